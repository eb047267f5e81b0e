// Compares relu_backward and reduce with double: every type, odd shapes, strides and alignments, special values.

#include "cuda_test.h"

#include "../../csrc/cuda/relu_backward.cu"

namespace manualbp::cuda {

struct Options {
  int64_t row_gap = 0;  // unused columns between the rows of grad
  int64_t skip = 0;
  bool expanded = false;  // grad has strides 0
  bool mask = true, out = true, sum = true, in_place = false, special = false;
  int64_t slices = 0;  // 0: as many as the launch code would choose
};

// With integers every sum is exact, so results must be equal bit for bit.
template <typename T>
void test(int64_t rows, int64_t cols, const Options& o = {}) {
  begin_case("relu_backward", kTypeName<T>, rows, "x", cols, "gap", o.row_gap, "skip", o.skip,
             o.expanded ? "expanded" : "", o.mask ? "" : "no mask", o.out ? "" : "no out", o.sum ? "" : "no sum",
             o.in_place ? "in place" : "", o.special ? "special" : "", "slices", o.slices);
  Random random;
  const int64_t grad_row = o.expanded ? 0 : cols + o.row_gap, grad_col = o.expanded ? 0 : 1;
  Buffer<T> grad(o.expanded ? 1 : std::max<int64_t>(rows * grad_row - o.row_gap, 0), o.skip);
  Buffer<T> h(rows * cols, o.skip), out(rows * cols), sum(cols);
  for (int64_t i = 0; i < grad.size(); ++i) grad.set(i, double(random.integer()));
  for (int64_t i = 0; i < h.size(); ++i) h.set(i, std::max<double>(double(random.integer()), 0));
  if (o.special && h.size() > 3) {
    h.set(0, NAN);      // passes
    h.set(1, -0.0);     // blocks any gradient
    grad.set(1, NAN);
    h.set(2, INFINITY);
    grad.set(2, INFINITY);
    h.set(3, 0.0);
    grad.set(3, -INFINITY);
  }
  const auto dh = grad.values(), activations = h.values();
  T* const target = o.in_place ? grad.data() : out.data();
  const int64_t slices = o.slices ? o.slices : relu_backward_slices<T>(rows, cols);
  Buffer<accumulator_t<T>> partial(slices > 1 ? slices * cols : 0);
  relu_backward<T>({rows, cols, grad.data(), grad_row, grad_col, o.mask ? h.data() : nullptr, o.out ? target : nullptr,
                    o.sum ? sum.data() : nullptr, slices, slices > 1 ? partial.data() : nullptr},
                   nullptr);
  std::vector<double> want_sum(size_t(cols), 0.0);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      const double g = dh[size_t(i * grad_row + j * grad_col)];
      const double want = o.mask && activations[size_t(i * cols + j)] <= 0 ? 0.0 : g;
      if (o.out) expect("df", i * cols + j, double(widen(target[i * cols + j])), want);
      want_sum[size_t(j)] += want;
    }
  }
  for (int64_t j = 0; o.sum && j < cols; ++j) expect("dbeta", j, sum.at(j), want_sum[size_t(j)]);
}

template <typename T>
void test_all(bool thorough) {
  for (const int64_t cols : thorough ? Sizes{1, 2, 3, 8, 33, 64, 100} : Sizes{1, 33}) {
    for (const int64_t rows : thorough ? Sizes{0, 1, 5, 37, 300} : Sizes{300}) test<T>(rows, cols);
  }
  for (const int64_t cols : thorough ? Sizes{7, 64} : Sizes{64}) {
    test<T>(50, cols, {0, 0, false, true, true, true, true});
    test<T>(50, cols, {0, 0, false, false, false, true});
    test<T>(50, cols, {0, 0, false, true, true, false});
    test<T>(50, cols, {0, 0, true});
    test<T>(50, cols, {3, 0});
    test<T>(50, cols, {8, 0});
    test<T>(50, cols, {0, 1});
    test<T>(50, cols, {0, 0, false, true, true, true, false, true});
    test<T>(50, cols, {0, 0, false, true, true, true, false, false, 7});
    test<T>(50, cols, {0, 0, false, true, true, true, false, false, 64});  // some slices have no rows
  }
  test<T>(9, 0);
}

// With real numbers, the error of a sum is measured against the sum of absolute values.
template <typename T>
void test_rounding(int64_t rows, int64_t cols) {
  begin_case("relu_backward, real numbers", kTypeName<T>, rows, "x", cols);
  Random random;
  Buffer<T> grad(rows * cols), h(rows * cols), sum(cols);
  for (int64_t i = 0; i < rows * cols; ++i) {
    grad.set(i, random.uniform());
    h.set(i, std::max(random.uniform(), 0.0));
  }
  const int64_t slices = relu_backward_slices<T>(rows, cols);
  Buffer<accumulator_t<T>> partial(slices * cols);
  relu_backward<T>({rows, cols, grad.data(), cols, 1, h.data(), nullptr, sum.data(), slices, partial.data()}, nullptr);
  for (int64_t j = 0; j < cols; ++j) {
    double want = 0, total = 0;
    for (int64_t i = 0; i < rows; ++i) {
      const double df = h.at(i * cols + j) <= 0 ? 0.0 : grad.at(i * cols + j);
      want += df;
      total += std::fabs(df);
    }
    expect("dbeta", j, sum.at(j), want, std::fabs(want) * kRounding<T> + total * 16 * kSumRounding<T>);
  }
}

// More elements than 32 bits can count; runs the block with the last rows, that is, the last slice.
void test_large(int64_t cols) {
  using T = float16;
  const int64_t rows = (int64_t(1) << 32) / cols + 100, size = rows * cols;
  begin_case("relu_backward, 64-bit indices", rows, "x", cols);
  Reserved<T> grad(size), h(size);
  Buffer<T> sum(cols);
  for (int64_t i = size - 3 * cols; i < size; ++i) {
    grad.set(i, 5);
    h.set(i, i >= size - cols ? 0 : 1);  // two rows pass
  }
  const int64_t slices = relu_backward_slices<T>(rows, cols);
  Reserved<float> partial(slices * cols);
  run_block(0, slices - 1, [&] {
    relu_backward<T>({rows, cols, grad.data(), cols, 1, h.data(), grad.data(), sum.data(), slices, partial.data()},
                     nullptr);
  });
  for (int64_t j = 0; j < cols; ++j) {
    expect("df", size - cols + j, grad.at(size - cols + j), 0);
    expect("df", size - 2 * cols + j, grad.at(size - 2 * cols + j), 5);
    expect("partial", (slices - 1) * cols + j, partial.at((slices - 1) * cols + j), 10);
  }
}

}  // namespace manualbp::cuda

int main() {
  using namespace manualbp::cuda;
  using manualbp::bfloat16, manualbp::float16;
  return run_tests<float, double, float16, bfloat16>(
      [](auto zero, bool thorough) { test_all<decltype(zero)>(thorough); },
      [] {
        test_rounding<float>(20000, 5);
        test_rounding<double>(3000, 12);
        test_rounding<float16>(3000, 16);
        test_rounding<bfloat16>(3000, 16);
        test_large(8);
        test_large(5);
      });
}
