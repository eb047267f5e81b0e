// The steps of one layer, cut over torch's threads. Lecture notation: f = beta + Omega h, h' = a[f].
//
//   forward           f = h Omega^T + beta, and ReLU where asked for, in one pass
//   relu_backward     df = I[h' > 0] . dh',  d(beta) = column sums of df, in one pass
//   input_gradient    dh = df Omega
//   weight_gradient   d(Omega) = df^T h
//
// How work is cut never changes a result: an element of a product is summed by one thread in ascending order,
// and sums over the batch are cut into slices whose number depends on the sizes alone, then added in order.
#pragma once

#include <algorithm>

#include "isa.h"
#include "tensor.h"

namespace manualbp {

// The threads' packing buffers, one allocation for a whole call: enough for products of storage type T with at most
// n columns and depth k.
class Scratch {
 public:
  template <typename T>
  static Scratch of(int64_t n, int64_t k) {
    return Scratch(kernels<T>().workspace_bytes(n, k));
  }
  int64_t threads() const { return threads_; }
  // The buffer of the calling thread.
  void* mine() const {
    uint32_t thread;
    MBP_TORCH(torch_get_thread_idx(&thread));
    return base_ + int64_t(thread) * bytes_;
  }

 private:
  static constexpr int64_t kAlign = 64;

  explicit Scratch(int64_t bytes)
      : threads_(torch::stable::get_num_threads()), bytes_((bytes + kAlign - 1) / kAlign * kAlign) {
    buffer_ = empty({threads_ * bytes_ + kAlign}, aoti_torch_dtype_uint8());
    const auto address = reinterpret_cast<uintptr_t>(data<char>(buffer_));
    base_ = reinterpret_cast<char*>((address + kAlign - 1) / kAlign * kAlign);
  }

  int64_t threads_, bytes_;
  Tensor buffer_;
  char* base_;
};

// Below this many multiply-adds a thread's share costs less than waking the thread.
constexpr int64_t kGrain = 128 * 1024;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// C = A B, cut by rows of C, or by columns where rows are few.
template <typename T>
void parallel_gemm(const Gemm<T, T>& p, const Scratch& scratch) {
  if (p.m == 0 || p.n == 0) return;
  const auto& kernel = kernels<T>();
  const double work = double(p.m) * double(p.n) * double(std::max<int64_t>(p.k, 1));
  const int64_t parts = std::clamp<int64_t>(int64_t(work / kGrain), 1, scratch.threads());
  // Every part packs the block of B that it uses: cut columns unless a part still has rows to pay for that.
  const bool by_rows = p.m >= parts * 64 || p.m >= p.n;
  const int64_t step = by_rows ? kernel_table().tile_rows : kernel_table().tile_cols;
  const int64_t extent = by_rows ? p.m : p.n;
  const int64_t share = ceil_div(ceil_div(extent, parts), step) * step;
  torch::stable::parallel_for(0, ceil_div(extent, share), 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * share;
    const int64_t count = std::min(end * share, extent) - first;
    Gemm<T, T> part = p;
    if (by_rows) {
      part.m = count;
      part.a += first * p.a_m;
      part.c += first * p.c_m;
    } else {
      part.n = count;
      part.b += first * p.b_n;
      part.c += first;
      if (p.bias) part.bias += first * p.bias_stride;
    }
    kernel.gemm(part, scratch.mine());
  });
}

// f (B, D_out) = h (B, D_in) Omega^T + beta, then ReLU if asked for.
template <typename T>
void forward(Matrix<const T> h, Matrix<const T> omega, Bias<T> beta, bool relu, T* f, const Scratch& scratch) {
  parallel_gemm<T>({h.rows, omega.rows, omega.cols, h.data, h.row_stride, h.col_stride, omega.data, omega.col_stride,
                    omega.row_stride, f, omega.rows, beta.data, beta.stride, relu},
                   scratch);
}

// dh (B, D_in) = df (B, D_out) Omega.
template <typename T>
void input_gradient(Matrix<const T> df, Matrix<const T> omega, T* dh, const Scratch& scratch) {
  parallel_gemm<T>({df.rows, omega.cols, omega.rows, df.data, df.row_stride, df.col_stride, omega.data,
                    omega.row_stride, omega.col_stride, dh, omega.cols, nullptr, 0, false},
                   scratch);
}

// Sums of slices, waiting to be added up.
template <typename A>
struct Partial {
  explicit Partial(int64_t size)
      : tensor(empty({size}, sizeof(A) == 8 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32())),
        data(manualbp::data<A>(tensor)) {}
  Tensor tensor;
  A* data;
};

// The fixed-order sum of partial results (slices, size) into out (size).
template <typename T>
void parallel_reduce(const accumulator_t<T>* partial, int64_t slices, int64_t size, T* out) {
  if (size == 0) return;
  const Reduce<T> p{slices, size, partial, out};
  torch::stable::parallel_for(0, size, std::max<int64_t>(kGrain / slices, 1),
                              [&](int64_t begin, int64_t end) { kernels<T>().reduce(p, begin, end); });
}

// df = I[h > 0] . dh into df (B, D) contiguous, which may be dh itself, and d(beta) (D) = sum over the batch of df.
// h = nullptr: no ReLU, only the sums. df = nullptr: only the sums. dbeta = nullptr: only df.
template <typename T>
void relu_backward(Matrix<const T> dh, const T* h, T* df, T* dbeta) {
  using A = accumulator_t<T>;
  const int64_t rows = dh.rows, cols = dh.cols;
  if (cols == 0) return;
  const int64_t slices =
      dbeta ? std::clamp<int64_t>(rows / 256, 1, 32) : std::clamp<int64_t>(rows * cols / (16 * 1024), 1, 32);
  const int64_t share = std::max<int64_t>(ceil_div(rows, slices), 1);
  const bool direct = slices == 1 && sizeof(T) == sizeof(A);  // the sums need neither reduction nor rounding
  std::optional<Partial<A>> partial;
  if (dbeta && !direct) partial.emplace(slices * cols);
  A* const sums = direct ? reinterpret_cast<A*>(dbeta) : partial ? partial->data : nullptr;
  torch::stable::parallel_for(0, slices, rows * cols < 16 * 1024 ? slices : 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t first = std::min(s * share, rows);
      const int64_t count = std::min(first + share, rows) - first;
      kernels<T>().relu_backward({count, cols, dh.data + first * dh.row_stride, dh.row_stride, dh.col_stride,
                                  h ? h + first * cols : nullptr, cols, df ? df + first * cols : nullptr,
                                  sums ? sums + s * cols : nullptr});
    }
  });
  if (partial) parallel_reduce<T>(sums, slices, cols, dbeta);
}

// d(Omega) (D_out, D_in) = df^T (D_out, B) h (B, D_in).
template <typename T>
void weight_gradient(Matrix<const T> df, Matrix<const T> h, T* domega, const Scratch& scratch) {
  using A = accumulator_t<T>;
  const int64_t d_out = df.cols, d_in = h.cols, batch = h.rows;
  if (d_out == 0 || d_in == 0) return;
  // Tasks are blocks of d(Omega) times slices of the batch. A block is large enough to pay for packing h; slices
  // are taken where blocks are few (narrow layers, tall batches), each long enough to pay for the reduction.
  constexpr int64_t kBlockRows = 192, kBlockCols = 256, kTasks = 32, kSliceRows = 256;
  const int64_t blocks_m = ceil_div(d_out, kBlockRows), blocks_n = ceil_div(d_in, kBlockCols);
  const int64_t blocks = blocks_m * blocks_n;
  const int64_t slices = std::clamp<int64_t>(ceil_div(kTasks, blocks), 1, std::max<int64_t>(batch / kSliceRows, 1));
  const int64_t share = ceil_div(batch, slices);
  std::optional<Partial<A>> partial;
  if (slices > 1) partial.emplace(slices * d_out * d_in);
  A* const sums = partial ? partial->data : nullptr;
  const double work = double(batch) * double(d_out) * double(d_in);
  const int64_t tasks = slices * blocks;
  torch::stable::parallel_for(0, tasks, work < 2 * kGrain ? tasks : 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slice = task / blocks, block = task % blocks;
      const int64_t first = std::min(slice * share, batch), count = std::min(first + share, batch) - first;
      const int64_t m0 = block / blocks_n * kBlockRows, m = std::min(d_out - m0, kBlockRows);
      const int64_t n0 = block % blocks_n * kBlockCols, n = std::min(d_in - n0, kBlockCols);
      const T* a = df.data + first * df.row_stride + m0 * df.col_stride;
      const T* b = h.data + first * h.row_stride + n0 * h.col_stride;
      if (sums) {
        A* c = sums + slice * d_out * d_in + m0 * d_in + n0;
        kernels<T>().gemm_accumulated(
            {m, n, count, a, df.col_stride, df.row_stride, b, h.row_stride, h.col_stride, c, d_in, nullptr, 0, false},
            scratch.mine());
      } else {
        T* c = domega + m0 * d_in + n0;
        kernels<T>().gemm(
            {m, n, count, a, df.col_stride, df.row_stride, b, h.row_stride, h.col_stride, c, d_in, nullptr, 0, false},
            scratch.mine());
      }
    }
  });
  if (sums) parallel_reduce<T>(sums, slices, d_out * d_in, domega);
}

}  // namespace manualbp
