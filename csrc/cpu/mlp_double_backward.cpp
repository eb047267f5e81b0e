// mlp_double_backward on the CPU: checks the arguments, allocates the results, and calls the pass (double_backward.h).

#include "double_backward.h"
#include "mlp.h"
#include "ops.h"

namespace manualbp {

namespace {

void check_cotangents(const char* op, const Tensor& input, const std::vector<Tensor>& weights,
                      const std::optional<Tensor>& dinput, const std::vector<std::optional<Tensor>>& dweights,
                      const std::vector<std::optional<Tensor>>& dbiases) {
  const auto shape = input.sizes();
  if (dinput) check_same_shape(op, {"grad_dinput"}, *dinput, {shape.begin(), shape.end()}, input);
  bool some = dinput.has_value();
  MBP_CHECK(dweights.size() == weights.size() && dbiases.size() == weights.size(), op,
            ": `grad_dweights` and `grad_dbiases` must have one item per weight (", weights.size(), "), got ",
            dweights.size(), " and ", dbiases.size());
  for (size_t k = 0; k < weights.size(); ++k) {
    const int64_t d_out = weights[k].size(0), d_in = weights[k].size(1);
    if (dweights[k]) check_same_shape(op, {"grad_dweights", int64_t(k)}, *dweights[k], {d_out, d_in}, input);
    if (dbiases[k]) check_same_shape(op, {"grad_dbiases", int64_t(k)}, *dbiases[k], {d_out}, input);
    some = some || dweights[k] || dbiases[k];
  }
  MBP_CHECK(some, op, ": one of `grad_dinput`, `grad_dweights` and `grad_dbiases` must be given");
}

// Memory for the results. What the cotangents do not reach is zero, and not for the pass to compute.
template <typename T>
SecondGradients<T> allocate(const char* op, const Tensor& grad_output, const Tensor& input, const Tensor& hidden,
                            const Network<T>& net, const Cotangents<T>& from, const std::vector<bool>& needs,
                            std::vector<Tensor>& asked) {
  const size_t layers = net.layers.size();
  MBP_CHECK(needs.size() == 3 + layers, op, ": `needs` must have 3 + ", layers, " items, got ", needs.size());
  const auto ask = [&](const Tensor& like) {
    asked.push_back(empty({like.sizes().begin(), like.sizes().end()}, dtype_of(input)));
    return data<T>(asked.back());
  };
  const auto of_h = [&](size_t k, T* memory) {
    if (from.omega[k]) return memory;
    std::fill_n(memory, net.plan.batch * net.layers[k].d_in(), T{});
    return static_cast<T*>(nullptr);
  };
  SecondGradients<T> grads;
  grads.h.resize(layers);
  grads.omega.resize(layers);
  if (needs[0]) grads.grad_output = ask(grad_output);
  if (needs[1]) grads.h[0] = of_h(0, ask(input));
  if (needs[2]) {
    const typename Network<T>::Activations activations{ask(hidden), net.plan.batch, 0};
    for (size_t k = 1; k < layers; ++k) grads.h[k] = of_h(k, activations.at(net, k));
  }
  for (size_t k = 0; k < layers; ++k) {
    if (!needs[3 + k]) continue;
    const int64_t d_out = net.layers[k].d_out(), d_in = net.layers[k].d_in();
    asked.push_back(empty({d_out, d_in}, dtype_of(input)));
    T* const omega = data<T>(asked.back());
    if (from.reach(k)) {
      grads.omega[k] = omega;
    } else {
      std::fill_n(omega, d_out * d_in, T{});
    }
  }
  return grads;
}

}  // namespace

std::vector<Tensor> mlp_double_backward(Tensor grad_output, Tensor input, std::vector<Tensor> weights, Tensor hidden,
                                        std::optional<Tensor> output, Tensor df, std::optional<Tensor> grad_dinput,
                                        std::vector<std::optional<Tensor>> grad_dweights,
                                        std::vector<std::optional<Tensor>> grad_dbiases, std::vector<bool> needs,
                                        std::vector<double> scales) {
  const char* op = "mlp_double_backward";
  check_network(op, input, weights, std::vector<std::optional<Tensor>>(weights.size()));
  check_backward(op, input, weights.back().size(0), grad_output, output);
  check_cotangents(op, input, weights, grad_dinput, grad_dweights, grad_dbiases);
  return dispatch(op, input, [&](auto zero) {
    using T = decltype(zero);
    Tensor keep_input, keep_grad, keep_dinput;
    const auto h = as_matrix<T>(input, keep_input);
    auto net = network<T>(h.rows, weights, std::vector<std::optional<Tensor>>(weights.size()), output.has_value());
    set_dropout(op, net, {}, scales, /*needs_masks=*/false);
    check_stored(op, {"hidden"}, hidden, {net.hidden_size()}, input);
    check_stored(op, {"df"}, df, {net.hidden_size()}, input);
    Cotangents<T> from;
    if (grad_dinput) from.input = as_matrix<T>(*grad_dinput, keep_dinput);
    for (size_t k = 0; k < weights.size(); ++k) {
      from.omega.emplace_back();
      from.beta.emplace_back();
      if (grad_dweights[k]) from.omega[k] = as_matrix<T>(*grad_dweights[k]);
      if (grad_dbiases[k]) from.beta[k] = as_bias<T>(grad_dbiases[k]);
    }
    std::vector<Tensor> asked;
    const auto grads = allocate<T>(op, grad_output, input, hidden, net, from, needs, asked);
    DoubleBackwardPass<T>(net, from, grads)
        .run(h, const_data<T>(hidden), const_data<T>(df), as_matrix<T>(grad_output, keep_grad),
             output ? const_data<T>(*output) : nullptr);
    return asked;
  });
}

}  // namespace manualbp
