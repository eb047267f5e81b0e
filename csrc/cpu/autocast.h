// Rounding to half precision, for a computation that autocast makes of float32 tensors (mlp_autocast.cpp, train.cpp).
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include "../checks.h"
#include "backward.h"

namespace manualbp {

// The dtype that autocast computes in, from the argument of an entry.
inline int32_t half_of(const char* op, torch::headeronly::ScalarType dtype) {
  if (dtype == torch::headeronly::ScalarType::BFloat16) return aoti_torch_dtype_bfloat16();
  if (dtype == torch::headeronly::ScalarType::Half) return aoti_torch_dtype_float16();
  raise(op, ": `dtype` must be bfloat16 or float16");
}

// `from`, rounded to T, in the memory `to`: row after row, or column after column if its columns are contiguous.
template <typename T>
Matrix<const T> rounded(Matrix<const float> from, T* to, const Workers& workers) {
  if (from.row_stride == 1 && from.col_stride != 1) return rounded<T>(from.transposed(), to, workers).transposed();
  // A pass over memory costs about as much as 16 multiply-adds per element.
  const double work = 16 * double(from.rows) * double(from.cols);
  constexpr int64_t kRun = 1024;
  if (from.col_stride == 1 && (from.row_stride == from.cols || from.rows == 1)) {
    const int64_t numbers = from.rows * from.cols;
    workers.run(ceil_div(numbers, kRun), work, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kRun, last = std::min(end * kRun, numbers);
      kernels<T>().narrow(from.data + first, to + first, last - first);
    });
  } else {
    workers.run(from.rows, work, [&](int64_t begin, int64_t end) {
      float gathered[kRun];
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t col = 0; col < from.cols; col += kRun) {
          const int64_t count = std::min(kRun, from.cols - col);
          const float* const row = from.data + i * from.row_stride + col * from.col_stride;
          for (int64_t j = 0; j < count; ++j) gathered[j] = row[j * from.col_stride];
          kernels<T>().narrow(gathered, to + i * from.cols + col, count);
        }
      }
    });
  }
  return Matrix<const T>::contiguous(to, from.rows, from.cols);
}

// The result of a backward pass in memory of type P: T, or under autocast the accumulator type of T.
template <typename T, typename P>
Result<T> result_in(P* memory) {
  if constexpr (std::is_same_v<T, P>) {
    return memory;
  } else {
    return Result<T>::in_accumulator(memory);
  }
}

}  // namespace manualbp
