// Launches kernels/accumulate.cuh.

#include <algorithm>

#include "kernels/accumulate.cuh"
#include "launch.cuh"

namespace manualbp::cuda {

template <typename T>
void accumulate(const Accumulate<T>& p, Stream stream) {
  if (p.size == 0) return;
  constexpr int64_t kMaxBlocks = 2048;
  launch("accumulate", &accumulate_kernel<T>,
         {std::min(ceil_div(p.size, kAccumulateThreads), kMaxBlocks), 1, dim3(kAccumulateThreads)}, stream, p);
}

#define INSTANTIATE(T) template void accumulate(const Accumulate<T>&, Stream);
MBP_FOR_EACH_TYPE(INSTANTIATE)
#undef INSTANTIATE

}  // namespace manualbp::cuda
