// A whole network on the CPU, as one call: the lecture's two passes.
//
//   forward    h_0 = input;   f_k = beta_k + Omega_k h_k;   h_{k+1} = a[f_k];   output = f_{K-1} (or a[f_{K-1}])
//   backward   k = K-1 ... 0:   d(beta_k) = sum of df_k,   d(Omega_k) = df_k^T h_k,
//                               df_{k-1} = I[h_k > 0] . (df_k Omega_k)
//
// Layer k maps D_k to D_{k+1} features; B is the number of rows of the input, however many dimensions it has.
// Activations are kept ("store"): h_1 ... h_{K-1} lie one after another in one flat tensor.

#include "layer.h"
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

// Where h_k lies in `hidden`: offsets[k] for k = 1 ... K-1; offsets[K] is the number of elements.
std::vector<int64_t> hidden_offsets(int64_t batch, const std::vector<Tensor>& weights) {
  std::vector<int64_t> offsets(weights.size() + 1, 0);
  for (size_t k = 1; k < weights.size(); ++k) offsets[k + 1] = offsets[k] + batch * weights[k - 1].size(0);
  return offsets;
}

int64_t widest_hidden(const std::vector<Tensor>& weights) {
  int64_t widest = 0;
  for (size_t k = 0; k + 1 < weights.size(); ++k) widest = std::max(widest, weights[k].size(0));
  return widest;
}

int64_t widest_layer(const std::vector<Tensor>& weights) {
  int64_t widest = weights[0].size(1);
  for (const Tensor& weight : weights) widest = std::max(widest, weight.size(0));
  return widest;
}

}  // namespace

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
    auto h = as_matrix<T>(input, keep);
    const int64_t batch = h.rows;
    const auto offsets = hidden_offsets(batch, weights);
    Tensor output = empty(with_last_size(input, weights.back().size(0)), dtype);
    // Without store, two buffers take turns.
    const int64_t turn = batch * widest_hidden(weights);
    Tensor hidden = empty({store ? offsets[layers] : std::min<int64_t>(layers - 1, 2) * turn}, dtype);
    const int64_t widest = widest_layer(weights);
    const Scratch scratch = Scratch::of<T>(widest, widest);
    for (size_t k = 0; k < layers; ++k) {
      const bool last = k + 1 == layers;
      const int64_t offset = store ? offsets[k + 1] : int64_t(k % 2) * turn;
      T* next = last ? data<T>(output) : data<T>(hidden) + offset;
      const auto omega = as_matrix<T>(weights[k]);
      forward<T>(h, omega, as_bias<T>(biases[k]), !last || final_relu, next, scratch);
      h = Matrix<const T>::contiguous(next, batch, omega.rows);
    }
    if (!store) hidden = empty({0}, dtype);
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
    const auto h0 = as_matrix<T>(input, keep_input);
    const int64_t batch = h0.rows;
    const auto offsets = hidden_offsets(batch, weights);
    check_same_shape(op, {"hidden"}, hidden, {offsets[layers]}, input);
    MBP_CHECK(hidden.is_contiguous(), op, ": `hidden` must be contiguous");
    const T* const stored = const_data<T>(hidden);
    const auto need_weight = [&](size_t k) { return bool(needs[1 + k]); };
    const auto need_bias = [&](size_t k) { return bool(needs[1 + layers + k]); };

    // The layers below `lowest` have nothing to learn: the backward pass stops there.
    size_t lowest = needs[0] ? 0 : layers;
    for (size_t k = layers; k-- > 0;) {
      if (need_weight(k) || need_bias(k)) lowest = std::min(lowest, k);
    }
    std::vector<Tensor> grads(needs.size());

    // df takes turns in two buffers; the first gradient is read where the caller left it.
    auto df = as_matrix<T>(grad_output, keep_grad);
    const int64_t turn = batch * std::max(widest_hidden(weights), output ? weights.back().size(0) : 0);
    const Tensor buffer = empty({2 * turn}, dtype);
    T* turns[2] = {data<T>(buffer), data<T>(buffer) + turn};
    const int64_t widest = widest_layer(weights);
    const Scratch scratch = Scratch::of<T>(widest, std::max(widest, batch));
    for (size_t k = layers; k-- > lowest;) {
      const auto omega = as_matrix<T>(weights[k]);
      const bool last = k + 1 == layers;
      // df_k = I[h_{k+1} > 0] . dh_{k+1} and d(beta_k) in one pass. Without a ReLU after the last layer: the sums.
      const T* mask = !last ? stored + offsets[k + 1] : output ? const_data<T>(*output) : nullptr;
      T* dbeta = nullptr;
      if (need_bias(k)) {
        grads[1 + layers + k] = empty({omega.rows}, dtype);
        dbeta = data<T>(grads[1 + layers + k]);
      }
      if (mask) {
        T* out = last ? turns[0] : const_cast<T*>(df.data);  // below the top, dh lies in our own buffer
        relu_backward<T>(df, mask, out, dbeta);
        df = Matrix<const T>::contiguous(out, batch, omega.rows);
      } else if (dbeta) {
        relu_backward<T>(df, nullptr, nullptr, dbeta);
      }
      if (need_weight(k)) {
        const auto h = k == 0 ? h0 : Matrix<const T>::contiguous(stored + offsets[k], batch, omega.cols);
        grads[1 + k] = empty({omega.rows, omega.cols}, dtype);
        weight_gradient<T>(df, h, data<T>(grads[1 + k]), scratch);
      }
      if (k > lowest || needs[0]) {
        T* dh = df.data == turns[0] ? turns[1] : turns[0];
        if (k == 0) {
          grads[0] = empty(with_last_size(input, omega.cols), dtype);
          dh = data<T>(grads[0]);
        }
        input_gradient<T>(df, omega, dh, scratch);
        df = Matrix<const T>::contiguous(dh, batch, omega.cols);
      }
    }
    std::vector<Tensor> asked;
    for (size_t i = 0; i < needs.size(); ++i) {
      if (needs[i]) asked.push_back(std::move(grads[i]));
    }
    return asked;
  });
}

}  // namespace manualbp
