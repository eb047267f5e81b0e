// The vector type of the kernels, and conversions between storage and accumulator types.
// Included once per instruction-set level, in its target region and namespace, so without an include guard.
// The vector extensions of GCC and clang make one source serve SSE2, AVX2, AVX-512 and NEON.

#define MBP_INLINE static inline __attribute__((always_inline))

MBP_INLINE int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }

// `type` is a full register, `unaligned` the same at any address, `doubles` this many numbers in double.
template <typename A>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(MBP_VECTOR_BYTES)));
  typedef float unaligned __attribute__((vector_size(MBP_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t mask __attribute__((vector_size(MBP_VECTOR_BYTES)));
  typedef double doubles __attribute__((vector_size(2 * MBP_VECTOR_BYTES), aligned(8), may_alias));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(MBP_VECTOR_BYTES)));
  typedef double unaligned __attribute__((vector_size(MBP_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t mask __attribute__((vector_size(MBP_VECTOR_BYTES)));
  typedef unaligned doubles;
};
template <typename A>
using vec = typename VecOf<A>::type;
template <typename A>
constexpr int kLanes = MBP_VECTOR_BYTES / int(sizeof(A));

template <typename A>
MBP_INLINE vec<A> load(const A* p) {
  return *reinterpret_cast<const typename VecOf<A>::unaligned*>(p);
}
template <typename A>
MBP_INLINE void store(A* p, vec<A> v) {
  *reinterpret_cast<typename VecOf<A>::unaligned*>(p) = v;
}
// relu(NaN) = NaN and relu(-0) = -0, as in torch.relu: only a number below 0 becomes 0.
template <typename A>
MBP_INLINE vec<A> relu(vec<A> v) {
  return v < A(0) ? vec<A>{} : v;
}
template <typename A>
MBP_INLINE A relu_scalar(A v) {
  return v < A(0) ? A(0) : v;
}

// a b + c, rounded once if the level has the instruction; else the product is rounded as well. Of vectors and of numbers
// alike: the last few numbers of a run get the same bits as if they were in a vector. (`c += a * b` of vectors, which
// the compiler turns into this, is left to it: it may not do so in a loop over numbers, nor below -O2.)
#if MBP_VECTOR_BYTES >= 32 || defined(__FP_FAST_FMAF)
MBP_INLINE float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
MBP_INLINE double multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
MBP_INLINE float multiply_add(float a, float b, float c) { return a * b + c; }
MBP_INLINE double multiply_add(double a, double b, double c) { return a * b + c; }
#endif
// Square roots are instructions too: a library function would set errno for numbers below 0. (The masks avoid a warning
// of GCC 12 about its own header.) MBP_MODEL: a level for tests, with vectors that the machine need not have.
#if MBP_VECTOR_BYTES == 64 && !defined(MBP_MODEL)
MBP_INLINE vec<float> multiply_add(vec<float> a, vec<float> b, vec<float> c) { return _mm512_fmadd_ps(a, b, c); }
MBP_INLINE vec<double> multiply_add(vec<double> a, vec<double> b, vec<double> c) { return _mm512_fmadd_pd(a, b, c); }
MBP_INLINE vec<float> square_root(vec<float> v) { return _mm512_maskz_sqrt_ps(__mmask16(-1), v); }
MBP_INLINE vec<double> square_root(vec<double> v) { return _mm512_maskz_sqrt_pd(__mmask8(-1), v); }
#elif MBP_VECTOR_BYTES == 32
MBP_INLINE vec<float> multiply_add(vec<float> a, vec<float> b, vec<float> c) { return _mm256_fmadd_ps(a, b, c); }
MBP_INLINE vec<double> multiply_add(vec<double> a, vec<double> b, vec<double> c) { return _mm256_fmadd_pd(a, b, c); }
MBP_INLINE vec<float> square_root(vec<float> v) { return _mm256_sqrt_ps(v); }
MBP_INLINE vec<double> square_root(vec<double> v) { return _mm256_sqrt_pd(v); }
#elif defined(__x86_64__) && !defined(MBP_MODEL)
MBP_INLINE vec<float> multiply_add(vec<float> a, vec<float> b, vec<float> c) { return a * b + c; }
MBP_INLINE vec<double> multiply_add(vec<double> a, vec<double> b, vec<double> c) { return a * b + c; }
MBP_INLINE vec<float> square_root(vec<float> v) { return _mm_sqrt_ps(v); }
MBP_INLINE vec<double> square_root(vec<double> v) { return _mm_sqrt_pd(v); }
#elif defined(__aarch64__) && !defined(MBP_MODEL)
MBP_INLINE vec<float> multiply_add(vec<float> a, vec<float> b, vec<float> c) { return vfmaq_f32(c, a, b); }
MBP_INLINE vec<double> multiply_add(vec<double> a, vec<double> b, vec<double> c) { return vfmaq_f64(c, a, b); }
MBP_INLINE vec<float> square_root(vec<float> v) { return vsqrtq_f32(v); }
MBP_INLINE vec<double> square_root(vec<double> v) { return vsqrtq_f64(v); }
#else
MBP_INLINE vec<float> multiply_add(vec<float> a, vec<float> b, vec<float> c) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<float>; ++i) a[i] = multiply_add(a[i], b[i], c[i]);
  return a;
}
MBP_INLINE vec<double> multiply_add(vec<double> a, vec<double> b, vec<double> c) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<double>; ++i) a[i] = multiply_add(a[i], b[i], c[i]);
  return a;
}
MBP_INLINE vec<float> square_root(vec<float> v) {
  for (int i = 0; i < kLanes<float>; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
}
MBP_INLINE vec<double> square_root(vec<double> v) {
  for (int i = 0; i < kLanes<double>; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
}
#endif
MBP_INLINE float square_root(float x) { return square_root(vec<float>{x})[0]; }
MBP_INLINE double square_root(double x) { return square_root(vec<double>{x})[0]; }

// A product that the compiler must not fuse with the addition that follows.
template <typename V>
MBP_INLINE V rounded(V product) {
#if defined(__x86_64__) && !defined(MBP_MODEL)
  asm("" : "+x"(product));
#elif defined(__aarch64__) && !defined(MBP_MODEL)
  asm("" : "+w"(product));
#else
  asm("" : "+m"(product));
#endif
  return product;
}

// Shuffles two registers of L lanes by constant indices; an index of L or more refers to the second.
#if defined(__clang__)
#define MBP_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MBP_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, typename VecOf<A>::mask{__VA_ARGS__})
#endif
// a0 b0 a1 b1 ... of the lower (upper) half of each 16 bytes, which is one instruction; across the whole register it is
// not.
template <typename A>
MBP_INLINE void interleave(vec<A> a, vec<A> b, vec<A>& low, vec<A>& high) {
  if constexpr (kLanes<A> == 16) {
    low = MBP_SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    high = MBP_SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  } else if constexpr (kLanes<A> == 8 && sizeof(A) == 4) {
    low = MBP_SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13);
    high = MBP_SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
  } else if constexpr (kLanes<A> == 8) {
    low = MBP_SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14);
    high = MBP_SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
  } else if constexpr (kLanes<A> == 4 && sizeof(A) == 4) {
    low = MBP_SHUFFLE(a, b, 0, 4, 1, 5);
    high = MBP_SHUFFLE(a, b, 2, 6, 3, 7);
  } else if constexpr (kLanes<A> == 4) {
    low = MBP_SHUFFLE(a, b, 0, 4, 2, 6);
    high = MBP_SHUFFLE(a, b, 1, 5, 3, 7);
  } else {
    low = MBP_SHUFFLE(a, b, 0, 2);
    high = MBP_SHUFFLE(a, b, 1, 3);
  }
}
// The lower halves of a and b, and the upper ones.
template <typename A>
MBP_INLINE void halves(vec<A> a, vec<A> b, vec<A>& low, vec<A>& high) {
  if constexpr (kLanes<A> == 16) {
    low = MBP_SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    high = MBP_SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  } else if constexpr (kLanes<A> == 8) {
    low = MBP_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
    high = MBP_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  } else if constexpr (kLanes<A> == 4) {
    low = MBP_SHUFFLE(a, b, 0, 1, 4, 5);
    high = MBP_SHUFFLE(a, b, 2, 3, 6, 7);
  }
}
// Of each half of a and b the lower quarter, and the upper one (64-byte registers).
template <typename A>
MBP_INLINE void quarters(vec<A> a, vec<A> b, vec<A>& low, vec<A>& high) {
  if constexpr (kLanes<A> == 16) {
    low = MBP_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    high = MBP_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  } else if constexpr (kLanes<A> == 8) {
    low = MBP_SHUFFLE(a, b, 0, 1, 4, 5, 8, 9, 12, 13);
    high = MBP_SHUFFLE(a, b, 2, 3, 6, 7, 10, 11, 14, 15);
  }
}
#undef MBP_SHUFFLE

// Transposes a square block of kLanes rows in registers: first within 16 bytes (G x G elements at a time), then by
// exchanging whole pieces of 16 bytes between registers.
template <typename A>
MBP_INLINE void transpose(vec<A> (&rows)[kLanes<A>]) {
  constexpr int L = kLanes<A>, G = 16 / int(sizeof(A)), Q = L / G;
  vec<A> next[L];
#pragma GCC unroll 2
  for (int round = 1; round < G; round *= 2) {
#pragma GCC unroll 16
    for (int g = 0; g < L; g += G) {
#pragma GCC unroll 2
      for (int i = 0; i < G / 2; ++i) {
        interleave<A>(rows[g + i], rows[g + i + G / 2], next[g + 2 * i], next[g + 2 * i + 1]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = next[i];
  }
  if constexpr (Q == 2) {
#pragma GCC unroll 4
    for (int j = 0; j < G; ++j) halves<A>(rows[j], rows[G + j], next[j], next[G + j]);
  } else if constexpr (Q == 4) {
#pragma GCC unroll 4
    for (int j = 0; j < G; ++j) {
      vec<A> low01, high01, low23, high23;
      halves<A>(rows[j], rows[G + j], low01, high01);
      halves<A>(rows[2 * G + j], rows[3 * G + j], low23, high23);
      quarters<A>(low01, low23, next[j], next[G + j]);
      quarters<A>(high01, high23, next[2 * G + j], next[3 * G + j]);
    }
  }
  if constexpr (Q > 1) {
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = next[i];
  }
}

// --- storage type -> accumulator type -------------------------------------------------------------
MBP_INLINE float bits_to_float(uint32_t bits) {
  float f;
  __builtin_memcpy(&f, &bits, sizeof f);
  return f;
}
MBP_INLINE uint32_t float_to_bits(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, sizeof bits);
  return bits;
}

MBP_INLINE double widen(double v) { return v; }
MBP_INLINE float widen(float v) { return v; }
MBP_INLINE float widen(bfloat16 v) { return bits_to_float(uint32_t(v.bits) << 16); }
MBP_INLINE float widen(float16 v) {
  // Shifting the 15 value bits up by 13 leaves the exponent 112 too small; multiplying by 2^112 corrects it and also
  // normalises subnormals. Inf and NaN (exponent all ones) get their exponent separately.
  const uint32_t sign = uint32_t(v.bits & 0x8000u) << 16;
  const uint32_t shifted = uint32_t(v.bits & 0x7fffu) << 13;
  const uint32_t finite = float_to_bits(bits_to_float(shifted) * bits_to_float(239u << 23));
  const uint32_t special = shifted | 0x7f800000u;
  return bits_to_float(sign | (shifted >= 0x0f800000u ? special : finite));
}

// --- accumulator type -> storage type, rounded to nearest even ------------------------------------
MBP_INLINE void narrow_to(double v, double& out) { out = v; }
MBP_INLINE void narrow_to(float v, float& out) { out = v; }
MBP_INLINE void narrow_to(float v, bfloat16& out) {
  const uint32_t bits = float_to_bits(v);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x0040u;
  out.bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}
MBP_INLINE void narrow_to(float v, float16& out) {
  const uint32_t bits = float_to_bits(v);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal result: rebias the exponent by 127 - 15 = 112 and round the 13 dropped bits to nearest even.
  const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal result: adding 0.5 aligns the last kept bit with the float's last bit; the FPU does the rounding.
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t infinite = magnitude > 0x7f800000u ? 0x7e00u | (magnitude >> 13 & 0x1ffu) : 0x7c00u;
  const uint32_t value = magnitude >= 0x477ff000u ? infinite : magnitude < 0x38800000u ? subnormal : normal;
  out.bits = uint16_t(sign | value);
}
template <typename T>
MBP_INLINE T narrow(accumulator_t<T> v) {
  T out;
  narrow_to(v, out);
  return out;
}

// --- runs of n numbers ------------------------------------------------------------------------------
// Loops that the compiler vectorises. float16 uses conversion instructions (F16C, NEON), several numbers at a time:
// without them, a step of 32-64-64-64-64-16 in float16 spent 60 % of its time in conversions. So does bfloat16, whose
// rounding compilers turn into branches in short runs.
template <typename T>
constexpr int kConverted = 0;  // numbers that `convert` takes at once
#if MBP_VECTOR_BYTES >= 32
template <>
constexpr int kConverted<float16> = 8;
MBP_INLINE void convert(const float16* in, float* out) {
  _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in))));
}
MBP_INLINE void convert(const float* in, float16* out) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(_mm256_loadu_ps(in), _MM_FROUND_TO_NEAREST_INT));
}
template <>
constexpr int kConverted<bfloat16> = 8;
MBP_INLINE void convert(const bfloat16* in, float* out) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
  _mm256_storeu_ps(out, _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
}
MBP_INLINE void convert(const float* in, bfloat16* out) {  // as `narrow_to`
  const __m256 v = _mm256_loadu_ps(in);
  const __m256i bits = _mm256_castps_si256(v), high = _mm256_srli_epi32(bits, 16);
  const __m256i half = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), _mm256_and_si256(high, _mm256_set1_epi32(1)));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  const __m256i quiet_nan = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i value = _mm256_blendv_epi8(rounded, quiet_nan, is_nan);
  const __m128i low = _mm256_castsi256_si128(value), upper = _mm256_extracti128_si256(value, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_packus_epi32(low, upper));
}
#elif defined(__aarch64__)
template <>
constexpr int kConverted<float16> = 4;
MBP_INLINE void convert(const float16* in, float* out) {
  vst1q_f32(out, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&in->bits))));
}
MBP_INLINE void convert(const float* in, float16* out) {
  vst1_u16(&out->bits, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(in))));
}
#endif

template <typename T>
MBP_INLINE void widen_run(const T* in, accumulator_t<T>* out, int64_t n) {
  int64_t j = 0;
  if constexpr (kConverted<T> > 0) {
    for (; j + kConverted<T> <= n; j += kConverted<T>) convert(in + j, out + j);
  }
  for (; j < n; ++j) out[j] = widen(in[j]);
}
template <typename T>
MBP_INLINE void narrow_run(const accumulator_t<T>* in, T* out, int64_t n) {
  int64_t j = 0;
  if constexpr (kConverted<T> > 0) {
    for (; j + kConverted<T> <= n; j += kConverted<T>) convert(in + j, out + j);
  }
  for (; j < n; ++j) out[j] = narrow<T>(in[j]);
}
// n < 2 W numbers without a loop: as two overlapping runs of W each, or of W / 2, and so on.
template <int W, typename T>
MBP_INLINE void widen_short(const T* in, accumulator_t<T>* out, int64_t n) {
  if (n >= W) {
    widen_run(in, out, W);
    widen_run(in + n - W, out + n - W, W);
  } else if constexpr (W > 1) {
    widen_short<W / 2>(in, out, n);
  }
}
