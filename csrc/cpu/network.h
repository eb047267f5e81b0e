// A network on the CPU and its forward pass, over the blocks of rows that a Plan (plan.h) cuts the batch into:
//
//   h_0 = input;   f_k = beta_k + Omega_k h_k;   h_{k+1} = a[f_k];   output = f_{K-1} (or a[f_{K-1}])
//
// Where dropout follows a ReLU, h_{k+1} = m_k . a[f_k] with a mask m_k that the caller has drawn (Layer in layer.h).
// Layer k maps D_k to D_{k+1} features; B is the number of rows of the input. The backward pass is in backward.h.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "layer.h"
#include "plan.h"

namespace manualbp {

// How to cut a batch of this network, on this many threads.
template <typename T>
Plan<T> plan_of(int64_t batch, const std::vector<Layer<T>>& layers, int64_t threads) {
  check_countable(batch, layers);
  std::vector<LayerPlan> shapes(layers.size());
  for (size_t k = 0; k < layers.size(); ++k) {
    shapes[k].d_in = layers[k].d_in();
    shapes[k].d_out = layers[k].d_out();
    shapes[k].row_stride = layers[k].omega.row_stride;
    shapes[k].col_stride = layers[k].omega.col_stride;
  }
  return Plan<T>(batch, std::move(shapes), threads);
}

template <typename T>
Matrix<const T> rows_of(Matrix<const T> m, int64_t first, int64_t count) {
  m.data += first * m.row_stride;
  m.rows = count;
  return m;
}

template <typename T>
struct Network {
  using A = accumulator_t<T>;

  Network(int64_t batch, std::vector<Layer<T>> shapes, bool final_relu,
          int64_t threads = torch::stable::get_num_threads())
      : layers(std::move(shapes)), final_relu(final_relu), plan(plan_of(batch, layers, threads)) {}

  // Elements of h_1 ... h_{K-1}, stored one after another.
  int64_t hidden_size() const { return plan.batch * plan.hidden; }

  // h_1 ... h_{K-1} of `capacity` rows, one after another, seen from row `first` on.
  struct Activations {
    T* data;
    int64_t capacity, first;
    T* at(const Network& net, size_t k) const {
      return data + capacity * net.plan.layers[k - 1].start + first * net.layers[k].d_in();
    }
  };

  // The weights of layers [first, last), packed once for all the blocks that will multiply by them.
  // field: &Layer::packed_transposed (forward) or &Layer::packed (input gradient).
  class Packed {
   public:
    Packed(Network& net, const A* Layer<T>::* field, size_t first, size_t last)
        : memory_(size(net, field == &Layer<T>::packed_transposed, first, last)) {
      const bool transposed = field == &Layer<T>::packed_transposed;
      const auto& kernel = kernels<T>();
      A* out = memory_.data;
      for (size_t k = first; k < last; ++k) {
        const int64_t elements = net.plan.packed_size(int64_t(k), transposed);
        if (!elements) continue;
        const Matrix<const T> omega = net.layers[k].omega, b = transposed ? omega.transposed() : omega;
        const int64_t most = 4 * kernel_table().tile_cols;
        for (int64_t col = 0; col < b.cols; col += most) {
          stripes_.push_back({columns_of(b, col, std::min(most, b.cols - col)), out + kernel.packed_size(b.rows, col)});
        }
        net.layers[k].*field = out;
        out += elements;
      }
    }

    void pack(const Workers& workers) const {
      const auto& kernel = kernels<T>();
      workers.run(int64_t(stripes_.size()), double(kFetchRows) * double(size_), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const auto& [b, out] = stripes_[size_t(i)];
          kernel.pack(b.data, b.row_stride, b.col_stride, b.rows, b.cols, out);
        }
      });
    }

   private:
    int64_t size(const Network& net, bool transposed, size_t first, size_t last) {
      for (size_t k = first; k < last; ++k) size_ += net.plan.packed_size(int64_t(k), transposed);
      return size_;
    }
    int64_t size_ = 0;
    std::vector<std::pair<Matrix<const T>, A*>> stripes_;  // of whole panels, and where each is packed
    Buffer<A> memory_;
  };

  // output (B, D_K), contiguous. hidden: where h_1 ... h_{K-1} are stored, or nullptr.
  void forward(Matrix<const T> input, T* hidden, T* output) {
    const int64_t batch = plan.batch;
    if (batch * plan.top == 0 && (!hidden || hidden_size() == 0)) return;
    const ForwardPlan pass = plan.forward(/*store=*/hidden);
    const Buffer<char> workspaces(plan.threads * pass.workspace);
    const Workers workers(workspaces.data, pass.workspace, plan.threads);
    const Packed packed(*this, &Layer<T>::packed_transposed, 0, layers.size());
    packed.pack(workers);
    const Buffer<T> memory(pass.elements);
    const auto block = [&](int64_t first, int64_t count, T* buffers, const Workers& threads) {
      const auto place = [&](size_t k) -> T* {
        if (k + 1 == layers.size()) return output + first * plan.top;
        return hidden ? Activations{hidden, batch, first}.at(*this, k + 1) : buffers + int64_t(k % 2) * pass.buffer;
      };
      forward_block(rows_of(input, first, count), first, layers.size(), place, threads);
    };
    if (plan.way == Way::kWide) {
      for (int64_t first = 0; first < batch; first += pass.rows) {
        block(first, std::min(pass.rows, batch - first), memory.data, workers);
      }
      return;
    }
    const int64_t share = plan.thread_rows(batch);
    workers.run(ceil_div(batch, share), plan.multiply_adds(), [&](int64_t begin, int64_t end) {
      T* const buffers = memory.data + 2 * pass.buffer * workers.index();
      const int64_t stop = std::min(end * share, batch);
      for (int64_t first = begin * share, count; first < stop; first += count) {
        count = std::min(pass.rows, stop - first);
        block(first, count, buffers, workers.alone());
      }
    });
  }

  // The forward pass of a block of rows, from row `first` on, through the first `count` layers; h_{k+1} goes to place(k).
  template <typename Place>
  void forward_block(Matrix<const T> h, int64_t first, size_t count, const Place& place, const Workers& workers) const {
    for (size_t k = 0; k < count; ++k) {
      T* next = place(k);
      manualbp::forward<T>(h, layers[k], k + 1 < layers.size() || final_relu, next, workers);
      if (layers[k].kept) dropout<T>(layers[k], first, h.rows, next, workers);
      h = Matrix<const T>::contiguous(next, h.rows, layers[k].d_out());
    }
  }

  std::vector<Layer<T>> layers;
  bool final_relu;
  Plan<T> plan;
};

}  // namespace manualbp
