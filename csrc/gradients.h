// The gradients that a call asks for, and their memory, for the CPU and CUDA alike.
#pragma once

#include "tensor.h"

namespace manualbp {

// A gradient that is not asked for is an undefined tensor.
struct GradientTensors {
  Tensor input;                     // the shape of the input
  std::vector<Tensor> omega, beta;  // (D_{k+1}, D_k) and (D_{k+1}) each
};

// Allocates what `needs` = [input, weights..., biases...] asks for, and appends it to `asked` in this order.
// flat: the gradients of the parameters are views of one buffer, each at a multiple of 64 bytes.
// dtype: of the gradients of the parameters. empty(sizes, dtype) allocates a tensor on the device.
template <typename Empty>
GradientTensors allocate_gradients(const char* op, const Tensor& input, const std::vector<Tensor>& weights,
                                   const std::vector<bool>& needs, bool flat, std::vector<Tensor>& asked, int32_t dtype,
                                   const Empty& empty) {
  const size_t layers = weights.size();
  MBP_CHECK(needs.size() == 1 + 2 * layers, op, ": `needs` must have 1 + 2 x ", layers, " items, got ", needs.size());
  const int64_t align = 64 / item_size(dtype);
  int64_t total = 0, offset = 0;
  for (size_t k = 0; flat && k < layers; ++k) {
    const int64_t d_out = weights[k].size(0);
    if (needs[1 + k]) total += round_up(d_out * weights[k].size(1), align);
    if (needs[1 + layers + k]) total += round_up(d_out, align);
  }
  const Tensor buffer = flat ? empty({total}, dtype) : Tensor();
  const auto ask = [&](size_t i, const std::vector<int64_t>& sizes) -> Tensor {
    if (!needs[i]) return Tensor();
    if (flat && i > 0) {
      asked.push_back(seen_as(buffer, sizes, contiguous_strides(sizes), offset));
      offset += round_up(asked.back().numel(), align);
    } else {
      asked.push_back(empty(sizes, i == 0 ? dtype_of(input) : dtype));
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
