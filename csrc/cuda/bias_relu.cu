// Launches kernels/bias_relu.cuh.

#include <algorithm>

#include "kernels/bias_relu.cuh"
#include "launch.cuh"

namespace manualbp::cuda {

template <typename T>
void bias_relu(const BiasRelu<T>& p, Stream stream) {
  const int64_t size = p.rows * p.cols;
  if (size == 0) return;
  // Enough blocks for two rounds on 132 multiprocessors of 8 blocks each; beyond, a thread visits several vectors.
  constexpr int64_t kMaxBlocks = 2048;
  const int64_t blocks = std::min(ceil_div(ceil_div(size, kVectorWidth<T>), kBiasReluThreads), kMaxBlocks);
  launch("bias_relu", &bias_relu_kernel<T>, {blocks, 1, dim3(kBiasReluThreads)}, stream, p);
}

#define INSTANTIATE(T) template void bias_relu(const BiasRelu<T>&, Stream);
MBP_FOR_EACH_TYPE(INSTANTIATE)
#undef INSTANTIATE

}  // namespace manualbp::cuda
