// mlp_autocast on the CPU: what torch.autocast makes of a float32 network, in half precision. T is its type.
//
// Input and parameters are rounded once a call, into memory that is freed at its end. Activations, the output and its
// gradient are stored in T. The loss and the gradients of the parameters are float32: they leave the accumulators as
// they are. The gradient of the input has the dtype of the input.

#include "autocast.h"
#include "loss.h"
#include "mlp.h"
#include "ops.h"

namespace manualbp {

namespace {

// Calls f with a value of the type that autocast computes in.
template <typename F>
auto dispatch_half(const char* op, int32_t dtype, F&& f) {
  if (dtype == aoti_torch_dtype_bfloat16()) return f(bfloat16{});
  if (dtype == aoti_torch_dtype_float16()) return f(float16{});
  raise(op, ": the gradient of the output must be bfloat16 or float16, got ", dtype_name(dtype));
}

// The input and the layers of a network in T: those of its tensors that are float32 are rounded.
template <typename T>
class Rounded {
 public:
  Rounded(const Tensor& input, const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases)
      : layers(weights.size()),
        memory_(size(input, weights, biases)),
        free_(memory_.data),
        workers_(nullptr, 0, torch::stable::get_num_threads()) {
    h = is_wide(input) ? rounded(as_matrix<float>(input, keep_)) : as_matrix<T>(input, keep_);
    for (size_t k = 0; k < weights.size(); ++k) {
      layers[k].omega = is_wide(weights[k]) ? rounded(as_matrix<float>(weights[k])) : as_matrix<T>(weights[k]);
      if (!biases[k] || !is_wide(*biases[k])) {
        layers[k].beta = as_bias<T>(biases[k]);
      } else {
        const auto bias = as_bias<float>(biases[k]);
        layers[k].beta = {rounded({bias.data, 1, biases[k]->size(0), 0, bias.stride}).data, 1};
      }
    }
  }
  Rounded(const Rounded&) = delete;

  Matrix<const T> h;  // the input
  std::vector<Layer<T>> layers;

 private:
  static bool is_wide(const Tensor& t) { return dtype_of(t) == aoti_torch_dtype_float32(); }
  static int64_t size(const Tensor& input, const std::vector<Tensor>& weights,
                      const std::vector<std::optional<Tensor>>& biases) {
    int64_t size = is_wide(input) ? input.numel() : 0;
    for (const Tensor& weight : weights) size += is_wide(weight) ? weight.numel() : 0;
    for (const auto& bias : biases) size += bias && is_wide(*bias) ? bias->numel() : 0;
    return size;
  }

  Matrix<const T> rounded(Matrix<const float> from) {
    T* const to = free_;
    free_ += from.rows * from.cols;
    return manualbp::rounded<T>(from, to, workers_);
  }

  Buffer<T> memory_;
  T* free_;  // what follows is free
  Workers workers_;
  Tensor keep_;
};

// The rows of the input, and the elements of h_1 ... h_{K-1}, before anything is rounded: results are allocated first, so
// that an expanded input of more numbers than memory has bytes is an error at once.
template <typename T>
struct Count {
  Count(const Tensor& input, const std::vector<Tensor>& weights) {
    for (int64_t d = 0; d + 1 < input.dim(); ++d) rows *= input.size(d);
    std::vector<Layer<T>> shapes(weights.size());
    for (size_t k = 0; k < weights.size(); ++k) {
      shapes[k].omega = Matrix<const T>::contiguous(nullptr, weights[k].size(0), weights[k].size(1));
    }
    check_countable(rows, shapes);
    for (size_t k = 0; k + 1 < weights.size(); ++k) hidden += rows * weights[k].size(0);
  }
  int64_t rows = 1, hidden = 0;
};

// Allocates the gradients that `needs` asks for.
template <typename T>
Gradients<T> allocate_mixed(const char* op, const Tensor& input, const std::vector<Tensor>& weights,
                            const std::vector<bool>& needs, bool flat, std::vector<Tensor>& asked) {
  const auto tensors = allocate_gradients(op, input, weights, needs, flat, asked, aoti_torch_dtype_float32(), empty);
  const auto result = [](const Tensor& t) -> Result<T> {
    if (!t.defined()) return nullptr;
    return dtype_of(t) == aoti_torch_dtype_float32() ? result_in<T>(data<float>(t)) : result_in<T>(data<T>(t));
  };
  Gradients<T> grads;
  grads.input = result(tensors.input);
  for (const Tensor& omega : tensors.omega) grads.omega.push_back(result(omega));
  for (const Tensor& beta : tensors.beta) grads.beta.push_back(result(beta));
  return grads;
}

}  // namespace

std::tuple<Tensor, Tensor> mlp_autocast(Tensor input, std::vector<Tensor> weights,
                                        std::vector<std::optional<Tensor>> biases, bool final_relu, bool store,
                                        std::optional<Tensor> kept, std::vector<double> scales,
                                        torch::headeronly::ScalarType to) {
  const char* op = "mlp_autocast";
  const int32_t dtype = half_of(op, to);
  check_network(op, input, weights, biases, dtype);
  return dispatch_half(op, dtype, [&](auto zero) {
    using T = decltype(zero);
    const Count<T> count(input, weights);
    Tensor output = empty(with_last_size(input, weights.back().size(0)), dtype);
    Tensor hidden = pooled({store ? count.hidden : 0}, dtype);
    const Rounded<T> rounded(input, weights, biases);
    Network<T> net(count.rows, rounded.layers, final_relu);
    set_dropout(op, net, kept, scales, /*needs_masks=*/true);
    net.forward(rounded.h, store ? data<T>(hidden) : nullptr, data<T>(output));
    return std::make_tuple(output, hidden);
  });
}

std::vector<Tensor> mlp_autocast_backward(Tensor grad_output, Tensor input, std::vector<Tensor> weights,
                                          std::vector<std::optional<Tensor>> biases, std::optional<Tensor> hidden,
                                          std::optional<Tensor> output, std::vector<bool> needs,
                                          std::optional<Tensor> kept, std::vector<double> scales) {
  const char* op = "mlp_autocast_backward";
  const int32_t dtype = dtype_of(grad_output);
  if (hidden) biases.resize(weights.size());
  check_network(op, input, weights, biases, dtype);
  const auto sizes = with_last_size(input, weights.back().size(0));
  MBP_CHECK(same_shape(grad_output, sizes), op, ": `grad_output` must have shape ", shape_text(sizes), ", got ",
            shape_of(grad_output));
  if (output) check_stored(op, {"output"}, *output, sizes, grad_output);
  return dispatch_half(op, dtype, [&](auto zero) {
    using T = decltype(zero);
    Tensor keep;
    const Count<T> count(input, weights);
    if (hidden) check_stored(op, {"hidden"}, *hidden, {count.hidden}, grad_output);
    std::vector<Tensor> asked;
    const auto grads = allocate_mixed<T>(op, input, weights, needs, /*flat=*/false, asked);
    const Rounded<T> rounded(input, weights, biases);
    Network<T> net(count.rows, rounded.layers, output.has_value());
    set_dropout(op, net, kept, scales, /*needs_masks=*/!hidden);
    backward<T>(net, rounded.h, hidden ? const_data<T>(*hidden) : nullptr, /*recompute=*/!hidden,
                as_matrix<T>(grad_output, keep), output ? const_data<T>(*output) : nullptr, grads);
    return asked;
  });
}

std::vector<Tensor> mlp_autocast_loss(Tensor input, Tensor target, std::vector<Tensor> weights,
                                      std::vector<std::optional<Tensor>> biases, StringHandle loss_name, bool mean,
                                      int64_t ignore_index, double label_smoothing, std::vector<bool> needs, bool flat,
                                      torch::headeronly::ScalarType to) {
  const char* op = "mlp_autocast_loss";
  const LossOptions options{parse_loss(op, take_text(loss_name)), mean, ignore_index, label_smoothing};
  const int32_t dtype = half_of(op, to);
  check_network(op, input, weights, biases, dtype);
  const int64_t cols = weights.back().size(0);
  check_loss(op, input, target, cols, options.kind, label_smoothing, dtype);
  return dispatch_half(op, dtype, [&](auto zero) {
    using T = decltype(zero);
    Tensor keep;
    const Count<T> count(input, weights);
    auto loss = BatchLoss<T>::against(op, options, as_target<float>(target, options.kind, keep), count.rows, cols);
    std::vector<Tensor> results{empty({}, aoti_torch_dtype_float32())};
    const auto grads = allocate_mixed<T>(op, input, weights, needs, flat, results);
    loss.terms.gradient = results.size() > 1;
    const Rounded<T> rounded(input, weights, biases);
    Network<T> net(count.rows, rounded.layers, /*final_relu=*/false);
    const double sum = LossPass<T>(net, kernels<T>().loss(options.kind), grads).run(rounded.h, loss.terms);
    kernels<float>().store(loss.value(sum), data<float>(results[0]));
    return results;
  });
}

}  // namespace manualbp
