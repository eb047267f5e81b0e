// The passes of a network on a device: products by the library, everything between them by our kernels. Notation and
// sizes as in cpu/network.h:  f_k = beta_k + Omega_k h_k,  h_{k+1} = a[f_k].
//
// If activations are not stored (recompute, mlp_loss), blocks of rows go through all layers, forward and backward; the
// gradients of the blocks are added in order, in the accumulator type. Nothing waits for the device, and all memory
// comes from torch, so that a call can be captured in a CUDA graph.
//
// With MANUALBP_CUDA_NARROW=1, narrow networks go through all layers in one kernel (kernels/narrow.cuh). That is opt-in
// because it has not run on a GPU yet.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "../checks.h"
#include "../gradients.h"
#include "tensor.h"

namespace manualbp::cuda {

// Memory for the activations and gradients of one block of rows. Large enough that a product of a block should fill the
// device; not measured. Tests set a small one.
#if !defined(MBP_BLOCK_BYTES)
#define MBP_BLOCK_BYTES (256 << 20)
#define MBP_BLOCK_MIN_ROWS 4096
#endif

struct Gradients : GradientTensors {
  // The lowest layer whose gradient of the output is needed; the number of layers if none is.
  size_t lowest() const {
    if (input.defined()) return 0;
    size_t k = 0;
    while (k < omega.size() && !omega[k].defined() && !beta[k].defined()) ++k;
    return k;
  }
};

// The gradients that `needs` asks for (gradients.h), on the device; that of the input as rows.
inline Gradients allocate_gradients(const char* op, const OnDevice& device, const Tensor& input,
                                    const std::vector<Tensor>& weights, const std::vector<bool>& needs, bool flat,
                                    std::vector<Tensor>& asked) {
  const auto empty = [&](const std::vector<int64_t>& sizes, int32_t dtype) { return device.empty(sizes, dtype); };
  Gradients grads{manualbp::allocate_gradients(op, input, weights, needs, flat, asked, dtype_of(input), empty)};
  if (grads.input.defined()) grads.input = as_rows(grads.input);
  return grads;
}

inline bool narrow_is_wanted() {
  const char* value = std::getenv("MANUALBP_CUDA_NARROW");
  return value && std::strcmp(value, "1") == 0;
}

template <typename T>
class Network {
  using A = accumulator_t<T>;

 public:
  Network(const OnDevice& device, int64_t batch, const std::vector<Tensor>& weights,
          const std::vector<std::optional<Tensor>>& biases, bool final_relu)
      : device_(device), batch_(batch), final_relu_(final_relu) {
    widest_ = weights[0].size(1);
    for (size_t k = 0; k < weights.size(); ++k) {
      const Tensor& w = weights[k];
      layers_.push_back({seen_as(w, {w.size(0), w.size(1)}, {w.stride(0), w.stride(1)}), std::nullopt});
      if (biases[k]) {
        const Tensor bias = biases[k]->is_contiguous() ? *biases[k] : torch::stable::contiguous(*biases[k]);
        layers_[k].beta = seen_as(bias, {bias.size(0)}, {1});
      }
      widest_ = std::max(widest_, w.size(0));
      if (k + 1 < weights.size()) hidden_width_ += w.size(0);
    }
    narrow_ = narrow_applies();
  }

  // Elements of h_1 ... h_{K-1}, stored one after another.
  int64_t hidden_size() const { return batch_ * hidden_width_; }

  // input (B, D_0), output (B, D_K); hidden: where h_1 ... h_{K-1} are stored, or nullptr.
  void forward(const Tensor& input, const Tensor* hidden, const Tensor& output) const {
    if (hidden) return forward_block(input, activations_in(*hidden, batch_), output);
    if (narrow_) return forward_narrow(input, {}, output);
    const int64_t block = block_rows(2 * widest_);
    const Tensor buffers[2] = {flat(block * widest_), flat(block * widest_)};
    for_each_block(block, [&](int64_t first, int64_t rows) {
      std::vector<Tensor> h;
      for (size_t k = 0; k + 1 < layers_.size(); ++k) h.push_back(matrix_in(buffers[k % 2], rows, layers_[k].d_out()));
      forward_block(rows_of(input, first, rows), h, rows_of(output, first, rows));
    });
  }

  // From the gradient of the output. hidden: h_1 ... h_{K-1} as forward stored them, or nullptr: they are recomputed,
  // block by block. output: what forward returned if it ended in a ReLU, or nullptr.
  void backward(const Tensor& input, const Tensor* hidden, const Tensor& grad_output, const Tensor* output,
                const Gradients& grads) const {
    if (grads.lowest() == layers_.size()) return;
    const int64_t block = hidden ? batch_ : block_rows(hidden_width_ + 2 * widest_);
    const Tensor memory = hidden ? Tensor() : flat(block * hidden_width_);
    Blocks blocks(*this, block, grads);
    for_each_block(block, [&](int64_t first, int64_t rows) {
      const auto h = activations_in(hidden ? *hidden : memory, rows);
      const Tensor rows_in = rows_of(input, first, rows);
      if (!hidden) forward_block(rows_in, h, std::nullopt);
      const Tensor rows_out = output ? rows_of(*output, first, rows) : Tensor();
      blocks.backward(first, rows_in, h, rows_of(grad_output, first, rows), output ? &rows_out : nullptr);
    });
  }

  // Forward, loss and backward, block by block. p describes the whole batch; target: its (B, D_K) rows, or nullptr.
  // out: the loss times p.scale, divided by *p.counted unless that is nullptr.
  void loss_backward(const Tensor& input, LossKind kind, const Loss<T>& p, const Tensor* target, T* out,
                     const Gradients& grads) const {
    const int64_t cols = layers_.back().d_out();
    const int64_t block = block_rows(hidden_width_ + cols + 2 * widest_);
    const Tensor memory = flat(block * hidden_width_), top = flat(block * cols);
    const int64_t block_sums = loss_blocks(kind, std::min(block, batch_), cols);
    const Tensor sums =
        device_.empty({std::max<int64_t>(ceil_div(batch_, block), 1) * block_sums}, aoti_torch_dtype_float64());
    double* const first_sum = data<double>(sums);
    int64_t filled = 0;
    Blocks blocks(*this, block, grads);
    for_each_block(block, [&](int64_t first, int64_t rows) {
      const auto h = activations_in(memory, rows);
      const Tensor f = matrix_in(top, rows, cols), rows_in = rows_of(input, first, rows);
      forward_block(rows_in, h, f);
      Loss<T> part = p;
      part.rows = rows;
      part.f = data<T>(f);
      if (target) part.target = const_data<T>(*target) + first * cols;
      if (part.classes) part.classes += first * part.class_stride;
      part.sums = first_sum + filled;
      filled += loss_blocks(kind, rows, cols);
      loss(kind, part, device_.stream());
      if (p.gradient) blocks.backward(first, rows_in, h, f, nullptr);
    });
    loss_total<T>({filled, first_sum, p.scale, p.counted, out}, device_.stream());
  }

 private:
  struct Layer {
    Tensor omega;  // (D_out, D_in), any strides
    std::optional<Tensor> beta;  // (D_out), contiguous
    int64_t d_out() const { return omega.size(0); }
  };

  Tensor flat(int64_t size) const { return device_.empty({size}, kDtype<T>()); }

  // The number of rows for which `width` numbers per row fit into the memory of a block.
  int64_t block_rows(int64_t width) const {
    const int64_t fit = int64_t(MBP_BLOCK_BYTES) / (int64_t(sizeof(T)) * std::max<int64_t>(width, 1));
    return std::clamp<int64_t>(std::max<int64_t>(fit, MBP_BLOCK_MIN_ROWS), 1, std::max<int64_t>(batch_, 1));
  }

  // Calls f(first, rows) for each block; once, with no rows, for an empty batch, whose gradients are zeros.
  template <typename F>
  void for_each_block(int64_t block, const F& f) const {
    for (int64_t first = 0; first == 0 || first < batch_; first += std::max<int64_t>(block, 1)) {
      f(first, std::min(block, batch_ - first));
    }
  }

  // h_1 ... h_{K-1} of `rows` rows, one after another in a flat tensor.
  std::vector<Tensor> activations_in(const Tensor& memory, int64_t rows) const {
    std::vector<Tensor> h;
    int64_t offset = 0;
    for (size_t k = 0; k + 1 < layers_.size(); ++k) {
      h.push_back(matrix_in(memory, rows, layers_[k].d_out(), offset));
      offset += rows * layers_[k].d_out();
    }
    return h;
  }

  // h: where h_1 ... h_{K-1} go; f: where the output goes, or nothing if only the activations are wanted.
  void forward_block(const Tensor& input, const std::vector<Tensor>& h, const std::optional<Tensor>& f) const {
    if (narrow_) return forward_narrow(input, h, f);
    for (size_t k = 0; k < layers_.size(); ++k) {
      const bool last = k + 1 == layers_.size();
      if (last && !f) break;
      forward_layer(k == 0 ? input : h[k - 1], layers_[k], !last || final_relu_, last ? *f : h[k]);
    }
  }

  bool narrow_applies() const {
    if (!kHasNarrow<T> || layers_.size() > kNarrowLayers || widest_ > kNarrowWidth || !narrow_is_wanted()) return false;
    return std::all_of(layers_.begin(), layers_.end(),
                       [](const Layer& layer) { return layer.omega.numel() > 0 && layer.omega.is_contiguous(); });
  }

  NarrowNetwork<T> narrow_network(int64_t rows) const {
    NarrowNetwork<T> net{};
    net.rows = rows;
    net.layers = int(layers_.size());
    net.widths[0] = int(layers_[0].omega.size(1));
    for (size_t k = 0; k < layers_.size(); ++k) {
      net.widths[k + 1] = int(layers_[k].d_out());
      net.omega[k] = const_data<T>(layers_[k].omega);
    }
    return net;
  }

  // t, or a copy of it, such that the columns of each row are contiguous.
  static Tensor with_whole_rows(const Tensor& t) {
    return t.stride(1) == 1 || t.size(1) == 1 ? t : torch::stable::contiguous(t);
  }

  // h: matrices one after another in a flat tensor, or none if they are not wanted.
  void forward_narrow(const Tensor& input, const std::vector<Tensor>& h, const std::optional<Tensor>& f) const {
    if constexpr (kHasNarrow<T>) {
      const Tensor rows = with_whole_rows(input);
      NarrowForward<T> p{};
      p.net = narrow_network(rows.size(0));
      for (size_t k = 0; k < layers_.size(); ++k) {
        p.beta[k] = layers_[k].beta ? const_data<T>(*layers_[k].beta) : nullptr;
      }
      p.final_relu = final_relu_;
      p.input = const_data<T>(rows);
      p.input_row = rows.stride(0);
      p.hidden = h.empty() ? nullptr : data<T>(h[0]);
      p.output = f ? data<T>(*f) : nullptr;
      narrow_forward(p, device_.stream());
    }
  }

  void forward_layer(const Tensor& h, const Layer& layer, bool relu, const Tensor& f) const {
    // The library adds the bias if no kernel follows, and in half precision, where f would be rounded twice otherwise.
    const bool library_adds = !relu || sizeof(T) == 2;
    multiply_and_add(h, layer.omega, library_adds ? layer.beta : std::nullopt, f);
    if (!relu) return;
    const T* const bias = library_adds || !layer.beta ? nullptr : const_data<T>(*layer.beta);
    bias_relu<T>({f.size(0), f.size(1), data<T>(f), bias}, device_.stream());
  }

  // df = I[h > 0] . dh into `out`, and d(beta) into `sum`. Each may be absent; without h there is no ReLU.
  void mask(const Tensor& dh, const Tensor* h, const Tensor* out, const Tensor& sum) const {
    const int64_t rows = dh.size(0), cols = dh.size(1);
    const int64_t slices = relu_backward_slices<T>(rows, cols);
    const bool sums = sum.defined();
    const Tensor partial = sums && slices > 1 ? device_.empty({slices * cols}, kDtype<A>()) : Tensor();
    ReluBackward<T> pass{};
    pass.rows = rows;
    pass.cols = cols;
    pass.grad = const_data<T>(dh);
    pass.grad_row = dh.stride(0);
    pass.grad_col = dh.stride(1);
    pass.h = h ? const_data<T>(*h) : nullptr;
    pass.out = out ? data<T>(*out) : nullptr;
    pass.sum = sums ? data<T>(sum) : nullptr;
    pass.slices = slices;
    pass.partial = partial.defined() ? data<A>(partial) : nullptr;
    relu_backward<T>(pass, device_.stream());
  }

  // The backward pass block by block: gradients of parameters are added over blocks.
  class Blocks {
   public:
    Blocks(const Network& net, int64_t block, const Gradients& grads)
        : net_(net), grads_(grads), terms_(grads), several_(block < net.batch_) {
      if (grads.lowest() == net.layers_.size()) return;
      if (net.narrow_) {
        buffers_[0] = net.flat(block * outputs_above(grads.lowest()));
      } else {
        for (Tensor& buffer : buffers_) buffer = net.flat(block * net.widest_);
      }
      for (size_t k = 0; several_ && k < net.layers_.size(); ++k) {
        if (grads.omega[k].defined()) add(grads.omega[k], terms_.omega[k]);
        if (grads.beta[k].defined()) add(grads.beta[k], terms_.beta[k]);
      }
    }

    // dh: the gradient of the output of these rows, which begin at row `first` of the batch.
    void backward(int64_t first, const Tensor& input, const std::vector<Tensor>& h, Tensor dh, const Tensor* output) {
      if (net_.narrow_) {
        backward_narrow(first, input, h, dh, output);
      } else {
        backward_layers(first, input, h, dh, output);
      }
      const bool last = first + input.size(0) == net_.batch_;
      for (const Sum& sum : sums_) {
        accumulate<T>({sum.term.numel(), const_data<T>(sum.term), data<A>(sum.total), first == 0,
                       last ? data<T>(sum.out) : nullptr},
                      net_.device_.stream());
      }
    }

   private:
    void backward_layers(int64_t first, const Tensor& input, const std::vector<Tensor>& h, Tensor dh,
                         const Tensor* output) {
      const size_t lowest = grads_.lowest(), layers = net_.layers_.size();
      const int64_t rows = input.size(0);
      size_t next = 0;
      const auto place = [&](int64_t cols) { return matrix_in(buffers_[next++ % 2], rows, cols); };
      const Tensor& top = terms_.beta[layers - 1];
      if (output) {
        const Tensor df = place(dh.size(1));
        net_.mask(dh, output, &df, top);
        dh = df;
      } else if (top.defined()) {
        net_.mask(dh, nullptr, nullptr, top);
      }
      for (size_t k = layers; k-- > lowest;) {
        const Tensor df = dh;
        if (terms_.omega[k].defined()) multiply(transposed(df), k == 0 ? input : h[k - 1], terms_.omega[k]);
        if (k == 0) {
          if (grads_.input.defined()) multiply(df, net_.layers_[0].omega, rows_of(grads_.input, first, rows));
        } else if (k > lowest) {
          dh = place(net_.layers_[k].omega.size(1));
          multiply(df, net_.layers_[k].omega, dh);
          net_.mask(dh, &h[k - 1], &dh, terms_.beta[k - 1]);
        }
      }
    }

    // The numbers of df per row: the sum of D_{k+1} over the layers k from `lowest` on.
    int64_t outputs_above(size_t lowest) const {
      int64_t width = 0;
      for (size_t k = lowest; k < net_.layers_.size(); ++k) width += net_.layers_[k].d_out();
      return width;
    }

    // One kernel computes all df and dh, the library the gradients of the weights.
    void backward_narrow(int64_t first, const Tensor& input, const std::vector<Tensor>& h, const Tensor& dh,
                         const Tensor* output) {
      if constexpr (kHasNarrow<T>) {
        const size_t lowest = grads_.lowest(), layers = net_.layers_.size();
        const int64_t rows = input.size(0), width = outputs_above(lowest), blocks = narrow_blocks<T>(rows);
        const Tensor top = with_whole_rows(dh), df = buffers_[0];
        const bool sums =
            std::any_of(terms_.beta.begin(), terms_.beta.end(), [](const Tensor& t) { return t.defined(); });
        const Tensor dbeta = sums ? net_.device_.empty({blocks * width}, kDtype<A>()) : Tensor();
        NarrowBackward<T> p{};
        p.net = net_.narrow_network(rows);
        p.lowest = int(lowest);
        p.grad_output = const_data<T>(top);
        p.grad_row = top.stride(0);
        p.hidden = h.empty() ? nullptr : const_data<T>(h[0]);
        p.output = output ? const_data<T>(*output) : nullptr;
        p.df = data<T>(df);
        if (grads_.input.defined()) p.grad_input = data<T>(rows_of(grads_.input, first, rows));
        p.dbeta = sums ? data<A>(dbeta) : nullptr;
        p.dbeta_row = width;
        narrow_backward(p, net_.device_.stream());
        NarrowBiases<T> biases{};
        biases.slices = blocks;
        biases.partial = p.dbeta;
        int64_t above = 0;
        for (size_t k = lowest; k < layers; ++k) {
          const int64_t d_out = net_.layers_[k].d_out();
          const bool unmasked = k + 1 == layers && !output;
          const Tensor df_k = unmasked ? top : matrix_in(df, rows, d_out, rows * above);
          if (terms_.omega[k].defined()) multiply(transposed(df_k), k == 0 ? input : h[k - 1], terms_.omega[k]);
          above += d_out;
          biases.ends[biases.layers] = int(above);
          biases.out[biases.layers++] = terms_.beta[k].defined() ? data<T>(terms_.beta[k]) : nullptr;
        }
        if (sums) narrow_biases(biases, net_.device_.stream());
      }
    }

    struct Sum {
      Tensor out, term, total;
    };
    void add(const Tensor& out, Tensor& term) {
      const std::vector<int64_t> sizes(out.sizes().begin(), out.sizes().end());
      term = net_.device_.empty(sizes, kDtype<T>());
      sums_.push_back({out, term, net_.device_.empty({out.numel()}, kDtype<A>())});
    }

    const Network& net_;
    const Gradients& grads_;
    Gradients terms_;  // the gradients of one block: the results themselves, or (several blocks) terms of their sums
    bool several_;
    Tensor buffers_[2];  // df and dh alternate between them
    std::vector<Sum> sums_;
  };

  const OnDevice& device_;
  std::vector<Layer> layers_;
  int64_t batch_, widest_, hidden_width_ = 0;
  bool final_relu_, narrow_ = false;
};

}  // namespace manualbp::cuda
