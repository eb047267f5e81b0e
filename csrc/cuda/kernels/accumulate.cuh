// Sums of gradients over blocks of rows, in the accumulator type: total (+)= term, and out = total after the last.
#pragma once

#include "device.cuh"

namespace manualbp::cuda {

constexpr int kAccumulateThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kAccumulateThreads) accumulate_kernel(const Accumulate<T> p) {
  using A = accumulator_t<T>;
  for (int64_t i = int64_t(blockIdx.x) * kAccumulateThreads + threadIdx.x; i < p.size;
       i += int64_t(gridDim.x) * kAccumulateThreads) {
    const A total = (p.first ? A(0) : p.total[i]) + widen(p.term[i]);
    p.total[i] = total;
    if (p.out) p.out[i] = narrow<T>(total);
  }
}

}  // namespace manualbp::cuda
