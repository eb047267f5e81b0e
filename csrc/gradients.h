// The gradients that a backward pass is asked for: which, and their memory, the same on every device.
#pragma once

#include "cpu/tensor.h"

namespace manualbp {

// An undefined tensor: not asked for.
struct GradientTensors {
  Tensor input;                     // the shape of the input
  std::vector<Tensor> omega, beta;  // (D_{k+1}, D_k) and (D_{k+1}) each
};

// The tensors that `needs` = [input, weights..., biases...] asks for, also put into `asked`, in this order.
// flat: those of the parameters are views of one buffer, each at a multiple of 64 bytes.
// empty(sizes, dtype): memory on the device.
template <typename Empty>
GradientTensors allocate_gradients(const char* op, const Tensor& input, const std::vector<Tensor>& weights,
                                   const std::vector<bool>& needs, bool flat, std::vector<Tensor>& asked,
                                   const Empty& empty) {
  const size_t layers = weights.size();
  MBP_CHECK(needs.size() == 1 + 2 * layers, op, ": `needs` must have 1 + 2 x ", layers, " items, got ", needs.size());
  const int32_t dtype = dtype_of(input);
  const int64_t align = 64 / item_size(dtype);
  const auto room = [&](int64_t size) { return (size + align - 1) / align * align; };
  int64_t total = 0, offset = 0;
  for (size_t k = 0; flat && k < layers; ++k) {
    const int64_t d_out = weights[k].size(0);
    if (needs[1 + k]) total += room(d_out * weights[k].size(1));
    if (needs[1 + layers + k]) total += room(d_out);
  }
  const Tensor buffer = flat ? empty({total}, dtype) : Tensor();
  const auto ask = [&](size_t i, const std::vector<int64_t>& sizes) -> Tensor {
    if (!needs[i]) return Tensor();
    if (flat && i > 0) {
      asked.push_back(view(buffer, sizes, offset));
      offset += room(asked.back().numel());
    } else {
      asked.push_back(empty(sizes, dtype));
    }
    return asked.back();
  };
  GradientTensors grads;
  grads.input = ask(0, with_last_size(input, input.size(input.dim() - 1)));
  for (size_t k = 0; k < layers; ++k) grads.omega.push_back(ask(1 + k, {weights[k].size(0), weights[k].size(1)}));
  for (size_t k = 0; k < layers; ++k) grads.beta.push_back(ask(1 + layers + k, {weights[k].size(0)}));
  return grads;
}

}  // namespace manualbp
