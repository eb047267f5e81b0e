// From the arguments of an entry to a Network and to the memory of its gradients.
#pragma once

#include "../checks.h"
#include "../gradients.h"
#include "backward.h"

namespace manualbp {

// The layers that weights and biases describe.
template <typename T>
std::vector<Layer<T>> layers_of(const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases) {
  std::vector<Layer<T>> layers(weights.size());
  for (size_t k = 0; k < weights.size(); ++k) {
    layers[k].omega = as_matrix<T>(weights[k]);
    layers[k].beta = as_bias<T>(biases[k]);
  }
  return layers;
}

// The network of these layers, for `batch` rows.
template <typename T>
Network<T> network(int64_t batch, const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases,
                   bool final_relu) {
  return Network<T>(batch, layers_of<T>(weights, biases), final_relu);
}

// Checks a tensor that an earlier call stored, such as the flat one of all layers' activations.
inline void check_stored(const char* op, Name name, const Tensor& stored, const std::vector<int64_t>& sizes,
                         const Tensor& input) {
  check_same_shape(op, name, stored, sizes, input);
  MBP_CHECK(stored.is_contiguous(), op, ": `", name, "` must be contiguous");
}

// Gives the layers their dropout. scales: c of the dropout after each layer, 0 for none, or nothing at all; kept: which
// elements of the outputs of those with dropout are kept, (B, D_{k+1}) each, one after another in a flat tensor of bools.
// A backward pass whose activations are stored needs no masks.
template <typename T>
void set_dropout(const char* op, Network<T>& net, const std::optional<Tensor>& kept, const std::vector<double>& scales,
                 bool needs_masks) {
  MBP_CHECK(scales.empty() || scales.size() == net.layers.size(), op, ": `scales` must be empty or have one item per ",
            "layer (", net.layers.size(), "), got ", scales.size());
  int64_t size = 0;
  for (size_t k = 0; k < scales.size(); ++k) {
    const Name name{"scales", int64_t(k)};
    MBP_CHECK(scales[k] >= 0, op, ": `", name, "` must not be negative, got ", scales[k]);
    if (scales[k] == 0) continue;
    MBP_CHECK(k + 1 < net.layers.size() || net.final_relu, op, ": `", name, "` must be 0, since no ReLU follows, got ",
              scales[k]);
    net.layers[k].scale = accumulator_t<T>(scales[k]);
    size += net.plan.batch * net.layers[k].d_out();
  }
  MBP_CHECK(kept || !needs_masks || size == 0, op, ": `kept` must be given with `scales`");
  if (!kept) return;
  MBP_CHECK(dtype_of(*kept) == aoti_torch_dtype_bool(), op, ": `kept` must hold bools, got ",
            dtype_name(dtype_of(*kept)));
  MBP_CHECK(same_shape(*kept, {size}), op, ": `kept` must have shape ", shape_text(std::vector<int64_t>{size}),
            ", got ", shape_of(*kept));
  MBP_CHECK(kept->is_contiguous(), op, ": `kept` must be contiguous");
  if (size == 0) return;
  const uint8_t* mask = const_data<uint8_t>(*kept);
  for (size_t k = 0; k < scales.size(); ++k) {
    if (scales[k] == 0) continue;
    net.layers[k].kept = mask;
    mask += net.plan.batch * net.layers[k].d_out();
  }
}

// Allocates the gradients that `needs` asks for (gradients.h).
template <typename T>
Gradients<T> allocate_gradients(const char* op, const Tensor& input, const std::vector<Tensor>& weights,
                                const std::vector<bool>& needs, bool flat, std::vector<Tensor>& asked) {
  const auto tensors = allocate_gradients(op, input, weights, needs, flat, asked, dtype_of(input), empty);
  const auto memory = [](const Tensor& t) { return t.defined() ? data<T>(t) : nullptr; };
  Gradients<T> grads;
  grads.input = memory(tensors.input);
  for (const Tensor& omega : tensors.omega) grads.omega.push_back(memory(omega));
  for (const Tensor& beta : tensors.beta) grads.beta.push_back(memory(beta));
  return grads;
}

}  // namespace manualbp
