// The backward pass of a network on the CPU, over the blocks of rows that a Plan (plan.h) cuts the batch into:
//
//   k = K-1 ... 0:   d(beta_k) = sum of df_k,   d(Omega_k) = df_k^T h_k,   df_{k-1} = c I[h_k > 0] . (df_k Omega_k)
//
// c: 1, or the scale of the dropout that made h_k = m . a[f_{k-1}], m in {0, c}, c > 0. Its mask is not needed: the
// derivative of h_k is m I[f_{k-1} > 0], which is c where h_k > 0, and 0 elsewhere.
//
// It starts from the gradient of the output (`backward`), or from the loss that it computes itself (LossPass). Layer k
// maps D_k to D_{k+1} features; B is the number of rows of the input.
#pragma once

#include <atomic>
#include <optional>
#include <vector>

#include "network.h"

namespace manualbp {

// Where the backward pass writes its results; nullptr: this gradient is not needed.
template <typename T>
struct Gradients {
  T* input = nullptr;     // (B, D_0)
  std::vector<T*> omega;  // (D_{k+1}, D_k) each
  std::vector<T*> beta;   // (D_{k+1}) each
};

// Where each slice of the batch sums its gradients. d(beta): a row of a buffer, in double. d(Omega): a row of a
// buffer, or the gradient itself if the pass sums in place. If a slice has several chunks, that row holds the sum of
// one chunk, and a row of `totals`, in double, the sum of those before it.
template <typename T>
class Sums {
  using A = accumulator_t<T>;

 public:
  Sums(const Plan<T>& plan, const BackwardPlan& pass, const Gradients<T>& grads)
      : plan_(plan), pass_(pass), grads_(grads), betas_(pass.slices * pass.bias_sums) {
    if (!pass.in_place) omegas_.emplace(pass.slices * pass.weight_sums);
    if (pass.totals) totals_.emplace(pass.totals * pass.weight_sums);
  }
  void clear() const { std::fill_n(betas_.data, pass_.slices * pass_.bias_sums, 0.0); }
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

// The blocks of a slice, chunk by chunk: block(first, count, slice, accumulate, memory, workers) computes the rows
// [first, first + count). accumulate: whether it adds to the sums of the slice, or begins them. row: of the totals of
// Sums.
template <typename T, typename Block>
void for_each_block_of(int64_t slice, int64_t row, const Plan<T>& plan, const BackwardPlan& pass, const Sums<T>& sums,
                       T* memory, const Workers& workers, const Block& block) {
  const int64_t start = slice * pass.slice_rows, stop = std::min(start + pass.slice_rows, plan.batch);
  int64_t chunk = start;
  do {  // once even for an empty batch: its gradients are zero
    const int64_t end = std::min(chunk + pass.chunk_rows, stop);
    int64_t first = chunk;
    do {
      const int64_t count = std::min(pass.rows, end - first);
      block(first, count, slice, /*accumulate=*/first > chunk, memory, workers);
      first += pass.rows;
    } while (first < end);
    sums.add_chunk(slice, chunk == start, end == stop, row, workers);
    chunk = end;
  } while (chunk < stop);
}

// The blocks of all slices. A slice is computed by one thread, in its part of the memory, if there are several, else
// each of its blocks by all threads.
template <typename T, typename Block>
void for_each_block(const Plan<T>& plan, const BackwardPlan& pass, const Sums<T>& sums, T* memory,
                    const Workers& workers, const Block& block) {
  if (plan.way != Way::kTall) return for_each_block_of(0, 0, plan, pass, sums, memory, workers, block);
  std::atomic<int64_t> in_progress{0};
  workers.run(pass.slices, 3 * plan.multiply_adds(), [&](int64_t begin, int64_t end) {
    const int64_t row = in_progress++;
    T* const part = memory + pass.part * workers.index();
    for (int64_t s = begin; s < end; ++s) for_each_block_of(s, row, plan, pass, sums, part, workers.alone(), block);
  });
}

// A backward pass and its memory. It can run any number of times, on one batch after another.
template <typename T>
class BackwardPass {
  using A = accumulator_t<T>;
  using Activations = typename Network<T>::Activations;
  using Packed = typename Network<T>::Packed;

 public:
  // Where the pass of a block starts: the gradient of the output, and the output if a ReLU ended the network.
  struct Top {
    Matrix<const T> gradient;
    const T* output;
  };

  // What a gradient of a gradient reads and adds, each one layer after another as activations are, or nullptr.
  struct Second {
    T* df = nullptr;             // where df_0 ... df_{K-2} are stored
    const T* further = nullptr;  // added to the gradients of h_1 ... h_{K-1}; not in half precision
  };

  // recomputed: the number of layers whose activations the pass computes itself. `net` and `grads` must outlive the pass.
  BackwardPass(Network<T>& net, size_t recomputed, const Gradients<T>& grads, Second second = {})
      : net_(net),
        grads_(grads),
        second_(second),
        plan_(plan(net, recomputed, grads)),
        workspaces_(net.plan.threads * plan_.workspace),
        workers_(workspaces_.data, plan_.workspace, net.plan.threads),
        packed_(net, &Layer<T>::packed, size_t(plan_.first_packed), net.layers.size()),
        packed_transposed_(net, &Layer<T>::packed_transposed, 0, size_t(plan_.recomputed)),
        sums_(net.plan, plan_, grads),
        memory_(plan_.elements) {
    if (net.plan.way == Way::kShort) place_all_rows();
  }
  BackwardPass(const BackwardPass&) = delete;

  bool has_results() const { return plan_.lowest < net_.plan.count(); }
  const Workers& workers() const { return workers_; }
  int64_t bytes() const { return net_.plan.bytes(plan_); }  // of its memory

  // hidden: the stored activations, unless the pass computes them itself. top(first, count, f): where a block of rows
  // starts; f: its output, if the pass computes that too.
  template <typename TopOf>
  void run(Matrix<const T> input, const T* hidden, const TopOf& top) {
    packed_.pack(workers_);
    packed_transposed_.pack(workers_);
    sums_.clear();
    if (net_.plan.way == Way::kShort) {
      all_.input = input;
      if (!plan_.recomputed) all_.hidden = const_cast<T*>(hidden);
      backward_of_rows(top);
      gradients_of_layers();
    } else {
      for_each_block(
          net_.plan, plan_, sums_, memory_.data, workers_,
          [&](int64_t first, int64_t count, int64_t slice, bool accumulate, T* memory, const Workers& workers) {
            backward_of_block(input, hidden, top, first, count, slice, accumulate, memory, workers);
          });
    }
    sums_.finish(workers_);
  }

 private:
  static BackwardPlan plan(Network<T>& net, size_t recomputed, const Gradients<T>& grads) {
    for (size_t k = 0; k < net.layers.size(); ++k) {
      net.plan.layers[k].weight_gradient = grads.omega[k];
      net.plan.layers[k].bias_gradient = grads.beta[k];
    }
    return net.plan.backward(int64_t(recomputed), grads.input);
  }

  // Rows [first, first + count) through all layers. memory: two buffers that alternate between df_k and df_{k-1}, then
  // the activations, if the pass computes them.
  template <typename TopOf>
  void backward_of_block(Matrix<const T> input, const T* hidden, const TopOf& top, int64_t first, int64_t count,
                         int64_t slice, bool accumulate, T* memory, const Workers& workers) const {
    T* const buffers[] = {memory, memory + plan_.buffer};
    const auto h0 = rows_of(input, first, count);
    const auto activations = plan_.recomputed ? Activations{memory + 2 * plan_.buffer, plan_.rows, 0}
                                              : Activations{const_cast<T*>(hidden), net_.plan.batch, first};
    const auto place = [&](size_t k) { return k + 1 == net_.layers.size() ? buffers[0] : activations.at(net_, k + 1); };
    net_.forward_block(h0, first, size_t(plan_.recomputed), place, workers);
    // df_{K-1} and d(beta_{K-1}); if the network ends with a ReLU, its mask in the same pass.
    const auto [gradient, output] = top(first, count, buffers[0]);
    auto df = output ? Matrix<const T>::contiguous(buffers[0], count, net_.plan.top) : gradient;
    if (double* dbeta = sums_.beta(slice, net_.layers.size() - 1); output) {
      relu_backward<T>(gradient, output, buffers[0], dbeta, workers, net_.layers.back().scale);
    } else if (dbeta) {
      bias_gradient<T>(gradient, dbeta, workers);
    }
    for (size_t k = net_.layers.size(); k-- > size_t(plan_.lowest);) {
      const auto& layer = net_.layers[k];
      const auto h = k == 0 ? h0 : Matrix<const T>::contiguous(activations.at(net_, k), count, layer.d_in());
      if (A* domega = sums_.omega(slice, k)) {
        weight_gradient<T>(df, h, domega, accumulate, plan_.unit_rows, workers);
      }
      if (k > size_t(plan_.lowest)) {
        T* const other = df.data == buffers[0] ? buffers[1] : buffers[0];
        T* const below = second_.df ? Activations{second_.df, net_.plan.batch, first}.at(net_, k) : other;
        hidden_gradient<T>(df, layer, h.data, net_.layers[k - 1].scale, below, sums_.beta(slice, k - 1), workers,
                           further(k, first));
        df = Matrix<const T>::contiguous(below, count, layer.d_in());
      } else if (grads_.input) {
        input_gradient<T>(df, layer, grads_.input + first * layer.d_in(), workers);
      }
    }
  }

  // Short, parallel region 1: each thread takes its rows forward, if the pass computes the activations, and back to
  // df_0. Without a final ReLU, df_{K-1} is the gradient of the output itself, so it is not copied: the thread that
  // owns row 0 stores a view of the whole matrix, which replaces df_{K-1} after the barrier.
  template <typename TopOf>
  void backward_of_rows(const TopOf& top) {
    const size_t layers = net_.layers.size(), lowest = size_t(plan_.lowest);
    const int64_t batch = net_.plan.batch, rows = net_.plan.thread_rows();
    Matrix<const T> whole{};
    workers_.run(ceil_div(batch, rows), 2 * net_.plan.multiply_adds(), [&](int64_t begin, int64_t end) {
      const Workers alone = workers_.alone();
      const int64_t first = begin * rows, count = std::min(end * rows, batch) - first;
      const auto df_rows = [&](size_t k) { return const_cast<T*>(all_.df[k].data) + first * net_.layers[k].d_out(); };
      const Activations activations{all_.hidden, batch, first};
      const auto place = [&](size_t k) { return k + 1 == layers ? df_rows(k) : activations.at(net_, k + 1); };
      net_.forward_block(rows_of(all_.input, first, count), first, size_t(plan_.recomputed), place, alone);
      auto [gradient, output] = top(first, count, df_rows(layers - 1));
      if (output) {
        T* const df = df_rows(layers - 1);
        relu_backward<T>(gradient, output, df, nullptr, alone, net_.layers.back().scale);
        gradient = Matrix<const T>::contiguous(df, count, net_.plan.top);
      } else if (first == 0) {
        whole = rows_of(gradient, 0, batch);
      }
      for (size_t k = layers - 1; k > lowest; --k) {
        hidden_gradient<T>(gradient, net_.layers[k], activations.at(net_, k), net_.layers[k - 1].scale, df_rows(k - 1),
                           nullptr, alone, further(k, first));
        gradient = Matrix<const T>::contiguous(df_rows(k - 1), count, net_.layers[k].d_in());
      }
      if (T* const out = grads_.input) {
        input_gradient<T>(gradient, net_.layers[0], out + first * net_.layers[0].d_in(), alone);
      }
    });
    if (whole.data) all_.df[layers - 1] = whole;
  }

  const T* further(size_t k, int64_t first) const {
    if (!second_.further) return nullptr;
    return Activations{const_cast<T*>(second_.further), net_.plan.batch, first}.at(net_, k);
  }

  // Short, parallel region 2: each thread computes its part of every d(Omega_k), and some of the d(beta_k).
  void gradients_of_layers() const {
    const int64_t parts = parts_of(net_.plan.multiply_adds(), workers_);
    workers_.run(parts, net_.plan.multiply_adds(), [&](int64_t begin, int64_t end) {
      const Workers alone = workers_.alone();
      for (int64_t part = begin; part < end; ++part) {
        for (size_t k = size_t(plan_.lowest); k < net_.layers.size(); ++k) {
          if (A* domega = sums_.omega(0, k)) {
            weight_gradient_part<T>(all_.df[k], h_of(k), domega, /*accumulate=*/false, plan_.unit_rows, part, parts,
                                    alone.workspace());
          }
          double* const dbeta = sums_.beta(0, k);
          if (dbeta && int64_t(k) % parts == part) bias_gradient<T>(all_.df[k], dbeta, alone);
        }
      }
    });
  }

  // Short: df_0 ... df_{K-1} and the input of each layer, of all rows: parallel region 1 writes what parallel region 2
  // reads. They lie in the memory of the pass; so do the activations, if the pass computes them.
  struct AllRows {
    Matrix<const T> input;
    T* hidden;  // h_1 ... h_{K-1}
    std::vector<Matrix<const T>> df;
  };
  void place_all_rows() {
    const int64_t batch = net_.plan.batch;
    for (size_t k = 0; k < net_.layers.size(); ++k) {
      T* const df =
          (second_.df && k + 1 < net_.layers.size() ? second_.df : memory_.data) + batch * net_.plan.layers[k].start;
      all_.df.push_back(Matrix<const T>::contiguous(df, batch, net_.layers[k].d_out()));
    }
    if (plan_.recomputed) all_.hidden = memory_.data + batch * (net_.plan.hidden + net_.plan.top);
  }
  Matrix<const T> h_of(size_t k) const {
    if (k == 0) return all_.input;
    return Matrix<const T>::contiguous(Activations{all_.hidden, net_.plan.batch, 0}.at(net_, k), net_.plan.batch,
                                       net_.layers[k].d_in());
  }

  Network<T>& net_;
  const Gradients<T>& grads_;
  Second second_;
  BackwardPlan plan_;
  Buffer<char> workspaces_;
  Workers workers_;
  Packed packed_, packed_transposed_;
  Sums<T> sums_;
  Buffer<T> memory_;
  AllRows all_{};
};

// The backward pass from the gradient of the output. hidden: h_1 ... h_{K-1} as forward stored them, or nullptr: they
// are computed again. output: what forward returned if a ReLU ended it, else nullptr.
template <typename T>
void backward(Network<T>& net, Matrix<const T> input, const T* hidden, bool recompute, Matrix<const T> grad_output,
              const T* output, const Gradients<T>& grads, typename BackwardPass<T>::Second second = {}) {
  BackwardPass<T> pass(net, recompute ? net.layers.size() - 1 : 0, grads, second);
  if (!pass.has_results()) return;
  pass.run(input, hidden, [&](int64_t first, int64_t count, T*) -> typename BackwardPass<T>::Top {
    return {rows_of(grad_output, first, count), output ? output + first * net.plan.top : nullptr};
  });
}

// Forward, loss and backward in one pass over blocks of rows.
template <typename T>
class LossPass : public BackwardPass<T> {
 public:
  LossPass(Network<T>& net, LossKernel<T> kernel, const Gradients<T>& grads)
      : BackwardPass<T>(net, net.layers.size(), grads),
        top_(net.plan.top),
        kernel_(kernel),
        sums_(size_t(ceil_div(net.plan.batch, kLossRows))) {}

  // Returns the loss summed over all rows. loss: describes the whole batch; its rows and f are filled in here, group by
  // group.
  double run(Matrix<const T> input, const Loss<T>& loss) {
    BackwardPass<T>::run(input, nullptr, [&](int64_t first, int64_t count, T* f) -> typename BackwardPass<T>::Top {
      for (int64_t row = first; row < first + count; row += kLossRows) {
        Loss<T> group = loss;
        group.rows = std::min(kLossRows, first + count - row);
        group.f = f + (row - first) * top_;
        if (group.target) group.target += row * group.target_row;
        if (group.classes) group.classes += row * group.target_row;
        sums_[size_t(row / kLossRows)] = kernel_(group);
      }
      return {Matrix<const T>::contiguous(f, count, top_), nullptr};
    });
    double sum = 0;
    for (const double s : sums_) sum += s;
    return sum;
  }

 private:
  int64_t top_;
  LossKernel<T> kernel_;
  std::vector<double> sums_;
};

}  // namespace manualbp
