// Losses and their gradients, row by row. They replace a block f of the network's output by df while it is in the
// cache. Values are summed in double, so that a batch of millions of rows loses no digit of the float result.

// Sums along a row are kept in kSums interleaved parts, so that the loops over them vectorise.
constexpr int kSums = 16;

// Calls f(j, s) for each column j, with s = j mod kSums.
template <typename F>
MBP_INLINE void for_columns(int64_t cols, const F& f) {
  int64_t j = 0;
  for (; j + kSums <= cols; j += kSums) {
    for (int s = 0; s < kSums; ++s) f(j + s, s);
  }
  for (; j < cols; ++j) f(j, int(j % kSums));
}
template <typename Number>
MBP_INLINE Number total_of(const Number (&sums)[kSums]) {
  Number total = sums[0];
  for (int s = 1; s < kSums; ++s) total += sums[s];
  return total;
}

// e^x for x <= 0, to 1 unit in the last place. With x = n ln 2 + r, |r| <= ln 2 / 2: e^r is its Taylor series up to r^7
// (the rest is below 2^-27), multiplied by 2^n in two steps, since 2^n alone may underflow. NaN stays NaN.
MBP_INLINE float exp_of(float x) {
  constexpr float kRound = 12582912.0f;         // 1.5 * 2^23: adding it leaves the integer part in the low bits
  const float clamped = x < -104.0f ? -104.0f : x;  // e^-104 is 0 in float
  const float shifted = clamped * 1.44269504f + kRound, n = shifted - kRound;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t exponent = int32_t(float_to_bits(shifted)) - int32_t(float_to_bits(kRound)), half = exponent >> 1;
  return p * bits_to_float(uint32_t(half + 127) << 23) * bits_to_float(uint32_t(exponent - half + 127) << 23);
}
MBP_INLINE double exp_of(double x) { return __builtin_exp(x); }

// log(1 + e) for 0 <= e <= 1: 2 artanh z = 2 (z + z^3/3 + z^5/5 + ...) with z = e / (2 + e) <= 1/3.
MBP_INLINE float log1p_of(float e) {
  const float z = e / (2.0f + e), w = z * z;
  float p = 1.0f / 15;
  p = p * w + 1.0f / 13;
  p = p * w + 1.0f / 11;
  p = p * w + 1.0f / 9;
  p = p * w + 1.0f / 7;
  p = p * w + 1.0f / 5;
  p = p * w + 1.0f / 3;
  return 2.0f * (z + z * w * p);
}
MBP_INLINE double log1p_of(double e) { return __builtin_log1p(e); }
MBP_INLINE float log_of(float v) { return __builtin_logf(v); }
MBP_INLINE double log_of(double v) { return __builtin_log(v); }

// ell = sum (f - y)^2;   df = 2 (f - y) scale
template <typename T, typename Y>
MBP_INLINE double mse_row(T* f, const Y* y, int64_t y_col, int64_t cols, accumulator_t<T> scale, bool gradient) {
  using A = accumulator_t<T>;
  double sums[kSums] = {};
  for_columns(cols, [&](int64_t j, int s) __attribute__((always_inline)) {
    const A difference = widen(f[j]) - widen(y[j * y_col]);
    sums[s] += double(difference) * double(difference);
    if (gradient) f[j] = narrow<T>(A(2) * difference * scale);
  });
  return total_of(sums);
}

// ell = sum (1 - y) f - min(f, 0) + log(1 + exp(-|f|));   df = (sigmoid(f) - y) scale
template <typename T, typename Y>
MBP_INLINE double bce_row(T* f, const Y* target, int64_t target_col, int64_t cols, accumulator_t<T> scale,
                          bool gradient) {
  using A = accumulator_t<T>;
  double sums[kSums] = {};
  for_columns(cols, [&](int64_t j, int s) __attribute__((always_inline)) {
    const A x = widen(f[j]), y = widen(target[j * target_col]);
    const A e = exp_of(x < A(0) ? x : -x);  // exp(-|x|): never overflows; NaN stays NaN
    sums[s] += double((A(1) - y) * x - (x < A(0) ? x : A(0)) + log1p_of(e));
    if (gradient) f[j] = narrow<T>(((x < A(0) ? e : A(1)) / (A(1) + e) - y) * scale);
  });
  return total_of(sums);
}

// A loss of f against y, row by row. The usual cases pass constants, so that they vectorise.
template <typename T, typename Y, typename Row>
MBP_INLINE double rows_against_target(const Loss<T>& p, const Y* target, const Row& row) {
  const auto scale = accumulator_t<T>(p.scale);
  double sum = 0;
  for (int64_t i = 0; i < p.rows; ++i) {
    T* f = p.f + i * p.cols;
    const Y* y = target + i * p.target_row;
    if (p.target_col != 1) {
      sum += row(f, y, p.target_col, p.cols, scale, p.gradient);
    } else if (p.gradient) {
      sum += row(f, y, 1, p.cols, scale, true);
    } else {
      sum += row(f, y, 1, p.cols, scale, false);
    }
  }
  return sum;
}
// The same against the target in the type that it has.
template <typename T, typename Row>
MBP_INLINE double rows_against_target(const Loss<T>& p, const Row& row) {
  if constexpr (sizeof(T) < sizeof(accumulator_t<T>)) {
    if (p.wide_target) return rows_against_target(p, p.wide_target, row);
  }
  return rows_against_target(p, p.target, row);
}
template <typename T>
static double mse(const Loss<T>& p) {
  return rows_against_target(p, [](auto... a) __attribute__((always_inline)) { return mse_row<T>(a...); });
}
template <typename T>
static double bce_with_logits(const Loss<T>& p) {
  return rows_against_target(p, [](auto... a) __attribute__((always_inline)) { return bce_row<T>(a...); });
}

// f <- 0 softmax(f): NaN if f contains NaN or +Inf, or only -Inf; else 0.
template <typename T>
MBP_INLINE void nothing_of(T* f, int64_t cols) {
  using A = accumulator_t<T>;
  A nothing = A(0), largest = widen(f[0]);
  for (int64_t j = 0; j < cols; ++j) {
    const A x = widen(f[j]);
    nothing += (x < A(0) ? A(0) : x) * A(0);
    largest = x > largest ? x : largest;
  }
  nothing += largest * A(0);
  for (int64_t j = 0; j < cols; ++j) f[j] = narrow<T>(nothing);
}

// ell = sum over rows of -(1 - s) log p_c - s/D sum_j log p_j, with p = softmax(f), c the class and s the smoothing;
// df = (p - (1 - s) onehot(c) - s/D) scale. A row whose class is ignore_index adds nothing, and its df is 0 p, which is
// NaN where p is.
template <typename T>
static double cross_entropy(const Loss<T>& p) {
  using A = accumulator_t<T>;
  const A smoothing = A(p.label_smoothing), each = smoothing / A(p.cols), scale = A(p.scale);
  double sum = 0;
  for (int64_t i = 0; i < p.rows; ++i) {
    T* f = p.f + i * p.cols;
    const int64_t c = p.classes[i * p.target_row];
    if (c == p.ignore_index) {
      if (p.gradient) nothing_of<T>(f, p.cols);
      continue;
    }
    A maxima[kSums];
    for (int s = 0; s < kSums; ++s) maxima[s] = widen(f[0]);
    for_columns(p.cols, [&](int64_t j, int s) __attribute__((always_inline)) {
      const A x = widen(f[j]);
      maxima[s] = x > maxima[s] ? x : maxima[s];
    });
    A largest = maxima[0];
    for (int s = 1; s < kSums; ++s) largest = maxima[s] > largest ? maxima[s] : largest;
    A totals[kSums] = {}, shifts[kSums] = {};
    for_columns(p.cols, [&](int64_t j, int s) __attribute__((always_inline)) {
      const A x = widen(f[j]) - largest;  // a NaN makes the row NaN, through `total`
      shifts[s] += x;
      totals[s] += exp_of(x);
    });
    const A shifted = total_of(shifts), log_total = log_of(total_of(totals));
    double row = double((A(1) - smoothing) * (log_total - (widen(f[c]) - largest)));
    if (smoothing > A(0)) row += double(each * (A(p.cols) * log_total - shifted));
    sum += row;
    if (p.gradient) {
      const A at_class = widen(f[c]);
      for_columns(p.cols, [&](int64_t j, int) __attribute__((always_inline)) {
        f[j] = narrow<T>((exp_of(widen(f[j]) - largest - log_total) - each) * scale);
      });
      f[c] = narrow<T>((exp_of(at_class - largest - log_total) - each - (A(1) - smoothing)) * scale);
    }
  }
  return sum;
}

// No default: the compiler warns about a loss that is missing, and the trap stops what it let through.
template <typename T>
static LossKernel<T> loss(LossKind kind) {
  switch (kind) {
    case LossKind::mse:
      return mse<T>;
    case LossKind::bce_with_logits:
      return bce_with_logits<T>;
    case LossKind::cross_entropy:
      return cross_entropy<T>;
  }
  __builtin_trap();
}

template <typename T>
static void store_scalar(double value, T* out) {
  *out = narrow<T>(accumulator_t<T>(value));
}
