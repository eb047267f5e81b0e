// Compares bias_relu with double: every type, odd shapes, every alignment, special values.

#include "cuda_test.h"

#include "../../csrc/cuda/bias_relu.cu"

namespace manualbp::cuda {

template <typename T>
void test(int64_t rows, int64_t cols, int64_t skip, int64_t bias_skip, bool with_bias) {
  begin_case("bias_relu", kTypeName<T>, rows, "x", cols, "skip", skip, bias_skip, with_bias ? "bias" : "no bias");
  Random random;
  Buffer<T> f(rows * cols, skip), bias(cols, bias_skip);
  for (int64_t i = 0; i < f.size(); ++i) f.set(i, random.uniform());
  for (int64_t j = 0; j < cols; ++j) bias.set(j, random.uniform());
  if (f.size() > 4) {
    f.set(0, NAN);
    f.set(1, -INFINITY);
    f.set(2, INFINITY);
    f.set(3, -bias.at(3 % cols));  // exactly zero
    f.set(4, -0.0);
  }
  const auto before = f.values();
  bias_relu<T>({rows, cols, f.data(), with_bias ? bias.data() : nullptr}, nullptr);
  for (int64_t i = 0; i < f.size(); ++i) {
    const double sum = before[size_t(i)] + (with_bias ? bias.at(i % cols) : 0.0);
    const double want = sum < 0 ? 0.0 : sum;
    expect("f", i, f.at(i), want, std::fabs(want) * (kRounding<T> + 2 * kSumRounding<T>));
  }
}

template <typename T>
void test_all(bool thorough) {
  for (const int64_t cols : thorough ? Sizes{1, 2, 3, 7, 8, 16, 33, 64, 100} : Sizes{3, 16}) {
    for (const int64_t rows : thorough ? Sizes{0, 1, 5, 37} : Sizes{37}) {
      for (const bool with_bias : {true, false}) test<T>(rows, cols, 0, 0, with_bias);
    }
    for (int64_t skip = 1; skip < kVectorWidth<T>; ++skip) test<T>(5, cols, skip, 0, true);
    test<T>(6, cols, 0, 1, true);
  }
  test<T>(3, 0, 0, 0, true);
}

// More elements than 32 bits can count; runs the blocks with the last full vector and the remaining numbers.
void test_large() {
  using T = float16;
  const int64_t cols = 61, rows = (int64_t(1) << 32) / cols + 1000, size = rows * cols;
  begin_case("bias_relu, 64-bit indices", rows, "x", cols);
  Reserved<T> f(size);
  Buffer<T> bias(cols);
  for (int64_t j = 0; j < cols; ++j) bias.set(j, double(j % 8 - 3));
  for (int64_t i = size - 16; i < size; ++i) f.set(i, 1);
  const int64_t last_vector = size / kVectorWidth<T> - 1, block = last_vector / kBiasReluThreads % 2048;
  const auto launch = [&] { bias_relu<T>({rows, cols, f.data(), bias.data()}, nullptr); };
  run_block(block, 0, launch);
  run_block(0, 0, launch);
  for (int64_t i = last_vector * kVectorWidth<T>; i < size; ++i) {
    expect("f", i, f.at(i), std::max(1 + bias.at(i % cols), 0.0));
  }
}

}  // namespace manualbp::cuda

int main() {
  using namespace manualbp::cuda;
  using manualbp::bfloat16, manualbp::float16;
  return run_tests<float, double, float16, bfloat16>(
      [](auto zero, bool thorough) { test_all<decltype(zero)>(thorough); },
      [] {
        test<float>(2048 * 256 * 4 / 64 + 100, 64, 0, 0, true);  // more vectors than threads: each visits several
        test<float>((2048 * 256 * 4) / 33 + 100, 33, 3, 0, true);
        test_large();
      });
}
