// C = A B of bfloat16 numbers that are not widened: the specialisations of gemm-inl.h for levels with vdpbf16ps, which
// multiplies pairs of them and adds both products to the float in their lane. `gemm`, which rounds C, is that of
// gemm-inl.h; so are the register tile, the blocks, and the parts that a sum is made in.
//
//   panel of B   out[kk][column] = (B[2 kk][column], B[2 kk + 1][column]) in one lane: half the bytes of floats
//   rows of A    a lane (A[i][2 kk], A[i][2 kk + 1]) lies in memory as it is, and is broadcast from there
//   columns of A (weight gradient: pairs of rows of the batch) are packed, out[kk][i]
//
// The last pair of an odd depth is filled up with zeros in both A and B: with a 0 in one of them only, an Inf or NaN in
// the other would make the sum NaN. Parts, units and blocks of the depth are even, so that no pair is split.
//
// A register tile with pairs ran at 510 to 538 GFLOP/s where FMA reached 266 to 274 (one core of Zen 5, depth 64 to 512,
// operands in the cache). Nothing else here has been measured.
static_assert(MBP_VECTOR_BYTES == 64 && kTileRows == 12, "vectors and tiles of AVX-512");
static_assert(kSumDepth % 2 == 0 && kSumRows % 2 == 0 && kUnitRows % 2 == 0, "a pair is in one part and in one unit");
static_assert(kBlockDepth % 2 == 0 && kFewRowsDepth % 2 == 0, "a pair is in one block");

// N pairs, the number of the smaller k in the lower half of each; `unaligned`: at any address, as bfloat16 numbers are.
template <int N>
struct Pairs {
  typedef uint32_t type __attribute__((vector_size(4 * N)));
  typedef uint32_t unaligned __attribute__((vector_size(4 * N), aligned(2), may_alias));
  typedef uint16_t halves __attribute__((vector_size(2 * N), aligned(2), may_alias));
};
using pairs = Pairs<kLanes<float>>::type;
typedef uint32_t pair_in_memory __attribute__((may_alias));

template <int N = kLanes<float>>
MBP_INLINE typename Pairs<N>::type load_pairs(const void* p) {
  return *static_cast<const typename Pairs<N>::unaligned*>(p);
}
template <int N = kLanes<float>>
MBP_INLINE void store_pairs(void* p, typename Pairs<N>::type v) {
  *static_cast<typename Pairs<N>::unaligned*>(p) = v;
}
MBP_INLINE uint32_t load_pair(const bfloat16* p) {
  uint32_t pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return pair;
}
// (first, second), or (first, 0).
MBP_INLINE uint32_t pair_of(const bfloat16* first, const bfloat16* second) {
  return uint32_t(first->bits) | (second ? uint32_t(second->bits) << 16 : 0);
}
// The same of N numbers each.
template <int N>
MBP_INLINE typename Pairs<N>::type load_singles(const bfloat16* p) {
  return __builtin_convertvector(*reinterpret_cast<const typename Pairs<N>::halves*>(p), typename Pairs<N>::type);
}
template <int N>
MBP_INLINE typename Pairs<N>::type pairs_of(const bfloat16* first, const bfloat16* second) {
  return second ? load_singles<N>(first) | load_singles<N>(second) << 16 : load_singles<N>(first);
}

// sum + a b, of pairs. Intel documents the operation of each lane as two fused multiply-adds, first of the upper halves
// and then of the lower ones, each rounded to nearest even, with denormal inputs taken as 0 and denormal results flushed
// to 0, whatever MXCSR says. Nothing here depends on that order, nor on the flush, but only on this: the result is a
// function of the numbers in its lane.
#ifndef MBP_MODEL
MBP_INLINE vec<float> dot_pairs(vec<float> sum, pairs a, pairs b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
#else
// A model of it, for machines without the instruction. (A result is flushed here if it is denormal once it has been
// rounded to the multiples of 2^-149. Hardware may round as if there were no smallest exponent; this concerns only sums
// within half a multiple of 2^-126.)
MBP_INLINE vec<float> flushed(vec<float> x) {
  const pairs bits = (pairs)x, is_normal = (pairs)((bits & 0x7f800000u) != 0);
  return (vec<float>)(bits & (is_normal | 0x80000000u));
}
static __attribute__((noinline)) void dot_pairs_by_model(float* sums, const uint32_t* as, const uint32_t* bs) {
  const pairs a = load_pairs(as), b = load_pairs(bs);
  vec<float> sum = flushed(load<float>(sums));
  sum = flushed(multiply_add(flushed((vec<float>)(a & 0xffff0000u)), flushed((vec<float>)(b & 0xffff0000u)), sum));
  sum = flushed(multiply_add(flushed((vec<float>)(a << 16)), flushed((vec<float>)(b << 16)), sum));
  store<float>(sums, sum);
}
MBP_INLINE vec<float> dot_pairs(vec<float> sum, pairs a, pairs b) {
  float sums[kLanes<float>];
  uint32_t as[kLanes<float>], bs[kLanes<float>];
  store<float>(sums, sum);
  store_pairs(as, a);
  store_pairs(bs, b);
  dot_pairs_by_model(sums, as, bs);
  return load<float>(sums);
}
#endif

// One register tile. B: a packed panel.
struct PairTile {
  int64_t k;  // terms, not pairs
  const bfloat16* a;  // kRowsOfA: rows; else packed columns, kTileRows pairs for each two terms
  int64_t a_stride;  // kRowsOfA: between rows
  const float* b;
  float* c;
  int64_t c_stride;
  bool accumulate;  // as in Tile, and so are the following
  int64_t unit;
  const float* bias;
  bool relu;
};

// acc += A B for one pair of k. kSingle: of the last term of an odd depth, beside which a row of A has no other.
template <int MR, int NV, bool kRowsOfA, bool kSingle, int kGroups>
MBP_INLINE void add_pair(vec<float> (&acc)[MR][NV], const bfloat16* const (&p)[kGroups], int64_t s, const float* b) {
  pairs bv[NV];
#pragma GCC unroll 2
  for (int j = 0; j < NV; ++j) bv[j] = load_pairs(b + j * kLanes<float>);
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    const bfloat16* const a = kRowsOfA ? p[i / 3 % kGroups] + (i % 3) * s : p[0] + 2 * i;
    const pairs av = pairs{} + (kSingle ? pair_of(a, nullptr) : load_pair(a));
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) acc[i][j] = dot_pairs(acc[i][j], av, bv[j]);
  }
}

// The structure, and the order of parts and units, are those of `tile` in gemm-inl.h.
#if !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
template <int MR, int NV, bool kRowsOfA>
static void pair_tile(const PairTile& t) {
  constexpr int L = kLanes<float>;
  constexpr int kGroups = kRowsOfA ? (MR + 2) / 3 : 1;
  const int64_t s = t.a_stride;
  const bfloat16* p[kGroups];
#pragma GCC unroll 8
  for (int g = 0; g < kGroups; ++g) p[g] = t.a + 3 * g * s;
  const float* b = t.b;

  vec<float> acc[MR][NV];
  alignas(64) float sums[MR * NV * L];  // of the previous units
  alignas(64) float parts[kRowsOfA ? 1 : MR * NV * L];  // of the parts of this unit so far
  const float* before = t.accumulate ? t.c : nullptr;
  int64_t before_stride = t.c_stride, left_of_unit = 0;
  for (int64_t left = t.k;;) {
    const bool first = left_of_unit == 0;
    if (first) left_of_unit = min_i64(left, kRowsOfA ? kSumDepth : t.unit);
    const int64_t depth = kRowsOfA || left_of_unit <= kSumDepth ? left_of_unit : kSumRows;
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) acc[i][j] = vec<float>{};
    }
    // Packed columns hold the zero beside the last term of an odd depth, rows in place do not.
    for (int64_t count = kRowsOfA ? depth / 2 : ceil_div(depth, 2); count > 0; --count) {
      add_pair<MR, NV, kRowsOfA, false>(acc, p, s, b);
#pragma GCC unroll 8
      for (int g = 0; g < kGroups; ++g) p[g] += kRowsOfA ? 2 : 2 * kTileRows;
      b += kTileCols<float>;
    }
    if (kRowsOfA && depth % 2 != 0) add_pair<MR, NV, kRowsOfA, true>(acc, p, s, b);
    left -= depth;
    left_of_unit -= depth;
    if constexpr (!kRowsOfA) {
      if (!first) add_tile<float, MR, NV>(acc, parts, NV * L);
      if (left_of_unit > 0) {
        store_tile<float, MR, NV>(acc, parts, NV * L);
        continue;
      }
    }
    if (before) add_tile<float, MR, NV>(acc, before, before_stride);
    if (left == 0) break;
    before = sums;
    before_stride = NV * L;
    store_tile<float, MR, NV>(acc, sums, NV * L);
  }
  if (t.bias) {
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) {
      const vec<float> beta = load<float>(t.bias + j * L);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) acc[i][j] += beta;
    }
  }
  if (t.relu) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) acc[i][j] = relu<float>(acc[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {  // t.c is read anew for each store, as in `tile`
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) store<float>(t.c + i * t.c_stride + j * L, acc[i][j]);
  }
}
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif

template <int MR, bool kRowsOfA>
MBP_INLINE int pair_tile_columns(const PairTile& t, bool half_panel) {
  half_panel ? pair_tile<MR, 1, kRowsOfA>(t) : pair_tile<MR, 2, kRowsOfA>(t);
  return MR;
}
template <bool kRowsOfA>
MBP_INLINE int pair_tile_rows(const PairTile& t, int64_t rows, bool half_panel) {
  if (rows >= kTileRows) return pair_tile_columns<kTileRows, kRowsOfA>(t, half_panel);
  if (rows >= 8) return pair_tile_columns<8, kRowsOfA>(t, half_panel);
  if (rows >= 4) return pair_tile_columns<4, kRowsOfA>(t, half_panel);
  if (rows >= 2) return pair_tile_columns<2, kRowsOfA>(t, half_panel);
  return pair_tile_columns<1, kRowsOfA>(t, half_panel);
}

// out[i] = row i of `lanes` contiguous columns of pairs, for all rows of a square block; missing columns are zeros.
MBP_INLINE void transpose_pairs(const bfloat16* b, int64_t b_n, int64_t lanes, vec<float> (&block)[kLanes<float>]) {
#pragma GCC unroll 16
  for (int j = 0; j < kLanes<float>; ++j) block[j] = j < lanes ? vec<float>(load_pairs(b + j * b_n)) : vec<float>{};
  transpose<float>(block);
}
// n < 2 W numbers, copied as in widen_short.
template <int W>
MBP_INLINE void copy_short(const bfloat16* in, bfloat16* out, int64_t n) {
  if (n >= W) {
    __builtin_memcpy(out, in, W * sizeof *in);
    __builtin_memcpy(out + n - W, in + n - W, W * sizeof *in);
  } else if constexpr (W > 1) {
    copy_short<W / 2>(in, out, n);
  }
}
// Packs `lanes` contiguous columns of k numbers, in blocks of kLanes rows of pairs. The last block is aligned to end at
// the last whole pair, and may overlap the previous one.
MBP_INLINE void pack_pairs_transposed(const bfloat16* b, int64_t b_n, int64_t k, int64_t lanes, float* out) {
  constexpr int L = kLanes<float>, NR = kTileCols<float>;
  vec<float> block[L];
  if (k < 2 * L) {  // copied to where whole blocks can be loaded, and where zeros follow
    bfloat16 columns[L * 2 * L] = {};
    for (int64_t j = 0; j < lanes; ++j) copy_short<L>(b + j * b_n, columns + j * 2 * L, k);
    transpose_pairs(columns, 2 * L, lanes, block);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      if (2 * i < k) store<float>(out + i * NR, block[i]);
    }
    return;
  }
  for (int64_t left = k / 2;;) {
    transpose_pairs(b, b_n, lanes, block);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) store<float>(out + i * NR, block[i]);
    const int64_t step = min_i64(left -= L, L);
    if (left <= 0) break;
    b += 2 * step;
    out += step * NR;
  }
  if (k % 2 == 0) return;
  auto* const last = reinterpret_cast<pair_in_memory*>(out + L * NR);
  for (int64_t j = 0; j < L; ++j) last[j] = j < lanes ? pair_of(b + 2 * L + j * b_n, nullptr) : 0;
}
static __attribute__((noinline)) void pack_pairs_edge(const bfloat16* b, int64_t b_n, int64_t k, int64_t lanes,
                                                      float* out) {
  pack_pairs_transposed(b, b_n, k, lanes, out);
}

// kLanes columns of two rows of B, or of one if `second` is false, of which `lanes` exist.
MBP_INLINE void pack_pairs_of_rows(const bfloat16* b, int64_t b_k, int64_t b_n, bool second, int64_t lanes,
                                   float* out) {
  constexpr int L = kLanes<float>;
  if (b_n == 1 && lanes >= L) return store_pairs(out, pairs_of<L>(b, second ? b + b_k : nullptr));
  auto* const o = reinterpret_cast<pair_in_memory*>(out);
  for (int64_t j = 0; j < L; ++j, b += b_n) o[j] = j < lanes ? pair_of(b, second ? b + b_k : nullptr) : 0;
}

template <>
void pack_b<bfloat16>(const bfloat16* b, int64_t b_k, int64_t b_n, int64_t k, int64_t n, float* out) {
  constexpr int L = kLanes<float>, NR = kTileCols<float>;
  const int64_t depth = ceil_div(k, 2);
  constexpr int64_t kGroup = 4;  // panels that are packed at once, as in gemm-inl.h
  for (int64_t n0 = 0, panels; n0 < n; n0 += panels * NR, out += panels * depth * NR) {
    const bfloat16* const panel = b + n0 * b_n;
    panels = b_n == 1 ? min_i64(ceil_div(n - n0, NR), kGroup) : 1;
    if (b_k == 1 && b_n != 1) {  // columns of B are contiguous (a weight)
      for (int64_t half = 0; half < NR; half += L) {
        const int64_t lanes = n - n0 - half;
        const bfloat16* const columns = panel + half * b_n;
        lanes >= L ? pack_pairs_transposed(columns, b_n, k, L, out + half)
                   : pack_pairs_edge(columns, b_n, k, lanes, out + half);
      }
      continue;
    }
    for (int64_t kk = 0; kk < depth; ++kk) {
      for (int64_t j = 0; j < panels * NR; j += L) {
        pack_pairs_of_rows(panel + 2 * kk * b_k + j * b_n, b_k, b_n, 2 * kk + 1 < k, n - n0 - j,
                           out + (j / NR * depth + kk) * NR + j % NR);
      }
    }
  }
}

// A strip of A, row after row, `stride` apart.
static void copy_pair_rows(const bfloat16* a, int64_t a_m, int64_t a_k, int64_t rows, int64_t k, bfloat16* out,
                           int64_t stride) {
  for (int64_t i = 0; i < rows; ++i, a += a_m, out += stride) {
    if (a_k == 1) {
      __builtin_memcpy(out, a, size_t(k) * sizeof *a);
    } else {
      for (int64_t kk = 0; kk < k; ++kk) out[kk] = a[kk * a_k];
    }
  }
}
// The same of columns (a transposed gradient): out[kk][i] = (A[i][2 kk], A[i][2 kk + 1]).
static void pack_pair_columns(const bfloat16* a, int64_t a_m, int64_t a_k, int64_t rows, int64_t k, float* out) {
  for (int64_t kk = 0; kk < k; kk += 2, a += 2 * a_k, out += kTileRows) {
    const bfloat16* const second = kk + 1 < k ? a + a_k : nullptr;
    if (rows == kTileRows && a_m == 1) {
      store_pairs<8>(out, pairs_of<8>(a, second));
      store_pairs<4>(out + 8, pairs_of<4>(a + 8, second ? second + 8 : nullptr));
    } else {
      auto* const o = reinterpret_cast<pair_in_memory*>(out);
      for (int64_t i = 0; i < rows; ++i) o[i] = pair_of(a + i * a_m, second ? second + i * a_m : nullptr);
    }
  }
}

// C in float.
template <>
void gemm_accumulated<bfloat16>(const Gemm<bfloat16, float>& p, void* workspace) {
  constexpr int64_t NR = kTileCols<float>;
  // A single number over rows of a batch is summed in double. (Over features it takes a tile, whose order of additions
  // only the instruction has: a row alone must have the bits that it has in a batch.)
  if (p.m == 1 && p.n == 1 && p.unit_rows && !p.packed_b) return gemm_number<bfloat16>(p);
  const bool few_rows = p.m <= kFewRows && !p.packed_b;
  const int64_t block_cols = few_rows ? NR : Workspace<bfloat16>::kBlockCols;
  const int64_t block_depth = few_rows && !p.unit_rows ? kFewRowsDepth : kBlockDepth;
  const Workspace<bfloat16> work(workspace, min_i64(p.n, block_cols), min_i64(p.k, block_depth));
  auto* const strip = reinterpret_cast<bfloat16*>(work.a);
  // As in gemm-inl.h: rows of A in place or copied, or columns, of which only the tile knows units.
  const bool rows_of_a = !p.unit_rows && (p.a_k == 1 || p.a_m != 1);

  for (int64_t n0 = 0; n0 < p.n; n0 += block_cols) {
    const int64_t n = min_i64(block_cols, p.n - n0);
    if (p.bias) {
      for (int64_t j = 0; j < round_up(n, NR); ++j) {
        work.bias[j] = j < n ? widen(p.bias[(n0 + j) * p.bias_stride]) : 0.0f;
      }
    }
    int64_t k0 = 0;
    do {  // once even for k = 0
      PairTile t{};
      t.k = min_i64(block_depth, p.k - k0);
      t.unit = p.unit_rows ? p.unit_rows : kSumDepth;
      t.accumulate = p.accumulate || k0 > 0;
      const bool last = k0 + t.k >= p.k;
      t.relu = p.relu && last;
      const int64_t panel = packed_size<bfloat16>(t.k, NR);  // of the packed block
      if (!p.packed_b) pack_b<bfloat16>(p.b + k0 * p.b_k + n0 * p.b_n, p.b_k, p.b_n, t.k, n, work.b);
      const bool copy_a = p.a_k != 1 || n > 4 * NR;  // as in gemm-inl.h
      for (int64_t m0 = 0; m0 < p.m;) {
        const int64_t rows = min_i64(kTileRows, p.m - m0);
        const bfloat16* const a = p.a + m0 * p.a_m + k0 * p.a_k;
        t.a = rows_of_a && !copy_a ? a : strip;
        t.a_stride = !rows_of_a ? 0 : copy_a ? round_up(t.k, 2) : p.a_m;
        if (!rows_of_a) {
          pack_pair_columns(a, p.a_m, p.a_k, rows, t.k, work.a);
        } else if (copy_a) {
          copy_pair_rows(a, p.a_m, p.a_k, rows, t.k, strip, t.a_stride);
        }
        int64_t done = rows;
        for (int64_t j0 = 0; j0 < n; j0 += NR) {
          const int64_t cols = min_i64(NR, n - j0);
          t.b = p.packed_b ? p.packed_b + packed_size<bfloat16>(p.k, n0 + j0) + packed_size<bfloat16>(k0, NR)
                           : work.b + j0 / NR * panel;
          t.bias = p.bias && last ? work.bias + j0 : nullptr;
          float* c = p.c + m0 * p.c_m + n0 + j0;
          const bool overhangs = cols < NR;
          t.c = overhangs ? work.edge : c;
          t.c_stride = overhangs ? NR : p.c_m;
          if (overhangs && t.accumulate) copy_edge(c, p.c_m, work.edge, NR, rows, cols);
          const bool half_panel = cols <= kLanes<float>;
          done = rows_of_a ? pair_tile_rows<true>(t, rows, half_panel) : pair_tile_rows<false>(t, rows, half_panel);
          if (overhangs) copy_edge(work.edge, NR, c, p.c_m, done, cols);
        }
        m0 += done;
      }
      k0 += t.k;
    } while (k0 < p.k);
  }
}
