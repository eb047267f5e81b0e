// Launches kernels/loss.cuh.

#include <algorithm>

#include "kernels/loss.cuh"
#include "launch.cuh"

namespace manualbp::cuda {

namespace {
constexpr int64_t kMaxBlocks = 528;  // four for each multiprocessor of an H100; one block adds their sums
}

// A loss by class has a warp per row, the others a thread per element.
int64_t loss_blocks(LossKind kind, int64_t rows, int64_t cols) {
  const bool by_rows = has_class_target(kind);
  const int64_t blocks = by_rows ? ceil_div(rows, kLossThreads / kWarpSize) : ceil_div(rows * cols, kLossThreads);
  return std::min(blocks, kMaxBlocks);
}

namespace {
template <typename T>
using LossKernel = void (*)(Loss<T>);

template <typename T>
LossKernel<T> kernel_of(LossKind kind) {
  switch (kind) {
    case LossKind::mse:
      return &elementwise_loss_kernel<T, Mse>;
    case LossKind::bce_with_logits:
      return &elementwise_loss_kernel<T, BceWithLogits>;
    case LossKind::cross_entropy:
      return &cross_entropy_kernel<T>;
  }
  __builtin_trap();
}
}  // namespace

template <typename T>
void loss(LossKind kind, const Loss<T>& p, Stream stream) {
  const int64_t blocks = loss_blocks(kind, p.rows, p.cols);
  if (blocks == 0) return;
  launch("loss", kernel_of<T>(kind), {blocks, 1, dim3(kLossThreads), kLossThreads * sizeof(double)}, stream, p);
}

void count_classes(const CountClasses& p, Stream stream) {
  if (p.rows == 0) return;
  launch("count_classes", &count_classes_kernel,
         {std::min(ceil_div(p.rows, kLossThreads), kMaxBlocks), 1, dim3(kLossThreads), kLossThreads * sizeof(int64_t)},
         stream, p);
}

template <typename T>
void loss_total(const LossTotal<T>& p, Stream stream) {
  launch("loss_total", &loss_total_kernel<T>, {1, 1, dim3(kLossThreads), kLossThreads * sizeof(double)}, stream, p);
}

#define INSTANTIATE(T)                                  \
  template void loss(LossKind, const Loss<T>&, Stream); \
  template void loss_total(const LossTotal<T>&, Stream);
MBP_FOR_EACH_TYPE(INSTANTIATE)
#undef INSTANTIATE

}  // namespace manualbp::cuda
