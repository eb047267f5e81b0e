// The two cheap passes of the backward: ReLU mask with the bias gradient, and the fixed-order reduction.

// One row. Always inlined with constant arguments where they are known, so that the compiler vectorises it.
template <typename T>
MBP_INLINE void relu_backward_row(const T* grad, int64_t grad_col, const T* h, T* out, accumulator_t<T>* sum,
                                  int64_t cols) {
  using A = accumulator_t<T>;
  int64_t j = 0;
  if constexpr (kConverted<T> > 0) {
    constexpr int L = kConverted<T>;
    for (; grad_col == 1 && j + L <= cols; j += L) {
      A df[L], mask[L];
      convert(grad + j, df);
      if (h) {
        convert(h + j, mask);
        for (int i = 0; i < L; ++i) df[i] = mask[i] <= A(0) ? A(0) : df[i];
      }
      if (out) convert(df, out + j);
      for (int i = 0; sum && i < L; ++i) sum[j + i] += df[i];
    }
  }
  for (; j < cols; ++j) {
    const T g = grad[j * grad_col];
    const bool pass = h ? !(widen(h[j]) <= A(0)) : true;
    const A df = pass ? widen(g) : A(0);
    if (out) out[j] = narrow<T>(df);
    if (sum) sum[j] += df;
  }
}

// df = I[h > 0] . dh, and d(beta) = column sums of df, in one pass over memory.
//
// Narrow rows are taken several at a time, as one wide row with a sum for each of its elements (else a vector would be
// mostly empty, and each sum would wait for the one before); every kChunk rows the wide sums are folded. Blocks of rows
// begin at multiples of kChunk, so that the order of summation does not depend on how the rows are cut.
template <typename T>
static void relu_backward(const ReluBackward<T>& p) {
  using A = accumulator_t<T>;
  constexpr int64_t kChunk = 128, kWide = 64;
  if (p.column_sum && !p.accumulate) {
    for (int64_t j = 0; j < p.cols; ++j) p.column_sum[j] = A(0);
  }
  const int64_t group = p.cols > 0 && p.cols < kWide ? kWide / p.cols : 1;
  const bool wide_rows = p.grad_col == 1 && p.grad_row == p.cols && (!p.h || p.h_row == p.cols);
  A wide[kWide];
  for (int64_t i = 0; i < p.rows;) {
    const int64_t stop = group == 1 ? p.rows : min_i64(i + kChunk, p.rows);
    A* const sums = group == 1 || !p.column_sum ? p.column_sum : wide;
    if (sums == wide) {
      for (int64_t j = 0; j < kWide; ++j) wide[j] = A(0);
    }
    for (int64_t row = 0; i < stop; row = (row + 1) % group) {
      const T* grad = p.grad + i * p.grad_row;
      const T* h = p.h ? p.h + i * p.h_row : nullptr;
      T* out = p.out ? p.out + i * p.cols : nullptr;
      A* const sum = sums ? sums + row * p.cols : nullptr;
      if (group > 1 && wide_rows && i + group <= stop) {
        relu_backward_row<T>(grad, 1, h, out, sum, group * p.cols);
        i += group;
        row = group - 1;  // the next one starts a wide row again
      } else {
        relu_backward_row<T>(grad, p.grad_col == 1 ? 1 : p.grad_col, h, out, sum, p.cols);
        ++i;
      }
    }
    if (sums == wide) {
      for (int64_t row = 0; row < group; ++row) {
        for (int64_t j = 0; j < p.cols; ++j) p.column_sum[j] += wide[row * p.cols + j];
      }
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
