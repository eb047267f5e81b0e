// What entries need of torch on any device, so that they read as the algorithm: dtypes, shapes, views as pointers and
// strides. Allocation is in cpu/tensor.h and cuda/tensor.h.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "error.h"
#include "types.h"

namespace manualbp {

using torch::stable::Tensor;

// A matrix in memory: any strides, in elements.
template <typename T>
struct Matrix {
  T* data;
  int64_t rows, cols;
  int64_t row_stride, col_stride;

  static Matrix contiguous(T* data, int64_t rows, int64_t cols) { return {data, rows, cols, cols, 1}; }
  Matrix transposed() const { return {data, cols, rows, col_stride, row_stride}; }
};

inline int32_t dtype_of(const Tensor& t) {
  int32_t dtype;
  MBP_TORCH(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

inline int64_t item_size(int32_t dtype) {
  return dtype == aoti_torch_dtype_float64()   ? 8
         : dtype == aoti_torch_dtype_float32() ? 4
         : dtype == aoti_torch_dtype_uint8()   ? 1
                                               : 2;
}

inline const char* dtype_name(int32_t dtype) {
  const struct {
    int32_t (*dtype)();
    const char* name;
  } names[] = {
      {aoti_torch_dtype_float32, "float32"},     {aoti_torch_dtype_float64, "float64"},
      {aoti_torch_dtype_bfloat16, "bfloat16"},   {aoti_torch_dtype_float16, "float16"},
      {aoti_torch_dtype_bool, "bool"},           {aoti_torch_dtype_uint8, "uint8"},
      {aoti_torch_dtype_int8, "int8"},           {aoti_torch_dtype_int16, "int16"},
      {aoti_torch_dtype_int32, "int32"},         {aoti_torch_dtype_int64, "int64"},
      {aoti_torch_dtype_complex64, "complex64"}, {aoti_torch_dtype_complex128, "complex128"},
  };
  for (const auto& entry : names) {
    if (entry.dtype() == dtype) return entry.name;
  }
  return "an unsupported dtype";
}

// "(5, 3)", for messages.
template <typename Sizes>
std::string shape_text(const Sizes& sizes) {
  std::ostringstream text;
  const char* separator = "(";
  for (const int64_t size : sizes) {
    text << separator << size;
    separator = ", ";
  }
  text << (sizes.size() == 0 ? "()" : sizes.size() == 1 ? ",)" : ")");
  return text.str();
}
inline std::string shape_of(const Tensor& t) { return shape_text(t.sizes()); }

inline std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = step;
    step *= sizes[d] > 0 ? sizes[d] : 1;
  }
  return strides;
}

// The memory of t with other sizes and strides, from `offset` on. Torch does not record such a view, so it can be
// written and read in grad mode.
inline Tensor seen_as(const Tensor& t, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                      int64_t offset = 0) {
  AtenTensorHandle handle;
  MBP_TORCH(
      aoti_torch__reinterpret_tensor(t.get(), int64_t(sizes.size()), sizes.data(), strides.data(), offset, &handle));
  return Tensor(handle);
}

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
template <typename T>
const T* const_data(const Tensor& t) {
  const void* data = t.const_data_ptr();
  MBP_CHECK(data || t.numel() == 0, "a tensor of shape ", shape_of(t), " has no memory: its storage was freed");
  return static_cast<const T*>(data);
}

// A tensor of any rank as a matrix (product of the leading dimensions, last dimension), without a copy if one row
// stride serves all leading dimensions. Otherwise of a contiguous copy, which `keep` owns.
template <typename T>
Matrix<const T> as_matrix(const Tensor& t, Tensor& keep) {
  const int64_t dim = t.dim();
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  if (dim == 1) return {const_data<T>(t), 1, sizes[0], sizes[0], strides[0]};
  int64_t rows = sizes[dim - 2];
  int64_t row_stride = strides[dim - 2];
  bool regular = true;
  for (int64_t d = dim - 3; d >= 0; --d) {
    if (sizes[d] != 1) {
      if (rows == 1) {
        row_stride = strides[d];
      } else if (strides[d] != row_stride * rows) {
        regular = false;
      }
    }
    rows *= sizes[d];
  }
  const int64_t cols = sizes[dim - 1];
  if (regular || rows == 0) return {const_data<T>(t), rows, cols, row_stride, strides[dim - 1]};
  keep = torch::stable::contiguous(t);
  return Matrix<const T>::contiguous(const_data<T>(keep), rows, cols);
}

// A weight (D_out, D_in) as a matrix.
template <typename T>
Matrix<const T> as_matrix(const Tensor& weight) {
  return {const_data<T>(weight), weight.size(0), weight.size(1), weight.stride(0), weight.stride(1)};
}

// Takes ownership of a str argument, copies its text and frees it. (torch's own conversion to std::string, in 2.10 to
// 2.13 at least, never frees it: 48 bytes a call, each of which can keep the memory around it from being reused.)
inline std::string take_text(StringHandle handle) {
  const char* text;
  size_t length;
  MBP_TORCH(torch_string_c_str(handle, &text));
  MBP_TORCH(torch_string_length(handle, &length));
  std::string taken(text, length);
  MBP_TORCH(torch_delete_string(handle));
  return taken;
}

// The sizes of t with another last one.
inline std::vector<int64_t> with_last_size(const Tensor& t, int64_t last) {
  const auto sizes = t.sizes();
  std::vector<int64_t> out(sizes.begin(), sizes.end());
  out.back() = last;
  return out;
}

// Calls f with a value of input's storage type: f(float{}), f(bfloat16{}), ...
template <typename F>
auto dispatch(const char* op, const Tensor& input, F&& f) {
  const int32_t dtype = dtype_of(input);
  if (dtype == aoti_torch_dtype_float32()) return f(float{});
  if (dtype == aoti_torch_dtype_float64()) return f(double{});
  if (dtype == aoti_torch_dtype_bfloat16()) return f(bfloat16{});
  if (dtype == aoti_torch_dtype_float16()) return f(float16{});
  raise(op, ": `input` must be float64, float32, bfloat16 or float16, got ", dtype_name(dtype));
}

}  // namespace manualbp
