// Losses and their gradients, row by row: what turns the output block f of a network into df while it is in cache.
// Values are summed in double: a batch of millions of rows loses no digit of the float result.

// ell = sum (f - y)^2;   df = 2 (f - y) scale
// One row, summed in kSums interleaved parts, which keeps the adder busy.
template <typename T>
MBP_INLINE double mse_row(T* f, const T* y, int64_t y_col, int64_t cols, accumulator_t<T> scale, bool gradient) {
  using A = accumulator_t<T>;
  constexpr int kSums = 16;
  double sums[kSums] = {};
  int64_t j = 0;
  for (; j + kSums <= cols; j += kSums) {
    for (int s = 0; s < kSums; ++s) {
      const A difference = widen(f[j + s]) - widen(y[(j + s) * y_col]);
      sums[s] += double(difference) * double(difference);
      if (gradient) f[j + s] = narrow<T>(A(2) * difference * scale);
    }
  }
  for (; j < cols; ++j) {
    const A difference = widen(f[j]) - widen(y[j * y_col]);
    sums[j % kSums] += double(difference) * double(difference);
    if (gradient) f[j] = narrow<T>(A(2) * difference * scale);
  }
  double sum = 0;
  for (int s = 0; s < kSums; ++s) sum += sums[s];
  return sum;
}

template <typename T>
static double mse(const Loss<T>& p) {
  const auto scale = accumulator_t<T>(p.scale);
  double sum = 0;
  for (int64_t i = 0; i < p.rows; ++i) {
    T* f = p.f + i * p.cols;
    const T* y = p.target + i * p.target_row;
    if (p.target_col != 1) {
      sum += mse_row<T>(f, y, p.target_col, p.cols, scale, p.gradient);
    } else if (p.gradient) {
      sum += mse_row<T>(f, y, 1, p.cols, scale, true);
    } else {
      sum += mse_row<T>(f, y, 1, p.cols, scale, false);
    }
  }
  return sum;
}

MBP_INLINE float exp_of(float v) { return __builtin_expf(v); }
MBP_INLINE double exp_of(double v) { return __builtin_exp(v); }
MBP_INLINE float log_of(float v) { return __builtin_logf(v); }
MBP_INLINE double log_of(double v) { return __builtin_log(v); }
MBP_INLINE float log1p_of(float v) { return __builtin_log1pf(v); }
MBP_INLINE double log1p_of(double v) { return __builtin_log1p(v); }

// ell = sum (1 - y) f - min(f, 0) + log(1 + exp(-|f|));   df = (sigmoid(f) - y) scale
template <typename T>
static double bce_with_logits(const Loss<T>& p) {
  using A = accumulator_t<T>;
  double sum = 0;
  for (int64_t i = 0; i < p.rows; ++i) {
    T* f = p.f + i * p.cols;
    const T* target = p.target + i * p.target_row;
    double row = 0;
    for (int64_t j = 0; j < p.cols; ++j) {
      const A x = widen(f[j]), y = widen(target[j * p.target_col]);
      const A e = exp_of(x < A(0) ? x : -x);  // exp(-|x|): never overflows; NaN stays NaN
      row += double((A(1) - y) * x - (x < A(0) ? x : A(0)) + log1p_of(e));
      if (p.gradient) {
        const A sigmoid = (x < A(0) ? e : A(1)) / (A(1) + e);
        f[j] = narrow<T>((sigmoid - y) * A(p.scale));
      }
    }
    sum += row;
  }
  return sum;
}

// ell = sum over rows of -(1 - s) log p_c - s/D sum_j log p_j, with p = softmax(f), c the class and s the smoothing;
// df = (p - (1 - s) onehot(c) - s/D) scale. Rows whose class is ignore_index count for nothing.
template <typename T>
static double cross_entropy(const Loss<T>& p) {
  using A = accumulator_t<T>;
  const A smoothing = A(p.label_smoothing), each = smoothing / A(p.cols);
  double sum = 0;
  for (int64_t i = 0; i < p.rows; ++i) {
    T* f = p.f + i * p.cols;
    const int64_t c = p.classes[i * p.target_row];
    if (c == p.ignore_index) {
      for (int64_t j = 0; p.gradient && j < p.cols; ++j) f[j] = narrow<T>(A(0));
      continue;
    }
    A largest = widen(f[0]);
    for (int64_t j = 1; j < p.cols; ++j) {
      const A x = widen(f[j]);
      if (x > largest || x != x) largest = x;  // a NaN makes the row NaN
    }
    A total = A(0), shifted = A(0);
    for (int64_t j = 0; j < p.cols; ++j) {
      const A x = widen(f[j]) - largest;
      shifted += x;
      total += exp_of(x);
    }
    const A log_total = log_of(total);
    double row = double((A(1) - smoothing) * (log_total - (widen(f[c]) - largest)));
    if (smoothing > A(0)) row += double(each * (A(p.cols) * log_total - shifted));
    sum += row;
    if (p.gradient) {
      const A scale = A(p.scale);
      for (int64_t j = 0; j < p.cols; ++j) {
        A df = exp_of(widen(f[j]) - largest - log_total) - each;
        if (j == c) df -= A(1) - smoothing;
        f[j] = narrow<T>(df * scale);
      }
    }
  }
  return sum;
}

template <typename T>
static void store_scalar(double value, T* out) {
  *out = narrow<T>(accumulator_t<T>(value));
}
