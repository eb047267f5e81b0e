// mlp on the CPU: checks the arguments, allocates the results, and lets Network (network.h) compute.
//
// B is the number of rows of the input, however many dimensions it has; layer k maps D_k to D_{k+1} features.
// Activations are kept ("store"): h_1 ... h_{K-1} lie one after another in one flat tensor.

#include "network.h"
#include "ops.h"

namespace manualbp {

namespace {

void check(const char* op, const Tensor& input, const std::vector<Tensor>& weights) {
  MBP_CHECK(!weights.empty(), op, ": `weights` must hold at least one weight");
  MBP_CHECK(input.dim() >= 1, op, ": `input` must have at least one dimension, got a tensor of shape ()");
  int64_t features = input.size(input.dim() - 1);
  for (size_t k = 0; k < weights.size(); ++k) {
    const Tensor& weight = weights[k];
    const Name name{"weights", int64_t(k)};
    MBP_CHECK(weight.dim() == 2, op, ": `", name, "` must be (out_features, in_features), got shape ",
              shape_of(weight));
    check_dtype(op, name, weight, input);
    if (k == 0) {
      MBP_CHECK(weight.size(1) == features, op, ": `", name, "` has ", weight.size(1), " columns but `input` has ",
                features, " features (", name, ": ", shape_of(weight), ", input: ", shape_of(input), ")");
    } else {
      const Name previous{"weights", int64_t(k) - 1};
      MBP_CHECK(weight.size(1) == features, op, ": `", name, "` has ", weight.size(1), " columns but `", previous,
                "` has ", features, " rows (", name, ": ", shape_of(weight), ", ", previous, ": ",
                shape_of(weights[k - 1]), ")");
    }
    features = weight.size(0);
  }
}

template <typename T>
Network<T> network(int64_t batch, const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases,
                   bool final_relu) {
  std::vector<Layer<T>> layers(weights.size());
  for (size_t k = 0; k < weights.size(); ++k) {
    layers[k].omega = as_matrix<T>(weights[k]);
    if (k < biases.size()) layers[k].beta = as_bias<T>(biases[k]);
  }
  return Network<T>(batch, std::move(layers), final_relu);
}

} // namespace

std::tuple<Tensor, Tensor> mlp(Tensor input, std::vector<Tensor> weights, std::vector<std::optional<Tensor>> biases,
                               bool final_relu, bool store) {
  const char* op = "mlp";
  const size_t layers = weights.size();
  check(op, input, weights);
  MBP_CHECK(biases.size() == layers, op, ": `biases` must have one item per weight (", layers, "), got ",
            biases.size());
  for (size_t k = 0; k < layers; ++k) {
    if (biases[k]) check_bias(op, {"biases", int64_t(k)}, *biases[k], {"weights", int64_t(k)}, weights[k], input);
  }
  return dispatch(op, input, [&](auto zero) {
    using T = decltype(zero);
    const int32_t dtype = dtype_of(input);
    Tensor keep;
    const auto h = as_matrix<T>(input, keep);
    auto net = network<T>(h.rows, weights, biases, final_relu);
    Tensor output = empty(with_last_size(input, weights.back().size(0)), dtype);
    Tensor hidden = empty({store ? net.hidden_size() : 0}, dtype);
    net.forward(h, store ? data<T>(hidden) : nullptr, data<T>(output));
    return std::make_tuple(output, hidden);
  });
}

std::vector<Tensor> mlp_backward(Tensor grad_output, Tensor input, std::vector<Tensor> weights, Tensor hidden,
                                 std::optional<Tensor> output, std::vector<bool> needs) {
  const char* op = "mlp_backward";
  const size_t layers = weights.size();
  check(op, input, weights);
  const auto output_sizes = with_last_size(input, weights.back().size(0));
  check_same_shape(op, {"grad_output"}, grad_output, output_sizes, input);
  if (output) {
    check_same_shape(op, {"output"}, *output, output_sizes, input);
    MBP_CHECK(output->is_contiguous(), op, ": `output` must be contiguous");
  }
  MBP_CHECK(needs.size() == 1 + 2 * layers, op, ": `needs` must have 1 + 2 x ", layers, " items, got ", needs.size());
  return dispatch(op, input, [&](auto zero) {
    using T = decltype(zero);
    const int32_t dtype = dtype_of(input);
    Tensor keep_input, keep_grad;
    const auto h = as_matrix<T>(input, keep_input);
    auto net = network<T>(h.rows, weights, {}, output.has_value());
    check_same_shape(op, {"hidden"}, hidden, {net.hidden_size()}, input);
    MBP_CHECK(hidden.is_contiguous(), op, ": `hidden` must be contiguous");

    std::vector<Tensor> asked;
    const auto ask = [&](size_t i, std::vector<int64_t> sizes) -> T* {
      if (!needs[i]) return nullptr;
      asked.push_back(empty(sizes, dtype));
      return data<T>(asked.back());
    };
    Gradients<T> grads;
    grads.input = ask(0, with_last_size(input, h.cols));
    for (size_t k = 0; k < layers; ++k) grads.omega.push_back(ask(1 + k, {weights[k].size(0), weights[k].size(1)}));
    for (size_t k = 0; k < layers; ++k) grads.beta.push_back(ask(1 + layers + k, {weights[k].size(0)}));
    net.backward(h, const_data<T>(hidden), /*recompute=*/false, as_matrix<T>(grad_output, keep_grad),
                 output ? const_data<T>(*output) : nullptr, grads);
    return asked;
  });
}

} // namespace manualbp
