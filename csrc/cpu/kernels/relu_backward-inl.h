// The mask of the ReLU and the gradient of the bias, in one pass over memory.

// kLanes numbers, widened.
template <typename T>
MBP_INLINE vec<accumulator_t<T>> load_wide(const T* p) {
  using A = accumulator_t<T>;
  if constexpr (sizeof(T) == sizeof(A)) {
    return load<A>(p);
  } else {
    A wide[kLanes<A>];
    widen_run(p, wide, kLanes<A>);
    return load<A>(wide);
  }
}

// One row. By vectors, because `out` may be `grad` itself, and because the signs of h are not predictable: a compiler that
// has to check for both writes a branch for each number, which in half precision took longer than all products of a
// network of 64 units.
template <typename T>
MBP_INLINE void relu_backward_row(const T* grad, int64_t grad_col, const T* h, accumulator_t<T> scale, T* out,
                                  accumulator_t<T>* sum, int64_t cols) {
  using A = accumulator_t<T>;
  constexpr int L = kLanes<A>;
  int64_t j = 0;
  for (; grad_col == 1 && j + L <= cols; j += L) {
    vec<A> df = load_wide<T>(grad + j);
    if (h) {
      const vec<A> mask = load_wide<T>(h + j);
      df = mask <= A(0) ? vec<A>{} : df * scale;
    }
    if constexpr (sizeof(T) < sizeof(A)) {  // sums are those of the rounded numbers
      A exact[L];
      T rounded[L];
      store<A>(exact, df);
      narrow_run<T>(exact, rounded, L);
      if (out) __builtin_memcpy(out + j, rounded, sizeof rounded);
      if (scale != 1) df = load_wide<T>(rounded);
    } else if (out) {
      store<A>(out + j, df);
    }
    if (sum) store<A>(sum + j, load<A>(sum + j) + df);
  }
  for (; j < cols; ++j) {
    const A g = widen(grad[j * grad_col]);
    A df = h ? widen(h[j]) <= A(0) ? A(0) : g * scale : g;
    if constexpr (sizeof(T) < sizeof(A)) df = widen(narrow<T>(df));
    if (out) out[j] = narrow<T>(df);
    if (sum) sum[j] += df;
  }
}

// df = scale I[h > 0] . dh, and d(beta) = column sums of df, in one pass over memory.
//
// Sums of at most kSumRows rows are made in the accumulator type and added in double, so that the error does not grow
// with the number of rows. Wide rows are processed kStripe columns at a time. Several narrow rows are processed as one
// wide row with a sum for each of its elements, and these sums are then added in pairs: row by row, most lanes of a
// vector would be empty, and each addition would wait for the previous one.
template <typename T>
static void relu_backward(const ReluBackward<T>& p) {
  using A = accumulator_t<T>;
  constexpr int64_t kStripe = 512, kWide = 96;
  int64_t group = p.cols > 0 && p.cols <= kWide / 3 ? kUnitRows : 1;
  while (group > 3 && group * p.cols > kWide) group /= 2;
  const int64_t step = group == 1 ? kSumRows : kUnitRows;
  const bool wide_rows = p.grad_col == 1 && p.grad_row == p.cols && (!p.h || p.h_row == p.cols);
  A sums[kStripe];
  for (int64_t j0 = p.first_col; j0 < p.last_col; j0 += kStripe) {
    const int64_t cols = min_i64(kStripe, p.last_col - j0);
    for (int64_t i = 0; i < p.rows;) {
      const int64_t stop = min_i64(i + step, p.rows);
      for (int64_t j = 0; p.column_sum && j < group * cols; ++j) sums[j] = A(0);
      for (int64_t row = 0; i < stop; row = (row + 1) % group) {
        const T* grad = p.grad + i * p.grad_row + j0 * p.grad_col;
        const T* h = p.h ? p.h + i * p.h_row + j0 : nullptr;
        T* out = p.out ? p.out + i * p.cols + j0 : nullptr;
        A* const sum = p.column_sum ? sums + row * cols : nullptr;
        if (group > 1 && wide_rows && i + group <= stop) {
          relu_backward_row<T>(grad, 1, h, p.scale, out, sum, group * cols);
          i += group;
          row = group - 1;  // the next row begins a wide row
        } else {
          relu_backward_row<T>(grad, p.grad_col == 1 ? 1 : p.grad_col, h, p.scale, out, sum, cols);
          ++i;
        }
      }
      if (!p.column_sum) continue;
      int64_t left = group;
      for (; left % 2 == 0; left /= 2) {
        for (int64_t j = 0; j < left / 2 * cols; ++j) sums[j] += sums[left / 2 * cols + j];
      }
      for (int64_t row = 0; row < left; ++row) {
        for (int64_t j = 0; j < cols; ++j) p.column_sum[j0 + j] += double(sums[row * cols + j]);
      }
    }
  }
}

// The sums alone, in the order of Gemm::column_sum: over the rows of a register tile, which are then added in double.
template <typename T>
static void sum_by_tiles(const ReluBackward<T>& p) {
  using A = accumulator_t<T>;
  for (int64_t i = 0; i < p.rows;) {
    const T* grad = p.grad + i * p.grad_row;
    const int64_t left = p.rows - i;  // the heights that `tile_rows` chooses
    const int height = left >= kTileRows ? kTileRows : left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    for (int64_t j = 0; j < p.cols; ++j) {
      A sum = widen(grad[j * p.grad_col]);
      for (int row = 1; row < height; ++row) sum += widen(grad[row * p.grad_row + j * p.grad_col]);
      p.column_sum[j] += double(sum);
    }
    i += height;
  }
}
