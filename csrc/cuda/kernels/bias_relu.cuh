// Bias and ReLU, in place, after a product that the library has computed:  f <- a[f + beta].
//
// The matrix is one flat array of vectors of 16 bytes, with single numbers before the first aligned address and after
// the last one, so that any width and any alignment runs at the speed of memory. A thread visits vectors a fixed
// distance apart and keeps the column of each by addition: a 64-bit division for each would cost more than the rest.
//
// sm_80 and sm_90: 32 registers in half precision, up to 40 for float32 and float64 (ptxas), no shared memory. A
// multiprocessor holds 8 or 6 blocks of 256 threads, 100 or 75 % of its threads, each with 16 bytes in flight: 24 KB,
// where 16 KB hide a latency of 600 ns at 3.35 TB/s over 132 multiprocessors.
#pragma once

#include "device.cuh"

namespace manualbp::cuda {

constexpr int kBiasReluThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kBiasReluThreads) bias_relu_kernel(const BiasRelu<T> p) {
  constexpr int N = kVectorWidth<T>;
  const int64_t size = p.rows * p.cols;
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads = int64_t(gridDim.x) * blockDim.x;
  const int64_t misaligned = int64_t(reinterpret_cast<uintptr_t>(p.f) % 16 / sizeof(T));
  const int64_t before = misaligned == 0 ? 0 : (N - misaligned < size ? N - misaligned : size);
  const int64_t vectors = (size - before) / N;

  // Whole vectors of the bias too, if each vector lies within one row.
  const bool whole = p.bias && before == 0 && p.cols % N == 0 && reinterpret_cast<uintptr_t>(p.bias) % 16 == 0;
  const int64_t step = threads * N % p.cols;
  int64_t col = (before + thread * N) % p.cols;
  for (int64_t v = thread; v < vectors; v += threads) {
    T* const f = p.f + before + v * N;
    Vector<T, N> x = load<N>(f);
    if (whole) {
      const Vector<T, N> beta = load<N>(p.bias + col);
      for (int i = 0; i < N; ++i) x.items[i] = narrow<T>(relu(widen(x.items[i]) + widen(beta.items[i])));
    } else if (p.bias) {
      int64_t c = col;
      for (int i = 0; i < N; ++i) {
        x.items[i] = narrow<T>(relu(widen(x.items[i]) + widen(p.bias[c])));
        c = c + 1 == p.cols ? 0 : c + 1;
      }
    } else {
      for (int i = 0; i < N; ++i) x.items[i] = narrow<T>(relu(widen(x.items[i])));
    }
    store(f, x);
    col += step;
    if (col >= p.cols) col -= p.cols;
  }

  const int64_t after = before + vectors * N;
  const int64_t i = thread < before ? thread : after + (thread - before);
  if (i < size) {
    const accumulator_t<T> beta = p.bias ? widen(p.bias[i % p.cols]) : accumulator_t<T>(0);
    p.f[i] = narrow<T>(relu(widen(p.f[i]) + beta));
  }
}

}  // namespace manualbp::cuda
