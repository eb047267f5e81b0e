// The backward pass of the backward pass on the CPU, over the blocks of rows that a Plan (plan.h) cuts the batch into.
//
// The backward pass (backward.h) maps the gradient g of the output to
//
//   k = K-1 ... 0:   d(beta_k) = sum of df_k,   d(Omega_k) = df_k^T h_k,   dh_k = df_k Omega_k,
//                    df_{k-1} = s I[h_k > 0] . dh_k        from df_{K-1} = g, or s I[output > 0] . g after a final ReLU
//
// with s = 1 or the scale of dropout. It is linear in g, and its masks are constant. Given the gradients of a scalar by
// its results, v by dh_0, V_k by d(Omega_k) and u_k by d(beta_k), let c_k be that by dh_k and a_k that by df_k:
//
//   k = 0 ... K-1:   a_k = c_k Omega_k^T + h_k V_k^T + u_k,   c_{k+1} = s I[h_{k+1} > 0] . a_k   from c_0 = v
//
// which is a forward pass whose activation is a mask. It ends in the gradient by g, which is c_K (a_{K-1} without a
// final ReLU). On the way are those by Omega_k, df_k^T c_k, and by h_k, df_k V_k: the masks contribute nothing.
#pragma once

#include <optional>
#include <vector>

#include "backward.h"

namespace manualbp {

// What the second backward pass starts from; nothing: such a gradient is zero.
template <typename T>
struct Cotangents {
  std::optional<Matrix<const T>> input;  // v (B, D_0)
  std::vector<std::optional<Matrix<const T>>> omega;  // V_k (D_{k+1}, D_k)
  std::vector<std::optional<Bias<T>>> beta;  // u_k (D_{k+1})

  // The lowest layer with one: c_k and a_k are zero below. K if there is none.
  size_t lowest() const {
    size_t k = 0;
    while (k < omega.size() && !(k == 0 && input) && !omega[k] && !beta[k]) ++k;
    return k;
  }
  // Whether c_k is more than zero.
  bool reach(size_t k) const { return k == 0 ? input.has_value() : k > lowest(); }
};

// Where it writes its results; nullptr: this gradient is not needed.
template <typename T>
struct SecondGradients {
  T* grad_output = nullptr;  // (B, D_K)
  std::vector<T*> h;  // df_k V_k (B, D_k), of layers with a V_k
  std::vector<T*> omega;  // (D_{k+1}, D_k), of layers that the cotangents reach
};

template <typename T>
class DoubleBackwardPass {
  using A = accumulator_t<T>;
  using Activations = typename Network<T>::Activations;
  using Packed = typename Network<T>::Packed;

 public:
  // There must be cotangents.
  DoubleBackwardPass(Network<T>& net, const Cotangents<T>& from, const SecondGradients<T>& grads)
      : net_(net),
        from_(from),
        grads_(grads),
        of_weights_{nullptr, {grads.omega.begin(), grads.omega.end()}, std::vector<Result<T>>(net.layers.size())},
        first_(from.lowest()),
        last_(last_layer()),
        plan_(plan()),
        workspaces_(net.plan.threads * plan_.workspace),
        workers_(workspaces_.data, plan_.workspace, net.plan.threads),
        packed_(net, &Layer<T>::packed_transposed, first_, last_),
        sums_(net.plan, plan_, of_weights_),
        memory_(plan_.elements),
        wide_(wide_part() * parts()) {}
  DoubleBackwardPass(const DoubleBackwardPass&) = delete;

  // hidden: h_1 ... h_{K-1}; df: df_0 ... df_{K-2}, as the first backward pass stored them; output: what forward returned
  // if a ReLU ended it, else nullptr.
  void run(Matrix<const T> input, const T* hidden, const T* df, Matrix<const T> grad_output, const T* output) const {
    packed_.pack(workers_);
    const auto seen_from = [&](const T* stored, int64_t first) {
      return Activations{const_cast<T*>(stored), net_.plan.batch, first};
    };
    for_each_block(
        net_.plan, plan_, sums_, memory_.data, workers_,
        [&](int64_t first, int64_t count, int64_t slice, bool accumulate, T* memory, const Workers& workers) {
          const Block block{first,  count, slice, accumulate, memory, wide_.data + wide_part() * workers_.index(),
                            workers};
          run_block(block, rows_of(input, first, count), seen_from(hidden, first), seen_from(df, first),
                    rows_of(grad_output, first, count), output ? output + first * net_.plan.top : nullptr);
        });
    sums_.finish(workers_);
  }

 private:
  // The rows [first, first + count) of a slice, and what computes them.
  struct Block {
    int64_t first, count, slice;
    bool accumulate;
    T* memory;
    A* wide;
    const Workers& workers;
  };

  size_t top() const { return net_.layers.size() - 1; }

  // a_k is computed for the layers [first_, last_).
  size_t last_layer() const {
    if (grads_.grad_output) return net_.layers.size();
    size_t last = first_;
    for (size_t k = first_ + 1; k <= top(); ++k) last = grads_.omega[k] ? k : last;
    return last;
  }

  BackwardPlan plan() const {
    for (size_t k = 0; k <= top(); ++k) {
      net_.plan.layers[k].weight_gradient = grads_.omega[k];
      net_.plan.layers[k].bias_gradient = false;
    }
    BackwardPlan pass = net_.plan.backward(/*recomputed=*/0, /*input_gradient=*/true);
    pass.buffer = pass.rows * net_.plan.widest_hidden;  // of two that alternate between c_k and c_{k+1}
    pass.part = 2 * pass.buffer + (net_.final_relu ? pass.rows * net_.plan.top : 0);  // and df_{K-1}
    pass.elements = pass.part * parts();
    return pass;
  }
  int64_t parts() const { return net_.plan.way == Way::kTall ? net_.plan.threads : 1; }

  // Elements of a_k in the accumulator type, where it is the sum of two products in half precision.
  int64_t wide_part() const {
    bool two_products = false;
    for (size_t k = first_; k < last_; ++k) two_products = two_products || (from_.omega[k] && from_.reach(k));
    if (sizeof(T) == sizeof(A) || !two_products) return 0;
    return plan_.rows * std::max(net_.plan.widest_hidden, net_.plan.top);
  }

  void run_block(const Block& block, Matrix<const T> input, const Activations& h, const Activations& df,
                 Matrix<const T> gradient, const T* output) const {
    const Workers& workers = block.workers;
    T* const buffers[] = {block.memory, block.memory + plan_.buffer};
    if (output) {
      T* const masked = block.memory + 2 * plan_.buffer;
      relu_backward<T>(gradient, output, masked, nullptr, workers, net_.layers[top()].scale);
      gradient = Matrix<const T>::contiguous(masked, block.count, net_.plan.top);
    }
    const auto df_of = [&](size_t k) {
      if (k == top()) return gradient;
      return Matrix<const T>::contiguous(df.at(net_, k + 1), block.count, net_.layers[k].d_out());
    };
    std::optional<Matrix<const T>> c;
    if (from_.input) c = rows_of(*from_.input, block.first, block.count);
    for (size_t k = 0; k <= top(); ++k) {
      const auto& layer = net_.layers[k];
      if (A* domega = sums_.omega(block.slice, k)) {
        weight_gradient<T>({df_of(k), *c, domega, block.accumulate, plan_.unit_rows}, workers);
      }
      if (T* const dh = grads_.h[k]) {
        gemm<T>(product<T>(df_of(k), *from_.omega[k], dh + block.first * layer.d_in(), layer.d_in()), workers);
      }
      if (k < first_ || k >= last_) continue;
      const auto h_k = k == 0 ? input : Matrix<const T>::contiguous(h.at(net_, k), block.count, layer.d_in());
      T* const next = k == top() ? grads_.grad_output + block.first * net_.plan.top : buffers[k % 2];
      next_cotangent(block, k, c, h_k, k == top() ? output : h.at(net_, k + 1), next);
      c = Matrix<const T>::contiguous(next, block.count, layer.d_out());
    }
  }

  // out = c_{k+1} (B, D_{k+1}), contiguous. mask: h_{k+1}, or nullptr: no ReLU follows.
  void next_cotangent(const Block& block, size_t k, const std::optional<Matrix<const T>>& c, Matrix<const T> h,
                      const T* mask, T* out) const {
    const auto& layer = net_.layers[k];
    const auto& V = from_.omega[k];
    const int64_t d_out = layer.d_out();
    const auto add_u = [&](auto& p) {
      if (!from_.beta[k]) return;
      p.bias = from_.beta[k]->data;
      p.bias_stride = from_.beta[k]->stride;
    };
    const auto through = [&](auto* to) {  // c_k Omega_k^T; zero, as a product of depth 0, if there is no c_k
      auto p = product<T>(c ? *c : Matrix<const T>{nullptr, block.count, 0, 0, 0}, layer.omega.transposed(), to, d_out);
      if (c) p.packed_b = layer.packed_transposed;
      return p;
    };
    const auto direct = [&](auto* to) { return product<T>(h, V->transposed(), to, d_out); };  // h_k V_k^T
    if (c && V) {
      A* const sum = sizeof(T) == sizeof(A) ? reinterpret_cast<A*>(out) : block.wide;
      gemm<T>(through(sum), block.workers);
      auto p = direct(sum);
      p.accumulate = true;
      add_u(p);
      gemm<T>(p, block.workers);
      if constexpr (sizeof(T) != sizeof(A)) reduce<T>(sum, 1, 0, block.count * d_out, out, block.workers);
    } else {
      auto p = V ? direct(out) : through(out);
      add_u(p);
      if constexpr (sizeof(T) == sizeof(A)) {
        // As in hidden_gradient (layer.h), the mask is applied while the product is in registers.
        if (mask && block.workers.is_alone() && is_masked_in_tile<T>(d_out, layer.scale)) {
          p.mask = mask;
          p.mask_m = d_out;
          return gemm<T>(p, block.workers);
        }
      }
      gemm<T>(p, block.workers);
    }
    if (!mask) return;
    relu_backward<T>(Matrix<const T>::contiguous(out, block.count, d_out), mask, out, nullptr, block.workers,
                     layer.scale);
  }

  Network<T>& net_;
  const Cotangents<T>& from_;
  const SecondGradients<T>& grads_;
  Gradients<T> of_weights_;  // what the pass sums over rows
  size_t first_, last_;
  BackwardPlan plan_;
  Buffer<char> workspaces_;
  Workers workers_;
  Packed packed_;
  Sums<T> sums_;
  Buffer<T> memory_;
  Buffer<A> wide_;
};

}  // namespace manualbp
