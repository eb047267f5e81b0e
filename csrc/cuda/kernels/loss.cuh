// Losses and their gradients: f is replaced by df, and each block writes its part of the value in double, so that a
// batch of millions of rows loses no digit of a float result. loss_total_kernel adds the parts in a fixed order.
#pragma once

#include "device.cuh"

namespace manualbp::cuda {

constexpr int kLossThreads = 256;

__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
__device__ __forceinline__ float log_of(float x) { return logf(x); }
__device__ __forceinline__ double log_of(double x) { return log(x); }
__device__ __forceinline__ float log1p_of(float x) { return log1pf(x); }
__device__ __forceinline__ double log1p_of(double x) { return log1p(x); }

// ell = (f - y)^2;   df = 2 (f - y)
struct Mse {
  template <typename A>
  static __device__ __forceinline__ double value(A f, A y) {
    return double(f - y) * double(f - y);
  }
  template <typename A>
  static __device__ __forceinline__ A derivative(A f, A y) {
    return A(2) * (f - y);
  }
};

// ell = (1 - y) f - min(f, 0) + log(1 + exp(-|f|));   df = sigmoid(f) - y
struct BceWithLogits {
  template <typename A>
  static __device__ __forceinline__ double value(A f, A y) {
    return double((A(1) - y) * f - (f < A(0) ? f : A(0)) + log1p_of(exp_of(f < A(0) ? f : -f)));
  }
  template <typename A>
  static __device__ __forceinline__ A derivative(A f, A y) {
    const A e = exp_of(f < A(0) ? f : -f);  // exp(-|f|): never overflows; NaN stays NaN
    return (f < A(0) ? e : A(1)) / (A(1) + e) - y;
  }
};

// The losses that are a sum over elements.
template <typename T, typename Term>
__global__ void __launch_bounds__(kLossThreads) elementwise_loss_kernel(const Loss<T> p) {
  using A = accumulator_t<T>;
  const int64_t size = p.rows * p.cols;
  const A scale = A(p.scale);
  double sum = 0;
  for (int64_t i = int64_t(blockIdx.x) * kLossThreads + threadIdx.x; i < size; i += int64_t(gridDim.x) * kLossThreads) {
    const A f = widen(p.f[i]), y = widen(p.target[i]);
    sum += Term::value(f, y);
    if (p.gradient) p.f[i] = narrow<T>(Term::derivative(f, y) * scale);
  }
  sum = block_sum(sum, shared_memory<double>());
  if (threadIdx.x == 0) p.sums[blockIdx.x] = sum;
}

template <typename A>
__device__ __forceinline__ A warp_sum(A value) {
  for (int lane = kWarpSize / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(kWholeWarp, value, lane);
  return value;
}
template <typename A>
__device__ __forceinline__ A warp_max(A value) {
  for (int lane = kWarpSize / 2; lane > 0; lane /= 2) {
    const A other = __shfl_xor_sync(kWholeWarp, value, lane);
    value = other > value ? other : value;
  }
  return value;
}

// ell_i = -(1 - s) log p_c - s/D sum_j log p_j, with p = softmax(f_i), c the class and s the smoothing;
// df_i = (p - (1 - s) onehot(c) - s/D) scale. Rows whose class is ignore_index add nothing. One warp per row.
template <typename T>
__global__ void __launch_bounds__(kLossThreads) cross_entropy_kernel(const Loss<T> p) {
  using A = accumulator_t<T>;
  constexpr int kWarps = kLossThreads / kWarpSize;
  const int lane = int(threadIdx.x) % kWarpSize;
  const A smoothing = A(p.label_smoothing), each = smoothing / A(p.cols);
  const A scale = A(p.counted ? p.scale / double(*p.counted) : p.scale);
  double sum = 0;
  for (int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarpSize; row < p.rows;
       row += int64_t(gridDim.x) * kWarps) {
    T* const f = p.f + row * p.cols;
    const int64_t c = p.classes[row * p.class_stride];
    if (c == p.ignore_index) {  // df_i = 0 softmax(f_i): NaN if there is a NaN, a +Inf, or nothing but -Inf in f_i
      if (!p.gradient) continue;
      A nothing = 0, most = -INFINITY;
      for (int64_t j = lane; j < p.cols; j += kWarpSize) {
        const A x = widen(f[j]);
        nothing += (x < A(0) ? A(0) : x) * A(0);
        most = x > most ? x : most;
      }
      nothing = warp_sum(nothing) + warp_max(most) * A(0);
      for (int64_t j = lane; j < p.cols; j += kWarpSize) f[j] = narrow<T>(nothing);
      continue;
    }
    if (c < 0 || c >= p.cols) fail("cross_entropy: `target` is out of bounds");
    A largest = -INFINITY;
    for (int64_t j = lane; j < p.cols; j += kWarpSize) {
      const A x = widen(f[j]);
      largest = x > largest ? x : largest;
    }
    largest = warp_max(largest);
    A total = 0, shifted = 0;
    for (int64_t j = lane; j < p.cols; j += kWarpSize) {
      const A x = widen(f[j]) - largest;  // a NaN makes the row NaN, through `total`
      shifted += x;
      total += exp_of(x);
    }
    const A log_total = log_of(warp_sum(total));
    shifted = warp_sum(shifted);
#pragma unroll 1  // nothing to gain, f[j] is stored before the next is read; unrolled by ptxas, float64 spills on sm_90
    for (int64_t j = lane; j < p.cols; j += kWarpSize) {
      const A log_p = widen(f[j]) - largest - log_total;
      const A at_class = j == c ? A(1) - smoothing : A(0);
      if (j == c) sum -= double(at_class * log_p);
      if (p.gradient) f[j] = narrow<T>((exp_of(log_p) - each - at_class) * scale);
    }
    if (lane == 0 && smoothing > A(0)) sum += double(each * (A(p.cols) * log_total - shifted));
  }
  sum = block_sum(sum, shared_memory<double>());
  if (threadIdx.x == 0) p.sums[blockIdx.x] = sum;
}

// A sum of integers, so the order in which the blocks add does not matter.
static __global__ void __launch_bounds__(kLossThreads) count_classes_kernel(const CountClasses p) {
  int64_t count = 0;
  for (int64_t i = int64_t(blockIdx.x) * kLossThreads + threadIdx.x; i < p.rows;
       i += int64_t(gridDim.x) * kLossThreads) {
    count += p.classes[i * p.class_stride] != p.ignore_index;
  }
  count = block_sum(count, shared_memory<int64_t>());
  if (threadIdx.x == 0) atomicAdd(p.counted, (unsigned long long)(count));
}

template <typename T>
__global__ void __launch_bounds__(kLossThreads) loss_total_kernel(const LossTotal<T> p) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < p.size; i += kLossThreads) sum += p.sums[i];
  sum = block_sum(sum, shared_memory<double>()) * p.scale;
  if (threadIdx.x == 0) *p.out = narrow<T>(accumulator_t<T>(p.counted ? sum / double(*p.counted) : sum));
}

}  // namespace manualbp::cuda
