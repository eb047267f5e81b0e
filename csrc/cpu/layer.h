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

// What a product of m rows costs, in multiply-adds.
inline double product_work(int64_t m, int64_t n, int64_t k) {
  return double(m + kFetchRows) * double(n) * double(std::max<int64_t>(k, 1));
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

// C = A B, divided among threads by rows of C or by columns. Out: the storage type, or the accumulator type.
template <typename T, typename Out>
void gemm(const Gemm<T, Out>& p, const Workers& workers) {
  if (p.m == 0 || p.n == 0) return;
  const double work = product_work(p.m, p.n, p.k);
  const int64_t parts = parts_of(work, workers);
  // When splitting by rows, every thread packs all of B, so do it only if B is the smaller matrix, or packed already.
  const bool by_rows = p.m >= p.n || (p.packed_b && p.m >= parts * 4 * kernel_table().tile_rows);
  const int64_t step = by_rows ? kernel_table().tile_rows : kernel_table().tile_cols;
  const int64_t extent = by_rows ? p.m : p.n;
  const int64_t share = round_up(ceil_div(extent, parts), step);
  workers.run(ceil_div(extent, share), work, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * share;
    const int64_t count = std::min(end * share, extent) - first;
    Gemm<T, Out> part = p;
    if (by_rows) {
      part.m = count;
      part.a += first * p.a_m;
      part.c += first * p.c_m;
    } else {
      part.n = count;
      part.b += first * p.b_n;
      part.c += first;
      if (p.bias) part.bias += first * p.bias_stride;
      if (p.packed_b) part.packed_b += first * p.k;
    }
    if constexpr (std::is_same_v<T, Out>) {
      kernels<T>().gemm(part, workers.workspace());
    } else {
      kernels<T>().gemm_accumulated(part, workers.workspace());
    }
  });
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

// dh (B, D_in) = df (B, D_out) Omega.
template <typename T>
void input_gradient(Matrix<const T> df, const Layer<T>& layer, T* dh, const Workers& workers) {
  auto p = product<T>(df, layer.omega, dh, layer.d_in());
  p.packed_b = layer.packed;
  gemm<T>(p, workers);
}

// Runs f(begin, end) over [0, size), for a pass that is as cheap as `passes` multiply-adds per element.
template <typename F>
void run_shares(int64_t size, double passes, const Workers& workers, const F& f) {
  const int64_t share = 4096;
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
  run_shares(size, double(slices), workers, [&](int64_t begin, int64_t end) {
    if constexpr (std::is_same_v<Partial, accumulator_t<T>>) {
      kernel.reduce({slices, stride, partial, out}, begin, end);
    } else {
      kernel.reduce_double({slices, stride, partial, out}, begin, end);
    }
  });
}

// The kernel relu_backward on all rows, for the functions below: out = scale I[h > 0] . dh, and sums (D) += the column
// sums of out. h, out and sums may be nullptr: no mask, no result, no sums.
template <typename T>
void masked_pass(Matrix<const T> dh, const T* h, T* out, double* sums, const Workers& workers,
                 accumulator_t<T> scale = 1) {
  const int64_t rows = dh.rows, cols = dh.cols;
  const auto part = [&](int64_t first, int64_t count, double* part_sums) {
    ReluBackward<T> p{};
    p.rows = count;
    p.cols = cols;
    p.grad = dh.data + first * dh.row_stride;
    p.grad_row = dh.row_stride;
    p.grad_col = dh.col_stride;
    p.h = h ? h + first * cols : nullptr;
    p.h_row = cols;
    p.out = out ? out + first * cols : nullptr;
    p.column_sum = part_sums;
    p.scale = scale;
    kernels<T>().relu_backward(p);
  };
  // Threads take units of a fixed size, each with sums of its own. The first row of `partial` holds what `sums` held.
  const int64_t units = ceil_div(rows, kUnitRows);
  if (workers.is_alone() || units <= 1) return part(0, rows, sums);
  const Buffer<double> partial(sums ? (1 + units) * cols : 0);
  if (sums) {
    std::copy_n(sums, cols, partial.data);
    std::fill_n(partial.data + cols, units * cols, 0.0);
  }
  // 16: a pass over memory costs about as much as 16 multiply-adds per element.
  workers.run(units, 16 * double(rows) * double(cols), [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
      const int64_t first = u * kUnitRows;
      part(first, std::min(kUnitRows, rows - first), sums ? partial.data + (1 + u) * cols : nullptr);
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

// df_{k-1} (B, D_k) = scale I[h_k > 0] . (df_k Omega_k + further), contiguous, and d(beta_{k-1}) (D_k) += its column
// sums, or nullptr. scale: of layer k-1. further: a gradient of h_k that is added, contiguous, not in half precision, or
// nullptr.
// On one thread, mask and sums are applied while the product is in registers, if D_k is a multiple of the tile: a pass
// of their own takes 3 % of a step of 32-64-64-64-64-16. Tiles that overhang took 40 % longer than that pass (48 wide),
// and a scale in the tile costs every product registers.
template <typename T>
void hidden_gradient(Matrix<const T> df, const Layer<T>& layer, const T* h, accumulator_t<T> scale, T* df_below,
                     double* dbeta, const Workers& workers, const T* further = nullptr) {
  const auto& omega = layer.omega;
  if (further) copy<T>(Matrix<const T>::contiguous(further, df.rows, omega.cols), df_below, workers);
  auto p = product<T>(df, omega, df_below, omega.cols);
  p.packed_b = layer.packed;
  p.accumulate = further;
  if constexpr (sizeof(T) == sizeof(accumulator_t<T>)) {
    if (workers.is_alone() && omega.cols % kernel_table().tile_cols == 0 && scale == 1) {
      p.mask = h;
      p.mask_m = omega.cols;
      p.column_sum = dbeta;
      return gemm<T>(p, workers);
    }
  }
  gemm<T>(p, workers);
  relu_backward<T>(Matrix<const T>::contiguous(df_below, df.rows, omega.cols), h, df_below, dbeta, workers, scale);
}

template <typename T>
Matrix<const T> columns_of(Matrix<const T> m, int64_t first, int64_t most) {
  return {m.data + first * m.col_stride, m.rows, std::min(most, m.cols - first), m.row_stride, m.col_stride};
}

// Part `part` of `parts` of d(Omega) (D_out, D_in) (+)= df^T (D_out, B) h (B, D_in), on the calling thread: rows, or
// columns if there are more of these, so that the larger matrix is read once. unit_rows: see Gemm.
template <typename T>
void weight_gradient_part(Matrix<const T> df, Matrix<const T> h, accumulator_t<T>* domega, bool accumulate,
                          int64_t unit_rows, int64_t part, int64_t parts, void* workspace) {
  const KernelTable& table = kernel_table();
  const int64_t d_out = df.cols, d_in = h.cols;
  const bool by_rows = d_out >= d_in;
  const int64_t extent = by_rows ? d_out : d_in, step = by_rows ? table.tile_rows : table.tile_cols;
  // A product of one number is summed in another order than one of more (gemm_number), so that no part may be one.
  int64_t share = round_up(ceil_div(extent, parts), step);
  if (std::min(d_out, d_in) == 1 && extent % share == 1) share = extent;
  const auto block_size = [](int64_t left, int64_t most) { return left == most + 1 ? left : std::min(left, most); };
  const int64_t first = std::min(part * share, extent), last = std::min(first + share, extent);
  const int64_t first_row = by_rows ? first : 0, last_row = by_rows ? last : d_out;
  const int64_t first_col = by_rows ? 0 : first, last_col = by_rows ? d_in : last;
  const int64_t most_rows = parts == 1 ? d_out : table.gradient_rows;
  const int64_t most_cols = parts == 1 ? d_in : table.gradient_cols;
  for (int64_t row = first_row, rows; row < last_row; row += rows) {
    rows = block_size(last_row - row, most_rows);
    for (int64_t col = first_col, cols; col < last_col; col += cols) {
      cols = block_size(last_col - col, most_cols);
      auto p =
          product<T>(columns_of(df, row, rows).transposed(), columns_of(h, col, cols), domega + row * d_in + col, d_in);
      p.accumulate = accumulate;
      p.unit_rows = unit_rows;
      kernels<T>().gemm_accumulated(p, workspace);
    }
  }
}

// d(Omega) (D_out, D_in) (+)= df^T (D_out, B) h (B, D_in).
template <typename T>
void weight_gradient(Matrix<const T> df, Matrix<const T> h, accumulator_t<T>* domega, bool accumulate,
                     int64_t unit_rows, const Workers& workers) {
  if (df.cols == 0 || h.cols == 0) return;
  const double work = product_work(h.rows, df.cols, h.cols);
  const int64_t parts = parts_of(work, workers);
  workers.run(parts, work, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      weight_gradient_part<T>(df, h, domega, accumulate, unit_rows, part, parts, workers.workspace());
    }
  });
}

}  // namespace manualbp
