// The steps of one layer on a block of rows. Lecture notation: f = beta + Omega h, h' = a[f].
//
//   forward           f = h Omega^T + beta, and ReLU if asked for, in one pass
//   dropout           h' = m . a[f] with m in {0, scale}, in place
//   relu_backward     df = scale I[h' > 0] . dh',  d(beta) = column sums of df, in one pass
//   bias_gradient     d(beta) alone, where no ReLU follows
//   input_gradient    dh = df Omega
//   hidden_gradient   input_gradient and the relu_backward of the layer below
//   weight_gradient   d(Omega) = df^T h
//   relu, copy        h' = a[f],  h' = f
//
// Each step runs on one thread or is divided among torch's threads, depending on its Workers. The division never
// changes a result: one thread sums an element of a product, in ascending order, and sums over rows are made in slices
// whose number depends on the sizes alone, and then added in order.
//
// The relative error of sums over rows stays below 1e-6 at any number of rows: parts of 48 rows, the parts of a unit,
// and units up to a few thousand rows are added in the accumulator type, everything beyond in double (see Sums in
// backward.h).
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "isa.h"
#include "plan.h"
#include "tensor.h"

namespace manualbp {

// What the product of (m, k) and (k, n) costs, in multiply-adds.
inline double product_work(int64_t m, int64_t n, int64_t k) {
  return (double(m) * double(n) + double(kFetchRows) * double(m + n)) * double(std::max<int64_t>(k, 1));
}

// Uninitialised memory, aligned to a cache line. Small blocks come from malloc, since a tensor costs 1 us and a small
// network needs five of them; large ones come from torch's allocator, which reports it when memory runs out.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size) {
    const int64_t bytes = size * int64_t(sizeof(T));
    if (bytes <= kSmall) small_.reset(std::malloc(size_t(bytes + kAlign)));
    if (!small_) large_.emplace(empty({bytes + kAlign}, aoti_torch_dtype_uint8()));
    const auto address = reinterpret_cast<intptr_t>(small_ ? small_.get() : manualbp::data<void>(*large_));
    data = reinterpret_cast<T*>(round_up(address, kAlign));
  }
  T* data;

 private:
  static constexpr int64_t kAlign = 64, kSmall = 64 << 10;
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> small_;
  std::optional<Tensor> large_;
};

// The threads that compute a step: all of torch's, or the calling thread only (`alone`). Each has a workspace for
// packing.
class Workers {
 public:
  Workers(char* workspaces, int64_t bytes, int64_t threads) : base_(workspaces), bytes_(bytes), threads_(threads) {}

  int64_t threads() const { return threads_; }
  bool is_alone() const { return alone_; }

  // The calling thread, counted from 0.
  int64_t index() const {
    if (threads_ == 1) return 0;
    uint32_t thread;
    MBP_TORCH(torch_get_thread_idx(&thread));
    return thread;
  }

  // The workspace of the calling thread.
  void* workspace() const { return base_ + index() * bytes_; }

  // The calling thread only, for use inside a parallel region: steps are then not divided any further.
  Workers alone() const {
    Workers one(static_cast<char*>(workspace()), bytes_, 1);
    one.alone_ = true;
    return one;
  }

  // Runs f(begin, end) over [0, tasks), on one thread if `work` multiply-adds are too few for two.
  template <typename F>
  void run(int64_t tasks, double work, const F& f) const {
    if (threads_ == 1 || tasks <= 1 || work < 2 * kGrain) {
      if (tasks > 0) f(int64_t(0), tasks);
    } else {
      torch::stable::parallel_for(0, tasks, 1, f);
    }
  }

 private:
  char* base_;
  int64_t bytes_, threads_;
  bool alone_ = false;
};

// The threads of a call and their packing workspaces, for products of at most n columns and depth k.
template <typename T>
struct Team {
  Team(int64_t n, int64_t k)
      : bytes(round_up(kernels<T>().workspace_bytes(n, k), 64)),
        threads(torch::stable::get_num_threads()),
        memory(threads * bytes),
        workers(memory.data, bytes, threads) {}
  int64_t bytes, threads;
  Buffer<char> memory;
  Workers workers;
};

// The number of parts that a step is divided into. work: its multiply-adds.
inline int64_t parts_of(double work, const Workers& workers) {
  return std::clamp<int64_t>(int64_t(work / kGrain), 1, workers.threads());
}

// A piece of a matrix: rows [first_row, last_row) and columns [first_col, last_col).
struct Piece {
  int64_t first_row, last_row, first_col, last_col;
};

// A matrix cut into a grid of pieces of `rows` x `cols`; those at its end are smaller.
struct Grid {
  int64_t m, n;  // of the matrix
  int64_t rows, cols;

  int64_t across() const { return ceil_div(n, cols); }
  int64_t pieces() const { return ceil_div(m, rows) * across(); }
  Piece operator[](int64_t i) const {
    const int64_t row = i / across() * rows, col = i % across() * cols;
    return {row, std::min(row + rows, m), col, std::min(col + cols, n)};
  }
};

// With at least this many threads, products are cut in both directions, and two may share a parallel region.
constexpr int64_t kManyThreads = 8;

// Cuts C (m, n) = A B into at most `parts` pieces of whole register tiles. Few take rows, or columns if there are more of
// these, so that the larger matrix is read once. Many form the grid whose largest piece costs least: it computes its
// numbers, and fetches its rows of A and, unless they are packed, its columns of B.
inline Grid grid_of(int64_t m, int64_t n, int64_t parts, bool packed_b) {
  const KernelTable& table = kernel_table();
  const auto cut = [&](int64_t down, int64_t across) {
    return Grid{m, n, down == 1 ? m : round_up(ceil_div(m, down), table.tile_rows),
                across == 1 ? n : round_up(ceil_div(n, across), table.tile_cols)};
  };
  Grid best = cut(1, 1);
  double least = 0;
  const auto consider = [&](const Grid& grid) {
    // A sum over a batch that is a product of one number is made in another order than in a larger product (gemm_number),
    // so that no piece may be one: the last piece of all is the smallest.
    if ((m - 1) % grid.rows == 0 && (n - 1) % grid.cols == 0) return;
    const double rows = double(std::min(grid.rows, m)), cols = double(std::min(grid.cols, n));
    const double cost = rows * cols + double(kFetchRows) * (rows + (packed_b ? 0 : cols));
    if (least == 0 || cost < least) best = grid, least = cost;
  };
  if (parts < kManyThreads) {
    m >= n ? consider(cut(parts, 1)) : consider(cut(1, parts));
  } else {
    const int64_t most = std::min(parts, ceil_div(n, table.tile_cols));
    for (int64_t across = 1; across <= most; ++across) consider(cut(parts / across, across));
  }
  return best;
}

// Computes products, divided among threads. Each is a struct with work(), grid(parts) and compute(piece, workspace).
template <typename Product>
void run_product(const Product& product, const Workers& workers) {
  const double work = product.work();
  const Grid grid = product.grid(parts_of(work, workers));
  workers.run(grid.pieces(), work, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) product.compute(grid[i], workers.workspace());
  });
}

// Two products in one parallel region, if there are many threads: each is then cut into half as many pieces, which fetch
// less, and there is one barrier. Few threads compute one after another, since all of them finish each at the same time.
template <typename One, typename Other>
void run_products(const One& one, const Other& other, const Workers& workers) {
  const double work = one.work() + other.work();
  const int64_t parts = parts_of(work, workers);
  if (parts < kManyThreads) {
    run_product(one, workers);
    return run_product(other, workers);
  }
  const int64_t share = std::clamp<int64_t>(int64_t(double(parts) * one.work() / work + 0.5), 1, parts - 1);
  const Grid grid = one.grid(share), other_grid = other.grid(parts - share);
  const int64_t pieces = grid.pieces();
  workers.run(pieces + other_grid.pieces(), work, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      i < pieces ? one.compute(grid[i], workers.workspace())
                 : other.compute(other_grid[i - pieces], workers.workspace());
    }
  });
}

// C = A B. Out: the storage type, or the accumulator type.
template <typename T, typename Out>
struct WholeGemm {
  const Gemm<T, Out>& whole;
  double work() const { return product_work(whole.m, whole.n, whole.k); }
  Grid grid(int64_t parts) const { return grid_of(whole.m, whole.n, parts, whole.packed_b); }
  void compute(const Piece& piece, void* workspace) const {
    Gemm<T, Out> p = whole;
    p.m = piece.last_row - piece.first_row;
    p.n = piece.last_col - piece.first_col;
    p.a += piece.first_row * p.a_m;
    p.b += piece.first_col * p.b_n;
    p.c += piece.first_row * p.c_m + piece.first_col;
    if (p.bias) p.bias += piece.first_col * p.bias_stride;
    if (p.packed_b) p.packed_b += kernels<T>().packed_size(p.k, piece.first_col);  // whole panels
    if constexpr (std::is_same_v<T, Out>) {
      kernels<T>().gemm(p, workspace);
    } else {
      kernels<T>().gemm_accumulated(p, workspace);
    }
  }
};
template <typename T, typename Out>
void gemm(const Gemm<T, Out>& p, const Workers& workers) {
  if (p.m > 0 && p.n > 0) run_product(WholeGemm<T, Out>{p}, workers);
}

// A layer's parameters, and its weight packed for the two products that multiply by it.
template <typename T>
struct Layer {
  Matrix<const T> omega;  // (D_out, D_in)
  Bias<T> beta;  // (D_out), or none
  const accumulator_t<T>* packed_transposed = nullptr;  // Omega^T (D_in, D_out), for forward
  const accumulator_t<T>* packed = nullptr;  // Omega (D_out, D_in), for the input gradient
  // Dropout after the ReLU: h' = m . a[f], where m is `scale` if `kept` is 1, else 0. Backward needs only the scale: where
  // h' > 0, m was `scale`, and where h' = 0, either m or the ReLU blocks the gradient.
  accumulator_t<T> scale = 1;
  const uint8_t* kept = nullptr;  // (B, D_out); nullptr: no dropout, or its result is stored

  int64_t d_in() const { return omega.cols; }
  int64_t d_out() const { return omega.rows; }
};

// Expanded tensors can have more elements than memory has bytes. This check keeps every count of a network below 2^63.
template <typename T>
void check_countable(int64_t batch, const std::vector<Layer<T>>& layers) {
  double width = double(layers[0].d_in()), parameters = 0;
  for (const auto& layer : layers) {
    width += double(layer.d_out());
    parameters += (double(layer.d_in()) + 1) * double(layer.d_out());
  }
  constexpr double kMost = double(int64_t(1) << 57);
  MBP_CHECK(double(batch) * width < kMost && parameters < kMost, "a network of ", parameters,
            " parameters on an `input` of ", batch, " rows is larger than any memory");
}

// C (M, N) = A (M, K) B (K, N), rows of C `c_m` apart. Bias, ReLU and the rest of Gemm are set by name.
template <typename T, typename Out>
Gemm<T, Out> product(Matrix<const T> a, Matrix<const T> b, Out* c, int64_t c_m) {
  Gemm<T, Out> p{};
  p.m = a.rows;
  p.n = b.cols;
  p.k = a.cols;
  p.a = a.data;
  p.a_m = a.row_stride;
  p.a_k = a.col_stride;
  p.b = b.data;
  p.b_k = b.row_stride;
  p.b_n = b.col_stride;
  p.c = c;
  p.c_m = c_m;
  return p;
}

// f (B, D_out) = h (B, D_in) Omega^T + beta, then ReLU if asked for.
template <typename T>
void forward(Matrix<const T> h, const Layer<T>& layer, bool relu, T* f, const Workers& workers) {
  auto p = product<T>(h, layer.omega.transposed(), f, layer.d_out());
  p.bias = layer.beta.data;
  p.bias_stride = layer.beta.stride;
  p.relu = relu;
  p.packed_b = layer.packed_transposed;
  gemm<T>(p, workers);
}

// dh (B, D_in) = df (B, D_out) Omega. Out: the storage type, or the accumulator type.
template <typename T, typename Out>
void input_gradient(Matrix<const T> df, const Layer<T>& layer, Out* dh, const Workers& workers) {
  auto p = product<T>(df, layer.omega, dh, layer.d_in());
  p.packed_b = layer.packed;
  gemm<T, Out>(p, workers);
}

// Runs f(begin, end) over [0, size), for a pass that is as cheap as `passes` multiply-adds per element.
template <typename F>
void run_shares(int64_t size, double passes, const Workers& workers, const F& f) {
  const int64_t share = 1024;
  workers.run(ceil_div(size, share), passes * double(size),
              [&](int64_t begin, int64_t end) { f(begin * share, std::min(end * share, size)); });
}

// h (rows, D_out) = m . h, contiguous; `first`: the row of the batch that it begins with.
template <typename T>
void dropout(const Layer<T>& layer, int64_t first, int64_t rows, T* h, const Workers& workers) {
  const Dropout<T> p{h, layer.kept + first * layer.d_out(), layer.scale};
  run_shares(rows * layer.d_out(), 16, workers,  // a pass over memory, as in masked_pass
             [&](int64_t begin, int64_t end) { kernels<T>().dropout(p, begin, end); });
}

// out (size) = the sum of the slices of partial (slices, size), which lie `stride` apart.
template <typename T, typename Partial>
void reduce(const Partial* partial, int64_t slices, int64_t stride, int64_t size, T* out, const Workers& workers) {
  const auto& kernel = kernels<T>();
  run_shares(size, double(kFetchRows * slices), workers, [&](int64_t begin, int64_t end) {
    if constexpr (std::is_same_v<Partial, accumulator_t<T>>) {
      kernel.reduce({slices, stride, partial, out}, begin, end);
    } else {
      kernel.reduce_double({slices, stride, partial, out}, begin, end);
    }
  });
}

// Rows are not divided into stripes of fewer columns than this.
constexpr int64_t kStripeCols = 128;

// The kernel relu_backward on all rows, for the functions below: out = scale I[h > 0] . dh, and sums (D) += the column
// sums of out. h, out and sums may be nullptr: no mask, no result, no sums.
template <typename T>
void masked_pass(Matrix<const T> dh, const T* h, T* out, double* sums, const Workers& workers,
                 accumulator_t<T> scale = 1) {
  const int64_t rows = dh.rows, cols = dh.cols;
  const auto part = [&](const Piece& piece, double* part_sums) {
    ReluBackward<T> p{};
    p.rows = piece.last_row - piece.first_row;
    p.cols = cols;
    p.grad = dh.data + piece.first_row * dh.row_stride;
    p.grad_row = dh.row_stride;
    p.grad_col = dh.col_stride;
    p.h = h ? h + piece.first_row * cols : nullptr;
    p.h_row = cols;
    p.out = out ? out + piece.first_row * cols : nullptr;
    p.column_sum = part_sums;
    p.scale = scale;
    p.first_col = piece.first_col;
    p.last_col = piece.last_col;
    kernels<T>().relu_backward(p);
  };
  // Threads take units of a fixed size, each with sums of its own; if these are too few, stripes of them. The first row of
  // `partial` holds what `sums` held.
  const int64_t units = ceil_div(rows, kUnitRows);
  if (workers.is_alone() || units <= 1) return part({0, rows, 0, cols}, sums);
  const int64_t stripes = std::max<int64_t>(workers.threads() / units, 1);
  const Grid grid{rows, cols, kUnitRows, round_up(std::max<int64_t>(ceil_div(cols, stripes), 1), kStripeCols)};
  const Buffer<double> partial(sums ? (1 + units) * cols : 0);
  if (sums) {
    std::copy_n(sums, cols, partial.data);
    std::fill_n(partial.data + cols, units * cols, 0.0);
  }
  // 16: a pass over memory costs about as much as 16 multiply-adds per element.
  workers.run(grid.pieces(), 16 * double(rows) * double(cols), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Piece piece = grid[i];
      part(piece, sums ? partial.data + (1 + piece.first_row / kUnitRows) * cols : nullptr);
    }
  });
  if (sums) reduce<double>(partial.data, 1 + units, cols, cols, sums, workers);
}

// df (B, D) = scale I[h > 0] . dh, contiguous, which may be dh itself; and d(beta) (D) += the column sums of df, or
// nullptr.
template <typename T>
void relu_backward(Matrix<const T> dh, const T* h, T* df, double* dbeta, const Workers& workers,
                   accumulator_t<T> scale = 1) {
  masked_pass<T>(dh, h, df, dbeta, workers, scale);
}

// d(beta) (D) += the column sums of df (B, D).
template <typename T>
void bias_gradient(Matrix<const T> df, double* dbeta, const Workers& workers) {
  masked_pass<T>(df, nullptr, nullptr, dbeta, workers);
}

// h (B, D) = a[f], both contiguous: f masked by itself.
template <typename T>
void relu(Matrix<const T> f, T* h, const Workers& workers) {
  masked_pass<T>(f, f.data, h, nullptr, workers);
}

// to (B, D), contiguous, = from.
template <typename T>
void copy(Matrix<const T> from, T* to, const Workers& workers) {
  masked_pass<T>(from, nullptr, to, nullptr, workers);
}

template <typename T>
Matrix<const T> columns_of(Matrix<const T> m, int64_t first, int64_t count) {
  return {m.data + first * m.col_stride, m.rows, count, m.row_stride, m.col_stride};
}

// d(Omega) (D_out, D_in) (+)= df^T (D_out, B) h (B, D_in).
template <typename T>
struct WeightGradient {
  Matrix<const T> df, h;
  accumulator_t<T>* domega;
  bool accumulate;
  int64_t unit_rows;  // see Gemm

  double work() const { return product_work(h.rows, df.cols, h.cols); }
  Grid grid(int64_t parts) const { return grid_of(df.cols, h.cols, parts, /*packed_b=*/false); }
  void compute(const Piece& piece, void* workspace) const {
    const KernelTable& table = kernel_table();
    const int64_t height = piece.last_row - piece.first_row, width = piece.last_col - piece.first_col;
    const bool whole = height == df.cols && width == h.cols;
    const int64_t most_rows = whole ? height : table.gradient_rows, most_cols = whole ? width : table.gradient_cols;
    const auto block_size = [](int64_t left, int64_t most) { return left == most + 1 ? left : std::min(left, most); };
    for (int64_t row = piece.first_row, rows; row < piece.last_row; row += rows) {
      rows = block_size(piece.last_row - row, most_rows);
      for (int64_t col = piece.first_col, cols; col < piece.last_col; col += cols) {
        cols = block_size(piece.last_col - col, most_cols);
        auto p = product<T>(columns_of(df, row, rows).transposed(), columns_of(h, col, cols),
                            domega + row * h.cols + col, h.cols);
        p.accumulate = accumulate;
        p.unit_rows = unit_rows;
        kernels<T>().gemm_accumulated(p, workspace);
      }
    }
  }
};
template <typename T>
void weight_gradient(const WeightGradient<T>& gradient, const Workers& workers) {
  if (gradient.df.cols > 0 && gradient.h.cols > 0) run_product(gradient, workers);
}

// df_{k-1} (B, D_k) = scale I[h_k > 0] . (df_k Omega_k + further), contiguous, and d(beta_{k-1}) (D_k) += its column
// sums, or nullptr. scale: of layer k-1. further: a gradient of h_k that is added, contiguous, not in half precision, or
// nullptr. domega: d(Omega_k), if it is to be computed beside.
// On one thread, mask and sums are applied while the product is in registers, if D_k is a multiple of the tile: a pass
// of their own takes 3 % of a step of 32-64-64-64-64-16. Tiles that overhang took 40 % longer than that pass (48 wide),
// and a scale in the tile costs every product registers.
template <typename T>
bool is_masked_in_tile(int64_t d_k, accumulator_t<T> scale) {
  return sizeof(T) == sizeof(accumulator_t<T>) && d_k % kernel_table().tile_cols == 0 && scale == 1;
}
template <typename T>
void hidden_gradient(Matrix<const T> df, const Layer<T>& layer, const T* h, accumulator_t<T> scale, T* df_below,
                     double* dbeta, const Workers& workers, const T* further = nullptr,
                     const WeightGradient<T>* domega = nullptr) {
  const auto& omega = layer.omega;
  if (further) copy<T>(Matrix<const T>::contiguous(further, df.rows, omega.cols), df_below, workers);
  auto p = product<T>(df, omega, df_below, omega.cols);
  p.packed_b = layer.packed;
  p.accumulate = further;
  if constexpr (sizeof(T) == sizeof(accumulator_t<T>)) {
    if (workers.is_alone() && is_masked_in_tile<T>(omega.cols, scale)) {
      p.mask = h;
      p.mask_m = omega.cols;
      p.column_sum = dbeta;
      return gemm<T>(p, workers);
    }
  }
  if (domega && p.m * p.n > 0 && df.cols * omega.cols > 0) {
    run_products(*domega, WholeGemm<T, T>{p}, workers);
  } else {
    if (domega) weight_gradient<T>(*domega, workers);
    gemm<T>(p, workers);
  }
  relu_backward<T>(Matrix<const T>::contiguous(df_below, df.rows, omega.cols), h, df_below, dbeta, workers, scale);
}

}  // namespace manualbp
