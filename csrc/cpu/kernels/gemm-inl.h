// C = A B with bias and ReLU in the same pass: the only matrix product of the library, on one thread.
// It serves the forward pass, the input gradient and the weight gradient of a layer (see Gemm in params.h).
//
// Structure, from the inside out:
//   tile      MR x NR accumulators stay in registers while k runs; A is broadcast, B is read as vectors
//   strip     MR rows of A, copied (and widened) into the workspace if that pays
//   block     KC x NC of B, packed into panels of NR columns: any strides become contiguous and aligned,
//             half precision becomes float, columns past N become zeros
// For few rows of A there are gemm_transposed, if the columns of B are contiguous, and gemm_by_rows, if its rows are.
// The sum of an element of C runs over k in ascending order, in parts of kSumDepth terms that are added in that order.
// Tile, thread and batch do not change it. Over rows of a batch (Gemm::unit_rows) the parts are shorter, and the parts
// of a unit of rows are added together before they are added to C.

// Register tile. 16 vector registers: 6 x 2 accumulators + 2 of B + a broadcast number of A. 32 registers: with AVX-512,
// which reads that number from memory, 12 x 2 + 2 + 1; with NEON 8 x 2 + 2 + 8, each of which holds kLanes numbers of A,
// because there an instruction multiplies a vector by one lane of another.
constexpr int kTileRows = MBP_VECTOR_REGISTERS == 16 ? 6 : MBP_VECTOR_BYTES == 64 ? 12 : 8;
constexpr bool kByLane = MBP_VECTOR_REGISTERS == 32 && MBP_VECTOR_BYTES == 16;
template <typename A>
constexpr int kTileCols = 2 * kLanes<A>;
// Consecutive k that share a lane of a packed matrix: one, widened to the accumulator type, or a pair of bfloat16
// (gemm_pairs-inl.h).
template <typename T>
constexpr int64_t kTermsOfLane = 1;
#ifdef MBP_BFLOAT16_PAIRS
template <>
constexpr int64_t kTermsOfLane<bfloat16> = 2;
#endif

// A packed block of B takes at most kBlockBytes; its depth is at most kBlockDepth, so that a strip of A
// (12 rows x 384 x 4 bytes) stays in the first-level cache. Twice the bytes with AVX2, whose strips are half as high:
// each block copies all of A, so that the weight gradient of 2048 x 1024 x 1024 ran 1.1 times as fast.
constexpr int64_t kBlockDepth = 384;
constexpr int64_t kBlockBytes = (MBP_VECTOR_BYTES == 64 ? 384 : 768) * 1024;
// Rows of B that lie further apart than this are packed: in place they would share few cache sets and touch many pages.
// With AVX2, 2048 x 256 x 256 in place ran at 0.7 to 0.9 of the speed, 32 x 256 x 256 packed at 0.95.
constexpr int64_t direct_stride(int64_t m) { return MBP_VECTOR_BYTES == 64 ? 512 : m > 64 ? 128 : 448; }
constexpr int64_t kDirectColumns = MBP_VECTOR_BYTES == 64 ? 256 : 0;  // the same for columns of A
// The block of a weight's gradient that a thread computes at once. With AVX-512 it has so few columns that the strip of
// df is read in place; with blocks of 192 x 256, for which it is copied, backward of apex and dlrm_top took 7 % longer.
// With AVX2, whose strips are half as high, blocks of 96 x 128 took 1.1 to 1.8 times as long as the whole.
constexpr int64_t kWhole = int64_t(1) << 40;
constexpr int64_t kGradientRows = MBP_VECTOR_BYTES == 64 ? 96 : kWhole;
constexpr int64_t kGradientCols = MBP_VECTOR_BYTES == 64 ? 128 : kWhole;
// With this many rows of A or fewer, B is read once or twice: it is packed in small pieces that fit the first-level
// cache.
constexpr int64_t kFewRows = 2 * kTileRows;
constexpr int64_t kFewRowsDepth = 128;
// A contiguous B of this size or more is then read row by row.
constexpr int64_t kStreamedBytes = 1 << 20;
// With this many or fewer, B is transposed in registers and never written to memory.
constexpr int64_t kTransposedRows = MBP_VECTOR_REGISTERS / 8;

static_assert(kBlockDepth % kSumDepth == 0 && kFewRowsDepth % kSumDepth == 0, "a part is never split");
static_assert(kBlockDepth % kLongUnitRows == 0 && kLongUnitRows % kUnitRows == 0, "nor is a unit of rows");

// One register tile: rows of A at a + i*a_m + kk*a_k, B at b + kk*b_k, both in accumulator type.
template <typename A>
struct Tile {
  int64_t k;
  const A* a;
  int64_t a_stride;  // kRowsOfA: a_m (a_k is 1); else a_k (a_m is 1)
  const A* b;
  int64_t b_stride;
  A* c;
  int64_t c_stride;
  bool accumulate;  // start from what is in c (every block of k but the first)
  int64_t unit;  // terms that are added together before they are added to the sum (kRowsOfA: kSumDepth)
  const A* bias;  // padded to a full tile, or nullptr
  bool relu;
  const A* mask;  // or nullptr
  int64_t mask_stride;
  double* column_sum;  // or nullptr
};

template <typename A, int MR, int NV>
MBP_INLINE void add_tile(vec<A> (&acc)[MR][NV], const A* from, int64_t stride) {
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) acc[i][j] += load<A>(from + i * stride + j * kLanes<A>);
  }
}
template <typename A, int MR, int NV>
MBP_INLINE void store_tile(const vec<A> (&acc)[MR][NV], A* to, int64_t stride) {
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) store<A>(to + i * stride + j * kLanes<A>, acc[i][j]);
  }
}

// g++ cannot see that `parts` of `tile` is read only from a unit's second part on, and that what pack_transposed loads
// beyond the k numbers in `columns` is never stored.
#if !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

template <typename A, int MR, int NV, bool kRowsOfA>
static void tile(const Tile<A>& t) {
  constexpr int L = kLanes<A>;
  // Row pointers in groups of three (p, p+s, p+2s are one addressing mode each): 12 rows need 4 registers.
  constexpr int kGroups = kRowsOfA ? (MR + 2) / 3 : 1;
  const int64_t s = t.a_stride;
  const A* p[kGroups];
#pragma GCC unroll 8
  for (int g = 0; g < kGroups; ++g) p[g] = t.a + 3 * g * s;
  const A* b = t.b;

  vec<A> acc[MR][NV];
  alignas(64) A sums[MR * NV * L];  // of the previous units
  alignas(64) A parts[kRowsOfA ? 1 : MR * NV * L];  // of the parts of this unit so far
  const A* before = t.accumulate ? t.c : nullptr;
  int64_t before_stride = t.c_stride, left_of_unit = 0;
  for (int64_t left = t.k;;) {
    const bool first = left_of_unit == 0;
    if (first) left_of_unit = min_i64(left, kRowsOfA ? kSumDepth : t.unit);
    const int64_t depth = kRowsOfA || left_of_unit <= kSumDepth ? left_of_unit : kSumRows;
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) acc[i][j] = vec<A>{};
    }
    int64_t kk = depth;
    if constexpr (kByLane && kRowsOfA) {
      for (; kk >= L; kk -= L) {
        vec<A> av[MR];
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) av[i] = load<A>(p[i / 3 % kGroups] + (i % 3) * s);
#pragma GCC unroll 4
        for (int lane = 0; lane < L; ++lane, b += t.b_stride) {
#pragma GCC unroll 2
          for (int j = 0; j < NV; ++j) {
            const vec<A> bv = load<A>(b + j * L);
#pragma GCC unroll 16
            for (int i = 0; i < MR; ++i) acc[i][j] += av[i][lane] * bv;
          }
        }
#pragma GCC unroll 8
        for (int g = 0; g < kGroups; ++g) p[g] += L;
      }
    }
    for (; kk > 0; --kk) {
      vec<A> bv[NV];
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) bv[j] = load<A>(b + j * L);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const A av = kRowsOfA ? p[i / 3 % kGroups][(i % 3) * s] : p[0][i];
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) acc[i][j] += av * bv[j];
      }
#pragma GCC unroll 8
      for (int g = 0; g < kGroups; ++g) p[g] += kRowsOfA ? 1 : s;
      b += t.b_stride;
    }
    left -= depth;
    left_of_unit -= depth;
    if constexpr (!kRowsOfA) {
      if (!first) add_tile<A, MR, NV>(acc, parts, NV * L);
      if (left_of_unit > 0) {
        store_tile<A, MR, NV>(acc, parts, NV * L);
        continue;
      }
    }
    if (before) add_tile<A, MR, NV>(acc, before, before_stride);
    if (left == 0) break;
    before = sums;
    before_stride = NV * L;
    store_tile<A, MR, NV>(acc, sums, NV * L);
  }
  if (t.bias) {
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) {
      const vec<A> beta = load<A>(t.bias + j * L);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) acc[i][j] += beta;
    }
  }
  if (t.relu) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) acc[i][j] = relu<A>(acc[i][j]);
    }
  }
  if (t.mask) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) {
        const vec<A> h = load<A>(t.mask + i * t.mask_stride + j * L);
        acc[i][j] = h <= A(0) ? vec<A>{} : acc[i][j];
      }
    }
  }
  if (t.column_sum) {
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) {
      vec<A> sum = acc[0][j];
#pragma GCC unroll 16
      for (int i = 1; i < MR; ++i) sum += acc[i][j];
      using doubles = typename VecOf<A>::doubles;
      *reinterpret_cast<doubles*>(t.column_sum + j * L) += __builtin_convertvector(sum, doubles);
    }
  }
  // Read t.c anew for each store, so that an address computation separates them: 24 stores in a row fill the store
  // queue if C is not in the cache (64 x 64 with 16384 rows took 10 % longer).
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) store<A>(t.c + i * t.c_stride + j * L, acc[i][j]);
  }
}

// The rows that full tiles leave over go to smaller and smaller tiles: 11 = 8 + 2 + 1.
template <typename A, int MR, bool kRowsOfA>
MBP_INLINE void tile_columns(const Tile<A>& t, bool half_panel) {
  if (half_panel) {
    tile<A, MR, 1, kRowsOfA>(t);
  } else {
    tile<A, MR, 2, kRowsOfA>(t);
  }
}
template <typename A, bool kRowsOfA>
MBP_INLINE int tile_rows(const Tile<A>& t, int64_t rows, bool half_panel) {
  if (rows >= kTileRows) return tile_columns<A, kTileRows, kRowsOfA>(t, half_panel), kTileRows;
  if constexpr (kTileRows > 8) {
    if (rows >= 8) return tile_columns<A, 8, kRowsOfA>(t, half_panel), 8;
  }
  if (rows >= 4) return tile_columns<A, 4, kRowsOfA>(t, half_panel), 4;
  if (rows >= 2) return tile_columns<A, 2, kRowsOfA>(t, half_panel), 2;
  return tile_columns<A, 1, kRowsOfA>(t, half_panel), 1;
}

// Loads kLanes rows of `lanes` contiguous columns of B, transposed in registers; missing columns are zeros. Pointers in
// groups of three, as in `tile`.
template <typename T>
MBP_INLINE void load_transposed(const T* b, int64_t b_n, int64_t lanes,
                                vec<accumulator_t<T>> (&block)[kLanes<accumulator_t<T>>]) {
  using A = accumulator_t<T>;
  constexpr int L = kLanes<A>;
#pragma GCC unroll 16
  for (int j = 0; j < L; ++j) {
    const T* column = b + (j % 3) * b_n;
    if (j % 3 == 2) b += 3 * b_n;
    if (j >= lanes) {
      block[j] = vec<A>{};
    } else if constexpr (sizeof(T) == sizeof(A)) {
      block[j] = load<A>(reinterpret_cast<const A*>(column));
    } else {
      A widened[L];
      widen_run(column, widened, L);
      block[j] = load<A>(widened);
    }
  }
  transpose<A>(block);
}

// Packs `lanes` contiguous columns of k numbers, in blocks of kLanes rows. The last block is aligned to end at k and
// may overlap the previous one.
template <typename T>
MBP_INLINE void pack_transposed(const T* b, int64_t b_n, int64_t k, int64_t lanes, accumulator_t<T>* out) {
  using A = accumulator_t<T>;
  constexpr int L = kLanes<A>, NR = kTileCols<A>;
  vec<A> block[L];
  if (k < L) {  // copied to where whole blocks can be loaded
    A columns[L * L];
    for (int64_t j = 0; j < lanes; ++j) widen_short<L / 2>(b + j * b_n, columns + j * L, k);
    load_transposed<A>(columns, L, lanes, block);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      if (i < k) store<A>(out + i * NR, block[i]);
    }
    return;
  }
  for (int64_t left = k;;) {
    load_transposed<T>(b, b_n, lanes, block);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) store<A>(out + i * NR, block[i]);
    if ((left -= L) <= 0) return;
    const int64_t step = min_i64(left, L);
    b += step;
    out += step * NR;
  }
}

#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif

// The same, not inlined: for the edges of B, which are not worth specialised code.
template <typename T>
static __attribute__((noinline)) void pack_edge(const T* b, int64_t b_n, int64_t k, int64_t lanes,
                                                accumulator_t<T>* out) {
  pack_transposed<T>(b, b_n, k, lanes, out);
}

// Panels of kTileCols columns, k-major: out[panel][kk][column]. Columns past n are zeros.
template <typename T>
static void pack_b(const T* b, int64_t b_k, int64_t b_n, int64_t k, int64_t n, accumulator_t<T>* out) {
  using A = accumulator_t<T>;
  constexpr int L = kLanes<A>;
  constexpr int NR = kTileCols<A>;
  constexpr int64_t kGroup = 4;
  for (int64_t n0 = 0; n0 < n; n0 += NR, out += k * NR) {
    const int64_t cols = n - n0 < NR ? n - n0 : NR;
    const T* panel = b + n0 * b_n;
    if (b_n == 1 && n - n0 >= kGroup * NR) {  // several panels at once: each read takes whole cache lines, in order
      for (int64_t kk = 0; kk < k; ++kk) {
#pragma GCC unroll 4
        for (int64_t g = 0; g < kGroup; ++g) widen_run(panel + kk * b_k + g * NR, out + (g * k + kk) * NR, NR);
      }
      n0 += (kGroup - 1) * NR;
      out += (kGroup - 1) * k * NR;
      continue;
    }
    if (b_n == 1) {  // rows of B are contiguous: a widening copy
      for (int64_t kk = 0; kk < k; ++kk) {
        const T* row = panel + kk * b_k;
        A* o = out + kk * NR;
        if (cols == NR) {
          widen_run(row, o, NR);
        } else {
          widen_run(row, o, cols);
          for (int64_t j = cols; j < NR; ++j) o[j] = A(0);
        }
      }
      continue;
    }
    for (int64_t half = 0; half < NR; half += L) {
      const int64_t lanes = cols - half < 0 ? 0 : cols - half < L ? cols - half : L;
      A* o = out + half;
      if (b_k == 1) {  // columns of B are contiguous (a weight)
        const T* columns = panel + half * b_n;
        lanes == L ? pack_transposed<T>(columns, b_n, k, L, o) : pack_edge<T>(columns, b_n, k, lanes, o);
        continue;
      }
      for (int64_t kk = 0; kk < k; ++kk) {
        int64_t j = 0;
        for (; j < lanes; ++j) o[kk * NR + j] = widen(panel[kk * b_k + (half + j) * b_n]);
        for (; j < L; ++j) o[kk * NR + j] = A(0);
      }
    }
  }
}

// Contiguous rows of B in the accumulator type need no packing if they lie close together, or if few rows of A use
// them: packing B costs as much as multiplying 8 rows by it.
template <typename T>
MBP_INLINE bool rows_in_place(int64_t m, int64_t b_k, int64_t b_n) {
  return sizeof(T) == sizeof(accumulator_t<T>) && b_n == 1 && (b_k <= direct_stride(m) || m <= kFewRows);
}
// Whether the caller gains nothing by packing B. (With many rows of A, a panel that N does not fill has to be packed.)
template <typename T>
static bool reads_in_place(int64_t m, int64_t b_k, int64_t b_n, int64_t n) {
  return rows_in_place<T>(m, b_k, b_n) && (n % kTileCols<accumulator_t<T>> == 0 || m <= kFewRows);
}

template <typename T>
static int64_t packed_size(int64_t k, int64_t n) {
  constexpr int64_t NR = kTileCols<accumulator_t<T>>;
  return round_up(n, NR) * ceil_div(k, kTermsOfLane<T>);
}

// A strip of A in accumulator type, out[i][kk].
template <typename T>
static void pack_a(const T* a, int64_t a_m, int64_t a_k, int64_t rows, int64_t k, accumulator_t<T>* out) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = a + i * a_m;
    accumulator_t<T>* o = out + i * k;
    if (a_k == 1) {
      widen_run(row, o, k);
    } else {
      for (int64_t kk = 0; kk < k; ++kk) o[kk] = widen(row[kk * a_k]);
    }
  }
}
// The same for A with contiguous columns (a transposed gradient), or with neither rows nor columns contiguous:
// out[kk][i].
template <typename T>
static void pack_a_columns(const T* a, int64_t a_m, int64_t a_k, int64_t rows, int64_t k, accumulator_t<T>* out) {
  for (int64_t kk = 0; kk < k; ++kk, a += a_k, out += kTileRows) {
    if (rows == kTileRows && a_m == 1) {
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; ++i) out[i] = widen(a[i]);
    } else {
      for (int64_t i = 0; i < rows; ++i) out[i] = widen(a[i * a_m]);
    }
  }
}

// The parts of a thread's workspace, as large as a product with n columns and depth k needs.
template <typename T>
struct Workspace {
  using A = accumulator_t<T>;
  static constexpr int64_t kBlockCols = kBlockBytes / (kBlockDepth * int64_t(sizeof(A)));
  static constexpr int64_t kChunkRows = sizeof(T) == sizeof(A) ? 0 : 16 * kTileRows;
  A* b;  // packed block of B, aligned for vectors
  A* bias;  // in accumulator type, padded with zeros
  A* edge;  // a tile that overhangs C
  A* a;  // strip of A
  A* chunk;  // half precision: rows of C before they are rounded
  int64_t bytes;

  Workspace(void* memory, int64_t n, int64_t k) {
    const int64_t cols = min_i64(kBlockCols, round_up(n, kTileCols<A>));
    const int64_t depth = ceil_div(min_i64(kBlockDepth, k), kTermsOfLane<T>);
    b = static_cast<A*>(memory);
    bias = b + depth * cols;
    edge = bias + cols;
    a = edge + kTileRows * kTileCols<A>;
    chunk = a + kTileRows * depth;
    bytes = (chunk - b + kChunkRows * cols) * int64_t(sizeof(A));
  }
};

template <typename T>
static int64_t workspace_bytes(int64_t n, int64_t k) {
  return Workspace<T>(nullptr, n, k).bytes;
}

// part[i] += row i of A times a block of kLanes rows of B.
template <typename A, int MR>
MBP_INLINE void multiply_block(const A* a, int64_t a_m, const A* b, int64_t b_n, int64_t lanes, vec<A> (&part)[MR]) {
  vec<A> block[kLanes<A>];
  load_transposed<A>(b, b_n, lanes, block);
#pragma GCC unroll 16
  for (int kk = 0; kk < kLanes<A>; ++kk) {
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) part[i] += a[i * a_m + kk] * block[kk];
  }
}

// Adds the next part to the sums. The first one is stored, not added to 0: 0 + part would lose the sign of a part that
// is -0.
template <typename A, int MR>
MBP_INLINE void add_part(const vec<A> (&part)[MR], bool& started, vec<A> (&sums)[MR]) {
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i) sums[i] = started ? part[i] + sums[i] : part[i];
  started = true;
}

// Computes `lanes` columns of C, with the sums of `tile`.
template <typename A, int MR>
MBP_INLINE void tile_transposed(const Gemm<A, A>& p, const A* b, int64_t lanes, vec<A> (&sums)[MR]) {
  // Each addition of a row depends on the previous one: with short vectors, two parts are computed at the same time.
  constexpr int L = kLanes<A>, NR = kTileCols<A>, kParts = L < 16 && MR <= 2 ? 2 : 1;
  static_assert(kSumDepth % L == 0, "a part is whole blocks");
  bool started = p.accumulate;
  int64_t kk = 0;
  for (; kk + kParts * kSumDepth <= p.k; kk += kParts * kSumDepth) {
    vec<A> parts[kParts][MR] = {};
    for (int64_t at = kk; at < kk + kSumDepth; at += L) {
#pragma GCC unroll 2
      for (int64_t i = 0; i < kParts; ++i) {
        const int64_t k = at + i * kSumDepth;
        multiply_block<A, MR>(p.a + k, p.a_m, b + k, p.b_n, lanes, parts[i]);
      }
    }
#pragma GCC unroll 2
    for (int i = 0; i < kParts; ++i) add_part<A, MR>(parts[i], started, sums);
  }
  while (kk < p.k) {
    const int64_t end = min_i64(kk + kSumDepth, p.k);
    vec<A> part[MR] = {};
    for (; kk + L <= end; kk += L) multiply_block<A, MR>(p.a + kk, p.a_m, b + kk, p.b_n, lanes, part);
    if (kk < end) {  // the last, incomplete block
      A block[L * NR];
      const int64_t depth = min_i64(L, p.k);
      pack_edge<A>(b + p.k - depth, p.b_n, depth, lanes, block);
      for (const A* row = block + (depth - (end - kk)) * NR; kk < end; ++kk, row += NR) {
#pragma GCC unroll 4
        for (int i = 0; i < MR; ++i) part[i] += p.a[i * p.a_m + kk] * load<A>(row);
      }
    }
    add_part<A, MR>(part, started, sums);
  }
}

// C of MR rows, for contiguous rows of A and columns of B: B is transposed in registers, multiplied there, and never
// written. One row and 400 x 400: 10.7 us, instead of 16.6 us with B packed (AVX-512); 12.5 instead of 18.5 us (AVX2).
template <typename A, int MR>
static void gemm_transposed(const Gemm<A, A>& p) {
  constexpr int L = kLanes<A>;
  A edge[L] = {};
  for (int64_t n0 = 0; n0 < p.n; n0 += L) {
    const int64_t lanes = min_i64(L, p.n - n0);
    A* const c = p.c + n0;
    vec<A> sums[MR] = {};
    if (p.accumulate) {
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) {
        for (int64_t j = 0; j < lanes; ++j) edge[j] = c[i * p.c_m + j];
        sums[i] = load<A>(edge);
      }
    }
    const A* b = p.b + n0 * p.b_n;
    lanes == L ? tile_transposed<A, MR>(p, b, L, sums) : tile_transposed<A, MR>(p, b, lanes, sums);
    if (p.bias) {
      const A* bias = p.bias + n0 * p.bias_stride;
      if (lanes < L || p.bias_stride != 1) {
        for (int64_t j = 0; j < lanes; ++j) edge[j] = bias[j * p.bias_stride];
        bias = edge;
      }
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) sums[i] += load<A>(bias);
    }
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) {
      if (p.relu) sums[i] = relu<A>(sums[i]);
      if (lanes == L) {
        store<A>(c + i * p.c_m, sums[i]);
      } else {
        store<A>(edge, sums[i]);
        for (int64_t j = 0; j < lanes; ++j) c[i * p.c_m + j] = edge[j];
      }
    }
  }
}
template <typename A>
static void gemm_transposed(const Gemm<A, A>& p) {
  if (p.m == 1) return gemm_transposed<A, 1>(p);
  if (p.m == 2) return gemm_transposed<A, 2>(p);
  if constexpr (kTransposedRows > 2) p.m == 3 ? gemm_transposed<A, 3>(p) : gemm_transposed<A, 4>(p);
}

// One number over rows of a batch (M = N = 1), in double. Sixteen sums are interleaved, since each addition to a sum
// depends on the previous one. Always inlined, with constant strides if they are known, so that the compiler vectorises
// it.
template <typename T>
MBP_INLINE double dot_in_double(const T* a, int64_t a_k, const T* b, int64_t b_k, int64_t k) {
  constexpr int kSums = 16;
  double sums[kSums] = {};
  for (; k >= kSums; k -= kSums, a += kSums * a_k, b += kSums * b_k) {
    for (int s = 0; s < kSums; ++s) sums[s] += double(widen(a[s * a_k])) * double(widen(b[s * b_k]));
  }
  for (int s = 0; s < k; ++s) sums[s] += double(widen(a[s * a_k])) * double(widen(b[s * b_k]));
  for (int s = 1; s < kSums; ++s) sums[0] += sums[s];
  return sums[0];
}

// C of one number (M = N = 1), in the order in which a lane of a tile sums it. A tile would compute zeros beside it.
template <typename T>
MBP_INLINE void gemm_number(const Gemm<T, accumulator_t<T>>& p) {
  using A = accumulator_t<T>;
  A sum = p.accumulate ? p.c[0] : A(0);
  const int64_t step = p.unit_rows ? p.unit_rows : kSumDepth;
  for (int64_t k0 = 0; k0 < p.k; k0 += step) {
    const int64_t end = min_i64(k0 + step, p.k);
    A part(0);
    if (p.unit_rows) {
      const T *a = p.a + k0 * p.a_k, *b = p.b + k0 * p.b_k;
      part = A(p.a_k == 1 && p.b_k == 1 ? dot_in_double<T>(a, 1, b, 1, end - k0)
                                        : dot_in_double<T>(a, p.a_k, b, p.b_k, end - k0));
    } else {
      for (int64_t kk = k0; kk < end; ++kk) part = multiply_add(widen(p.a[kk * p.a_k]), widen(p.b[kk * p.b_k]), part);
    }
    sum = p.accumulate || k0 > 0 ? part + sum : part;
  }
  if (p.bias) sum += widen(p.bias[0]);
  p.c[0] = p.relu ? relu_scalar<A>(sum) : sum;
}

// Where the tile reads A: `rows` rows from `strip` on, in place or copied to `memory`. rows_of_a: see Tile::a_stride.
template <typename T>
MBP_INLINE void read_a(const Gemm<T, accumulator_t<T>>& p, const T* strip, int64_t rows, bool rows_of_a, bool copy,
                       accumulator_t<T>* memory, Tile<accumulator_t<T>>& t) {
  if (!copy) {
    t.a = reinterpret_cast<const accumulator_t<T>*>(strip);
    t.a_stride = rows_of_a ? p.a_m : p.a_k;
  } else if (rows_of_a) {
    pack_a<T>(strip, p.a_m, p.a_k, rows, t.k, memory);
    t.a = memory;
    t.a_stride = t.k;
  } else {
    pack_a_columns<T>(strip, p.a_m, p.a_k, rows, t.k, memory);
    t.a = memory;
    t.a_stride = kTileRows;
  }
}

// Where the tile reads a panel of B, at column j0 of the block at (k0, n0): as the caller packed it; in place, for the
// first direct_n columns of the block, which begins at `block`; or as gemm_accumulated packed it into `memory`.
template <typename T>
MBP_INLINE void read_b(const Gemm<T, accumulator_t<T>>& p, int64_t k0, int64_t n0, int64_t j0, const T* block,
                       int64_t direct_n, const accumulator_t<T>* memory, Tile<accumulator_t<T>>& t) {
  constexpr int64_t NR = kTileCols<accumulator_t<T>>;
  if (p.packed_b) {
    t.b = p.packed_b + (n0 + j0) * p.k + k0 * NR;
    t.b_stride = NR;
  } else if (j0 < direct_n) {
    t.b = reinterpret_cast<const accumulator_t<T>*>(block + j0);
    t.b_stride = p.b_k;
  } else {
    t.b = memory + j0 * t.k;
    t.b_stride = NR;
  }
}

// A tile is a whole panel wide. If it overhangs C, it works on a copy: this copies the `cols` columns that belong to C,
// in either direction.
template <typename A>
MBP_INLINE void copy_edge(const A* from, int64_t from_stride, A* to, int64_t to_stride, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) to[i * to_stride + j] = from[i * from_stride + j];
  }
}

// C += A B of MR rows and `cols` columns, for contiguous rows of A and of B, over one part of kSumDepth terms. B is read
// row by row, kStreams rows at a time, as the hardware prefetches it; `part` (MR, cols) is in the first-level cache.
template <typename A, int MR>
MBP_INLINE void add_part_by_rows(const A* a, int64_t a_m, const A* b, int64_t b_k, A* c, int64_t c_m, int64_t cols,
                                 bool started, A* part) {
  constexpr int L = kLanes<A>, kStreams = 8;
  static_assert(kSumDepth % kStreams == 0, "a part is whole groups of rows");
  const int64_t whole = cols / L * L;
  for (int64_t kk = 0; kk < kSumDepth; kk += kStreams) {
    for (int64_t j = 0; j < whole; j += L) {
      vec<A> acc[MR];
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) acc[i] = kk ? load<A>(part + i * cols + j) : vec<A>{};
#pragma GCC unroll 8
      for (int s = 0; s < kStreams; ++s) {
        const vec<A> row = load<A>(b + (kk + s) * b_k + j);
#pragma GCC unroll 4
        for (int i = 0; i < MR; ++i) acc[i] += a[i * a_m + kk + s] * row;
      }
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) store<A>(part + i * cols + j, acc[i]);
    }
    for (int64_t j = whole; j < cols; ++j) {
      for (int i = 0; i < MR; ++i) {
        A sum = kk ? part[i * cols + j] : A(0);
        for (int s = 0; s < kStreams; ++s) sum = multiply_add(a[i * a_m + kk + s], b[(kk + s) * b_k + j], sum);
        part[i * cols + j] = sum;
      }
    }
  }
  for (int i = 0; i < MR; ++i) {
    for (int64_t j = 0; j < cols; ++j)
      c[i * c_m + j] = started ? part[i * cols + j] + c[i * c_m + j] : part[i * cols + j];
  }
}

// All parts of C but the last, for few rows of A and a B that does not fit into the second-level cache. A tile, which
// reads a few columns of all rows of B, would wait for each of them: one row and 1024 x 1024 took 1.7 ms instead of 0.55,
// 12 rows 2.9 instead of 1.2 (AVX2, B in memory). Where B is in that cache, the tile is faster: 12 rows and 400 x 300
// took 66 us instead of 124.
template <typename A>
static void gemm_by_rows(const Gemm<A, A>& p, int64_t depth, A* part) {
  for (int64_t n0 = 0; n0 < p.n; n0 += Workspace<A>::kBlockCols) {
    const int64_t cols = min_i64(Workspace<A>::kBlockCols, p.n - n0);
    for (int64_t k0 = 0; k0 < depth; k0 += kSumDepth) {
      const A* b = p.b + k0 * p.b_k + n0;
      const bool started = p.accumulate || k0 > 0;
      for (int64_t m0 = 0; m0 < p.m;) {
        const A* a = p.a + m0 * p.a_m + k0;
        A* c = p.c + m0 * p.c_m + n0;
        const int64_t rows = p.m - m0;
        if (rows >= 4) {
          add_part_by_rows<A, 4>(a, p.a_m, b, p.b_k, c, p.c_m, cols, started, part);
          m0 += 4;
        } else if (rows >= 2) {
          add_part_by_rows<A, 2>(a, p.a_m, b, p.b_k, c, p.c_m, cols, started, part);
          m0 += 2;
        } else {
          add_part_by_rows<A, 1>(a, p.a_m, b, p.b_k, c, p.c_m, cols, started, part);
          m0 += 1;
        }
      }
    }
  }
}

// C in the accumulator type.
template <typename T>
static void gemm_accumulated(const Gemm<T, accumulator_t<T>>& p, void* workspace) {
  using A = accumulator_t<T>;
  constexpr int64_t NR = kTileCols<A>;
  static_assert(Workspace<T>::kBlockCols % NR == 0, "a block of B is a whole number of panels");
  if (p.m == 1 && p.n == 1 && !p.packed_b) return gemm_number<T>(p);
  // Only the input gradient has a mask and column sums, and its B is a weight as it lies, not transposed.
  if constexpr (sizeof(T) == sizeof(A)) {
    if (p.m <= kTransposedRows && p.a_k == 1 && p.b_k == 1 && p.b_n != 1 && !p.packed_b && !p.mask && !p.column_sum &&
        !p.unit_rows) {
      return gemm_transposed<A>(p);
    }
  }
  const bool few_rows = p.m <= kFewRows && !p.packed_b;
  if constexpr (sizeof(T) == sizeof(A)) {
    if (few_rows && p.b_n == 1 && p.a_k == 1 && !p.unit_rows && p.k > kSumDepth &&
        p.k * p.n * int64_t(sizeof(A)) >= kStreamedBytes) {
      const int64_t depth = (p.k - 1) / kSumDepth * kSumDepth;
      gemm_by_rows<A>(p, depth, static_cast<A*>(workspace));
      Gemm<A, A> last = p;
      last.k -= depth;
      last.a += depth;
      last.b += depth * p.b_k;
      last.accumulate = true;
      return gemm_accumulated<T>(last, workspace);
    }
  }
  const int64_t block_cols = few_rows ? NR : Workspace<T>::kBlockCols;
  const int64_t block_depth = few_rows && !p.unit_rows ? kFewRowsDepth : kBlockDepth;
  const Workspace<T> work(workspace, min_i64(p.n, block_cols), min_i64(p.k, block_depth));
  // A is read by rows if its rows are contiguous, or if neither rows nor columns are (they are then gathered into
  // rows); by columns if those are contiguous, as the columns of df usually are. Only the tile by columns knows units.
  const bool rows_of_a = !p.unit_rows && (p.a_k == 1 || p.a_m != 1);
  const bool contiguous_a = sizeof(T) == sizeof(A) && (rows_of_a ? p.a_k : p.a_m) == 1;
  const bool direct_b = !p.packed_b && rows_in_place<T>(p.m, p.b_k, p.b_n);

  for (int64_t n0 = 0; n0 < p.n; n0 += block_cols) {
    const int64_t n = min_i64(block_cols, p.n - n0);
    if (p.bias) {
      for (int64_t j = 0; j < round_up(n, NR); ++j) {
        work.bias[j] = j < n ? widen(p.bias[(n0 + j) * p.bias_stride]) : A(0);
      }
    }
    // Whole panels of contiguous rows (a stored activation, a weight that is not transposed) are read in place.
    const int64_t direct_n = direct_b ? n / NR * NR : 0;
    int64_t k0 = 0;
    do {  // once even for k = 0: the product is then zero, bias and ReLU remain
      Tile<A> t{};
      t.k = min_i64(block_depth, p.k - k0);
      t.unit = p.unit_rows ? p.unit_rows : kSumDepth;
      t.accumulate = p.accumulate || k0 > 0;
      const bool last = k0 + t.k >= p.k;
      t.relu = p.relu && last;
      const T* b = p.b + k0 * p.b_k + n0 * p.b_n;
      if (!p.packed_b && direct_n < n) {
        pack_b<T>(b + direct_n * p.b_n, p.b_k, p.b_n, t.k, n - direct_n, work.b + direct_n * t.k);
      }
      // Copying a strip of A pays if several panels read it, and avoids the cache-set conflicts of rows that lie a
      // power of two apart; a product with few columns reads A in place. Columns are copied if they lie far apart: with
      // 4096 x 256 x 256 the weight gradient ran at 80 % of the peak copying, at 87 % reading in place; with 2048 x 512
      // x 1024 at 79 and 75 %.
      const bool copy_a = !contiguous_a || (n > 4 * NR && (rows_of_a || p.a_k > kDirectColumns));
      for (int64_t m0 = 0; m0 < p.m;) {
        int64_t rows = min_i64(kTileRows, p.m - m0);
        read_a<T>(p, p.a + m0 * p.a_m + k0 * p.a_k, rows, rows_of_a, copy_a, work.a, t);
        int64_t done = rows;
        for (int64_t j0 = 0; j0 < n; j0 += NR) {
          const int64_t cols = min_i64(NR, n - j0);
          read_b<T>(p, k0, n0, j0, b, direct_n, work.b, t);
          t.bias = p.bias && last ? work.bias + j0 : nullptr;
          if constexpr (sizeof(T) == sizeof(A)) {
            t.mask = p.mask && last ? p.mask + m0 * p.mask_m + n0 + j0 : nullptr;
            t.mask_stride = p.mask_m;
            t.column_sum = p.column_sum && last ? p.column_sum + n0 + j0 : nullptr;
          }
          A* c = p.c + m0 * p.c_m + n0 + j0;
          const bool overhangs = cols < NR;
          t.c = overhangs ? work.edge : c;
          t.c_stride = overhangs ? NR : p.c_m;
          if (overhangs && t.accumulate) copy_edge(c, p.c_m, work.edge, NR, rows, cols);
          const bool half_panel = cols <= kLanes<A>;
          done = rows_of_a ? tile_rows<A, true>(t, rows, half_panel) : tile_rows<A, false>(t, rows, half_panel);
          if (overhangs) copy_edge(work.edge, NR, c, p.c_m, done, cols);
        }
        m0 += done;
      }
      k0 += t.k;
    } while (k0 < p.k);
  }
}

// C of one column (a network with one output), which would use one lane of each vector. Computed as the row
// C^T = B^T A^T it uses all lanes, and A has to be transposed in registers; the sums have the same bits. 256 x 1 x 256
// went from 6 to 13 % of the peak. A column times one number is a loop: forward of 1-1-1-1-1 with 65536 rows went from
// 300 to 90 us.
template <typename T>
static void gemm_column(const Gemm<T, T>& p, void* workspace) {
  const int64_t m = p.m;
  T* const c = p.c;
  if (p.k == 1 && p.a_m == 1) {
    const T *a = p.a, omega = p.b[0];
    for (int64_t i = 0; i < m; ++i) c[i] = multiply_add(a[i], omega, T(0));  // as a sum: never -0
  } else {
    Gemm<T, T> row{};
    row.m = 1;
    row.n = p.m;
    row.k = p.k;
    row.a = p.b;
    row.a_m = p.b_n;
    row.a_k = p.b_k;
    row.b = p.a;
    row.b_k = p.a_k;
    row.b_n = p.a_m;
    row.c = p.c;
    row.c_m = p.m;
    gemm_accumulated<T>(row, workspace);
  }
  // Separate loops: in one loop with the product, the compiler would fuse the multiplication with this addition.
  if (p.bias) {
    const T beta = p.bias[0];
    for (int64_t i = 0; i < m; ++i) c[i] += beta;
  }
  if (p.relu) {
    for (int64_t i = 0; i < m; ++i) c[i] = relu_scalar<T>(c[i]);
  }
}

// C in the storage type. In half precision, chunks of C are completed in float and rounded once.
template <typename T>
static void gemm(const Gemm<T, T>& p, void* workspace) {
  using A = accumulator_t<T>;
  if constexpr (sizeof(T) == sizeof(A)) {
    if (p.n == 1 && p.c_m == 1 && p.m > 1 && !p.accumulate && !p.packed_b) return gemm_column<T>(p, workspace);
    gemm_accumulated<T>(p, workspace);
  } else {
    using W = Workspace<T>;
    A* const chunk = W(workspace, p.n, p.k).chunk;
    for (int64_t n0 = 0; n0 < p.n; n0 += W::kBlockCols) {
      const int64_t n = min_i64(W::kBlockCols, p.n - n0);
      for (int64_t m0 = 0; m0 < p.m; m0 += W::kChunkRows) {
        const int64_t m = min_i64(W::kChunkRows, p.m - m0);
        Gemm<T, A> part{};
        part.m = m;
        part.n = n;
        part.k = p.k;
        part.a = p.a + m0 * p.a_m;
        part.a_m = p.a_m;
        part.a_k = p.a_k;
        part.b = p.b + n0 * p.b_n;
        part.b_k = p.b_k;
        part.b_n = p.b_n;
        part.c = chunk;
        part.c_m = n;
        part.bias = p.bias ? p.bias + n0 * p.bias_stride : nullptr;
        part.bias_stride = p.bias_stride;
        part.relu = p.relu;
        part.packed_b = p.packed_b ? p.packed_b + packed_size<T>(p.k, n0) : nullptr;
        gemm_accumulated<T>(part, workspace);
        for (int64_t i = 0; i < m; ++i) {
          narrow_run(chunk + i * n, p.c + (m0 + i) * p.c_m + n0, n);
        }
      }
    }
  }
}
