// The two cheap passes of the backward: ReLU mask with the bias gradient, and the fixed-order reduction.

// One row. Always inlined with constant arguments where they are known, so that the compiler vectorises it.
template <typename T>
MBP_INLINE void relu_backward_row(const T* grad, int64_t grad_col, const T* h, T* out, accumulator_t<T>* sum,
                                  int64_t cols) {
  using A = accumulator_t<T>;
  for (int64_t j = 0; j < cols; ++j) {
    const T g = grad[j * grad_col];
    const bool pass = h ? !(widen(h[j]) <= A(0)) : true;
    const A df = pass ? widen(g) : A(0);
    if (out) out[j] = narrow<T>(df);
    if (sum) sum[j] += df;
  }
}

// df = I[h > 0] . dh, and d(beta) = column sums of df, in one pass over memory.
template <typename T>
static void relu_backward(const ReluBackward<T>& p) {
  using A = accumulator_t<T>;
  if (p.column_sum && !p.accumulate) {
    for (int64_t j = 0; j < p.cols; ++j) p.column_sum[j] = A(0);
  }
  for (int64_t i = 0; i < p.rows; ++i) {
    const T* grad = p.grad + i * p.grad_row;
    const T* h = p.h ? p.h + i * p.h_row : nullptr;
    T* out = p.out ? p.out + i * p.cols : nullptr;
    if (p.grad_col == 1) {
      relu_backward_row<T>(grad, 1, h, out, p.column_sum, p.cols);
    } else {
      relu_backward_row<T>(grad, p.grad_col, h, out, p.column_sum, p.cols);
    }
  }
}

template <typename T>
static void reduce(const Reduce<T>& p, int64_t begin, int64_t end) {
  using A = accumulator_t<T>;
  // Short runs keep their sums in the first-level cache while the slices pass by.
  constexpr int64_t kRun = 512;
  A sum[kRun];
  for (int64_t i0 = begin; i0 < end; i0 += kRun) {
    const int64_t n = min_i64(kRun, end - i0);
    const A* first = p.partial + i0;
    for (int64_t i = 0; i < n; ++i) sum[i] = p.accumulate ? widen(p.out[i0 + i]) : A(0);
    for (int64_t s = 0; s < p.slices; ++s) {
      const A* slice = first + s * p.stride;
      for (int64_t i = 0; i < n; ++i) sum[i] += slice[i];
    }
    for (int64_t i = 0; i < n; ++i) p.out[i0 + i] = narrow<T>(sum[i]);
  }
}
