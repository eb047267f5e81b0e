// A loss and its target, from the arguments of an entry to what the kernels take.
#pragma once

#include "../checks.h"
#include "isa.h"

namespace manualbp {

struct LossOptions {
  LossKind kind;
  bool mean;
  int64_t ignore_index;
  double label_smoothing;
};

// The target of a loss of outputs (B, D): (B, D), or the class of each row.
template <typename T>
struct Target {
  Matrix<const T> values;
  Matrix<const int64_t> classes;  // (B, 1); only one of the two has data
};

template <typename T>
Target<T> as_target(const Tensor& target, LossKind kind, Tensor& keep) {
  if (!has_class_target(kind)) return {as_matrix<T>(target, keep), {}};
  const int64_t rows = target.dim() ? target.size(0) : 1, stride = target.dim() ? target.stride(0) : 0;
  return {{}, {const_data<int64_t>(target), rows, 1, stride, 1}};
}

// The loss of a batch: `terms` for the kernels, and `count`, by which a mean divides the sum. Classes out of bounds are
// an error.
template <typename T>
struct BatchLoss {
  BatchLoss(const char* op, const LossOptions& options, const Target<T>& target, int64_t rows, int64_t cols)
      : mean(options.mean) {
    terms.cols = cols;
    terms.ignore_index = options.ignore_index;
    terms.label_smoothing = options.label_smoothing;
    if (has_class_target(options.kind)) {
      terms.classes = target.classes.data;
      terms.target_row = target.classes.row_stride;
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t c = terms.classes[i * terms.target_row];
        if (c == options.ignore_index) continue;
        MBP_CHECK(c >= 0 && c < cols, op, ": `target` is out of bounds: class ", c, " at row ", i,
                  ", but the output has ", cols, " classes");
        ++count;
      }
    } else {
      terms.target = target.values.data;
      terms.target_row = target.values.row_stride;
      terms.target_col = target.values.col_stride;
      count = rows * cols;
    }
    terms.scale = mean ? 1.0 / double(count) : 1.0;
  }

  // The same against a target of type P: T or, under autocast, the accumulator type of T.
  template <typename P>
  static BatchLoss against(const char* op, const LossOptions& options, const Target<P>& target, int64_t rows,
                           int64_t cols) {
    const Matrix<const P> y = target.values;
    Target<T> same{{nullptr, y.rows, y.cols, y.row_stride, y.col_stride}, target.classes};
    if constexpr (std::is_same_v<T, P>) same.values = y;
    BatchLoss loss(op, options, same, rows, cols);
    if constexpr (!std::is_same_v<T, P>) loss.terms.wide_target = y.data;
    return loss;
  }

  // The loss, from the sum over all rows, and its rounding to the storage type.
  double value(double sum) const { return mean ? sum / double(count) : sum; }
  void store(double sum, T* out) const { kernels<T>().store(value(sum), out); }

  Loss<T> terms{};
  int64_t count = 0;
  bool mean;
};

}  // namespace manualbp
