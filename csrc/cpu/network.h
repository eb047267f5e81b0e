// A network on the CPU: the lecture's two passes, over the blocks of rows that a Plan (plan.h) cuts the batch into.
//
//   forward    h_0 = input;   f_k = beta_k + Omega_k h_k;   h_{k+1} = a[f_k];   output = f_{K-1} (or a[f_{K-1}])
//   backward   k = K-1 ... 0:   d(beta_k) = sum of df_k,   d(Omega_k) = df_k^T h_k,
//                               df_{k-1} = I[h_k > 0] . (df_k Omega_k)
//
// Layer k maps D_k to D_{k+1} features; B is the number of rows of the input.
#pragma once

#include <atomic>
#include <optional>
#include <vector>

#include "layer.h"
#include "plan.h"

namespace manualbp {

// Where the backward pass writes its results; nullptr: this gradient is not needed.
template <typename T>
struct Gradients {
  T* input = nullptr;     // (B, D_0)
  std::vector<T*> omega;  // (D_{k+1}, D_k) each
  std::vector<T*> beta;   // (D_{k+1}) each
};

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
class Network {
  using A = accumulator_t<T>;

 public:
  Network(int64_t batch, std::vector<Layer<T>> layers, bool final_relu)
      : layers_(std::move(layers)),
        final_relu_(final_relu),
        plan_(plan_of(batch, layers_, torch::stable::get_num_threads())) {}

  // Elements of h_1 ... h_{K-1}, stored one after another.
  int64_t hidden_size() const { return plan_.batch * plan_.hidden; }

  // output (B, D_K), contiguous. hidden: where h_1 ... h_{K-1} are stored, or nullptr.
  void forward(Matrix<const T> input, T* hidden, T* output) {
    const int64_t batch = plan_.batch;
    if (batch * plan_.top == 0 && (!hidden || hidden_size() == 0)) return;
    const ForwardPlan pass = plan_.forward(/*store=*/hidden);
    const Buffer<char> workspaces(plan_.threads * pass.workspace);
    const Workers workers(workspaces.data, pass.workspace, plan_.threads);
    const Buffer<A> packed(pack(&Layer<T>::packed_transposed, 0, layers_.size(), workers));
    const Buffer<T> memory(pass.elements);
    const auto block = [&](int64_t first, T* buffers, const Workers& threads) {
      const auto place = [&](size_t k) -> T* {
        if (k + 1 == layers_.size()) return output + first * plan_.top;
        return hidden ? Activations{hidden, batch, first}.at(*this, k + 1) : buffers + int64_t(k % 2) * pass.buffer;
      };
      forward_block(rows_of(input, first, std::min(pass.rows, batch - first)), layers_.size(), place, threads);
    };
    if (plan_.way == Way::kWide) {
      for (int64_t first = 0; first < batch; first += pass.rows) block(first, memory.data, workers);
      return;
    }
    workers.run(ceil_div(batch, pass.rows), plan_.multiply_adds(), [&](int64_t begin, int64_t end) {
      T* const buffers = memory.data + 2 * pass.buffer * workers.index();
      for (int64_t i = begin; i < end; ++i) block(i * pass.rows, buffers, workers.alone());
    });
  }

  // From the gradient of the output. hidden: h_1 ... h_{K-1} as forward stored them; recompute: they are computed again
  // instead. output: what forward returned if a ReLU ended it, else nullptr.
  void backward(Matrix<const T> input, const T* hidden, bool recompute, Matrix<const T> grad_output, const T* output,
                const Gradients<T>& grads) {
    const BackwardPlan pass = plan_backward(recompute ? layers_.size() - 1 : 0, grads);
    if (pass.lowest == plan_.count()) return;
    run_backward(input, hidden, pass, grads, [&](int64_t first, int64_t count, T*) -> Top {
      return {rows_of(grad_output, first, count), output ? output + first * plan_.top : nullptr};
    });
  }

  // Forward, loss and backward in one pass over blocks of rows; returns the loss summed over all rows.
  // loss: describes the whole batch; its rows and f are filled in here, group by group.
  double loss_backward(Matrix<const T> input, double (*kernel)(const Loss<T>&), const Loss<T>& loss,
                       const Gradients<T>& grads) {
    std::vector<double> sums(size_t(ceil_div(plan_.batch, kLossRows)), 0.0);
    const BackwardPlan pass = plan_backward(layers_.size(), grads);
    run_backward(input, nullptr, pass, grads, [&](int64_t first, int64_t count, T* f) -> Top {
      for (int64_t row = first; row < first + count; row += kLossRows) {
        Loss<T> group = loss;
        group.rows = std::min(kLossRows, first + count - row);
        group.f = f + (row - first) * plan_.top;
        if (group.target) group.target += row * group.target_row;
        if (group.classes) group.classes += row * group.target_row;
        sums[size_t(row / kLossRows)] = kernel(group);
      }
      return {Matrix<const T>::contiguous(f, count, plan_.top), nullptr};
    });
    double sum = 0;
    for (const double s : sums) sum += s;
    return sum;
  }

 private:
  // h_1 ... h_{K-1} of `capacity` rows, one after another, seen from row `first` on.
  struct Activations {
    T* data;
    int64_t capacity, first;
    T* at(const Network& net, size_t k) const {
      return data + capacity * net.plan_.layers[k - 1].start + first * net.layers_[k].d_in();
    }
  };

  // Where the backward pass of a block starts: the gradient of the output, and the output if a ReLU ended the network.
  struct Top {
    Matrix<const T> gradient;
    const T* output;
  };

  // Where each slice of the batch sums its gradients. d(beta): a row of a buffer, in double. d(Omega): a row of a
  // buffer, or the gradient itself if the pass sums in place. If a slice has several chunks, that row holds the sum of
  // one chunk, and a row of `totals`, in double, the sum of those before it.
  class Sums {
   public:
    Sums(const Plan<T>& plan, const BackwardPlan& pass, const Gradients<T>& grads)
        : plan_(plan), pass_(pass), grads_(grads), betas_(pass.slices * pass.bias_sums) {
      std::fill_n(betas_.data, pass.slices * pass.bias_sums, 0.0);
      if (!pass.in_place) omegas_.emplace(pass.slices * pass.weight_sums);
      if (pass.totals) totals_.emplace(pass.totals * pass.weight_sums);
    }
    double* beta(int64_t slice, size_t k) const {
      return grads_.beta[k] ? betas_.data + slice * pass_.bias_sums + plan_.layers[k].bias_sums : nullptr;
    }
    A* omega(int64_t slice, size_t k) const {
      T* const out = grads_.omega[k];
      if (!out) return nullptr;
      if (pass_.in_place) return reinterpret_cast<A*>(out);
      return omegas_->data + slice * pass_.weight_sums + plan_.layers[k].weight_sums;
    }

    // Adds the sum of a chunk to its slice's total; after the last chunk, puts the total in the place of the sum. Does
    // nothing for a slice of one chunk. row: the slice's row of `totals`.
    void add_chunk(int64_t slice, bool first, bool last, int64_t row, const Workers& workers) const {
      for (size_t k = 0; k < plan_.layers.size() && !(first && last); ++k) {
        AddUp<A> chunk{};
        chunk.sum = omega(slice, k);
        if (!chunk.sum) continue;
        chunk.total = totals_->data + row * pass_.weight_sums + plan_.layers[k].weight_sums;
        chunk.first = first;
        chunk.last = last;
        run_shares(size_of(k), 1, workers, [&](int64_t begin, int64_t end) { kernels<A>().add_up(chunk, begin, end); });
      }
    }

    // Adds up the slices in order and rounds to the storage type.
    void finish(const Workers& workers) const {
      for (size_t k = 0; k < plan_.layers.size(); ++k) {
        if (T* out = grads_.omega[k]; out && !pass_.in_place) {
          reduce<T>(omega(0, k), pass_.slices, pass_.weight_sums, size_of(k), out, workers);
        }
        if (T* out = grads_.beta[k]) {
          reduce<T>(beta(0, k), pass_.slices, pass_.bias_sums, plan_.layers[k].d_out, out, workers);
        }
      }
    }

   private:
    int64_t size_of(size_t k) const { return plan_.layers[k].d_out * plan_.layers[k].d_in; }
    const Plan<T>& plan_;
    const BackwardPlan& pass_;
    const Gradients<T>& grads_;
    Buffer<double> betas_;
    std::optional<Buffer<double>> totals_;
    std::optional<Buffer<A>> omegas_;
  };

  // In a short batch, df_0 ... df_{K-1} and the input of each layer, of all rows: parallel region 1 writes what
  // parallel region 2 reads.
  struct AllRows {
    Matrix<const T> input;
    T* hidden;  // h_1 ... h_{K-1}
    std::vector<Matrix<const T>> df;

    Matrix<const T> h(const Network& net, size_t k) const {
      if (k == 0) return input;
      return Matrix<const T>::contiguous(Activations{hidden, net.plan_.batch, 0}.at(net, k), net.plan_.batch,
                                         net.layers_[k].d_in());
    }
  };

  BackwardPlan plan_backward(size_t recomputed, const Gradients<T>& grads) {
    for (size_t k = 0; k < layers_.size(); ++k) {
      plan_.layers[k].weight_gradient = grads.omega[k];
      plan_.layers[k].bias_gradient = grads.beta[k];
    }
    return plan_.backward(int64_t(recomputed), grads.input);
  }

  static Matrix<const T> rows_of(Matrix<const T> m, int64_t first, int64_t count) {
    m.data += first * m.row_stride;
    m.rows = count;
    return m;
  }

  // The forward pass of a block of rows through the first `layers` layers; h_{k+1} goes to place(k).
  template <typename Place>
  void forward_block(Matrix<const T> h, size_t layers, const Place& place, const Workers& workers) const {
    for (size_t k = 0; k < layers; ++k) {
      T* next = place(k);
      manualbp::forward<T>(h, layers_[k], k + 1 < layers_.size() || final_relu_, next, workers);
      h = Matrix<const T>::contiguous(next, h.rows, layers_[k].d_out());
    }
  }

  // A backward pass as its functions see it.
  template <typename TopOf>
  struct Backward {
    Matrix<const T> input;
    const T* hidden;  // the stored activations, unless the pass computes them itself
    const TopOf& top;  // top(first, count, f): where a block starts; f: its output, if the pass computed that too
    const BackwardPlan& plan;
    const Gradients<T>& grads;
    const Sums& sums;
  };

  template <typename TopOf>
  void run_backward(Matrix<const T> input, const T* hidden, const BackwardPlan& plan, const Gradients<T>& grads,
                    const TopOf& top) {
    const Buffer<char> workspaces(plan_.threads * plan.workspace);
    const Workers workers(workspaces.data, plan.workspace, plan_.threads);
    const Buffer<A> packed(pack(&Layer<T>::packed, size_t(plan.first_packed), layers_.size(), workers));
    const Buffer<A> packed_transposed(pack(&Layer<T>::packed_transposed, 0, size_t(plan.recomputed), workers));
    const Sums sums(plan_, plan, grads);
    const Buffer<T> memory(plan.elements);
    const Backward<TopOf> pass{input, hidden, top, plan, grads, sums};
    if (plan_.way == Way::kShort) {
      AllRows all = all_rows(pass, memory.data);
      backward_of_rows(pass, all, workers);
      gradients_of_layers(pass, all, workers);
    } else if (plan_.way == Way::kWide) {
      backward_of_slice(pass, 0, 0, memory.data, workers);
    } else {
      std::atomic<int64_t> in_progress{0};
      workers.run(plan.slices, 3 * plan_.multiply_adds(), [&](int64_t begin, int64_t end) {
        const int64_t row = in_progress++;
        T* const part = memory.data + plan.part * workers.index();
        for (int64_t s = begin; s < end; ++s) backward_of_slice(pass, s, row, part, workers.alone());
      });
    }
    sums.finish(workers);
  }

  // Tall and wide: the blocks of a slice, chunk by chunk. row: of the totals of Sums.
  template <typename TopOf>
  void backward_of_slice(const Backward<TopOf>& pass, int64_t slice, int64_t row, T* memory,
                         const Workers& workers) const {
    const int64_t start = slice * pass.plan.slice_rows, stop = std::min(start + pass.plan.slice_rows, plan_.batch);
    int64_t chunk = start;
    do {  // once even for an empty batch: its gradients are zero
      const int64_t end = std::min(chunk + pass.plan.chunk_rows, stop);
      int64_t first = chunk;
      do {
        const int64_t count = std::min(pass.plan.rows, end - first);
        backward_of_block(pass, first, count, slice, /*accumulate=*/first > chunk, memory, workers);
        first += pass.plan.rows;
      } while (first < end);
      pass.sums.add_chunk(slice, chunk == start, end == stop, row, workers);
      chunk = end;
    } while (chunk < stop);
  }

  // Rows [first, first + count) through all layers. memory: two buffers that alternate between df_k and df_{k-1}, then
  // the activations, if the pass computes them.
  template <typename TopOf>
  void backward_of_block(const Backward<TopOf>& pass, int64_t first, int64_t count, int64_t slice, bool accumulate,
                         T* memory, const Workers& workers) const {
    const auto& [input, hidden, top, plan, grads, sums] = pass;
    T* const buffers[] = {memory, memory + plan.buffer};
    const auto h0 = rows_of(input, first, count);
    const auto activations = plan.recomputed ? Activations{memory + 2 * plan.buffer, plan.rows, 0}
                                             : Activations{const_cast<T*>(hidden), plan_.batch, first};
    const auto place = [&](size_t k) { return k + 1 == layers_.size() ? buffers[0] : activations.at(*this, k + 1); };
    forward_block(h0, size_t(plan.recomputed), place, workers);
    // df_{K-1} and d(beta_{K-1}); if the network ends with a ReLU, its mask in the same pass.
    const auto [gradient, output] = top(first, count, buffers[0]);
    auto df = output ? Matrix<const T>::contiguous(buffers[0], count, plan_.top) : gradient;
    if (double* dbeta = sums.beta(slice, layers_.size() - 1); output) {
      relu_backward<T>(gradient, output, buffers[0], dbeta, workers);
    } else if (dbeta) {
      bias_gradient<T>(gradient, dbeta, workers);
    }
    for (size_t k = layers_.size(); k-- > size_t(plan.lowest);) {
      const auto& layer = layers_[k];
      const auto h = k == 0 ? h0 : Matrix<const T>::contiguous(activations.at(*this, k), count, layer.d_in());
      if (A* domega = sums.omega(slice, k)) {
        weight_gradient<T>(df, h, domega, accumulate, plan.unit_rows, workers);
      }
      if (k > size_t(plan.lowest)) {
        T* const below = df.data == buffers[0] ? buffers[1] : buffers[0];
        hidden_gradient<T>(df, layer, h.data, below, sums.beta(slice, k - 1), workers);
        df = Matrix<const T>::contiguous(below, count, layer.d_in());
      } else if (grads.input) {
        input_gradient<T>(df, layer, grads.input + first * layer.d_in(), workers);
      }
    }
  }

  // Short: df_0 ... df_{K-1} in the memory of the pass, then the activations, if the pass computes them.
  template <typename TopOf>
  AllRows all_rows(const Backward<TopOf>& pass, T* memory) const {
    AllRows all{pass.input, const_cast<T*>(pass.hidden), std::vector<Matrix<const T>>(layers_.size())};
    for (size_t k = 0; k < layers_.size(); ++k) {
      T* const df = memory + plan_.batch * plan_.layers[k].start;
      all.df[k] = Matrix<const T>::contiguous(df, plan_.batch, layers_[k].d_out());
    }
    if (pass.plan.recomputed) all.hidden = memory + plan_.batch * (plan_.hidden + plan_.top);
    return all;
  }

  // Short, parallel region 1: each thread takes its rows forward, if the pass computes the activations, and back to
  // df_0. Without a final ReLU, df_{K-1} is the gradient of the output itself, so it is not copied: the thread that
  // owns row 0 stores a view of the whole matrix, which replaces df_{K-1} after the barrier.
  template <typename TopOf>
  void backward_of_rows(const Backward<TopOf>& pass, AllRows& all, const Workers& workers) const {
    const size_t layers = layers_.size(), lowest = size_t(pass.plan.lowest);
    const int64_t batch = plan_.batch, rows = plan_.thread_rows();
    Matrix<const T> whole{};
    workers.run(ceil_div(batch, rows), 2 * plan_.multiply_adds(), [&](int64_t begin, int64_t end) {
      const Workers alone = workers.alone();
      const int64_t first = begin * rows, count = std::min(end * rows, batch) - first;
      const auto df_rows = [&](size_t k) { return const_cast<T*>(all.df[k].data) + first * layers_[k].d_out(); };
      const Activations activations{all.hidden, batch, first};
      const auto place = [&](size_t k) { return k + 1 == layers ? df_rows(k) : activations.at(*this, k + 1); };
      forward_block(rows_of(pass.input, first, count), size_t(pass.plan.recomputed), place, alone);
      auto [gradient, output] = pass.top(first, count, df_rows(layers - 1));
      if (output) {
        T* const df = df_rows(layers - 1);
        relu_backward<T>(gradient, output, df, nullptr, alone);
        gradient = Matrix<const T>::contiguous(df, count, plan_.top);
      } else if (first == 0) {
        whole = rows_of(gradient, 0, batch);
      }
      for (size_t k = layers - 1; k > lowest; --k) {
        hidden_gradient<T>(gradient, layers_[k], activations.at(*this, k), df_rows(k - 1), nullptr, alone);
        gradient = Matrix<const T>::contiguous(df_rows(k - 1), count, layers_[k].d_in());
      }
      if (T* const out = pass.grads.input) {
        input_gradient<T>(gradient, layers_[0], out + first * layers_[0].d_in(), alone);
      }
    });
    if (whole.data) all.df[layers - 1] = whole;
  }

  // Short, parallel region 2: the blocks of all d(Omega_k), and all d(beta_k), are divided among the threads.
  template <typename TopOf>
  void gradients_of_layers(const Backward<TopOf>& pass, const AllRows& all, const Workers& workers) const {
    struct Task {
      size_t k;
      int64_t row, col;  // of the block of d(Omega_k); row < 0: d(beta_k)
    };
    std::vector<Task> tasks;
    for (size_t k = size_t(pass.plan.lowest); k < layers_.size(); ++k) {
      for (int64_t row = 0; pass.grads.omega[k] && row < layers_[k].d_out(); row += kGradientRows) {
        for (int64_t col = 0; col < layers_[k].d_in(); col += kGradientCols) tasks.push_back({k, row, col});
      }
      if (pass.grads.beta[k]) tasks.push_back({k, -1, 0});
    }
    workers.run(int64_t(tasks.size()), plan_.multiply_adds(), [&](int64_t begin, int64_t end) {
      const Workers alone = workers.alone();
      for (int64_t i = begin; i < end; ++i) {
        const auto [k, row, col] = tasks[size_t(i)];
        if (row < 0) {
          bias_gradient<T>(all.df[k], pass.sums.beta(0, k), alone);
          continue;
        }
        const int64_t d_in = layers_[k].d_in();
        gradient_block<T>(columns_of(all.df[k], row, kGradientRows), columns_of(all.h(*this, k), col, kGradientCols),
                          pass.sums.omega(0, k) + row * d_in + col, d_in, /*accumulate=*/false, pass.plan.unit_rows,
                          alone.workspace());
      }
    });
  }

  // Packs the weights of layers [first, last) once, for all the blocks that will multiply by them.
  // field: &Layer::packed_transposed (forward) or &Layer::packed (input gradient). Returns the memory.
  Buffer<A> pack(const A* Layer<T>::* field, size_t first, size_t last, const Workers& workers) {
    const bool transposed = field == &Layer<T>::packed_transposed;
    const auto& kernel = kernels<T>();
    std::vector<std::pair<size_t, int64_t>> packed;  // a layer, and where its packed weight begins
    int64_t size = 0;
    for (size_t k = first; plan_.packs && k < last; ++k) {
      const int64_t elements = plan_.packed_size(int64_t(k), transposed);
      if (elements) packed.push_back({k, size});
      size += elements;
    }
    Buffer<A> memory(size);
    workers.run(int64_t(packed.size()), double(kFetchRows) * double(size), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        auto& layer = layers_[packed[size_t(i)].first];
        const auto& omega = layer.omega;
        A* out = memory.data + packed[size_t(i)].second;
        if (transposed) {
          kernel.pack(omega.data, omega.col_stride, omega.row_stride, omega.cols, omega.rows, out);
        } else {
          kernel.pack(omega.data, omega.row_stride, omega.col_stride, omega.rows, omega.cols, out);
        }
        layer.*field = out;
      }
    });
    return memory;
  }

  std::vector<Layer<T>> layers_;
  bool final_relu_;
  Plan<T> plan_;
};

}  // namespace manualbp
