// What the entries share: the network that their arguments describe, and the gradients asked for.
#pragma once

#include "../checks.h"
#include "network.h"

namespace manualbp {

// The network that weights and biases describe, for `batch` rows.
template <typename T>
Network<T> network(int64_t batch, const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases,
                   bool final_relu) {
  std::vector<Layer<T>> layers(weights.size());
  for (size_t k = 0; k < weights.size(); ++k) {
    layers[k].omega = as_matrix<T>(weights[k]);
    layers[k].beta = as_bias<T>(biases[k]);
  }
  return Network<T>(batch, std::move(layers), final_relu);
}

// The tensors of the gradients that `needs` = [input, weights..., biases...] asks for, in this order, and their memory.
// flat: those of the parameters are views of one buffer, each at a multiple of 64 bytes.
template <typename T>
Gradients<T> allocate_gradients(const char* op, const Tensor& input, const std::vector<Tensor>& weights,
                                const std::vector<bool>& needs, bool flat, std::vector<Tensor>& asked) {
  const size_t layers = weights.size();
  MBP_CHECK(needs.size() == 1 + 2 * layers, op, ": `needs` must have 1 + 2 x ", layers, " items, got ", needs.size());
  const int32_t dtype = dtype_of(input);
  constexpr int64_t kAlign = 64 / int64_t(sizeof(T));
  int64_t size = 0, offset = 0;
  for (size_t k = 0; flat && k < layers; ++k) {
    const int64_t d_out = weights[k].size(0);
    if (needs[1 + k]) size += ceil_div(d_out * weights[k].size(1), kAlign) * kAlign;
    if (needs[1 + layers + k]) size += ceil_div(d_out, kAlign) * kAlign;
  }
  const Tensor buffer = flat ? empty({size}, dtype) : Tensor();
  const auto ask = [&](size_t i, const std::vector<int64_t>& sizes) -> T* {
    if (!needs[i]) return nullptr;
    if (flat && i > 0) {
      asked.push_back(view(buffer, sizes, offset));
      offset += ceil_div(asked.back().numel(), kAlign) * kAlign;
    } else {
      asked.push_back(empty(sizes, dtype));
    }
    return data<T>(asked.back());
  };
  Gradients<T> grads;
  grads.input = ask(0, with_last_size(input, input.size(input.dim() - 1)));
  for (size_t k = 0; k < layers; ++k) grads.omega.push_back(ask(1 + k, {weights[k].size(0), weights[k].size(1)}));
  for (size_t k = 0; k < layers; ++k) grads.beta.push_back(ask(1 + layers + k, {weights[k].size(0)}));
  return grads;
}

}  // namespace manualbp
