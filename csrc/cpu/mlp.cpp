// mlp on the CPU: checks the arguments, allocates the results, and calls the passes (network.h, backward.h).
//
// B is the number of rows of the input, however many dimensions it has; layer k maps D_k to D_{k+1} features.
// Stored activations: h_1 ... h_{K-1} lie one after another in one flat tensor.

#include "mlp.h"

#include "ops.h"

namespace manualbp {

namespace {

// Dropout after the layers, or none if there are no scales: see set_dropout.
struct DropoutArguments {
  std::optional<Tensor> kept;
  std::vector<double> scales;
};

std::tuple<Tensor, Tensor> forward(const char* op, const Tensor& input, const std::vector<Tensor>& weights,
                                   const std::vector<std::optional<Tensor>>& biases, bool final_relu, bool store,
                                   const DropoutArguments& dropout) {
  check_network(op, input, weights, biases);
  return dispatch(op, input, [&](auto zero) {
    using T = decltype(zero);
    const int32_t dtype = dtype_of(input);
    Tensor keep;
    const auto h = as_matrix<T>(input, keep);
    auto net = network<T>(h.rows, weights, biases, final_relu);
    set_dropout(op, net, dropout.kept, dropout.scales, /*needs_masks=*/true);
    Tensor output = empty(with_last_size(input, weights.back().size(0)), dtype);
    Tensor hidden = pooled({store ? net.hidden_size() : 0}, dtype);
    net.forward(h, store ? data<T>(hidden) : nullptr, data<T>(output));
    return std::make_tuple(output, hidden);
  });
}

// biases: may be left out if `hidden` is given, since they are needed only to recompute. store_df: the first of the
// results is df_0 ... df_{K-2}, flat. grad_hidden: see mlp_backward_further.
std::vector<Tensor> backward(const char* op, const Tensor& grad_output, const Tensor& input,
                             const std::vector<Tensor>& weights, std::vector<std::optional<Tensor>> biases,
                             const std::optional<Tensor>& hidden, const std::optional<Tensor>& output,
                             const std::vector<bool>& needs, const DropoutArguments& dropout, bool store_df = false,
                             const std::optional<Tensor>& grad_hidden = {}) {
  if (hidden) biases.resize(weights.size());
  check_network(op, input, weights, biases);
  check_backward(op, input, weights.back().size(0), grad_output, output);
  return dispatch(op, input, [&](auto zero) {
    using T = decltype(zero);
    Tensor keep_input, keep_grad;
    const auto h = as_matrix<T>(input, keep_input);
    auto net = network<T>(h.rows, weights, biases, output.has_value());
    set_dropout(op, net, dropout.kept, dropout.scales, /*needs_masks=*/!hidden);
    if (hidden) check_stored(op, {"hidden"}, *hidden, {net.hidden_size()}, input);
    typename BackwardPass<T>::Second second;
    if (grad_hidden) {
      check_stored(op, {"grad_hidden"}, *grad_hidden, {net.hidden_size()}, input);
      MBP_CHECK(sizeof(T) == sizeof(accumulator_t<T>), op, ": `input` must be float64 or float32, got ",
                dtype_name(dtype_of(input)));
      second.further = const_data<T>(*grad_hidden);
    }
    std::vector<Tensor> asked;
    if (store_df) {
      asked.push_back(pooled({net.hidden_size()}, dtype_of(input)));
      second.df = data<T>(asked[0]);
    }
    const auto grads = allocate_gradients<T>(op, input, weights, needs, /*flat=*/false, asked);
    manualbp::backward<T>(net, h, hidden ? const_data<T>(*hidden) : nullptr, /*recompute=*/!hidden,
                          as_matrix<T>(grad_output, keep_grad), output ? const_data<T>(*output) : nullptr, grads,
                          second);
    return asked;
  });
}

}  // namespace

std::tuple<Tensor, Tensor> mlp(Tensor input, std::vector<Tensor> weights, std::vector<std::optional<Tensor>> biases,
                               bool final_relu, bool store) {
  return forward("mlp", input, weights, biases, final_relu, store, {});
}

std::vector<Tensor> mlp_backward(Tensor grad_output, Tensor input, std::vector<Tensor> weights,
                                 std::vector<std::optional<Tensor>> biases, std::optional<Tensor> hidden,
                                 std::optional<Tensor> output, std::vector<bool> needs) {
  return backward("mlp_backward", grad_output, input, weights, std::move(biases), hidden, output, needs, {});
}

std::tuple<Tensor, Tensor> mlp_dropout(Tensor input, std::vector<Tensor> weights,
                                       std::vector<std::optional<Tensor>> biases, bool final_relu, bool store,
                                       std::optional<Tensor> kept, std::vector<double> scales) {
  return forward("mlp_dropout", input, weights, biases, final_relu, store, {std::move(kept), std::move(scales)});
}

std::vector<Tensor> mlp_dropout_backward(Tensor grad_output, Tensor input, std::vector<Tensor> weights,
                                         std::vector<std::optional<Tensor>> biases, std::optional<Tensor> hidden,
                                         std::optional<Tensor> output, std::vector<bool> needs,
                                         std::optional<Tensor> kept, std::vector<double> scales) {
  return backward("mlp_dropout_backward", grad_output, input, weights, std::move(biases), hidden, output, needs,
                  {std::move(kept), std::move(scales)});
}

std::vector<Tensor> mlp_backward_further(Tensor grad_output, Tensor grad_hidden, Tensor input,
                                         std::vector<Tensor> weights, Tensor hidden, std::optional<Tensor> output,
                                         std::vector<bool> needs, std::vector<double> scales) {
  return backward("mlp_backward_further", grad_output, input, weights, {}, hidden, output, needs,
                  {std::nullopt, std::move(scales)}, /*store_df=*/false, grad_hidden);
}

std::vector<Tensor> mlp_backward_store(Tensor grad_output, Tensor input, std::vector<Tensor> weights, Tensor hidden,
                                       std::optional<Tensor> output, std::vector<bool> needs,
                                       std::vector<double> scales) {
  return backward("mlp_backward_store", grad_output, input, weights, {}, hidden, output, needs,
                  {std::nullopt, std::move(scales)}, /*store_df=*/true);
}

}  // namespace manualbp
