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

// Allocates the gradients that `needs` asks for (gradients.h).
template <typename T>
Gradients<T> allocate_gradients(const char* op, const Tensor& input, const std::vector<Tensor>& weights,
                                const std::vector<bool>& needs, bool flat, std::vector<Tensor>& asked) {
  const auto tensors = allocate_gradients(op, input, weights, needs, flat, asked, empty);
  const auto memory = [](const Tensor& t) { return t.defined() ? data<T>(t) : nullptr; };
  Gradients<T> grads;
  grads.input = memory(tensors.input);
  for (const Tensor& omega : tensors.omega) grads.omega.push_back(memory(omega));
  for (const Tensor& beta : tensors.beta) grads.beta.push_back(memory(beta));
  return grads;
}

}  // namespace manualbp
