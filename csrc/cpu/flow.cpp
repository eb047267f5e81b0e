// Gradient flow on the CPU: both passes of a network, keeping every f_k and df_k, and the sums of each layer over them.
//
//   forward    h_0 = input;   f_k = beta_k + Omega_k h_k;   h_{k+1} = a[f_k], or f_k where no ReLU follows
//   backward   df_k = I[f_k > 0] . dh_{k+1};   dh_k = df_k Omega_k
//
// f_0 ... f_{K-1} lie one after another in one flat tensor, and so do the df_k. A monitor calls this during training
// (inspection/monitor.py), so it computes only what it needs: no weight gradients. Network (network.h) cannot serve,
// since it keeps h_k but not f_k, and overwrites df_k.

#include <cmath>

#include "../checks.h"
#include "layer.h"
#include "ops.h"

namespace manualbp {

namespace {

// The layers of a network. Each thread takes its rows through all layers. That needs no Plan (plan.h): every f_k and
// df_k is kept, so blocks that fit into a cache would save nothing, and no gradient of a weight is summed.
template <typename T>
struct FlowNetwork {
  FlowNetwork(int64_t rows, const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases)
      : rows(rows), layers(weights.size()), starts{0}, widest(weights[0].size(1)) {
    for (size_t k = 0; k < layers.size(); ++k) {
      layers[k].omega = as_matrix<T>(weights[k]);
      layers[k].beta = as_bias<T>(biases[k]);
    }
    check_countable(rows, layers);
    for (const auto& layer : layers) {
      starts.push_back(starts.back() + layer.d_out());
      widest = std::max(widest, layer.d_out());
      parameters += layer.d_in() * layer.d_out();
    }
  }

  // Runs of_rows(first, count, workers) on the rows of each thread.
  template <typename F>
  void run(const F& of_rows) const {
    const Team<T> team(widest, widest);
    const int64_t share = std::max<int64_t>(ceil_div(ceil_div(rows, team.threads), 16), 1) * 16;
    team.workers.run(ceil_div(rows, share), product_work(rows, 1, parameters), [&](int64_t begin, int64_t end) {
      const int64_t first = begin * share;
      of_rows(first, std::min(end * share, rows) - first, team.workers.alone());
    });
  }

  // Writes all f_k, h_1 ... h_{K-1}, and the output unless it is nullptr.
  void forward(Matrix<const T> input, const std::vector<bool>& relus, T* f, T* h_next, T* output) const {
    run([&](int64_t first, int64_t count, const Workers& workers) {
      Matrix<const T> h{input.data + first * input.row_stride, count, input.cols, input.row_stride, input.col_stride};
      for (size_t k = 0; k < layers.size(); ++k) {
        T* const f_k = at(f, k, first);
        manualbp::forward<T>(h, layers[k], /*relu=*/false, f_k, workers);
        h = Matrix<const T>::contiguous(f_k, count, layers[k].d_out());
        const bool last = k + 1 == layers.size();
        if (last ? !output : !relus[k]) continue;
        T* const next = last ? output + first * h.cols : at(h_next, k, first);
        relus[k] ? relu<T>(h, next, workers) : copy<T>(h, next, workers);
        h = Matrix<const T>::contiguous(next, count, h.cols);
      }
    });
  }

  // Writes all df_k, from the gradient of the output.
  void backward(Matrix<const T> gradient, const std::vector<bool>& relus, const T* f, T* df) const {
    run([&](int64_t first, int64_t count, const Workers& workers) {
      Matrix<const T> dh{gradient.data + first * gradient.row_stride, count, gradient.cols, gradient.row_stride,
                         gradient.col_stride};
      for (size_t k = layers.size(); k-- > 0;) {
        T* const df_k = at(df, k, first);
        if (relus[k]) {
          relu_backward<T>(dh, at(f, k, first), df_k, nullptr, workers);
        } else if (k + 1 == layers.size()) {
          copy<T>(dh, df_k, workers);
        }
        if (k == 0) break;
        dh = Matrix<const T>::contiguous(at(df, k - 1, first), count, layers[k].d_in());
        input_gradient<T>(Matrix<const T>::contiguous(df_k, count, layers[k].d_out()), layers[k],
                          const_cast<T*>(dh.data), workers);
      }
    });
  }

  // The number of elements of all f_k together, or of all df_k.
  int64_t size() const { return rows * starts.back(); }

  // Rows of f_k or df_k, from `first` on.
  template <typename P>
  P* at(P* flat, size_t k, int64_t first) const {
    return flat + rows * starts[k] + first * layers[k].d_out();
  }

  int64_t rows;
  std::vector<Layer<T>> layers;
  std::vector<int64_t> starts;  // f_k starts at row width starts[k]; the last item is the end
  int64_t widest, parameters = 0;
};

void check_flow(const char* op, const Tensor& input, const std::vector<Tensor>& weights,
                const std::vector<std::optional<Tensor>>& biases, const std::vector<bool>& relus) {
  check_network(op, input, weights, biases);
  MBP_CHECK(input.dim() == 2, op, ": `input` must be a matrix, got ", shape_of(input));
  MBP_CHECK(relus.size() == weights.size(), op, ": `relus` must have one item per weight (", weights.size(), "), got ",
            relus.size());
}

// The range of bytes that a tensor occupies.
std::pair<uintptr_t, uintptr_t> extent(const Tensor& t) {
  if (t.numel() == 0) return {0, 0};
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  const auto begin = reinterpret_cast<uintptr_t>(const_data<char>(t));
  return {begin, begin + uintptr_t((last + 1) * item_size(dtype_of(t)))};
}

// Checks a tensor that a pass writes: flat, of `size` items, and without overlap with any other argument.
void check_memory(const char* op, Name name, const Tensor& t, int64_t size, const Tensor& input,
                  const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases,
                  const std::vector<Tensor>& others) {
  check_same_shape(op, name, t, {size}, input);
  MBP_CHECK(t.is_contiguous(), op, ": `", name, "` must be contiguous");
  const auto written = extent(t);
  const auto check_apart = [&](const Tensor& other) {
    const auto [first, last] = extent(other);
    MBP_CHECK(last <= written.first || written.second <= first, op, ": `", name,
              "` must not share memory with another argument");
  };
  check_apart(input);
  for (const auto& weight : weights) check_apart(weight);
  for (const auto& bias : biases) {
    if (bias) check_apart(*bias);
  }
  for (const auto& other : others) check_apart(other);
}

// A tensor as a matrix of contiguous rows, of a copy if necessary; `keep` owns it.
template <typename T>
Matrix<const T> with_contiguous_rows(const Tensor& t, Tensor& keep) {
  if (t.stride(1) != 1) keep = torch::stable::contiguous(t);
  return as_matrix<T>(t.stride(1) == 1 ? t : keep);
}

// Sum and sum of squares of a matrix, or of its difference to `other`, which is contiguous.
template <typename T>
Moments moments(Matrix<const T> m, const T* other, T* copy) {
  Moments total{};
  const bool whole = m.row_stride == m.cols;
  const int64_t runs = whole ? 1 : m.rows, size = whole ? m.rows * m.cols : m.cols;
  for (int64_t i = 0; i < runs; ++i) {
    const Moments part = kernels<T>().moments(m.data + i * m.row_stride, other ? other + i * size : nullptr,
                                              copy ? copy + i * size : nullptr, size);
    total.sum += part.sum;
    total.square += part.square;
  }
  return total;
}

}  // namespace

Tensor flow_forward(Tensor input, std::vector<Tensor> weights, std::vector<std::optional<Tensor>> biases,
                    std::vector<bool> relus, Tensor f, Tensor h) {
  const char* op = "flow_forward";
  check_flow(op, input, weights, biases, relus);
  return dispatch(op, input, [&](auto zero) {
    using T = decltype(zero);
    const FlowNetwork<T> net(input.size(0), weights, biases);
    check_memory(op, {"f"}, f, net.size(), input, weights, biases, {h});
    check_memory(op, {"h"}, h, net.size(), input, weights, biases, {f});
    const Tensor output = empty({net.rows, weights.back().size(0)}, dtype_of(input));
    net.forward(as_matrix<T>(input), relus, data<T>(f), data<T>(h), data<T>(output));
    return output;
  });
}

Tensor flow_backward(Tensor grad_output, Tensor input, std::vector<Tensor> weights,
                     std::vector<std::optional<Tensor>> biases, std::vector<bool> relus, Tensor f, bool has_f,
                     Tensor df, Tensor copies) {
  const char* op = "flow_backward";
  check_flow(op, input, weights, biases, relus);
  check_same_shape(op, {"grad_output"}, grad_output, {input.size(0), weights.back().size(0)}, input);
  return dispatch(op, input, [&](auto zero) {
    using T = decltype(zero);
    const FlowNetwork<T> net(input.size(0), weights, biases);
    const int64_t layers = int64_t(weights.size());
    check_memory(op, {"f"}, f, net.size(), input, weights, biases, {grad_output, df, copies});
    check_memory(op, {"df"}, df, net.size(), input, weights, biases, {grad_output, f, copies});
    check_memory(op, {"copies"}, copies, net.parameters, input, weights, biases, {grad_output, f, df});
    if (!has_f) net.forward(as_matrix<T>(input), relus, data<T>(f), /*h=*/data<T>(df), nullptr);
    const Tensor sums = empty({7, layers}, aoti_torch_dtype_float64());
    const T* const f_data = const_data<T>(f);
    net.backward(as_matrix<T>(grad_output), relus, f_data, data<T>(df));

    // One thread makes the sums of a layer, so that they do not depend on the number of threads.
    std::vector<Tensor> keep(weights.size() + 1);
    std::vector<Matrix<const T>> omega;
    std::vector<int64_t> offsets{0};
    for (size_t k = 0; k < weights.size(); ++k) {
      omega.push_back(with_contiguous_rows<T>(weights[k], keep[k]));
      offsets.push_back(offsets.back() + omega[k].rows * omega[k].cols);
    }
    double* const out = data<double>(sums);
    out[layers] = moments<T>(with_contiguous_rows<T>(input, keep.back()), nullptr, nullptr).square;
    const Team<T> team(1, 1);
    const double work =
        4.0 * double(2 * net.size() + net.parameters);  // 4: an element costs as much as 4 multiply-adds
    team.workers.run(layers, work, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const size_t i = size_t(k);
        LayerFlow<T> layer{};
        layer.rows = net.rows;
        layer.cols = net.layers[i].d_out();
        layer.f = net.at(f_data, i, 0);
        layer.df = net.at(const_data<T>(df), i, 0);
        layer.relu = relus[i];
        const FlowSums s = kernels<T>().layer_flow(layer);
        const Moments m = moments<T>(omega[i], nullptr, data<T>(copies) + offsets[i]);
        const double column[] = {s.f, 0, s.df, s.off, s.on, m.sum, m.square};
        for (int64_t row = 0; row < 7; ++row) {
          if (row != 1) out[row * layers + k] = column[row];
        }
        if (k + 1 < layers) out[layers + k + 1] = s.h;  // what enters the next layer
      }
    });
    return sums;
  });
}

Tensor flow_update(std::vector<Tensor> weights, Tensor copies) {
  const char* op = "flow_update";
  MBP_CHECK(!weights.empty(), op, ": `weights` must hold at least one weight");
  int64_t size = 0;
  for (size_t k = 0; k < weights.size(); ++k) {
    MBP_CHECK(weights[k].dim() == 2, op, ": `weights[", k, "]` must be a matrix, got ", shape_of(weights[k]));
    check_dtype(op, {"weights", int64_t(k)}, weights[k], copies);
    MBP_CHECK(weights[k].numel() <= copies.numel() - size, op,
              ": `copies` must have an item for each of all weights, got ", shape_of(copies));
    size += weights[k].numel();
  }
  check_same_shape(op, {"copies"}, copies, {size}, copies);
  MBP_CHECK(copies.is_contiguous(), op, ": `copies` must be contiguous");
  return dispatch(op, copies, [&](auto zero) {
    using T = decltype(zero);
    const Tensor norms = empty({int64_t(weights.size())}, aoti_torch_dtype_float64());
    const T* before = const_data<T>(copies);
    for (size_t k = 0; k < weights.size(); ++k) {
      Tensor keep;
      const auto omega = with_contiguous_rows<T>(weights[k], keep);
      data<double>(norms)[k] = std::sqrt(moments<T>(omega, before, nullptr).square);
      before += omega.rows * omega.cols;
    }
    return norms;
  });
}

}  // namespace manualbp
