// Replaces the parts of torch that csrc/tensor.h and csrc/cpu/{tensor,layer,network,update}.h need: tensors in malloc'ed
// memory, and a parallel_for on std::thread, whose synchronisation the thread sanitizer sees, unlike OpenMP's.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

struct AtenTensorOpaque {
  std::vector<int64_t> sizes, strides;
  int32_t dtype;
  std::shared_ptr<void> memory;
};
using AtenTensorHandle = AtenTensorOpaque*;
struct StringOpaque;
using StringHandle = StringOpaque*;

#define MBP_STUB_DTYPE(name, number) \
  inline int32_t aoti_torch_dtype_##name() { return number; }
MBP_STUB_DTYPE(uint8, 0)
MBP_STUB_DTYPE(int8, 1)
MBP_STUB_DTYPE(int16, 2)
MBP_STUB_DTYPE(int32, 3)
MBP_STUB_DTYPE(int64, 4)
MBP_STUB_DTYPE(float16, 5)
MBP_STUB_DTYPE(float32, 6)
MBP_STUB_DTYPE(float64, 7)
MBP_STUB_DTYPE(complex64, 9)
MBP_STUB_DTYPE(complex128, 10)
MBP_STUB_DTYPE(bool, 11)
MBP_STUB_DTYPE(bfloat16, 15)
#undef MBP_STUB_DTYPE

inline int aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* dtype) { return *dtype = tensor->dtype, 0; }
inline int32_t aoti_torch_device_type_cpu() { return 0; }
inline int32_t aoti_torch_layout_strided() { return 0; }
// Supports only bytes: the one tensor that a Network makes is a large Buffer.
inline int aoti_torch_empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t,
                                    int32_t, AtenTensorHandle* out) {
  const size_t bytes = dim == 1 ? size_t(sizes[0]) : 0;
  if (dtype != aoti_torch_dtype_uint8() || dim != 1) return 1;
  *out = new AtenTensorOpaque{{sizes, sizes + dim}, {strides, strides + dim}, dtype, {std::malloc(bytes), std::free}};
  return 0;
}
inline int aoti_torch__reinterpret_tensor(AtenTensorHandle, int64_t, const int64_t*, const int64_t*, int64_t,
                                          AtenTensorHandle*) {
  return 1;
}
inline int torch_string_c_str(StringHandle, const char**) { return 1; }
inline int torch_string_length(StringHandle, size_t*) { return 1; }
inline int torch_delete_string(StringHandle) { return 1; }

inline uint32_t stub_threads = 1;
inline thread_local uint32_t stub_thread = 0;
inline void (*stub_barrier)(bool is_end) = nullptr;  // called where a parallel region begins, and where it ends
inline int torch_get_thread_idx(uint32_t* index) { return *index = stub_thread, 0; }

namespace torch::stable {

class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : tensor_(handle) {}
  AtenTensorHandle get() const { return tensor_.get(); }
  int64_t dim() const { return int64_t(tensor_->sizes.size()); }
  int64_t size(int64_t d) const { return tensor_->sizes[size_t(d)]; }
  int64_t stride(int64_t d) const { return tensor_->strides[size_t(d)]; }
  const std::vector<int64_t>& sizes() const { return tensor_->sizes; }
  const std::vector<int64_t>& strides() const { return tensor_->strides; }
  int64_t numel() const {
    int64_t count = 1;
    for (const int64_t size : tensor_->sizes) count *= size;
    return count;
  }
  bool is_contiguous() const {
    int64_t step = 1;
    for (size_t d = tensor_->sizes.size(); d-- > 0; step *= tensor_->sizes[d]) {
      if (tensor_->strides[d] != step) return false;
    }
    return true;
  }
  void* mutable_data_ptr() const { return tensor_->memory.get(); }
  const void* const_data_ptr() const { return tensor_->memory.get(); }

 private:
  std::shared_ptr<AtenTensorOpaque> tensor_;
};
inline Tensor contiguous(const Tensor& tensor) { return tensor; }

inline uint32_t get_num_threads() { return stub_threads; }

// Splits [begin, end) into parts of at least `grain`; the calling thread runs the first.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  const int64_t shares = std::min<int64_t>(stub_threads, (end - begin + grain - 1) / grain);
  const int64_t share = shares ? (end - begin + shares - 1) / shares : 0;
  std::vector<std::thread> team;
  if (stub_barrier) stub_barrier(false);
  for (int64_t i = 1; i < shares; ++i) {
    const int64_t first = begin + i * share;
    if (first >= end) break;
    team.emplace_back([=, &f] {
      stub_thread = uint32_t(i);
      f(first, std::min(first + share, end));
    });
  }
  if (shares) f(begin, std::min(begin + share, end));
  for (auto& thread : team) thread.join();
  if (stub_barrier) stub_barrier(true);
}

}  // namespace torch::stable
