// mlp on CUDA: checks the arguments, allocates the results, and calls Network (network.h).

#include "network.h"
#include "ops.h"

namespace manualbp::cuda {

std::tuple<Tensor, Tensor> mlp(Tensor input, std::vector<Tensor> weights, std::vector<std::optional<Tensor>> biases,
                               bool final_relu, bool store) {
  const char* op = "mlp";
  check_network(op, input, weights, biases);
  check_devices(op, input, weights, biases);
  return dispatch(op, input, [&](auto zero) {
    using T = decltype(zero);
    const OnDevice device(input);
    const Tensor h = as_rows(input);
    const Network<T> net(device, h.size(0), weights, biases, final_relu);
    const Tensor output = device.empty(with_last_size(input, weights.back().size(0)), dtype_of(input));
    const Tensor hidden = device.empty({store ? net.hidden_size() : 0}, dtype_of(input));
    net.forward(h, store ? &hidden : nullptr, as_rows(output));
    return std::make_tuple(output, hidden);
  });
}

std::vector<Tensor> mlp_backward(Tensor grad_output, Tensor input, std::vector<Tensor> weights,
                                 std::vector<std::optional<Tensor>> biases, std::optional<Tensor> hidden,
                                 std::optional<Tensor> output, std::vector<bool> needs) {
  const char* op = "mlp_backward";
  if (hidden) biases.assign(weights.size(), std::nullopt);  // callers may leave out biases
  check_network(op, input, weights, biases);
  check_devices(op, input, weights, biases);
  check_backward(op, input, weights.back().size(0), grad_output, output);
  check_device(op, {"grad_output"}, grad_output, input);
  if (output) check_device(op, {"output"}, *output, input);
  return dispatch(op, input, [&](auto zero) {
    using T = decltype(zero);
    const OnDevice device(input);
    const Tensor h = as_rows(input);
    const Network<T> net(device, h.size(0), weights, biases, output.has_value());
    if (hidden) {
      check_same_shape(op, {"hidden"}, *hidden, {net.hidden_size()}, input);
      check_device(op, {"hidden"}, *hidden, input);
      MBP_CHECK(hidden->is_contiguous(), op, ": `hidden` must be contiguous");
    }
    std::vector<Tensor> asked;
    const Gradients grads = allocate_gradients(op, device, input, weights, needs, /*flat=*/false, asked);
    const Tensor rows = output ? as_rows(*output) : Tensor();
    net.backward(h, hidden ? &*hidden : nullptr, as_rows(grad_output), output ? &rows : nullptr, grads);
    return asked;
  });
}

}  // namespace manualbp::cuda
