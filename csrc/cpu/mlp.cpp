// mlp on the CPU: checks the arguments, allocates the results, and calls the passes (network.h, backward.h).
//
// B is the number of rows of the input, however many dimensions it has; layer k maps D_k to D_{k+1} features.
// Stored activations: h_1 ... h_{K-1} lie one after another in one flat tensor.

#include "mlp.h"

#include "ops.h"

namespace manualbp {

std::tuple<Tensor, Tensor> mlp(Tensor input, std::vector<Tensor> weights, std::vector<std::optional<Tensor>> biases,
                               bool final_relu, bool store, std::optional<Tensor> kept, std::vector<double> scales) {
  const char* op = "mlp";
  check_network(op, input, weights, biases);
  return dispatch(op, input, [&](auto zero) {
    using T = decltype(zero);
    const int32_t dtype = dtype_of(input);
    Tensor keep;
    const auto h = as_matrix<T>(input, keep);
    auto net = network<T>(h.rows, weights, biases, final_relu);
    set_dropout(op, net, kept, scales, /*needs_masks=*/true);
    Tensor output = empty(with_last_size(input, weights.back().size(0)), dtype);
    Tensor hidden = pooled({store ? net.hidden_size() : 0}, dtype);
    net.forward(h, store ? data<T>(hidden) : nullptr, data<T>(output));
    return std::make_tuple(output, hidden);
  });
}

namespace {

// store_df: the first of the results is df_0 ... df_{K-2}, flat.
std::vector<Tensor> backward_of(const char* op, const Tensor& grad_output, const Tensor& input,
                                const std::vector<Tensor>& weights, std::vector<std::optional<Tensor>> biases,
                                const std::optional<Tensor>& hidden, const std::optional<Tensor>& output,
                                const std::vector<bool>& needs, const std::optional<Tensor>& kept,
                                const std::vector<double>& scales, bool store_df) {
  if (hidden) biases.resize(weights.size());  // callers may leave out biases, which are needed only to recompute
  check_network(op, input, weights, biases);
  check_backward(op, input, weights.back().size(0), grad_output, output);
  return dispatch(op, input, [&](auto zero) {
    using T = decltype(zero);
    Tensor keep_input, keep_grad;
    const auto h = as_matrix<T>(input, keep_input);
    auto net = network<T>(h.rows, weights, biases, output.has_value());
    set_dropout(op, net, kept, scales, /*needs_masks=*/!hidden);
    if (hidden) check_stored(op, {"hidden"}, *hidden, net.hidden_size(), input);
    std::vector<Tensor> asked;
    if (store_df) asked.push_back(pooled({net.hidden_size()}, dtype_of(input)));
    T* const df = store_df ? data<T>(asked[0]) : nullptr;
    const auto grads = allocate_gradients<T>(op, input, weights, needs, /*flat=*/false, asked);
    backward<T>(net, h, hidden ? const_data<T>(*hidden) : nullptr, /*recompute=*/!hidden,
                as_matrix<T>(grad_output, keep_grad), output ? const_data<T>(*output) : nullptr, grads, df);
    return asked;
  });
}

}  // namespace

std::vector<Tensor> mlp_backward(Tensor grad_output, Tensor input, std::vector<Tensor> weights,
                                 std::vector<std::optional<Tensor>> biases, std::optional<Tensor> hidden,
                                 std::optional<Tensor> output, std::vector<bool> needs, std::optional<Tensor> kept,
                                 std::vector<double> scales) {
  return backward_of("mlp_backward", grad_output, input, weights, std::move(biases), hidden, output, needs, kept,
                     scales, /*store_df=*/false);
}

std::vector<Tensor> mlp_backward_store(Tensor grad_output, Tensor input, std::vector<Tensor> weights, Tensor hidden,
                                       std::optional<Tensor> output, std::vector<bool> needs,
                                       std::vector<double> scales) {
  return backward_of("mlp_backward_store", grad_output, input, weights, {}, hidden, output, needs, {}, scales,
                     /*store_df=*/true);
}

}  // namespace manualbp
