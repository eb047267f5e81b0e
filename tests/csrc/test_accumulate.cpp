// Compares accumulate with double: it sums terms in the accumulator type and rounds once at the end.

#include "cuda_test.h"

#include "../../csrc/cuda/accumulate.cu"

namespace manualbp::cuda {

template <typename T>
void test(int64_t size, int terms) {
  begin_case("accumulate", kTypeName<T>, size, "terms", terms);
  Random random;
  Buffer<accumulator_t<T>> total(size);
  Buffer<T> out(size);
  std::vector<double> want(static_cast<size_t>(size), 0.0);
  for (int i = 0; i < terms; ++i) {
    Buffer<T> term(size);
    for (int64_t j = 0; j < size; ++j) {
      term.set(j, random.uniform());
      want[size_t(j)] += term.at(j);
    }
    accumulate<T>({size, term.data(), total.data(), i == 0, i + 1 == terms ? out.data() : nullptr}, nullptr);
  }
  for (int64_t j = 0; j < size; ++j) {
    expect("out", j, out.at(j), want[size_t(j)],
           std::fabs(want[size_t(j)]) * kRounding<T> + terms * terms * kSumRounding<T>);
  }
}

template <typename T>
void test_all(bool thorough) {
  for (const int64_t size : thorough ? Sizes{0, 1, 255, 257, 1000} : Sizes{257}) {
    for (const int terms : {1, 3}) test<T>(size, terms);
  }
}

// More elements than 32 bits can count; runs the block with the last one.
void test_large() {
  const int64_t size = (int64_t(1) << 32) + 100;
  begin_case("accumulate, 64-bit indices", size);
  Reserved<float16> term(size), out(size);
  Reserved<float> total(size);
  term.set(size - 1, 3);
  total.set(size - 1, 4);
  run_block((size - 1) / kAccumulateThreads % 2048, 0,
            [&] { accumulate<float16>({size, term.data(), total.data(), false, out.data()}, nullptr); });
  expect("total", size - 1, total.at(size - 1), 7);
  expect("out", size - 1, out.at(size - 1), 7);
}

}  // namespace manualbp::cuda

int main() {
  using namespace manualbp::cuda;
  using manualbp::bfloat16, manualbp::float16;
  return run_tests<float, double, float16, bfloat16>(
      [](auto zero, bool thorough) { test_all<decltype(zero)>(thorough); }, [] { test_large(); });
}
