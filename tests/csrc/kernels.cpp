// Compares the kernels of one instruction-set level (MANUALBP_ISA) with naive loops, on memory of exactly the size that
// each may access. `make asan`, `make tsan` and tests/test_sanitizers.py run it with sanitizers, without torch.
//
//   kernels [CASES]     random shapes, strides and options, this many of each kind and dtype
//   kernels threads     products, masks and sums split over threads as in csrc/cpu/layer.h
//   kernels overflow    deliberate write past the end of C, which the address sanitizer must stop
//   kernels race        deliberate race on the same rows, which the thread sanitizer must report
//
// Exit status 77: this machine does not support the level.
// Numbers are small integers, so products are exact and must be equal; losses are compared within rounding.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/isa.h"
#include "common.h"

namespace {

[[noreturn]] void fail(const char* what, const char* dtype, int64_t m, int64_t n, int64_t k) {
  std::printf("%s, %s, level %s: wrong for %lld x %lld x %lld\n", what, dtype, kernel_table().name, (long long)m,
              (long long)n, (long long)k);
  std::exit(1);
}

// C (M, N) = A (M, K) B (K, N), rows of C `c_m` apart.
template <typename Out, typename T>
Gemm<T, Out> product(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_m, int64_t a_k, const T* b, int64_t b_k,
                     int64_t b_n, Out* c, int64_t c_m) {
  Gemm<T, Out> p{};
  p.m = m, p.n = n, p.k = k;
  p.a = a, p.a_m = a_m, p.a_k = a_k;
  p.b = b, p.b_k = b_k, p.b_n = b_n;
  p.c = c, p.c_m = c_m;
  return p;
}

using Workspace = Exact<char>;
template <typename T>
struct WorkspaceFor : Workspace {
  WorkspaceFor(int64_t n, int64_t k) : Workspace(kernels<T>().workspace_bytes(n, k), 64) {}
};

// A matrix with random strides: contiguous rows or columns, neither, or one of the two repeated.
template <typename T>
struct Strided {
  Strided(int64_t rows, int64_t cols, int high) : Strided(rows, cols, high, below(6), below(3)) {}
  Strided(int64_t rows, int64_t cols, int high, int64_t kind, int64_t gap)
      : row(kind == 0   ? cols
            : kind == 1 ? cols + gap
            : kind == 2 ? 1
            : kind == 3 ? 2 * cols + gap
            : kind == 4 ? 0
                        : 1),
        col(kind == 2   ? rows + gap
            : kind == 3 ? 2
            : kind == 5 ? 0
                        : 1),
        memory(rows && cols ? (rows - 1) * row + (cols - 1) * col + 1 : 0) {
    memory.fill(high);
  }
  double at(int64_t i, int64_t j) const { return to_double(memory.data[i * row + j * col]); }
  int64_t row, col;
  Exact<T> memory;
};

// A size around the edges of the tiles, sometimes beyond a block of the depth (384) or of the columns (256).
int64_t draw_size() {
  static const int64_t edges[] = {1,  2,  3,  5,  6,  7,  8,  9,  11, 12, 13, 15,
                                  16, 17, 23, 24, 25, 31, 32, 33, 48, 63, 64, 65};
  return chance(4) ? 200 + below(300) : chance(20) ? 1 + below(130) : edges[below(sizeof edges / sizeof *edges)];
}

// C (M, N) = A (M, K) B (K, N) with all options. Out is T or its accumulator type.
template <typename T, typename Out>
void check_product(void (*multiply)(const Gemm<T, Out>&, void*), bool accumulates, bool masks) {
  const auto& kernel = kernels<T>();
  // One column, times one number or not, one number, and few rows times a weight have special code.
  const bool few = chance(20);
  const int64_t n = chance(10) ? 1 : draw_size(), m = few ? 1 + below(5) : n == 1 && chance(30) ? 1 : draw_size();
  const int64_t k = chance(3) ? 0 : chance(n == 1 ? 30 : 1) ? 1 : draw_size();
  if (m * n * k > 3000000) return;
  const Strided<T> a(m, k, 2, few ? below(2) : below(6), below(3)), b(k, n, 1, few ? 2 : below(6), below(3));
  const int64_t c_m = n + (chance(30) ? 3 : 0), mask_m = n + (chance(30) ? 2 : 0), bias_stride = below(3);
  Exact<Out> c((m - 1) * c_m + n), mask((m - 1) * mask_m + n);
  Exact<T> bias((n - 1) * bias_stride + 1);
  Exact<accumulator_t<T>> packed(kernel.packed_size(k, n));
  Exact<double> column_sum(n);
  const WorkspaceFor<T> workspace(n, k);
  for (int64_t i = 0; i < c.size; ++i) c.data[i] = Out(rounded<Out>(double(below(5) - 2)));
  for (int64_t i = 0; i < mask.size; ++i) mask.data[i] = rounded<Out>(double(below(3) - 1));
  column_sum.fill(2);
  bias.fill(2);
  auto p = product(m, n, k, a.memory.data, a.row, a.col, b.memory.data, b.row, b.col, c.data, c_m);
  if (chance(50)) p.bias = bias.data, p.bias_stride = bias_stride;
  p.relu = chance(30);
  p.accumulate = accumulates && chance(50);
  if (accumulates && chance(50)) p.unit_rows = chance(50) ? kUnitRows : kLongUnitRows;
  masks = masks && n % kernel_table().tile_cols == 0;
  if (masks && chance(50)) p.mask = mask.data, p.mask_m = mask_m;
  if (masks && chance(50)) p.column_sum = column_sum.data;
  if (chance(40)) {
    kernel.pack(p.b, p.b_k, p.b_n, k, n, packed.data);
    p.packed_b = packed.data;
  }
  (void)kernel.reads_in_place(m, p.b_k, p.b_n, n);
  std::vector<double> want(size_t(m * n)), sums(size_t(n), 0.0);
  for (int64_t j = 0; j < n; ++j) sums[size_t(j)] = column_sum.data[j];
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = p.accumulate ? to_double(c.data[i * c_m + j]) : 0;
      for (int64_t kk = 0; kk < k; ++kk) sum += a.at(i, kk) * b.at(kk, j);
      if (p.bias) sum += to_double(bias.data[j * bias_stride]);
      if (p.relu && sum < 0) sum = 0;
      if (p.mask && to_double(mask.data[i * mask_m + j]) <= 0) sum = 0;
      sums[size_t(j)] += sum;
      want[size_t(i * n + j)] = to_double(rounded<Out>(sum));
    }
  }
  multiply(p, workspace.data);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      if (to_double(c.data[i * c_m + j]) != want[size_t(i * n + j)]) fail("product", name_of<T>(), m, n, k);
    }
  }
  for (int64_t j = 0; p.column_sum && j < n; ++j) {
    if (column_sum.data[j] != sums[size_t(j)]) fail("column sum of a product", name_of<T>(), m, n, k);
  }
}

// With real numbers, whose sums depend on their order: a row of h Omega^T (forward) or df Omega (`backward`) has the
// same bits for all other rows, and whether or not Omega is packed. Some products are so small that they round to -0,
// which adding 0 would lose. (One number, and the rest of a row of df Omega after whole vectors, are excluded: their
// multiply-adds are fused explicitly, those of vectors by the compiler, at -O2 and above.)
template <typename T>
void check_rows() {
  const auto& kernel = kernels<T>();
  const bool backward = chance(50);
  const int64_t rows = 30, k = chance(30) ? 1 + below(20) : chance(30) ? 65 + below(200) : draw_size();
  const int64_t n = backward ? kernel_table().tile_cols * (1 + below(2)) : chance(20) ? 1 : below(40) + 1;
  const int64_t b_k = backward ? n : 1, b_n = backward ? 1 : k;
  Exact<T> h(rows * k), omega(n * k), beta(n), whole(rows * n);
  Exact<accumulator_t<T>> packed(kernel.packed_size(k, n));
  const WorkspaceFor<T> workspace(n, k);
  const double size = chance(10) ? std::ldexp(1.0, sizeof(T) == 8 ? -540 : sizeof(T) == 4 ? -75 : -10) : 0.01;
  for (int64_t i = 0; i < h.size; ++i) h.data[i] = rounded<T>(size * double(below(2001) - 1000));
  for (int64_t i = 0; i < omega.size; ++i) omega.data[i] = rounded<T>(size * double(below(2001) - 1000));
  for (int64_t i = 0; i < n; ++i) beta.data[i] = rounded<T>(size * double(below(2001) - 1000));
  const T* const bias = chance(50) ? beta.data : nullptr;
  const bool relu = chance(30);
  kernel.pack(omega.data, b_k, b_n, k, n, packed.data);
  const auto rows_from = [&](int64_t first, int64_t m, T* out) {
    auto p = product(m, n, k, h.data + first * k, k, 1, omega.data, b_k, b_n, out, n);
    p.bias = bias, p.bias_stride = 1, p.relu = relu;
    return p;
  };
  auto all = rows_from(0, rows, whole.data);
  all.packed_b = packed.data;
  kernel.gemm(all, workspace.data);
  for (const int64_t m : {1, 2, 3, 4, 5, 8, 16, 24, 25, 30}) {
    if (m == 1 && n == 1) continue;
    const int64_t first = below(rows - m + 1);
    Exact<T> part(m * n);
    kernel.gemm(rows_from(first, m, part.data), workspace.data);
    if (std::memcmp(part.data, whole.data + first * n, size_t(m * n) * sizeof(T)) != 0) {
      fail("a row among others", name_of<T>(), m, n, k);
    }
  }
}

// Whether products of T take pairs of k per lane, by the instruction for bfloat16 or a model of it.
template <typename T>
bool has_pairs() {
  return kernels<T>().packed_size(2, 1) == kernels<T>().packed_size(1, 1);
}

// a . b + c as the level computes it: with pairs, denormal numbers count as 0.
float multiply_add(float a, float b, float c, bool flush) {
  const auto flushed = [&](float x) {
    return flush && std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
  };
  return flushed(std::fma(flushed(a), flushed(b), flushed(c)));
}

// Half precision in the documented order, bit for bit: an element of C is a sum of parts in ascending order, a part one
// of products; with pairs, the second product of a pair is added before the first. Operands lie anywhere and have any
// strides, the product is computed as a whole and cut in four pieces, and some numbers are NaN, Inf, tiny or huge.
template <typename T, typename Out>
void check_order(void (*multiply)(const Gemm<T, Out>&, void*)) {
  const auto& kernel = kernels<T>();
  const bool pairs = has_pairs<T>(), sums = std::is_same_v<Out, accumulator_t<T>>, gradient = sums && chance(50);
  const int64_t m = chance(20) ? 1 : draw_size(), n = chance(20) ? 1 : draw_size(), skip = below(2);
  const int64_t k = chance(5) ? 0 : gradient && chance(30) ? below(900) : draw_size();
  if (m * n * k > 300000) return check_order<T, Out>(multiply);
  const Strided<T> a(m, k + skip, 1, chance(70) ? (gradient ? 2 : below(2)) : below(6), below(3)), b(k, n, 1);
  for (const Exact<T>* each : {&a.memory, &b.memory}) {
    const double strange[] = {NAN, INFINITY, -INFINITY, -0.0, 1e-39, -3e-39, 1e-20, -1e-20, 1e20, -3e38};
    const int percent = chance(30) ? 3 : 0;
    for (int64_t i = 0; i < each->size; ++i) {
      const double x = std::ldexp(double(below(511) - 255), -4 - int(below(16)));  // so that sums are rounded
      each->data[i] = rounded<T>(chance(percent) ? strange[below(pairs ? 10 : 4)] : x);
    }
  }
  const int64_t cut = below(m), cut_col = below(n) / kernel_table().tile_cols * kernel_table().tile_cols;
  Exact<Out> c(m * n), pieces(m * n);
  Exact<T> bias(n);
  Exact<accumulator_t<T>> packed(kernel.packed_size(k, n));
  const WorkspaceFor<T> workspace(n, k);
  for (int64_t i = 0; i < c.size; ++i) c.data[i] = pieces.data[i] = rounded<Out>(double(below(2001) - 1000) / 100);
  for (int64_t i = 0; i < n; ++i) bias.data[i] = rounded<T>(double(below(2001) - 1000) / 100);
  auto p = product(m, n, k, a.memory.data + skip * a.col, a.row, a.col, b.memory.data, b.row, b.col, c.data, n);
  p.accumulate = sums && chance(50);
  p.unit_rows = !gradient ? 0 : chance(50) ? kUnitRows : kLongUnitRows;
  if (!sums && chance(50)) p.bias = bias.data, p.bias_stride = 1;
  p.relu = !sums && chance(50);
  if (chance(50)) {
    kernel.pack(p.b, p.b_k, p.b_n, k, n, packed.data);
    p.packed_b = packed.data;
  }
  const auto is_double = [&](int64_t rows, int64_t cols) { return rows == 1 && cols == 1 && gradient; };
  if (is_double(m, n) || is_double(m - cut, n - cut_col) || is_double(cut, cut_col) || is_double(cut, n - cut_col)) {
    return;
  }
  std::vector<float> as(size_t(m * k)), bs(size_t(k * n));
  for (int64_t i = 0; i < m * k; ++i) as[size_t(i)] = float(a.at(i / k, i % k + skip));
  for (int64_t i = 0; i < k * n; ++i) bs[size_t(i)] = float(b.at(i / n, i % n));
  std::vector<Out> want(size_t(m * n));
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const auto part = [&](int64_t begin, int64_t end) {
        const auto term = [&](int64_t kk, float sum) {
          const bool exists = kk < end;
          return multiply_add(exists ? as[size_t(i * k + kk)] : 0, exists ? bs[size_t(kk * n + j)] : 0, sum, pairs);
        };
        float sum = 0;
        for (int64_t kk = begin; kk < end; kk += 2) {
          sum = pairs ? term(kk, term(kk + 1, sum)) : kk + 1 < end ? term(kk + 1, term(kk, sum)) : term(kk, sum);
        }
        return sum;
      };
      float sum = p.accumulate ? float(to_double(c.data[i * n + j])) : 0;
      for (int64_t k0 = 0, length; k0 < k; k0 += length) {
        length = std::min(k - k0, gradient ? p.unit_rows : kSumDepth);
        float unit = 0;
        for (int64_t done = 0, depth; done < length; done += depth) {
          depth = length - done <= kSumDepth ? length - done : kSumRows;
          const float next = part(k0 + done, k0 + done + depth);
          unit = done ? next + unit : next;
        }
        sum = p.accumulate || k0 ? unit + sum : unit;
      }
      if (p.bias) sum += float(to_double(bias.data[j]));
      if (p.relu && sum < 0) sum = 0;
      want[size_t(i * n + j)] = rounded<Out>(double(sum));
    }
  }
  const auto compare = [&](const Exact<Out>& got, const char* what) {  // as bits, except those of a NaN
    for (int64_t i = 0; i < m * n; ++i) {
      const bool both_nan = std::isnan(to_double(got.data[i])) && std::isnan(to_double(want[size_t(i)]));
      if (!both_nan && std::memcmp(&got.data[i], &want[size_t(i)], sizeof(Out)) != 0) fail(what, name_of<T>(), m, n, k);
    }
  };
  multiply(p, workspace.data);
  compare(c, "order of a product");
  for (const int64_t row : {int64_t(0), cut}) {
    for (const int64_t col : {int64_t(0), cut_col}) {
      auto piece = p;
      piece.m = row || !cut ? m - row : cut;
      piece.n = col || !cut_col ? n - col : cut_col;
      piece.a += row * p.a_m;
      piece.b += col * p.b_n;
      piece.c = pieces.data + row * n + col;
      if (p.bias) piece.bias += col;
      if (p.packed_b) piece.packed_b += kernel.packed_size(k, col);
      multiply(piece, workspace.data);
      if (!cut_col) break;
    }
    if (!cut) break;
  }
  compare(pieces, "product in pieces");
}

template <typename T>
void check_relu_backward() {
  const int64_t rows = chance(5) ? 0 : chance(20) ? 100 + below(200) : draw_size(), cols = draw_size();
  const Strided<T> grad(rows, cols, 2);
  const int64_t h_row = cols + (chance(30) ? 3 : 0);
  Exact<T> h(rows ? (rows - 1) * h_row + cols : 0), apart(rows * cols);
  Exact<double> sum(cols);
  h.fill(1);
  sum.fill(2);
  ReluBackward<T> p{};
  p.rows = rows, p.cols = cols, p.h_row = h_row;
  p.grad = grad.memory.data, p.grad_row = grad.row, p.grad_col = grad.col;
  if (chance(70)) p.h = h.data;
  const bool in_place = grad.row == cols && grad.col == 1;
  if (chance(70)) p.out = in_place && chance(50) ? grad.memory.data : apart.data;
  if (chance(70)) p.column_sum = sum.data;
  if (p.h && chance(50)) p.scale = 2;
  std::vector<double> want(size_t(rows * cols)), sums(sum.data, sum.data + cols);
  for (int64_t j = 0; j < cols; ++j) {
    for (int64_t i = 0; i < rows; ++i) {
      const bool off = p.h && to_double(h.data[i * h_row + j]) <= 0;
      sums[size_t(j)] += want[size_t(i * cols + j)] = off ? 0 : grad.at(i, j) * (p.h ? double(p.scale) : 1);
    }
  }
  const int64_t middle = cols > 32 ? below(cols + 1) : 0;  // in two stripes, the second one first
  p.first_col = middle, p.last_col = cols;
  kernels<T>().relu_backward(p);
  p.first_col = 0, p.last_col = middle;
  kernels<T>().relu_backward(p);
  for (int64_t i = 0; p.out && i < rows * cols; ++i) {
    if (to_double(p.out[i]) != want[size_t(i)]) fail("relu_backward", name_of<T>(), rows, cols, 0);
  }
  for (int64_t j = 0; p.column_sum && j < cols; ++j) {
    if (sum.data[j] != sums[size_t(j)]) fail("sums of relu_backward", name_of<T>(), rows, cols, 0);
  }
  if (!p.column_sum || p.h || p.out) return;
  kernels<T>().sum_by_tiles(p);
  for (int64_t i = 0; i < rows * cols; ++i) sums[size_t(i % cols)] += grad.at(i / cols, i % cols);
  for (int64_t j = 0; j < cols; ++j) {
    if (sum.data[j] != sums[size_t(j)]) fail("sum_by_tiles", name_of<T>(), rows, cols, 0);
  }
}

template <typename T>
void check_dropout() {
  const int64_t size = draw_size(), begin = below(size + 1), end = begin + below(size - begin + 1);
  Exact<T> h(size);
  Exact<uint8_t> kept(size);
  h.fill(2);
  for (int64_t i = 0; i < size; ++i) kept.data[i] = uint8_t(below(2));
  std::vector<double> want;
  for (int64_t i = 0; i < size; ++i) {
    const bool inside = i >= begin && i < end;
    want.push_back(to_double(h.data[i]) * (!inside ? 1 : kept.data[i] ? 2 : 0));
  }
  Dropout<T> p{h.data, kept.data, 2};
  kernels<T>().dropout(p, begin, end);
  for (int64_t i = 0; i < size; ++i) {
    if (to_double(h.data[i]) != want[size_t(i)]) fail("dropout", name_of<T>(), size, begin, end);
  }
}

template <typename T, typename Partial>
void check_reduce(void (*reduce)(const Reduce<T, Partial>&, int64_t, int64_t)) {
  const int64_t slices = 1 + below(9), size = chance(20) ? 500 + below(600) : draw_size(), stride = size + below(5);
  Exact<Partial> partial((slices - 1) * stride + size);
  Exact<T> out(size);
  partial.fill(2);
  out.fill(2);
  const int64_t begin = chance(50) ? 0 : below(size), end = chance(50) ? size : begin + below(size - begin + 1);
  std::vector<double> want(static_cast<size_t>(size));
  for (int64_t i = 0; i < size; ++i) {
    double sum = to_double(out.data[i]);
    if (i >= begin && i < end) {
      sum = 0;
      for (int64_t s = 0; s < slices; ++s) sum += to_double(partial.data[s * stride + i]);
    }
    want[size_t(i)] = to_double(rounded<T>(sum));
  }
  reduce({slices, stride, partial.data, out.data}, begin, end);
  for (int64_t i = 0; i < size; ++i) {
    if (to_double(out.data[i]) != want[size_t(i)]) fail("reduce", name_of<T>(), slices, size, 0);
  }
}

// Sums are added to a total, which starts as a copy of the first and is added to the last.
template <typename A>
void check_add_up(const Kernels<A>& kernel) {
  const int64_t size = draw_size(), begin = below(size), end = begin + below(size - begin + 1);
  Exact<A> sum(size);
  Exact<double> total(size);
  const bool first = chance(50), last = !first && chance(50);
  std::vector<double> sums(static_cast<size_t>(size)), totals(static_cast<size_t>(size));
  sum.fill(2);
  total.fill(2);
  for (int64_t i = 0; i < size; ++i) {
    const bool in = i >= begin && i < end;
    const double s = to_double(sum.data[i]), t = total.data[i];
    sums[size_t(i)] = in && last ? s + t : s;
    totals[size_t(i)] = !in || last ? t : first ? s : s + t;
  }
  kernel.add_up({sum.data, total.data, first, last}, begin, end);
  for (int64_t i = 0; i < size; ++i) {
    const bool right = to_double(sum.data[i]) == sums[size_t(i)] && total.data[i] == totals[size_t(i)];
    if (!right) fail("add_up", name_of<A>(), size, begin, end);
  }
}

// Computes a loss by its formula in double; f and targets are real numbers.
template <typename T>
void check_loss(LossKind kind) {
  const int64_t rows = chance(5) ? 0 : draw_size() % 40, cols = draw_size();
  Exact<T> f(rows * cols);
  for (int64_t i = 0; i < f.size; ++i) f.data[i] = rounded<T>(double(below(2001) - 1000) / 125);
  const Strided<T> target(rows, cols, 1);
  const int64_t class_stride = 1 + below(2);
  Exact<int64_t> classes(rows ? (rows - 1) * class_stride + 1 : 0);
  for (int64_t i = 0; i < classes.size; ++i) classes.data[i] = chance(20) ? -100 : below(cols);
  Loss<T> p{};
  p.rows = rows, p.cols = cols, p.f = f.data, p.scale = chance(50) ? 1.0 : 0.125, p.gradient = chance(70);
  p.ignore_index = -100, p.label_smoothing = chance(50) ? 0.0 : 0.25;
  if (has_class_target(kind)) {
    p.classes = classes.data, p.target_row = class_stride;
  } else {
    p.target = target.memory.data, p.target_row = target.row, p.target_col = target.col;
  }
  double want = 0;
  std::vector<double> df(size_t(rows * cols), 0.0);
  for (int64_t i = 0; i < rows; ++i) {
    double largest = -INFINITY, total = 0;
    for (int64_t j = 0; j < cols; ++j) largest = std::fmax(largest, to_double(f.data[i * cols + j]));
    for (int64_t j = 0; j < cols; ++j) total += std::exp(to_double(f.data[i * cols + j]) - largest);
    for (int64_t j = 0; j < cols; ++j) {
      const double x = to_double(f.data[i * cols + j]);
      double& d = df[size_t(i * cols + j)];
      if (has_class_target(kind)) {
        const int64_t c = classes.data[i * class_stride];
        const double y = (c == j ? 1 - p.label_smoothing : 0) + p.label_smoothing / double(cols);
        if (c == p.ignore_index) continue;
        want -= y * (x - largest - std::log(total));
        d = std::exp(x - largest) / total - y;
      } else {
        const double y = target.at(i, j);
        want += kind == LossKind::mse ? (x - y) * (x - y) : (1 - y) * x + std::log1p(std::exp(-x));
        d = kind == LossKind::mse ? 2 * (x - y) : 1 / (1 + std::exp(-x)) - y;
      }
    }
  }
  const double got = kernels<T>().loss(kind)(p);
  const double rounding = sizeof(T) == 8 ? 1e-12 : sizeof(T) == 4 ? 2e-5 : 2e-2;
  const char* const names[] = {"mse", "bce_with_logits", "cross_entropy"};
  const char* what = names[int(kind)];
  // Except in double, the value is a sum of terms of up to 20 that are rounded to float.
  if (std::fabs(got - want) > (sizeof(T) == 8 ? 1e-11 : 2e-5) * (1 + double(rows * cols) * 20)) {
    fail(what, name_of<T>(), rows, cols, 0);
  }
  for (int64_t i = 0; p.gradient && i < rows * cols; ++i) {
    const double scaled = df[size_t(i)] * p.scale;
    if (std::fabs(to_double(f.data[i]) - scaled) > rounding * (1 + std::fabs(scaled))) {
      fail(what, name_of<T>(), rows, cols, 0);
    }
  }
}

// The sums of gradient flow on integers, which are exact in double.
template <typename T>
void check_flow() {
  const int64_t rows = below(40), cols = below(40);
  Exact<T> f(rows * cols), df(rows * cols), copy(rows * cols);
  f.fill(2), df.fill(2);
  if (f.size && chance(30)) f.data[below(f.size)] = rounded<T>(NAN);
  const bool relu = chance(50);
  FlowSums want{};
  Moments alone{}, apart{};
  for (int64_t j = 0; j < cols; ++j) {
    bool off = true, on = true;
    for (int64_t i = 0; i < rows; ++i) {
      const double x = to_double(f.data[i * cols + j]), dx = to_double(df.data[i * cols + j]);
      want.f += x * x;
      want.h += relu && x < 0 ? 0 : x * x;
      want.df += dx * dx;
      off = off && x <= 0;
      on = on && x > 0;
      alone.sum += dx;
      alone.square += dx * dx;
      apart.sum += dx - x;
      apart.square += (dx - x) * (dx - x);
    }
    want.off += off;
    want.on += on;
  }
  const auto same = [](double a, double b) { return a == b || (a != a && b != b); };
  LayerFlow<T> layer{};
  layer.rows = rows, layer.cols = cols, layer.f = f.data, layer.df = df.data, layer.relu = relu;
  const FlowSums got = kernels<T>().layer_flow(layer);
  if (!same(got.f, want.f) || !same(got.h, want.h) || got.df != want.df || got.off != want.off || got.on != want.on) {
    fail("layer_flow", name_of<T>(), rows, cols, 0);
  }
  const Moments a = kernels<T>().moments(df.data, nullptr, copy.data, df.size);
  const Moments b = kernels<T>().moments(df.data, f.data, nullptr, df.size);
  if (a.sum != alone.sum || a.square != alone.square || !same(b.sum, apart.sum) || !same(b.square, apart.square) ||
      (df.size && std::memcmp(copy.data, df.data, size_t(df.size) * sizeof(T)) != 0)) {
    fail("moments", name_of<T>(), rows, cols, 0);
  }
}

// A step of SGD or Adam on part of a run, against the equations in double, and the same step cut in two, bit for bit.
template <typename T>
void check_update() {
  const int64_t size = chance(20) ? 200 + below(600) : draw_size(), begin = below(size),
                end = begin + below(size - begin);
  const bool adam = chance(60), amsgrad = adam && chance(40), momentum = !adam && chance(70);
  const auto number = [](double low, double high) { return low + (high - low) * double(below(1001)) / 1000; };
  UpdateScalars<double> s{};
  s.step_size = number(0, 0.5), s.maximize = chance(30), s.nesterov = chance(50);
  if (chance(50)) s.weight_decay = number(0, 0.5);
  if (chance(50)) s.gradient_scale = number(0, 1);
  if (adam && chance(30)) s.shrink = number(0.5, 1);
  s.momentum = number(0, 1), s.gain = number(0, 1), s.weight1 = number(0, 1), s.beta2 = number(0, 1);
  s.weight2 = 1 - s.beta2, s.correction2 = number(0.1, 1), s.eps = chance(50) ? 1e-8 : 0.1;
  const AllUpdateScalars all = in_both_types(s);
  Exact<T> p(size), g(size), first(size), second(size), largest(size);
  for (Exact<T>* each : {&p, &g, &first}) {
    for (int64_t i = 0; i < size; ++i) each->data[i] = rounded<T>(number(-2, 2));
  }
  for (Exact<T>* each : {&second, &largest}) {
    for (int64_t i = 0; i < size; ++i) each->data[i] = rounded<T>(number(0.5, 2));
  }
  Update u{};
  u.parameter = p.data, u.gradient = g.data;
  if (adam || momentum) u.first = first.data;
  if (adam) u.second = second.data;
  if (amsgrad) u.largest = largest.data;
  u.fresh = momentum && chance(30);
  Exact<T>* const written[] = {&p, &first, &second, &largest};
  std::vector<double> want[4], scale[4];  // scale: what an error is relative to
  for (int k = 0; k < 4; ++k) {
    for (int64_t i = 0; i < size; ++i) want[k].push_back(to_double(written[k]->data[i]));
    scale[k].assign(size_t(size), 0.0);
  }
  for (int64_t i = begin; i < end; ++i) {
    double &x = want[0][size_t(i)], &m = want[1][size_t(i)], &v = want[2][size_t(i)], &l = want[3][size_t(i)];
    double gradient = to_double(g.data[i]);
    if (s.gradient_scale != 1) gradient = to_double(rounded<T>(gradient * s.gradient_scale));
    if (s.maximize) gradient = -gradient;
    const double terms = std::fabs(gradient) + s.weight_decay * std::fabs(x) + std::fabs(m);
    gradient += s.weight_decay * x;
    double change;
    if (adam) {
      x *= s.shrink;
      m += s.weight1 * (gradient - m);
      v = s.beta2 * v + s.weight2 * gradient * gradient;
      if (amsgrad) l = std::max(l, v);
      const double denominator = std::sqrt(amsgrad ? l : v) / s.correction2 + s.eps;
      change = s.step_size * m / denominator;
      scale[0][size_t(i)] = std::fabs(x) + s.step_size * terms / denominator + std::fabs(change) * terms * terms / v;
    } else {
      const double b = u.fresh ? gradient : s.momentum * m + s.gain * gradient;
      if (momentum) m = b;
      change = s.step_size * (!momentum ? gradient : s.nesterov ? gradient + s.momentum * b : b);
      scale[0][size_t(i)] = std::fabs(x) + 2 * s.step_size * terms;
    }
    x -= change;
    scale[1][size_t(i)] = terms, scale[2][size_t(i)] = scale[3][size_t(i)] = std::fabs(v) + terms * terms;
  }
  std::vector<std::vector<char>> start;
  for (Exact<T>* each : written) {
    const char* bytes = reinterpret_cast<const char*>(each->data);
    start.emplace_back(bytes, bytes + size * int64_t(sizeof(T)));
  }
  kernels<T>().update(u, all, begin, end);
  const double rounding = sizeof(T) == 8                ? 1e-14
                          : sizeof(T) == 4              ? 2e-6
                          : std::is_same_v<T, bfloat16> ? 1.01 / 256
                                                        : 1.01 / 2048;
  std::vector<std::vector<char>> whole;
  for (int k = 0; k < 4; ++k) {
    for (int64_t i = 0; i < size; ++i) {
      const double error = std::fabs(to_double(written[k]->data[i]) - want[k][size_t(i)]);
      if (!(error <= rounding * (scale[k][size_t(i)] + std::fabs(want[k][size_t(i)]) * (i >= begin && i < end)))) {
        fail(adam ? "update by Adam" : "update by SGD", name_of<T>(), size, begin, end);
      }
    }
    const char* bytes = reinterpret_cast<const char*>(written[k]->data);
    whole.emplace_back(bytes, bytes + start[size_t(k)].size());
    std::memcpy(written[k]->data, start[size_t(k)].data(), start[size_t(k)].size());
  }
  const int64_t cut = begin + below(end - begin + 1);
  kernels<T>().update(u, all, begin, cut);
  kernels<T>().update(u, all, cut, end);
  for (int k = 0; k < 4; ++k) {
    if (std::memcmp(written[k]->data, whole[size_t(k)].data(), whole[size_t(k)].size()) != 0) {
      fail("update in two parts", name_of<T>(), size, begin, end);
    }
  }
}

template <typename T>
void check_all(int cases) {
  const auto& kernel = kernels<T>();
  constexpr bool whole = sizeof(T) == sizeof(accumulator_t<T>);
  for (int i = 0; i < cases; ++i) {
    check_product<T, T>(kernel.gemm, false, whole);
    check_product<T, accumulator_t<T>>(kernel.gemm_accumulated, true, whole);
    check_rows<T>();
    if constexpr (!whole) {
      check_order<T, T>(kernel.gemm);
      check_order<T, accumulator_t<T>>(kernel.gemm_accumulated);
    }
    check_relu_backward<T>();
    check_dropout<T>();
    check_reduce<T>(kernels<T>().reduce);
    check_reduce<T>(kernels<T>().reduce_double);
    if constexpr (sizeof(T) == sizeof(accumulator_t<T>)) check_add_up<T>(kernels<T>());
    check_loss<T>(LossKind(i % 3));
    check_flow<T>();
    check_update<T>();
  }
}

// Calls f(begin, end) on `threads` threads, each with an equal part of [0, n).
template <typename F>
void in_parallel(int64_t n, int threads, const F& f) {
  std::vector<std::thread> team;
  const int64_t share = (n + threads - 1) / threads;
  for (int64_t begin = 0; begin < n; begin += share) {
    team.emplace_back([=, &f] { f(begin, std::min(begin + share, n)); });
  }
  for (auto& thread : team) thread.join();
}

// A layer: forward by rows of the batch from one packed weight, df with d(beta) in units of rows, d(Omega) in blocks.
// With overlap, a thread also computes 12 rows of its neighbour, which is the race to detect.
template <typename T>
void check_threads(int threads, int64_t overlap) {
  using A = accumulator_t<T>;
  const auto& kernel = kernels<T>();
  const int64_t rows = 300, d_in = 70, d_out = 50, unit = 128, units = (rows + unit - 1) / unit;
  Exact<T> h(rows * d_in), omega(d_out * d_in), beta(d_out), f(rows * d_out), df(rows * d_out), dbeta(d_out);
  Exact<A> packed(kernel.packed_size(d_in, d_out)), domega(d_out * d_in);
  std::vector<double> partial(size_t(units * d_out), 0.0);
  h.fill(2), omega.fill(1), beta.fill(2), df.fill(1);
  kernel.pack(omega.data, 1, d_in, d_in, d_out, packed.data);
  std::vector<double> want_f(size_t(rows * d_out)), want_domega(size_t(d_out * d_in)),
      want_dbeta(static_cast<size_t>(d_out));
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < d_out; ++j) {
      double sum = to_double(beta.data[j]);
      for (int64_t k = 0; k < d_in; ++k) sum += to_double(h.data[i * d_in + k]) * to_double(omega.data[j * d_in + k]);
      want_f[size_t(i * d_out + j)] = sum < 0 ? 0 : to_double(rounded<T>(sum));
      const double d = sum <= 0 ? 0 : to_double(df.data[i * d_out + j]);
      want_dbeta[size_t(j)] += d;
      for (int64_t k = 0; k < d_in; ++k) want_domega[size_t(j * d_in + k)] += d * to_double(h.data[i * d_in + k]);
    }
  }
  in_parallel(rows, threads, [&](int64_t begin, int64_t end) {
    const WorkspaceFor<T> workspace(d_out, d_in);
    const int64_t count = std::min(end + overlap, rows) - begin;
    auto p =
        product(count, d_out, d_in, h.data + begin * d_in, d_in, 1, omega.data, 1, d_in, f.data + begin * d_out, d_out);
    p.bias = beta.data, p.bias_stride = 1, p.relu = true, p.packed_b = packed.data;
    kernel.gemm(p, workspace.data);
  });
  in_parallel(units, threads, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
      const int64_t at = u * unit * d_out;
      ReluBackward<T> p{};
      p.rows = std::min(unit, rows - u * unit), p.cols = d_out;
      p.grad = df.data + at, p.grad_row = d_out, p.grad_col = 1;
      p.h = f.data + at, p.h_row = d_out, p.out = df.data + at, p.column_sum = partial.data() + u * d_out;
      p.last_col = d_out;
      kernel.relu_backward(p);
    }
  });
  in_parallel(d_out, threads, [&](int64_t begin, int64_t end) {
    kernel.reduce_double({units, d_out, partial.data(), dbeta.data}, begin, end);
    const WorkspaceFor<T> workspace(d_in, rows);
    kernel.gemm_accumulated(
        product(end - begin, d_in, rows, df.data + begin, 1, d_out, h.data, d_in, 1, domega.data + begin * d_in, d_in),
        workspace.data);
  });
  const auto compare = [&](const auto& got, const std::vector<double>& want, const char* what, auto type) {
    for (int64_t i = 0; i < got.size; ++i) {
      const double expected = to_double(rounded<decltype(type)>(want[size_t(i)]));
      if (to_double(got.data[i]) != expected) fail(what, name_of<T>(), rows, d_out, d_in);
    }
  };
  compare(f, want_f, "forward on threads", T{});
  compare(dbeta, want_dbeta, "bias gradient on threads", T{});
  compare(domega, want_domega, "weight gradient on threads", A{});
}

void overflow() {
  const Strided<float> a(24, 8, 1, 0, 0), b(8, 64, 1, 0, 0);
  Exact<float> c(24 * 64 - 1);
  const WorkspaceFor<float> workspace(64, 8);
  kernels<float>().gemm(product<float>(24, 64, 8, a.memory.data, 8, 1, b.memory.data, 64, 1, c.data, 64),
                        workspace.data);
}

}  // namespace

int main(int count, char** arguments) {
  const std::string what = count > 1 ? arguments[1] : "1000";
  try {
    kernel_table();
  } catch (const std::exception& error) {
    std::printf("skipped: %s\n", error.what());
    return 77;
  }
  if (what == "overflow") {
    overflow();
  } else if (what == "threads" || what == "race") {
    for (int threads : {2, 4, 7}) {
      check_threads<float>(threads, what == "race" ? 12 : 0);
      check_threads<double>(threads, 0);
      check_threads<bfloat16>(threads, 0);
      check_threads<float16>(threads, 0);
    }
  } else {
    const int cases = std::atoi(what.c_str());
    check_all<float>(cases);
    check_all<double>(cases);
    check_all<bfloat16>(cases);
    check_all<float16>(cases);
  }
  std::printf("%s: %s passed\n", kernel_table().name, what.c_str());
}
