// Tensors on a device: allocation, views and products through torch, and checks of the device. Needs no CUDA header.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "../checks.h"
#include "kernels.h"

namespace manualbp::cuda {

struct Device {
  int32_t type, index;
};

inline Device device_of(const Tensor& t) {
  Device device;
  MBP_TORCH(aoti_torch_get_device_type(t.get(), &device.type));
  MBP_TORCH(aoti_torch_get_device_index(t.get(), &device.index));
  return device;
}

// While it exists, the device of a tensor is the current one. Also holds the current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : device_(device_of(t)) {
#if !defined(MBP_EMULATED)
    guard_.emplace(device_.index);
    MBP_TORCH(aoti_torch_get_current_cuda_stream(device_.index, &stream_));
#endif
  }

  Stream stream() const { return stream_; }

  // A new contiguous tensor from torch's allocator. It may be freed on the host before the stream has used it: the
  // allocator reuses the memory only for later work of the same stream.
  Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype) const {
    const auto strides = contiguous_strides(sizes);
    AtenTensorHandle handle;
    MBP_TORCH(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype, device_.type,
                                       device_.index, &handle));
    return Tensor(handle);
  }

 private:
  Device device_;
  Stream stream_ = nullptr;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

template <typename T>
constexpr int32_t (*kDtype)() = aoti_torch_dtype_float32;
template <>
constexpr int32_t (*kDtype<double>)() = aoti_torch_dtype_float64;
template <>
constexpr int32_t (*kDtype<bfloat16>)() = aoti_torch_dtype_bfloat16;
template <>
constexpr int32_t (*kDtype<float16>)() = aoti_torch_dtype_float16;

inline Tensor transposed(const Tensor& t) { return seen_as(t, {t.size(1), t.size(0)}, {t.stride(1), t.stride(0)}); }
inline Tensor rows_of(const Tensor& t, int64_t first, int64_t count) {
  return seen_as(t, {count, t.size(1)}, {t.stride(0), t.stride(1)}, first * t.stride(0));
}

// A contiguous (rows, cols) matrix in a flat tensor.
inline Tensor matrix_in(const Tensor& flat, int64_t rows, int64_t cols, int64_t offset = 0) {
  return seen_as(flat, {rows, cols}, {cols, 1}, offset);
}

// A tensor of any rank as a matrix (product of the leading dimensions, last dimension), of a copy if necessary.
inline Tensor as_rows(const Tensor& t) {
  Tensor keep;
  const auto m = as_matrix<char>(t, keep);  // for its sizes and strides
  return seen_as(keep.defined() ? keep : t, {m.rows, m.cols}, {m.row_stride, m.col_stride});
}

template <typename... Arguments>
void call(const char* op, const char* overload, const Arguments&... arguments) {
  StableIValue stack[] = {torch::stable::detail::from(arguments)...};
  MBP_TORCH(torch_call_dispatcher(op, overload, stack, TORCH_TARGET_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // the result is a second reference to `out`: releases it
}

// out = a b, by the library.
inline void multiply(const Tensor& a, const Tensor& b, const Tensor& out) { call("aten::mm", "out", a, b, out); }

// f = h Omega^T + beta, by the library.
inline void multiply_and_add(const Tensor& h, const Tensor& omega, const std::optional<Tensor>& beta, const Tensor& f) {
  if (beta) return call("aten::linear", "out", h, omega, beta, f);
  multiply(h, transposed(omega), f);
}

inline std::string device_text(const Device& device) {
  return (device.type == aoti_torch_device_type_cpu() ? "cpu" : "cuda:" + std::to_string(device.index));
}

inline void check_device(const char* op, Name name, const Tensor& t, const Tensor& input) {
  const Device device = device_of(t), expected = device_of(input);
  MBP_CHECK(device.type == expected.type && device.index == expected.index, op, ": `", name,
            "` must be on the device of `input` (", device_text(expected), "), got ", device_text(device));
}
inline void check_devices(const char* op, const Tensor& input, const std::vector<Tensor>& weights,
                          const std::vector<std::optional<Tensor>>& biases) {
  for (size_t k = 0; k < weights.size(); ++k) check_device(op, {"weights", int64_t(k)}, weights[k], input);
  for (size_t k = 0; k < biases.size(); ++k) {
    if (biases[k]) check_device(op, {"biases", int64_t(k)}, *biases[k], input);
  }
}

}  // namespace manualbp::cuda
