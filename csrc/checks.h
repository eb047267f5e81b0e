// The argument checks that the CPU and the CUDA entries share: the message names the argument, what was expected and
// what came.
#pragma once

#include "cpu/tensor.h"

namespace manualbp {

// Checks input (..., D_in) and weight (D_out, D_in).
inline void check_layer(const char* op, const Tensor& input, const Tensor& weight) {
  MBP_CHECK(input.dim() >= 1, op, ": `input` must have at least one dimension, got a tensor of shape ()");
  MBP_CHECK(weight.dim() == 2, op, ": `weight` must be (out_features, in_features), got shape ", shape_of(weight));
  check_dtype(op, {"weight"}, weight, input);
  const int64_t features = input.size(input.dim() - 1);
  MBP_CHECK(weight.size(1) == features, op, ": `weight` has ", weight.size(1), " columns but `input` has ", features,
            " features (weight: ", shape_of(weight), ", input: ", shape_of(input), ")");
}

// Checks input (..., D_0), weights[k] (D_{k+1}, D_k) and biases[k] (D_{k+1}) or none.
inline void check_network(const char* op, const Tensor& input, const std::vector<Tensor>& weights,
                          const std::vector<std::optional<Tensor>>& biases) {
  MBP_CHECK(!weights.empty(), op, ": `weights` must hold at least one weight");
  MBP_CHECK(input.dim() >= 1, op, ": `input` must have at least one dimension, got a tensor of shape ()");
  int64_t features = input.size(input.dim() - 1);
  for (size_t k = 0; k < weights.size(); ++k) {
    const Tensor& weight = weights[k];
    const Name name{"weights", int64_t(k)};
    MBP_CHECK(weight.dim() == 2, op, ": `", name, "` must be (out_features, in_features), got shape ",
              shape_of(weight));
    check_dtype(op, name, weight, input);
    if (k == 0) {
      MBP_CHECK(weight.size(1) == features, op, ": `", name, "` has ", weight.size(1), " columns but `input` has ",
                features, " features (", name, ": ", shape_of(weight), ", input: ", shape_of(input), ")");
    } else {
      const Name previous{"weights", int64_t(k) - 1};
      MBP_CHECK(weight.size(1) == features, op, ": `", name, "` has ", weight.size(1), " columns but `", previous,
                "` has ", features, " rows (", name, ": ", shape_of(weight), ", ", previous, ": ",
                shape_of(weights[k - 1]), ")");
    }
    features = weight.size(0);
  }
  MBP_CHECK(biases.size() == weights.size(), op, ": `biases` must have one item per weight (", weights.size(),
            "), got ", biases.size());
  for (size_t k = 0; k < weights.size(); ++k) {
    if (biases[k]) check_bias(op, {"biases", int64_t(k)}, *biases[k], {"weights", int64_t(k)}, weights[k], input);
  }
}

// Checks what a backward pass gets back: grad_output, and the output if the pass needs it, both (..., cols).
inline void check_backward(const char* op, const Tensor& input, int64_t cols, const Tensor& grad_output,
                           const std::optional<Tensor>& output) {
  const auto sizes = with_last_size(input, cols);
  check_same_shape(op, {"grad_output"}, grad_output, sizes, input);
  if (!output) return;
  check_same_shape(op, {"output"}, *output, sizes, input);
  MBP_CHECK(output->is_contiguous(), op, ": `output` must be contiguous");
}

// Checks the target of a loss of an output (..., cols): the classes themselves are data, and left to the kernels.
inline void check_loss(const char* op, const Tensor& input, const Tensor& target, int64_t cols, const std::string& loss,
                       double label_smoothing) {
  const bool is_class = loss == "cross_entropy";
  MBP_CHECK(is_class || loss == "mse" || loss == "bce_with_logits", op,
            ": `loss` must be mse, cross_entropy or bce_with_logits, got ", loss);
  MBP_CHECK(label_smoothing >= 0 && label_smoothing <= 1, op, ": `label_smoothing` must be between 0 and 1, got ",
            label_smoothing);
  auto sizes = with_last_size(input, cols);
  if (is_class) {
    MBP_CHECK(input.dim() <= 2, op, ": cross_entropy takes an `input` of at most two dimensions, got ",
              shape_of(input));
    MBP_CHECK(dtype_of(target) == aoti_torch_dtype_int64(), op,
              ": `target` of cross_entropy must hold class indices (int64), got ", dtype_name(dtype_of(target)));
    sizes.pop_back();
  } else {
    check_dtype(op, {"target"}, target, input);
  }
  MBP_CHECK(same_shape(target, sizes), op, ": `target` must have shape ", shape_text(sizes), ", got ",
            shape_of(target));
}

}  // namespace manualbp
