// linear_relu on the CPU: checks the arguments, allocates the results, and calls a Network (network.h) of one layer:
//   h' = a[beta + Omega h];   df = I[h' > 0] . dh',   dh = df Omega,   d(Omega) = df^T h,   d(beta) = sum of df.
// input (..., D_in), weight = Omega (D_out, D_in), bias = beta (D_out), output = h' (..., D_out).

#include "mlp.h"
#include "ops.h"

namespace manualbp {

Tensor linear_relu(Tensor input, Tensor weight, std::optional<Tensor> bias) {
  const char* op = "linear_relu";
  check_layer(op, input, weight);
  if (bias) check_bias(op, {"bias"}, *bias, {"weight"}, weight, input);
  return dispatch(op, input, [&](auto zero) {
    using T = decltype(zero);
    Tensor keep;
    const auto h = as_matrix<T>(input, keep);
    Tensor output = empty(with_last_size(input, weight.size(0)), dtype_of(input));
    Network<T>(h.rows, {{as_matrix<T>(weight), as_bias<T>(bias)}},
               /*final_relu=*/true)
        .forward(h, nullptr, data<T>(output));
    return output;
  });
}

std::vector<Tensor> linear_relu_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor output,
                                         std::vector<bool> needs) {
  const char* op = "linear_relu_backward";
  check_layer(op, input, weight);
  check_backward(op, input, weight.size(0), grad_output, output);
  MBP_CHECK(needs.size() == 3, op, ": `needs` must have 3 items, got ", needs.size());
  return dispatch(op, input, [&](auto zero) {
    using T = decltype(zero);
    Tensor keep_input, keep_grad;
    const auto h = as_matrix<T>(input, keep_input);
    std::vector<Tensor> asked;
    const auto grads = allocate_gradients<T>(op, input, {weight}, needs, /*flat=*/false, asked);
    Network<T> net(h.rows, {{as_matrix<T>(weight), {}}}, /*final_relu=*/true);
    backward<T>(net, h, nullptr, /*recompute=*/false, as_matrix<T>(grad_output, keep_grad), const_data<T>(output),
                grads);
    return asked;
  });
}

}  // namespace manualbp
