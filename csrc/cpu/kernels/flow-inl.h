// The sums of gradient flow (flow.cpp): sums of squares, in double because squares of small and large floats underflow
// and overflow, and the numbers of units that are off, or on, for every example.

// All rows of eight columns, or of `n` at the right edge.
template <typename T>
MBP_INLINE void layer_flow_columns(const LayerFlow<T>& p, int64_t column, int n, FlowSums& sums) {
  using A = accumulator_t<T>;
  constexpr int L = 8;
  double f2[L] = {}, h2[L] = {}, df2[L] = {};
  A off[L], on[L];  // 1 until a row contradicts it; NaN contradicts both
  for (int i = 0; i < L; ++i) off[i] = on[i] = A(1);
  for (int64_t row = 0; row < p.rows; ++row) {
    const T* f = p.f + row * p.cols + column;
    const T* df = p.df + row * p.cols + column;
    for (int i = 0; i < n; ++i) {
      const A x = widen(f[i]), h = p.relu ? relu_scalar(x) : x, dx = widen(df[i]);
      off[i] = x <= A(0) ? off[i] : A(0);
      on[i] = x > A(0) ? on[i] : A(0);
      f2[i] += double(x) * double(x);
      h2[i] += double(h) * double(h);
      df2[i] += double(dx) * double(dx);
    }
  }
  for (int i = 0; i < n; ++i) {
    sums.f += f2[i];
    sums.h += h2[i];
    sums.df += df2[i];
    sums.off += double(off[i]);
    sums.on += double(on[i]);
  }
}

template <typename T>
static FlowSums layer_flow(const LayerFlow<T>& p) {
  FlowSums sums{};
  int64_t j = 0;
  for (; j + 8 <= p.cols; j += 8) layer_flow_columns<T>(p, j, 8, sums);
  if (j < p.cols) layer_flow_columns<T>(p, j, int(p.cols - j), sums);
  return sums;
}

// Sum and sum of squares of x - y, or of x if y is nullptr; also copies x if `copy` is given.
template <typename T>
static Moments moments(const T* x, const T* y, T* copy, int64_t size) {
  constexpr int L = 16;
  double sum[L] = {}, square[L] = {};
  int64_t i = 0;
  for (; i + L <= size; i += L) {
    for (int j = 0; j < L; ++j) {
      const double d = y ? double(widen(x[i + j])) - double(widen(y[i + j])) : double(widen(x[i + j]));
      sum[j] += d;
      square[j] += d * d;
    }
    for (int j = 0; copy && j < L; ++j) copy[i + j] = x[i + j];
  }
  Moments m{};
  for (int j = 0; j < L; ++j) {
    m.sum += sum[j];
    m.square += square[j];
  }
  for (; i < size; ++i) {
    const double d = double(widen(x[i])) - (y ? double(widen(y[i])) : 0.0);
    m.sum += d;
    m.square += d * d;
    if (copy) copy[i] = x[i];
  }
  return m;
}
