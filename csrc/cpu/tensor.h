// Tensors on the CPU: allocation through torch, and biases as a pointer and a stride.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../tensor.h"
#include "pool.h"

namespace manualbp {

// Gives the system advice on the whole huge pages of a large block. A hint: where there are none, nothing happens.
inline void advise([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes, [[maybe_unused]] int advice) {
#if defined(__linux__)
  constexpr int64_t kPage = 2 << 20;
  if (bytes < 2 * kPage) return;
  const int64_t first = round_up(reinterpret_cast<intptr_t>(data), kPage);
  const int64_t last = (reinterpret_cast<intptr_t>(data) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), size_t(last - first), advice);
#endif
}

// A new contiguous tensor from torch's allocator. If memory has run out, what the pool keeps is given up first.
inline Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype) {
  const auto strides = contiguous_strides(sizes);
  AtenTensorHandle handle;
  const auto allocate = [&] {
    return aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
                                    aoti_torch_device_type_cpu(), 0, &handle);
  };
  if (allocate() != 0) {
    if (Pool::global().clear() == 0) raise_libtorch_error("aoti_torch_empty_strided");
    MBP_TORCH(allocate());
  }
  Tensor tensor(handle);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // A page fault every 4 KiB costs as much as the work on the page, so huge pages are asked for before the first touch.
  const int64_t step = sizes.empty() ? 1 : strides[0] * sizes[0];
  if (step > (1 << 19)) advise(tensor.mutable_data_ptr(), step * item_size(dtype), MADV_HUGEPAGE);
#endif
  return tensor;
}

// A bias (D_out), or none.
template <typename T>
struct Bias {
  const T* data;  // nullptr: none
  int64_t stride;
};
template <typename T>
Bias<T> as_bias(const std::optional<Tensor>& bias) {
  if (!bias) return {nullptr, 0};
  return {const_data<T>(*bias), bias->stride(0)};
}

}  // namespace manualbp
