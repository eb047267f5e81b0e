// linear_relu on CUDA: a Network (network.h) of one layer, as on the CPU.

#include "network.h"
#include "ops.h"

namespace manualbp::cuda {

Tensor linear_relu(Tensor input, Tensor weight, std::optional<Tensor> bias) {
  const char* op = "linear_relu";
  check_layer(op, input, weight);
  check_device(op, {"weight"}, weight, input);
  if (bias) {
    check_bias(op, {"bias"}, *bias, {"weight"}, weight, input);
    check_device(op, {"bias"}, *bias, input);
  }
  return dispatch(op, input, [&](auto zero) {
    using T = decltype(zero);
    const OnDevice device(input);
    const Tensor h = as_rows(input);
    const Tensor output = device.empty(with_last_size(input, weight.size(0)), dtype_of(input));
    Network<T>(device, h.size(0), {weight}, {bias}, /*final_relu=*/true).forward(h, nullptr, as_rows(output));
    return output;
  });
}

std::vector<Tensor> linear_relu_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor output,
                                         std::vector<bool> needs) {
  const char* op = "linear_relu_backward";
  check_layer(op, input, weight);
  check_backward(op, input, weight.size(0), grad_output, output);
  MBP_CHECK(needs.size() == 3, op, ": `needs` must have 3 items, got ", needs.size());
  check_device(op, {"grad_output"}, grad_output, input);
  check_device(op, {"weight"}, weight, input);
  check_device(op, {"output"}, output, input);
  return dispatch(op, input, [&](auto zero) {
    using T = decltype(zero);
    const OnDevice device(input);
    std::vector<Tensor> asked;
    const Gradients grads = allocate_gradients(op, device, input, {weight}, needs, /*flat=*/false, asked);
    const Tensor h = as_rows(input), rows = as_rows(output), hidden = device.empty({0}, dtype_of(input));
    Network<T>(device, h.size(0), {weight}, {std::nullopt}, /*final_relu=*/true)
        .backward(h, &hidden, as_rows(grad_output), &rows, grads);
    return asked;
  });
}

}  // namespace manualbp::cuda
