// The argument checks that the CPU and the CUDA entries share. A message names the argument, what was expected and what
// was passed.
#pragma once

#include <algorithm>

#include "tensor.h"

namespace manualbp {

// An argument's name, as text only when a message needs it: "weights[1]", or "weight".
struct Name {
  const char* name;
  int64_t index = -1;
};
inline std::ostream& operator<<(std::ostream& out, const Name& n) {
  out << n.name;
  return n.index < 0 ? out : out << '[' << n.index << ']';
}

// Under autocast, arguments may be float32 or the dtype that it computes in.
constexpr int32_t kNoAutocast = -1;
inline void check_autocast_dtype(const char* op, Name name, const Tensor& t, int32_t autocast) {
  MBP_CHECK(dtype_of(t) == aoti_torch_dtype_float32() || dtype_of(t) == autocast, op, ": `", name,
            "` must be float32 or ", dtype_name(autocast), ", got ", dtype_name(dtype_of(t)));
}

inline void check_dtype(const char* op, Name name, const Tensor& t, const Tensor& input,
                        int32_t autocast = kNoAutocast) {
  if (autocast != kNoAutocast) return check_autocast_dtype(op, name, t, autocast);
  MBP_CHECK(dtype_of(t) == dtype_of(input), op, ": `", name, "` must have the dtype of `input` (",
            dtype_name(dtype_of(input)), "), got ", dtype_name(dtype_of(t)));
}

// `input` is at fault, rather than the parameters, if those agree.
inline void check_input_dtype(const char* op, const Tensor& input, Name name, const Tensor& weight) {
  const char* const dtype = dtype_name(dtype_of(weight));
  MBP_CHECK(dtype_of(input) == dtype_of(weight), op, ": `input` must have the dtype of `", name, "` (", dtype,
            "), got ", dtype_name(dtype_of(input)), ": pass input.to(torch.", dtype, ")");
}

inline void check_bias(const char* op, Name name, const Tensor& bias, Name weight_name, const Tensor& weight,
                       const Tensor& input, int32_t autocast = kNoAutocast) {
  check_dtype(op, name, bias, input, autocast);
  MBP_CHECK(bias.dim() == 1 && bias.size(0) == weight.size(0), op, ": `", name, "` must have shape (", weight.size(0),
            ",), one item per row of `", weight_name, "` ", shape_of(weight), ", got ", shape_of(bias));
}

inline bool same_shape(const Tensor& t, const std::vector<int64_t>& sizes) {
  bool same = t.dim() == int64_t(sizes.size());
  for (size_t d = 0; same && d < sizes.size(); ++d) same = t.size(int64_t(d)) == sizes[d];
  return same;
}

inline void check_same_shape(const char* op, Name name, const Tensor& t, const std::vector<int64_t>& sizes,
                             const Tensor& input) {
  check_dtype(op, name, t, input);
  MBP_CHECK(same_shape(t, sizes), op, ": `", name, "` must have shape ", shape_text(sizes), ", got ", shape_of(t));
}

// Checks input (..., D_in) and weight (D_out, D_in).
inline void check_layer(const char* op, const Tensor& input, const Tensor& weight) {
  MBP_CHECK(input.dim() >= 1, op, ": `input` must have at least one dimension, got a tensor of shape ()");
  MBP_CHECK(weight.dim() == 2, op, ": `weight` must be (out_features, in_features), got shape ", shape_of(weight));
  check_input_dtype(op, input, {"weight"}, weight);
  const int64_t features = input.size(input.dim() - 1);
  MBP_CHECK(weight.size(1) == features, op, ": `weight` has ", weight.size(1), " columns but `input` has ", features,
            " features (weight: ", shape_of(weight), ", input: ", shape_of(input), ")");
}

// Checks input (..., D_0), weights[k] (D_{k+1}, D_k) and biases[k] (D_{k+1}) or none.
inline void check_network(const char* op, const Tensor& input, const std::vector<Tensor>& weights,
                          const std::vector<std::optional<Tensor>>& biases, int32_t autocast = kNoAutocast) {
  MBP_CHECK(!weights.empty(), op, ": `weights` must hold at least one weight");
  MBP_CHECK(input.dim() >= 1, op, ": `input` must have at least one dimension, got a tensor of shape ()");
  int64_t features = input.size(input.dim() - 1);
  const int32_t dtype = dtype_of(weights[0]);
  if (autocast != kNoAutocast) check_autocast_dtype(op, {"input"}, input, autocast);
  if (autocast == kNoAutocast && dtype_of(input) != dtype &&
      std::all_of(weights.begin(), weights.end(), [&](const Tensor& weight) { return dtype_of(weight) == dtype; })) {
    check_input_dtype(op, input, {"weights", 0}, weights[0]);
  }
  for (size_t k = 0; k < weights.size(); ++k) {
    const Tensor& weight = weights[k];
    const Name name{"weights", int64_t(k)};
    MBP_CHECK(weight.dim() == 2, op, ": `", name, "` must be (out_features, in_features), got shape ",
              shape_of(weight));
    check_dtype(op, name, weight, input, autocast);
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
    if (biases[k]) {
      check_bias(op, {"biases", int64_t(k)}, *biases[k], {"weights", int64_t(k)}, weights[k], input, autocast);
    }
  }
}

// Checks the arguments of a backward pass: grad_output, and the output if the pass needs it, both (..., cols).
inline void check_backward(const char* op, const Tensor& input, int64_t cols, const Tensor& grad_output,
                           const std::optional<Tensor>& output) {
  const auto sizes = with_last_size(input, cols);
  check_same_shape(op, {"grad_output"}, grad_output, sizes, input);
  if (!output) return;
  check_same_shape(op, {"output"}, *output, sizes, input);
  MBP_CHECK(output->is_contiguous(), op, ": `output` must be contiguous");
}

// The loss that a `str` argument names.
inline LossKind parse_loss(const char* op, const std::string& name) {
  if (name == "mse") return LossKind::mse;
  if (name == "bce_with_logits") return LossKind::bce_with_logits;
  if (name == "cross_entropy") return LossKind::cross_entropy;
  raise(op, ": `loss` must be mse, cross_entropy or bce_with_logits, got ", name);
}

// Checks the target of a loss of an output (..., cols). The values of class indices are data: the entries and kernels
// check those.
inline void check_loss(const char* op, const Tensor& input, const Tensor& target, int64_t cols, LossKind loss,
                       double label_smoothing, int32_t autocast = kNoAutocast) {
  MBP_CHECK(label_smoothing >= 0 && label_smoothing <= 1, op, ": `label_smoothing` must be between 0 and 1, got ",
            label_smoothing);
  auto sizes = with_last_size(input, cols);
  if (has_class_target(loss)) {
    MBP_CHECK(input.dim() <= 2, op, ": cross_entropy takes an `input` of at most two dimensions, got ",
              shape_of(input));
    MBP_CHECK(dtype_of(target) == aoti_torch_dtype_int64(), op,
              ": `target` of cross_entropy must hold class indices (int64), got ", dtype_name(dtype_of(target)));
    sizes.pop_back();
  } else {
    if (autocast == kNoAutocast) check_dtype(op, {"target"}, target, input);
    MBP_CHECK(autocast == kNoAutocast || dtype_of(target) == aoti_torch_dtype_float32(), op,
              ": `target` must be float32, got ", dtype_name(dtype_of(target)));
  }
  MBP_CHECK(same_shape(target, sizes), op, ": `target` must have shape ", shape_text(sizes), ", got ",
            shape_of(target));
}

}  // namespace manualbp
