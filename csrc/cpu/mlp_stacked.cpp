// mlp_stacked on the CPU: E networks of the same widths in one call, as torch.func stacks them.
//
// Network e has the weights Omega_k[e] (D_{k+1}, D_k) and the rows input[e] (B, D_0). Each is computed by the passes of
// one network (network.h, backward.h), so that its numbers are those of a call of its own. Where all networks have the
// same parameters and one row each, their weight gradients are the gradients of the examples of a batch:
//
//   d(Omega_k)[e] = df_k[e] h_k[e]^T,   d(beta_k)[e] = df_k[e]
//
// and df_k is computed for all rows together (`per_sample`).

#include "mlp.h"
#include "ops.h"

namespace manualbp {
namespace {

// Item 0 of t (E, ...), the first of a stack.
Tensor first_of(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  return seen_as(t, {sizes.begin() + 1, sizes.end()}, {strides.begin() + 1, strides.end()});
}

// The networks of a call.
struct Stack {
  int64_t count;
  bool stacked;  // whether tensors have the dimension E; otherwise there is one network
  Tensor input;  // of the first network, as its weights and biases
  std::vector<Tensor> weights;
  std::vector<std::optional<Tensor>> biases;

  // The size of t without the dimension E.
  int64_t dim(const Tensor& t) const { return t.dim() - int64_t(stacked); }
  std::vector<int64_t> with_count(std::vector<int64_t> sizes) const {
    if (stacked) sizes.insert(sizes.begin(), count);
    return sizes;
  }
};

// Checks that t has the first dimension E, and returns its first item.
Tensor check_stacked(const char* op, Name name, const Tensor& t, int64_t count) {
  MBP_CHECK(t.dim() >= 1 && t.size(0) == count, op, ": `", name, "` must have ", count,
            " items, one per network in `weights[0]`, got ", shape_of(t));
  return first_of(t);
}

Stack check_stack(const char* op, const Tensor& input, const std::vector<Tensor>& weights,
                  const std::vector<std::optional<Tensor>>& biases) {
  const bool stacked = !weights.empty() && weights[0].dim() == 3;
  Stack stack{stacked ? weights[0].size(0) : 1, stacked, input, weights, biases};
  if (stacked) {
    MBP_CHECK(stack.count > 0, op, ": `weights[0]` must hold at least one network, got ", shape_of(weights[0]));
    stack.input = check_stacked(op, {"input"}, input, stack.count);
    for (size_t k = 0; k < weights.size(); ++k) {
      stack.weights[k] = check_stacked(op, {"weights", int64_t(k)}, weights[k], stack.count);
    }
    for (size_t k = 0; k < biases.size(); ++k) {
      if (biases[k]) stack.biases[k] = check_stacked(op, {"biases", int64_t(k)}, *biases[k], stack.count);
    }
  }
  check_network(op, stack.input, stack.weights, stack.biases);
  return stack;
}

// The rows of each network in t (E, ..., D): matrices (B, D) that lie `step` apart.
template <typename T>
struct Rows {
  Tensor keep;  // what the matrices see
  Matrix<const T> first;
  int64_t step;

  Matrix<const T> operator[](int64_t e) const {
    Matrix<const T> rows = first;
    rows.data += e * step;
    return rows;
  }
  bool is_contiguous() const {
    return (first.col_stride == 1 || first.cols <= 1) && (first.row_stride == first.cols || first.rows <= 1);
  }
};
template <typename T>
Rows<T> rows_in(const Tensor& t, const Stack& stack) {
  Tensor copied;
  const Tensor one = stack.stacked ? first_of(t) : t;
  const auto first = as_matrix<T>(one, copied);
  if (!copied.defined()) return {t, first, stack.stacked ? t.stride(0) : 0};
  const Tensor whole = torch::stable::contiguous(t);
  return {whole, Matrix<const T>::contiguous(const_data<T>(whole), first.rows, first.cols), first.rows * first.cols};
}
// The same with contiguous matrices.
template <typename T>
Rows<T> contiguous_rows_in(const Tensor& t, const Stack& stack) {
  auto rows = rows_in<T>(t, stack);
  return rows.is_contiguous() ? rows : rows_in<T>(torch::stable::contiguous(t), stack);
}

// The layers of each network: those of the first, and how far the others lie from them.
template <typename T>
class StackedLayers {
 public:
  StackedLayers(const Stack& stack, const std::vector<Tensor>& weights,
                const std::vector<std::optional<Tensor>>& biases)
      : first(layers_of<T>(stack.weights, stack.biases)), steps_(weights.size()) {
    for (size_t k = 0; stack.stacked && k < weights.size(); ++k) {
      steps_[k] = {weights[k].stride(0), biases[k] ? biases[k]->stride(0) : 0};
    }
  }
  std::vector<Layer<T>> of(int64_t e) const {
    auto layers = first;
    for (size_t k = 0; k < layers.size(); ++k) {
      layers[k].omega.data += e * steps_[k].first;
      if (layers[k].beta.data) layers[k].beta.data += e * steps_[k].second;
    }
    return layers;
  }
  bool share_weights() const {
    return std::all_of(steps_.begin(), steps_.end(), [](const auto& step) { return step.first == 0; });
  }
  const std::vector<Layer<T>> first;

 private:
  std::vector<std::pair<int64_t, int64_t>> steps_;  // of weights and biases
};

// Calls f(e, threads) for each network: the networks are divided among the threads if there are enough of them, or if
// one of them is too small to be divided itself. work: the multiply-adds of one.
template <typename F>
void for_each(const Stack& stack, double work, const F& f) {
  const int64_t threads = torch::stable::get_num_threads();
  if (stack.count >= threads || work < 2 * kGrain) {
    Workers(nullptr, 0, threads).run(stack.count, double(stack.count) * work, [&](int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; ++e) f(e, int64_t(1));
    });
  } else {
    for (int64_t e = 0; e < stack.count; ++e) f(e, threads);
  }
}

// The activations that the backward pass reads.
template <typename T>
struct Hidden {
  std::vector<Rows<T>> rows;  // h_1 ... h_{K-1}
  bool together;  // whether those of a network lie one after another

  Hidden(const std::vector<Tensor>& hidden, const Stack& stack) : together(true) {
    for (const Tensor& h : hidden) {
      rows.push_back(rows_in<T>(h, stack));
      const auto& here = rows.back();
      together = together && here.is_contiguous() && here.step == rows[0].step;
      if (rows.size() < 2) continue;
      const auto& before = rows[rows.size() - 2].first;
      together = together && here.first.data == before.data + before.rows * before.cols;
    }
  }
  // Those of network e one after another: where they are, or in `memory`.
  const T* at(int64_t e, T* memory) const {
    if (rows.empty()) return memory;
    if (together) return rows[0][e].data;
    T* out = memory;
    for (const auto& h : rows) {
      const auto from = h[e];
      for (int64_t row = 0; row < from.rows; ++row) {
        for (int64_t col = 0; col < from.cols; ++col) {
          *out++ = from.data[row * from.row_stride + col * from.col_stride];
        }
      }
    }
    return memory;
  }
};

// Allocates the gradients that `needs` asks for; those of network e.
template <typename T>
class StackedGradients {
 public:
  StackedGradients(const char* op, const Tensor& input, const Stack& stack, const std::vector<bool>& needs,
                   std::vector<Tensor>& asked) {
    const size_t layers = stack.weights.size();
    MBP_CHECK(needs.size() == 1 + 2 * layers, op, ": `needs` must have 1 + 2 x ", layers, " items, got ", needs.size());
    const int32_t dtype = dtype_of(input);
    const auto ask = [&](size_t i, const std::vector<int64_t>& sizes) {
      if (!needs[i]) return Part{nullptr, 0};
      asked.push_back(empty(sizes, dtype));
      return Part{data<T>(asked.back()), asked.back().numel() / stack.count};
    };
    input_ = ask(0, with_last_size(input, input.size(input.dim() - 1)));
    for (size_t k = 0; k < layers; ++k) {
      omega_.push_back(ask(1 + k, stack.with_count({stack.weights[k].size(0), stack.weights[k].size(1)})));
    }
    for (size_t k = 0; k < layers; ++k) {
      beta_.push_back(ask(1 + layers + k, stack.with_count({stack.weights[k].size(0)})));
    }
  }
  Gradients<T> of(int64_t e) const {
    Gradients<T> grads;
    grads.input = input_.at(e);
    for (const Part& part : omega_) grads.omega.push_back(part.at(e));
    for (const Part& part : beta_) grads.beta.push_back(part.at(e));
    return grads;
  }

 private:
  struct Part {
    T* data;
    int64_t step;
    T* at(int64_t e) const { return data ? data + e * step : nullptr; }
  };
  Part input_;
  std::vector<Part> omega_, beta_;
};

// Gradients per row, as at the top of this file. h: h_0 (E, D_0); hidden: h_1 ... h_{K-1} (E, D_k), contiguous, or
// empty; grads: of the first row, those of the others follow.
template <typename T>
void per_sample(Network<T>& net, Matrix<const T> h0, const std::vector<Matrix<const T>>& hidden,
                Matrix<const T> grad_output, const T* output, const Gradients<T>& grads) {
  using A = accumulator_t<T>;
  const size_t layers = net.layers.size();
  const bool recompute = hidden.empty() && layers > 1;
  for (size_t k = 0; k < layers; ++k) {
    net.plan.layers[k].weight_gradient = bool(grads.omega[k]);
    net.plan.layers[k].bias_gradient = bool(grads.beta[k]);
  }
  const BackwardPlan pass = net.plan.backward(recompute ? int64_t(layers) - 1 : 0, bool(grads.input));
  const size_t lowest = size_t(pass.lowest);
  if (lowest == layers) return;
  const Buffer<char> workspaces(net.plan.threads * pass.workspace);
  const Workers workers(workspaces.data, pass.workspace, net.plan.threads);
  const typename Network<T>::Packed packed(net, &Layer<T>::packed, size_t(pass.first_packed), layers);
  const typename Network<T>::Packed packed_transposed(net, &Layer<T>::packed_transposed, 0, size_t(pass.recomputed));
  packed.pack(workers);
  packed_transposed.pack(workers);

  // Blocks are short: their gradients are much larger than their rows.
  constexpr int64_t kRows = 16;
  const int64_t buffer = kRows * std::max(net.plan.widest_hidden, net.plan.top);
  const int64_t part = 2 * buffer + (recompute ? kRows * net.plan.hidden : 0);
  const Buffer<T> memory(net.plan.threads * part);
  workers.run(ceil_div(net.plan.batch, kRows), 20 * net.plan.multiply_adds(), [&](int64_t begin, int64_t end) {
    const Workers alone = workers.alone();
    T* const buffers[] = {memory.data + part * workers.index(), memory.data + part * workers.index() + buffer};
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kRows, count = std::min(kRows, net.plan.batch - first);
      const typename Network<T>::Activations recomputed{buffers[1] + buffer, kRows, 0};
      net.forward_block(
          rows_of(h0, first, count), first, size_t(pass.recomputed),
          [&](size_t k) { return recomputed.at(net, k + 1); }, alone);
      const auto h_of = [&](size_t k) {
        if (k == 0) return rows_of(h0, first, count);
        if (recompute) return Matrix<const T>::contiguous(recomputed.at(net, k), count, net.layers[k].d_in());
        return rows_of(hidden[k - 1], first, count);
      };
      auto df = rows_of(grad_output, first, count);
      if (output) {
        relu_backward<T>(df, output + first * net.plan.top, buffers[0], nullptr, alone);
        df = Matrix<const T>::contiguous(buffers[0], count, net.plan.top);
      }
      for (size_t k = layers; k-- > lowest;) {
        const auto& layer = net.layers[k];
        const auto h = h_of(k);
        if (T* const dbeta = grads.beta[k].data) copy<T>(df, dbeta + first * layer.d_out(), alone);
        for (int64_t row = 0; grads.omega[k] && row < count; ++row) {
          T* const domega = grads.omega[k].data + (first + row) * layer.d_out() * layer.d_in();
          const auto outer = product<T>(rows_of(df, row, 1).transposed(), rows_of(h, row, 1), domega, layer.d_in());
          if (outer.m > 0 && outer.n > 0) kernels<T>().gemm(outer, alone.workspace());
        }
        if (k > lowest) {
          T* const below = df.data == buffers[0] ? buffers[1] : buffers[0];
          hidden_gradient<T>(df, layer, h.data, A(1), below, nullptr, alone);
          df = Matrix<const T>::contiguous(below, count, layer.d_in());
        } else if (grads.input) {
          input_gradient<T>(df, layer, grads.input.data + first * layer.d_in(), alone);
        }
      }
    }
  });
}

}  // namespace

std::vector<Tensor> mlp_stacked(Tensor input, std::vector<Tensor> weights, std::vector<std::optional<Tensor>> biases,
                                bool final_relu, bool store) {
  const char* op = "mlp_stacked";
  const Stack stack = check_stack(op, input, weights, biases);
  return dispatch(op, input, [&](auto zero) {
    using T = decltype(zero);
    const int32_t dtype = dtype_of(input);
    const auto h = rows_in<T>(input, stack);
    const int64_t rows = h.first.rows;
    const StackedLayers<T> layers(stack, weights, biases);
    check_countable(rows * stack.count, layers.first);
    const Plan<T> plan = plan_of(rows, layers.first, /*threads=*/1);
    const int64_t size = store ? rows * plan.hidden : 0;
    std::vector<Tensor> results{empty(with_last_size(input, plan.top), dtype)};
    const Tensor hidden = pooled({stack.count * size}, dtype);
    T* const output = data<T>(results[0]);
    T* const memory = data<T>(hidden);
    for_each(stack, plan.multiply_adds(), [&](int64_t e, int64_t threads) {
      Network<T> net(rows, layers.of(e), final_relu, threads);
      net.forward(h[e], store ? memory + e * size : nullptr, output + e * rows * plan.top);
    });
    for (size_t k = 1; store && k < weights.size(); ++k) {
      const auto sizes = with_last_size(input, plan.layers[k].d_in);
      auto strides = contiguous_strides(sizes);
      if (stack.stacked) strides[0] = size;
      results.push_back(seen_as(hidden, sizes, strides, rows * plan.layers[k - 1].start));
    }
    return results;
  });
}

std::vector<Tensor> mlp_stacked_backward(Tensor grad_output, Tensor input, std::vector<Tensor> weights,
                                         std::vector<std::optional<Tensor>> biases, std::vector<Tensor> hidden,
                                         std::optional<Tensor> output, std::vector<bool> needs) {
  const char* op = "mlp_stacked_backward";
  const size_t count = weights.size();
  if (!hidden.empty()) biases.resize(count);  // callers may leave out biases, which are needed only to recompute
  const Stack stack = check_stack(op, input, weights, biases);
  MBP_CHECK(hidden.empty() || hidden.size() + 1 == count, op, ": `hidden` must be empty or have ", count - 1,
            " items, got ", hidden.size());
  for (size_t k = 0; k < hidden.size(); ++k) {
    const auto sizes = with_last_size(input, stack.weights[k].size(0));
    check_same_shape(op, {"hidden", int64_t(k)}, hidden[k], sizes, input);
  }
  const auto sizes = with_last_size(input, stack.weights.back().size(0));
  check_same_shape(op, {"grad_output"}, grad_output, sizes, input);
  if (output) check_same_shape(op, {"output"}, *output, sizes, input);
  return dispatch(op, input, [&](auto zero) {
    using T = decltype(zero);
    std::vector<Tensor> asked;
    const StackedGradients<T> grads(op, input, stack, needs, asked);
    const auto h = rows_in<T>(input, stack), gradient = rows_in<T>(grad_output, stack);
    const int64_t rows = h.first.rows;
    const bool recompute = hidden.empty() && count > 1;
    const StackedLayers<T> layers(stack, weights, biases);
    if (stack.count > 1 && rows == 1 && layers.share_weights()) {
      // The rows of all networks are one batch.
      const auto whole = [&](const Rows<T>& all) {
        return Matrix<const T>{all.first.data, stack.count, all.first.cols, all.step, all.first.col_stride};
      };
      std::vector<Rows<T>> kept;
      std::vector<Matrix<const T>> activations;
      const auto contiguous = [&](const Tensor& t) {
        kept.push_back(rows_in<T>(t, stack));
        const auto& last = kept.back();
        if (last.step != last.first.cols || !last.is_contiguous()) {
          kept.back() = rows_in<T>(torch::stable::contiguous(t), stack);
        }
        return whole(kept.back());
      };
      for (const Tensor& t : hidden) activations.push_back(contiguous(t));
      const T* const last = output ? contiguous(*output).data : nullptr;
      Network<T> net(stack.count, layers.first, output.has_value());
      per_sample<T>(net, whole(h), activations, whole(gradient), last, grads.of(0));
      return asked;
    }
    const Hidden<T> activations(hidden, stack);
    const auto result = output ? contiguous_rows_in<T>(*output, stack) : Rows<T>{};
    const Plan<T> plan = plan_of(rows, layers.first, /*threads=*/1);
    for_each(stack, 2 * plan.multiply_adds(), [&](int64_t e, int64_t threads) {
      Network<T> net(rows, layers.of(e), output.has_value(), threads);
      const Gradients<T> out = grads.of(e);
      const Buffer<T> copied(activations.together ? 0 : rows * plan.hidden);
      backward<T>(net, h[e], recompute ? nullptr : activations.at(e, copied.data), recompute, gradient[e],
                  output ? result[e].data : nullptr, out);
    });
    return asked;
  });
}

}  // namespace manualbp
