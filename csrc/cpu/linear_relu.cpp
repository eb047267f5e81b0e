// linear_relu on the CPU: one layer, h' = a[beta + Omega h], and its backward
//   df = I[h' > 0] . dh',   dh = df Omega,   d(Omega) = df^T h,   d(beta) = sum over the batch of df.
// input (..., D_in), weight = Omega (D_out, D_in), bias = beta (D_out), output = h' (..., D_out).

#include "layer.h"
#include "ops.h"

namespace manualbp {

namespace {

void check(const char* op, const Tensor& input, const Tensor& weight) {
  MBP_CHECK(input.dim() >= 1, op, ": `input` must have at least one dimension, got a tensor of shape ()");
  MBP_CHECK(weight.dim() == 2, op, ": `weight` must be (out_features, in_features), got shape ", shape_of(weight));
  check_dtype(op, {"weight"}, weight, input);
  const int64_t features = input.size(input.dim() - 1);
  MBP_CHECK(weight.size(1) == features, op, ": `weight` has ", weight.size(1), " columns but `input` has ", features,
            " features (weight: ", shape_of(weight), ", input: ", shape_of(input), ")");
}

}  // namespace

Tensor linear_relu(Tensor input, Tensor weight, std::optional<Tensor> bias) {
  const char* op = "linear_relu";
  check(op, input, weight);
  if (bias) check_bias(op, {"bias"}, *bias, {"weight"}, weight, input);
  return dispatch(op, input, [&](auto zero) {
    using T = decltype(zero);
    Tensor keep;
    const auto h = as_matrix<T>(input, keep);
    Tensor output = empty(with_last_size(input, weight.size(0)), dtype_of(input));
    forward<T>(h, as_matrix<T>(weight), as_bias<T>(bias), /*relu=*/true, data<T>(output),
               Scratch::of<T>(weight.size(0), weight.size(1)));
    return output;
  });
}

std::vector<Tensor> linear_relu_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor output,
                                         std::vector<bool> needs) {
  const char* op = "linear_relu_backward";
  check(op, input, weight);
  check_same_shape(op, {"grad_output"}, grad_output, with_last_size(input, weight.size(0)), input);
  check_same_shape(op, {"output"}, output, with_last_size(input, weight.size(0)), input);
  MBP_CHECK(output.is_contiguous(), op, ": `output` must be contiguous");
  MBP_CHECK(needs.size() == 3, op, ": `needs` must have 3 items, got ", needs.size());
  return dispatch(op, input, [&](auto zero) {
    using T = decltype(zero);
    const bool need_input = needs[0], need_weight = needs[1], need_bias = needs[2];
    const int32_t dtype = dtype_of(input);
    Tensor keep_input, keep_grad;
    const auto h = as_matrix<T>(input, keep_input);
    const auto omega = as_matrix<T>(weight);
    const auto dh_next = as_matrix<T>(grad_output, keep_grad);

    Tensor df, grad_input, grad_weight, grad_bias;
    if (need_input || need_weight) df = empty({h.rows, omega.rows}, dtype);
    if (need_bias) grad_bias = empty({omega.rows}, dtype);
    relu_backward<T>(dh_next, const_data<T>(output), need_input || need_weight ? data<T>(df) : nullptr,
                     need_bias ? data<T>(grad_bias) : nullptr);

    std::vector<Tensor> grads;
    if (need_input || need_weight) {
      const Scratch scratch = Scratch::of<T>(omega.cols, std::max(omega.rows, h.rows));
      const auto df_matrix = Matrix<const T>::contiguous(const_data<T>(df), h.rows, omega.rows);
      if (need_input) {
        grad_input = empty(with_last_size(input, omega.cols), dtype);
        input_gradient<T>(df_matrix, omega, data<T>(grad_input), scratch);
        grads.push_back(grad_input);
      }
      if (need_weight) {
        grad_weight = empty({omega.rows, omega.cols}, dtype);
        weight_gradient<T>(df_matrix, h, data<T>(grad_weight), scratch);
        grads.push_back(grad_weight);
      }
    }
    if (need_bias) grads.push_back(grad_bias);
    return grads;
  });
}

std::string isa() { return kernel_table().name; }

}  // namespace manualbp
