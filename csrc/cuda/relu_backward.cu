// Launches kernels/relu_backward.cuh. How the matrix is divided among blocks depends on its sizes alone.

#include <algorithm>

#include "kernels/relu_backward.cuh"
#include "launch.cuh"

namespace manualbp::cuda {

namespace {

// The lanes of a block across `cols` columns, N columns per lane: a power of two, so that the height of the block is
// one.
unsigned lanes_across(int64_t cols, int64_t n) {
  unsigned lanes = 1;
  while (lanes < 32 && lanes * n < cols) lanes *= 2;
  return lanes;
}

// 16 bytes at a time where every row begins at a multiple of 16 bytes.
template <typename T>
bool vectorised(const ReluBackward<T>& p) {
  constexpr int64_t N = kVectorWidth<T>;
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  return p.cols % N == 0 && p.grad_col == 1 && p.grad_row % N == 0 && aligned(p.grad) && aligned(p.h) && aligned(p.out);
}

template <typename T, int N>
void launch_relu_backward(const ReluBackward<T>& p, Stream stream) {
  const unsigned across = lanes_across(p.cols, N);
  const int64_t shared = p.sum ? int64_t(sizeof(accumulator_t<T>)) * N * kReluBackwardThreads : 0;
  launch("relu_backward", &relu_backward_kernel<T, N>,
         {ceil_div(p.cols, int64_t(across) * N), p.slices, dim3(across, kReluBackwardThreads / across), shared}, stream,
         p);
}

}  // namespace

template <typename T>
int64_t relu_backward_slices(int64_t rows, int64_t cols) {
  // Slices of at least eight rows per thread, and at most 512 blocks: four on each multiprocessor of an H100, whose
  // threads each have two rows in flight (an estimate: kernels/relu_backward.cuh).
  const int64_t across = lanes_across(cols, kVectorWidth<T>);
  const int64_t pieces = std::max<int64_t>(ceil_div(cols, across * kVectorWidth<T>), 1);
  const int64_t most = std::max<int64_t>(512 / pieces, 1);
  return std::clamp<int64_t>(rows * across / (8 * kReluBackwardThreads), 1, most);
}

template <typename T>
void relu_backward(const ReluBackward<T>& p, Stream stream) {
  if (p.cols == 0 || (p.rows == 0 && !p.sum)) return;  // without rows, the sums are still written: zeros
  if (vectorised(p)) {
    launch_relu_backward<T, kVectorWidth<T>>(p, stream);
  } else {
    launch_relu_backward<T, 1>(p, stream);
  }
  if (p.sum && p.slices > 1) reduce<T>({p.slices, p.cols, p.partial, p.sum}, stream);
}

template <typename T>
void reduce(const Reduce<T>& p, Stream stream) {
  if (p.cols == 0) return;
  launch("reduce", &reduce_kernel<T>,
         {ceil_div(p.cols, kReduceLanes), 1, dim3(kReduceLanes, kReduceRows),
          int64_t(sizeof(accumulator_t<T>)) * kReduceLanes * kReduceRows},
         stream, p);
}

#define INSTANTIATE(T)                                                \
  template int64_t relu_backward_slices<T>(int64_t, int64_t);         \
  template void relu_backward(const ReluBackward<T>&, Stream stream); \
  template void reduce(const Reduce<T>&, Stream stream);
MBP_FOR_EACH_TYPE(INSTANTIATE)
#undef INSTANTIATE

}  // namespace manualbp::cuda
