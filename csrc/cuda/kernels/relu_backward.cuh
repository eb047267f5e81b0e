// The mask of the ReLU and the gradient of the bias, in one pass over memory:
//   df = I[h > 0] . dh,   d(beta) = column sums of df.
// With torch's rule: a gradient passes unless h <= 0, so that it passes where h is NaN.
//
// Two stages, each in a fixed order: a block sums a slice of the rows of some columns into `partial`, and
// reduce_kernel adds the slices. The number of slices depends on the sizes alone (relu_backward.cu), not on the device,
// so that a gradient is the same on every one and in every run.
//
// sm_80 and sm_90: 48 to 60 registers where it reads vectors (ptxas), 256 threads and at most 8 KiB of shared memory a
// block: a multiprocessor holds 4 or 5 blocks, 50 or 62 % of its threads. The launch makes at most 4 for each, and each
// thread loads the 32 bytes of two rows before it waits: 64 KB in flight (see bias_relu.cuh for what is needed).
#pragma once

#include "device.cuh"

namespace manualbp::cuda {

constexpr int kReluBackwardThreads = 256;
// The rows that a thread loads before it stores the first. The compiler cannot move a load across a store, since df may
// be dh itself. Four rows need up to 100 registers: half as many threads, and no more bytes in flight.
constexpr int kRowsAhead = 2;

// N numbers at a time of each row. The block is (lanes across columns, rows), its height a power of two; blockIdx.x
// counts the columns in pieces of lanes * N, blockIdx.y the slices of rows.
template <typename T, int N>
__global__ void __launch_bounds__(kReluBackwardThreads) relu_backward_kernel(const ReluBackward<T> p) {
  using A = accumulator_t<T>;
  const int64_t col = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  const int64_t slice_rows = (p.rows + p.slices - 1) / p.slices;
  const int64_t first = int64_t(blockIdx.y) * slice_rows;
  const int64_t last = first + slice_rows < p.rows ? first + slice_rows : p.rows;
  A sums[N] = {};
  for (int64_t row = first + threadIdx.y; col < p.cols && row < last; row += kRowsAhead * blockDim.y) {
    Vector<T, N> g[kRowsAhead], h[kRowsAhead];
#pragma unroll
    for (int ahead = 0; ahead < kRowsAhead; ++ahead) {
      const int64_t r = row + ahead * blockDim.y;
      if (r >= last) continue;
      g[ahead] = load<N>(p.grad + r * p.grad_row + col * p.grad_col);
      if (p.h) h[ahead] = load<N>(p.h + r * p.cols + col);
    }
#pragma unroll
    for (int ahead = 0; ahead < kRowsAhead; ++ahead) {
      const int64_t r = row + ahead * blockDim.y;
      if (r >= last) continue;
      for (int i = 0; i < N; ++i) {
        if (p.h && widen(h[ahead].items[i]) <= A(0)) g[ahead].items[i] = narrow<T>(A(0));
        sums[i] += widen(g[ahead].items[i]);
      }
      if (p.out) store(p.out + r * p.cols + col, g[ahead]);
    }
  }
  if (!p.sum) return;

  A* const shared = shared_memory<A>();  // (N, threads): neighbours in different banks
  const unsigned threads = blockDim.x * blockDim.y, t = threadIdx.y * blockDim.x + threadIdx.x;
  for (int i = 0; i < N; ++i) shared[i * threads + t] = sums[i];
  for (unsigned half = blockDim.y / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half) {
      for (int i = 0; i < N; ++i) shared[i * threads + t] += shared[i * threads + t + half * blockDim.x];
    }
  }
  if (threadIdx.y == 0 && col < p.cols) {
    for (int i = 0; i < N; ++i) {
      const A sum = shared[i * threads + t];
      if (p.slices == 1) {
        p.sum[col + i] = narrow<T>(sum);
      } else {
        p.partial[int64_t(blockIdx.y) * p.cols + col + i] = sum;
      }
    }
  }
}

constexpr int kReduceLanes = 32, kReduceRows = 8;

// The sum of the slices of one column, in the threads of the block's first row. The block is (kReduceLanes,
// kReduceRows): each of its rows adds every kReduceRows-th slice in ascending order, then the rows are added.
template <typename A>
__device__ __forceinline__ A sum_of_slices(const A* partial, int64_t slices, int64_t stride, int64_t col,
                                           int64_t cols) {
  A* const shared = shared_memory<A>();  // (kReduceRows, kReduceLanes)
  A sum = 0;
  if (col < cols) {
#pragma unroll 4
    for (int64_t s = threadIdx.y; s < slices; s += kReduceRows) sum += partial[s * stride + col];
  }
  shared[threadIdx.y * kReduceLanes + threadIdx.x] = sum;
  __syncthreads();
  for (int row = 1; threadIdx.y == 0 && row < kReduceRows; ++row) sum += shared[row * kReduceLanes + threadIdx.x];
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kReduceLanes* kReduceRows) reduce_kernel(const Reduce<T> p) {
  const int64_t col = int64_t(blockIdx.x) * kReduceLanes + threadIdx.x;
  const accumulator_t<T> sum = sum_of_slices(p.partial, p.slices, p.cols, col, p.cols);
  if (threadIdx.y == 0 && col < p.cols) p.out[col] = narrow<T>(sum);
}

}  // namespace manualbp::cuda
