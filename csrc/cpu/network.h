// A network on the CPU: the lecture's two passes, over blocks of rows.
//
//   forward    h_0 = input;   f_k = beta_k + Omega_k h_k;   h_{k+1} = a[f_k];
//   output = f_{K-1} (or a[f_{K-1}]) backward   k = K-1 ... 0:   d(beta_k) =
//   sum of df_k,   d(Omega_k) = df_k^T h_k,
//                               df_{k-1} = I[h_k > 0] . (df_k Omega_k)
//
// Layer k maps D_k to D_{k+1} features; B is the number of rows of the input.
// Two ways to cut the work:
//   tall (and narrow)   blocks of rows go through all layers while they lie in
//   the cache, each block on one thread;
//                       the backward pass sums gradients over slices of the
//                       batch, added up in order at the end
//   short (or wide)     all rows go through one layer after the other, each
//   step cut over the threads
// The choice depends on the sizes alone, never on the number of threads: so do
// the results.
#pragma once

#include <optional>
#include <vector>

#include "layer.h"

namespace manualbp {

// What the backward pass writes: the tensors' memory, or nullptr where nobody
// asked.
template <typename T> struct Gradients {
  T *input = nullptr;     // (B, D_0)
  std::vector<T *> omega; // (D_{k+1}, D_k) each
  std::vector<T *> beta;  // (D_{k+1}) each

  // The lowest layer that has something to learn: the backward pass ends there.
  size_t lowest() const {
    if (input)
      return 0;
    size_t k = 0;
    while (k < omega.size() && !omega[k] && !beta[k])
      ++k;
    return k;
  }
};

template <typename T> class Network {
  using A = accumulator_t<T>;

public:
  Network(int64_t batch, std::vector<Layer<T>> layers, bool final_relu)
      : layers_(std::move(layers)), batch_(batch), final_relu_(final_relu) {
    widest_ = layers_[0].d_in();
    for (size_t k = 0; k < layers_.size(); ++k) {
      widest_ = std::max(widest_, layers_[k].d_out());
      parameters_ += (layers_[k].d_in() + 1) * layers_[k].d_out();
      if (k + 1 < layers_.size()) {
        widest_hidden_ = std::max(widest_hidden_, layers_[k].d_out());
        hidden_size_ += batch_ * layers_[k].d_out();
      }
    }
    slice_rows_ = choose_slice_rows();
  }

  // Elements of h_1 ... h_{K-1}, stored one after another.
  int64_t hidden_size() const { return hidden_size_; }

  // output (B, D_K), contiguous. hidden: where h_1 ... h_{K-1} are stored, or
  // nullptr.
  void forward(Matrix<const T> input, T *hidden, T *output) {
    const Team team(widest_, widest_);
    const auto &workers = team.workers;
    const Buffer<A> packed(pack(&Layer<T>::packed_transposed, 0, workers));
    const int64_t rows =
        is_tall() ? std::min(block_rows(), ceil_div(batch_, workers.threads()))
                  : batch_;
    const int64_t turn =
        hidden ? 0 : rows * widest_hidden_; // without store, two buffers a
                                            // thread take turns
    const Buffer<T> turns(2 * turn * (is_tall() ? workers.threads() : 1));
    const auto block = [&](int64_t first, T *turns, const Workers &who) {
      auto h = rows_of(input, first, std::min(rows, batch_ - first));
      T *stored = hidden;
      for (size_t k = 0; k < layers_.size(); ++k) {
        const bool last = k + 1 == layers_.size();
        const int64_t width = layers_[k].d_out();
        T *next = last     ? output + first * width
                  : hidden ? stored + first * width
                           : turns + int64_t(k % 2) * turn;
        manualbp::forward<T>(h, layers_[k], !last || final_relu_, next, who);
        h = Matrix<const T>::contiguous(next, h.rows, width);
        stored += hidden ? batch_ * width : 0;
      }
    };
    if (!is_tall())
      return block(0, turns.data, workers);
    workers.run(ceil_div(batch_, rows), multiply_adds(),
                [&](int64_t begin, int64_t end) {
                  for (int64_t i = begin; i < end; ++i)
                    block(i * rows, turns.data + 2 * turn * workers.index(),
                          workers.alone());
                });
  }

  // hidden: h_1 ... h_{K-1} as forward stored them. output: what forward
  // returned if a ReLU ended it, else nullptr.
  void backward(Matrix<const T> input, const T *hidden,
                Matrix<const T> grad_output, const T *output,
                const Gradients<T> &grads) {
    const size_t lowest = grads.lowest();
    if (lowest == layers_.size())
      return;
    const int64_t slices = is_tall() ? ceil_div(batch_, slice_rows_) : 1;
    const int64_t rows =
        is_tall() ? std::min(block_rows(), slice_rows_) : batch_;
    const Team team(widest_, std::max(widest_, rows));
    const auto &workers = team.workers;
    const Buffer<A> packed(
        pack(&Layer<T>::packed, grads.input ? 0 : lowest + 1, workers));
    const Sums sums(layers_, grads, slices);
    const int64_t turn =
        rows * std::max(widest_hidden_, output ? layers_.back().d_out() : 0);
    const Buffer<T> turns(2 * turn *
                          (is_tall()
                               ? workers.threads()
                               : 1)); // df takes turns in two buffers a thread

    const auto block = [&](int64_t first, int64_t count, int64_t slice,
                           bool accumulate, T *turns, const Workers &who) {
      auto df = rows_of(grad_output, first, count);
      const T *mask =
          output ? output + first * layers_.back().d_out() : nullptr;
      const T *stored = hidden + hidden_size_; // the end of h_{k+1}
      T *free = turns;
      for (size_t k = layers_.size(); k-- > lowest;) {
        const auto &layer = layers_[k];
        // df_k = I[h_{k+1} > 0] . dh_{k+1} and d(beta_k) in one pass; without a
        // ReLU on top, only the sums.
        A *const dbeta = sums.beta(slice, k);
        A *const domega = sums.omega(slice, k);
        const bool need_dh = k > lowest || grads.input;
        if (mask) {
          const bool ours = df.data == turns || df.data == turns + turn;
          T *out = !domega && !need_dh ? nullptr
                   : ours              ? const_cast<T *>(df.data)
                                       : free;
          relu_backward<T>(df, mask, out, dbeta, accumulate, who);
          df = Matrix<const T>::contiguous(out, count, layer.d_out());
          free = out == turns ? turns + turn : turns;
        } else if (dbeta) {
          relu_backward<T>(df, nullptr, nullptr, dbeta, accumulate, who);
        }
        if (k > 0)
          stored -= batch_ * layer.d_in();
        const auto h =
            k == 0 ? rows_of(input, first, count)
                   : Matrix<const T>::contiguous(stored + first * layer.d_in(),
                                                 count, layer.d_in());
        if (domega)
          weight_gradient<T>(df, h, domega, accumulate, who);
        if (need_dh) {
          T *dh = k == 0 ? grads.input + first * layer.d_in() : free;
          input_gradient<T>(df, layer, dh, who);
          df = Matrix<const T>::contiguous(dh, count, layer.d_in());
          free = dh == turns ? turns + turn : turns;
          mask = h.data;
        }
      }
    };
    if (!is_tall()) {
      block(0, batch_, 0, false, turns.data, workers);
    } else {
      workers.run(slices, 2 * multiply_adds(), [&](int64_t begin, int64_t end) {
        T *const mine = turns.data + 2 * turn * workers.index();
        for (int64_t s = begin; s < end; ++s) {
          const int64_t start = s * slice_rows_,
                        stop = std::min(start + slice_rows_, batch_);
          for (int64_t first = start; first < stop; first += rows) {
            block(first, std::min(rows, stop - first), s, first > start, mine,
                  workers.alone());
          }
        }
      });
    }
    sums.finish(grads, workers);
  }

private:
  // The threads of a call and their packing workspaces, for products of at most
  // n columns and depth k.
  struct Team {
    Team(int64_t n, int64_t k)
        : bytes(ceil_div(kernels<T>().workspace_bytes(n, k), 64) * 64),
          threads(torch::stable::get_num_threads()), memory(threads * bytes),
          workers(memory.data, bytes, threads) {}
    int64_t bytes, threads;
    Buffer<char> memory;
    Workers workers;
  };

  // Where each slice of the batch sums its gradients: the gradients themselves
  // if there is one slice and its sums need no rounding, else a row of a
  // buffer.
  class Sums {
  public:
    Sums(const std::vector<Layer<T>> &layers, const Gradients<T> &grads,
         int64_t slices)
        : layers_(layers), grads_(grads), slices_(slices),
          direct_(slices == 1 && sizeof(T) == sizeof(A)) {
      if (direct_)
        return;
      for (size_t k = 0; k < layers.size(); ++k) {
        offsets_.push_back(size_);
        if (grads.omega[k])
          size_ += layers[k].d_in() * layers[k].d_out();
        offsets_.push_back(size_);
        if (grads.beta[k])
          size_ += layers[k].d_out();
      }
      buffer_.emplace(slices * size_);
    }
    A *omega(int64_t slice, size_t k) const {
      return place(slice, 2 * k, grads_.omega[k]);
    }
    A *beta(int64_t slice, size_t k) const {
      return place(slice, 2 * k + 1, grads_.beta[k]);
    }

    // Adds up the slices in order and rounds to the storage type.
    void finish(const Gradients<T> &grads, const Workers &workers) const {
      if (direct_)
        return;
      for (size_t k = 0; k < layers_.size(); ++k) {
        if (T *out = grads.omega[k]) {
          reduce<T>(omega(0, k), slices_, size_,
                    layers_[k].d_in() * layers_[k].d_out(), out, workers);
        }
        if (T *out = grads.beta[k])
          reduce<T>(beta(0, k), slices_, size_, layers_[k].d_out(), out,
                    workers);
      }
    }

  private:
    A *place(int64_t slice, size_t item, T *grad) const {
      if (!grad)
        return nullptr;
      if (direct_)
        return reinterpret_cast<A *>(grad);
      return buffer_->data + slice * size_ + offsets_[item];
    }
    const std::vector<Layer<T>> &layers_;
    const Gradients<T> &grads_;
    int64_t slices_, size_ = 0;
    bool direct_;
    std::vector<int64_t> offsets_;
    std::optional<Buffer<A>> buffer_;
  };

  static Matrix<const T> rows_of(Matrix<const T> m, int64_t first,
                                 int64_t count) {
    return {m.data + first * m.row_stride, count, m.cols, m.row_stride,
            m.col_stride};
  }

  bool is_tall() const { return slice_rows_ < batch_; }

  // Rows of a slice; all of them where slices do not pay: their sums must not
  // take more than 16 MiB.
  int64_t choose_slice_rows() const {
    constexpr int64_t kFewest = 4, kMost = 32, kRows = 128,
                      kSumBytes = 16 << 20;
    if (batch_ < kRows)
      return batch_;
    const int64_t most = std::min(kMost, kSumBytes / int64_t(sizeof(A)) /
                                             std::max<int64_t>(parameters_, 1));
    if (most < kFewest)
      return batch_;
    return ceil_div(batch_, std::clamp(batch_ / kRows, kFewest, most));
  }

  // Rows of a block: what a thread touches at a time, two layers' activations,
  // fits in half of a 1 MiB cache.
  int64_t block_rows() const {
    return std::clamp<int64_t>(64 * 1024 / std::max<int64_t>(widest_, 1), 48,
                               512);
  }

  double multiply_adds() const { return double(batch_) * double(parameters_); }

  // Packs the weights of layers `first` and up once, for all the blocks that
  // will multiply by them. field: &Layer::packed_transposed (forward) or
  // &Layer::packed (input gradient). Returns the memory.
  Buffer<A> pack(const A *Layer<T>::*field, size_t first,
                 const Workers &workers) {
    const bool transposed = field == &Layer<T>::packed_transposed;
    const auto &kernel = kernels<T>();
    std::vector<int64_t> offsets;
    int64_t size = 0;
    for (const auto &layer : layers_) {
      const int64_t k = transposed ? layer.d_in() : layer.d_out(),
                    n = transposed ? layer.d_out() : layer.d_in();
      offsets.push_back(size);
      if (is_tall() && offsets.size() > first)
        size += kernel.packed_size(k, n);
    }
    Buffer<A> memory(size);
    if (!is_tall())
      return memory;
    workers.run(
        int64_t(layers_.size() - first), double(parameters_),
        [&](int64_t begin, int64_t end) {
          for (size_t i = first + size_t(begin); i < first + size_t(end); ++i) {
            auto &layer = layers_[i];
            const auto &omega = layer.omega;
            A *out = memory.data + offsets[i];
            if (transposed) {
              kernel.pack(omega.data, omega.col_stride, omega.row_stride,
                          layer.d_in(), layer.d_out(), out);
            } else {
              kernel.pack(omega.data, omega.row_stride, omega.col_stride,
                          layer.d_out(), layer.d_in(), out);
            }
            layer.*field = out;
          }
        });
    return memory;
  }

  std::vector<Layer<T>> layers_;
  int64_t batch_;
  bool final_relu_;
  int64_t widest_, widest_hidden_ = 0, hidden_size_ = 0, parameters_ = 0,
                   slice_rows_;
};

} // namespace manualbp
