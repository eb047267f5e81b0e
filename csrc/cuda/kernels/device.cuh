// What all kernels use: numbers, vectors of them, shared memory, sums over a block. Kernels do not include torch.
//
// The same source is compiled by nvcc and, for tests without a GPU, by a C++ compiler after
// tests/csrc/cuda_emulation.h, which defines MBP_EMULATED for the few places that differ.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "params.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace manualbp::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

// --- numbers: loaded as stored, computed in the accumulator type, rounded once on store -----------------------------

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(bfloat16 x) {
#if defined(__CUDACC__)
  return __uint_as_float(uint32_t(x.bits) << 16);
#else
  return emulation::float_of_bits(uint32_t(x.bits) << 16);
#endif
}
__device__ __forceinline__ float widen(float16 x) {
#if defined(__CUDACC__)
  return __half2float(__ushort_as_half(x.bits));
#else
  return emulation::half_to_float(x.bits);
#endif
}

template <typename T>
__device__ __forceinline__ T narrow(accumulator_t<T> x) {
  return x;
}
template <>
__device__ __forceinline__ float16 narrow<float16>(float x) {
#if defined(__CUDACC__)
  return {__half_as_ushort(__float2half_rn(x))};
#else
  return {emulation::float_to_half(x)};
#endif
}
template <>
__device__ __forceinline__ bfloat16 narrow<bfloat16>(float x) {
#if defined(__CUDACC__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  const uint32_t bits = emulation::bits_of_float(x);
  if (x != x) return {uint16_t(bits >> 16 | 64)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#endif
}

// max(x, 0) as torch has it: NaN stays NaN.
template <typename A>
__device__ __forceinline__ A relu(A x) {
  return x < A(0) ? A(0) : x;
}

// --- vectors: N numbers that one instruction loads or stores; the address must be a multiple of their size ----------

template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T items[N];
};
template <typename T>
constexpr int kVectorWidth = 16 / int(sizeof(T));

template <int N, typename T>
__device__ __forceinline__ Vector<T, N> load(const T* p) {
  return *reinterpret_cast<const Vector<T, N>*>(p);
}
template <typename T, int N>
__device__ __forceinline__ void store(T* p, const Vector<T, N>& v) {
  *reinterpret_cast<Vector<T, N>*>(p) = v;
}

// --- the block ------------------------------------------------------------------------------------------------------

// The block's shared memory; the launch says how much.
template <typename T>
__device__ __forceinline__ T* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char manualbp_shared[];
  return reinterpret_cast<T*>(manualbp_shared);
#else
  return static_cast<T*>(emulation::here().shared());
#endif
}

// The sum over all threads of a one-dimensional block, a power of two of them, in a fixed order; thread 0 has it.
// `shared`: one item a thread.
template <typename A>
__device__ __forceinline__ A block_sum(A value, A* shared) {
  const unsigned t = threadIdx.x;
  shared[t] = value;
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (t < half) shared[t] += shared[t + half];
  }
  return shared[t];
}

// Ends the launch with an error that the next synchronising call reports (cudaErrorAssert), as torch's own kernels do
// for an index out of bounds. Not assert(), which NDEBUG would remove.
__device__ __forceinline__ void fail(const char* message) {
#if defined(__CUDA_ARCH__)
  __assert_fail(message, __FILE__, __LINE__, "torch_manualbp");
  __builtin_unreachable();
#elif defined(MBP_EMULATED)
  emulation::here().fail(message);
#endif
}

}  // namespace manualbp::cuda
