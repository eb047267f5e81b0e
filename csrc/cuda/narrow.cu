// Launches kernels/narrow.cuh.

#include <algorithm>

#include "kernels/narrow.cuh"
#include "launch.cuh"

namespace manualbp::cuda {

namespace {

template <typename T>
int64_t shared_bytes(const NarrowNetwork<T>& net) {
  const int width = padded(*std::max_element(net.widths, net.widths + net.layers + 1));
  return int64_t(NarrowProduct<T>::kRows + width) * narrow_ld<T>(width) * int64_t(sizeof(T));
}

}  // namespace

template <typename T>
int64_t narrow_blocks(int64_t rows) {
  // Two for each multiprocessor of an H100. A constant, so that sums are the same on every device.
  constexpr int64_t kMaxBlocks = 264;
  return std::min(ceil_div(rows, NarrowProduct<T>::kRows), kMaxBlocks);
}

template <typename T>
void narrow_forward(const NarrowForward<T>& p, Stream stream) {
  if (p.net.rows == 0) return;
  launch("narrow_forward", &narrow_forward_kernel<T>,
         {narrow_blocks<T>(p.net.rows), 1, dim3(kNarrowThreads), shared_bytes(p.net)}, stream, p);
}

template <typename T>
void narrow_backward(const NarrowBackward<T>& p, Stream stream) {
  if (p.net.rows == 0) return;
  launch("narrow_backward", &narrow_backward_kernel<T>,
         {narrow_blocks<T>(p.net.rows), 1, dim3(kNarrowThreads), shared_bytes(p.net)}, stream, p);
}

template <typename T>
void narrow_biases(const NarrowBiases<T>& p, Stream stream) {
  launch("narrow_biases", &narrow_biases_kernel<T>,
         {ceil_div(p.ends[p.layers - 1], kReduceLanes), 1, dim3(kReduceLanes, kReduceRows),
          int64_t(sizeof(accumulator_t<T>)) * kReduceLanes * kReduceRows},
         stream, p);
}

#define INSTANTIATE(T)                                             \
  template int64_t narrow_blocks<T>(int64_t);                      \
  template void narrow_forward(const NarrowForward<T>&, Stream);   \
  template void narrow_backward(const NarrowBackward<T>&, Stream); \
  template void narrow_biases(const NarrowBiases<T>&, Stream);
INSTANTIATE(float)
INSTANTIATE(::manualbp::bfloat16)
INSTANTIATE(::manualbp::float16)
#undef INSTANTIATE

}  // namespace manualbp::cuda
