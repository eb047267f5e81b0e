// The backward pass of a network on the CPU, over the blocks of rows that a Plan (plan.h) cuts the batch into:
//
//   k = K-1 ... 0:   d(beta_k) = sum of df_k,   d(Omega_k) = df_k^T h_k,   df_{k-1} = c I[h_k > 0] . (df_k Omega_k)
//
// A tall batch goes block by block, each slice on one thread; a wide one block by block, layer by layer, on all threads.
// Rows that go in waves (all of a short batch, or parts of the slices of a tall one) go through two parallel regions: all
// df_k are computed in the first, the gradients of the parameters in the second.
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

// Where the backward pass writes a gradient: in the storage type or, under autocast, in the accumulator type, in which it
// is summed. Neither: this gradient is not needed.
template <typename T>
struct Result {
  using A = accumulator_t<T>;
  Result(T* data = nullptr) : data(data) {}
  static Result in_accumulator(A* wide) {
    Result result;
    result.wide = wide;
    return result;
  }
  explicit operator bool() const { return data || wide; }
  T* data;
  A* wide = nullptr;
};

// The results of a backward pass.
template <typename T>
struct Gradients {
  Result<T> input;  // (B, D_0)
  std::vector<Result<T>> omega;  // (D_{k+1}, D_k) each
  std::vector<Result<T>> beta;  // (D_{k+1}) each
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
    if (!grads_.omega[k]) return nullptr;
    if (pass_.in_place) return reinterpret_cast<A*>(grads_.omega[k].data);
    return omegas_->data + slice * pass_.weight_sums + plan_.layers[k].weight_sums;
  }

  // Adds the sum of a chunk to its slice's total; after the last chunk, puts the total in the place of the sum. Does
  // nothing for a slice of one chunk. row: the slice's row of `totals`.
  void add_chunk(int64_t slice, bool first, bool last, int64_t row, const Workers& workers) const {
    for (size_t k = 0; k < plan_.layers.size() && !(first && last); ++k) {
      if (!omega(slice, k)) continue;
      run_shares(size_of(k), 1, workers,
                 [&](int64_t begin, int64_t end) { add_chunk_of_layer(slice, k, first, last, row, begin, end); });
    }
  }

  // The same for the elements [begin, end) of one layer.
  void add_chunk_of_layer(int64_t slice, size_t k, bool first, bool last, int64_t row, int64_t begin,
                          int64_t end) const {
    if (first && last) return;
    AddUp<A> chunk{};
    chunk.sum = omega(slice, k);
    chunk.total = totals_->data + row * pass_.weight_sums + plan_.layers[k].weight_sums;
    chunk.first = first;
    chunk.last = last;
    kernels<A>().add_up(chunk, begin, end);
  }

  // Adds up the slices in order and rounds to the type of the result.
  void finish(const Workers& workers) const {
    // The layers are one long row of sums, because each alone would be too little for several threads.
    run_shares(pass_.in_place ? 0 : pass_.weight_sums, double(kFetchRows * pass_.slices), workers,
               [&](int64_t begin, int64_t end) {
                 for (size_t k = 0; k < plan_.layers.size(); ++k) {
                   const int64_t start = plan_.layers[k].weight_sums;
                   const int64_t first = std::max(begin - start, int64_t(0)), last = std::min(end - start, size_of(k));
                   const Result<T> out = grads_.omega[k];
                   if (!out || first >= last) continue;
                   if (out.wide) {
                     kernels<A>().reduce({pass_.slices, pass_.weight_sums, omega(0, k), out.wide}, first, last);
                   } else {
                     kernels<T>().reduce({pass_.slices, pass_.weight_sums, omega(0, k), out.data}, first, last);
                   }
                 }
               });
    for (size_t k = 0; k < plan_.layers.size(); ++k) {
      const Result<T> out = grads_.beta[k];
      if (out.wide) {
        reduce<A>(beta(0, k), pass_.slices, pass_.bias_sums, plan_.layers[k].d_out, out.wide, workers);
      } else if (out.data) {
        reduce<T>(beta(0, k), pass_.slices, pass_.bias_sums, plan_.layers[k].d_out, out.data, workers);
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
    T* df = nullptr;  // where df_0 ... df_{K-2} are stored
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
        memory_(plan_.elements) {}
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
    if (plan_.wave_rows) {
      for (int64_t offset = 0; offset < plan_.slice_rows; offset += plan_.wave_rows) {
        const Wave wave{*this, offset, input, hidden};
        tops_.assign(size_t(plan_.slices), {});
        backward_of_rows(wave, top);
        gradients_of_layers(wave);
      }
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
      net.plan.layers[k].weight_gradient = bool(grads.omega[k]);
      net.plan.layers[k].bias_gradient = bool(grads.beta[k]);
    }
    BackwardPlan pass = net.plan.backward(int64_t(recomputed), bool(grads.input));
    net.plan.divide_into_waves(pass);
    return pass;
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
      const WeightGradient<T> weight{df, h, sums_.omega(slice, k), accumulate, plan_.unit_rows};
      const bool together = weight.domega && !workers.is_alone() && k > size_t(plan_.lowest);
      if (weight.domega && !together) weight_gradient<T>(weight, workers);
      if (k > size_t(plan_.lowest)) {
        T* const other = df.data == buffers[0] ? buffers[1] : buffers[0];
        T* const below = second_.df ? Activations{second_.df, net_.plan.batch, first}.at(net_, k) : other;
        hidden_gradient<T>(df, layer, h.data, net_.layers[k - 1].scale, below, sums_.beta(slice, k - 1), workers,
                           further(k, first), together ? &weight : nullptr);
        df = Matrix<const T>::contiguous(below, count, layer.d_in());
      } else if (grads_.input) {
        gradient_of_input(df, first, workers);
      }
    }
  }

  // Rows that go through two parallel regions, the rows [offset, offset + rows) of each slice: region 1 writes what
  // region 2 reads. That lies in the memory of the pass, slice by slice, unless the caller stores it.
  struct Wave {
    const BackwardPass& pass;
    int64_t offset;
    Matrix<const T> input;
    const T* hidden;

    int64_t slices() const { return pass.plan_.slices; }
    int64_t batch() const { return pass.net_.plan.batch; }
    int64_t capacity() const { return slices() * pass.plan_.wave_rows; }
    // The row of the batch with which a slice begins in this wave, and how many follow: 0 if the last slice is short.
    int64_t first(int64_t slice) const { return slice * pass.plan_.slice_rows + offset; }
    int64_t rows(int64_t slice) const {
      const int64_t end = std::min((slice + 1) * pass.plan_.slice_rows, batch());
      return std::clamp(end - first(slice), int64_t(0), pass.plan_.wave_rows);
    }
    // Where df_k and h_k of the rows of a slice lie, from `row` of the wave on.
    T* df(size_t k, int64_t slice, int64_t row) const {
      const auto& net = pass.net_;
      if (pass.second_.df && k + 1 < net.layers.size()) {
        return Activations{pass.second_.df, batch(), first(slice) + row}.at(net, k + 1);
      }
      const int64_t at = slice * pass.plan_.wave_rows + row;
      return pass.memory_.data + capacity() * net.plan.layers[k].start + at * net.layers[k].d_out();
    }
    T* h(size_t k, int64_t slice, int64_t row) const {
      const auto& net = pass.net_;
      if (!pass.plan_.recomputed) {
        return Activations{const_cast<T*>(hidden), batch(), first(slice) + row}.at(net, k);
      }
      T* const memory = pass.memory_.data + capacity() * (net.plan.hidden + net.plan.top);
      return Activations{memory, capacity(), slice * pass.plan_.wave_rows + row}.at(net, k);
    }
    // The same as matrices of the rows [row, row + count).
    Matrix<const T> df_matrix(size_t k, int64_t slice, int64_t row, int64_t count) const {
      if (k + 1 == pass.net_.layers.size() && pass.tops_[size_t(slice)].data) {
        return rows_of(pass.tops_[size_t(slice)], row, count);
      }
      return Matrix<const T>::contiguous(df(k, slice, row), count, pass.net_.layers[k].d_out());
    }
    Matrix<const T> h_matrix(size_t k, int64_t slice, int64_t row, int64_t count) const {
      if (k == 0) return rows_of(input, first(slice) + row, count);
      return Matrix<const T>::contiguous(h(k, slice, row), count, pass.net_.layers[k].d_in());
    }
  };

  // Parallel region 1: each thread takes its rows forward, if the pass computes the activations, and back to df_0.
  template <typename TopOf>
  void backward_of_rows(const Wave& wave, const TopOf& top) {
    const int64_t rows = wave.rows(0), all = rows * (plan_.slices - 1) + wave.rows(plan_.slices - 1);
    const int64_t share = net_.plan.thread_rows(all);
    workers_.run(ceil_div(all, share), 2 * net_.plan.multiply_adds(all), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin * share, stop = std::min(end * share, all), count; row < stop; row += count) {
        const int64_t slice = row / rows;
        count = std::min(stop - row, wave.rows(slice) - row % rows);
        backward_of_rows(wave, slice, row % rows, count, top);
      }
    });
  }
  template <typename TopOf>
  void backward_of_rows(const Wave& wave, int64_t slice, int64_t row, int64_t count, const TopOf& top) {
    const size_t layers = net_.layers.size(), lowest = size_t(plan_.lowest);
    const Workers alone = workers_.alone();
    const int64_t first = wave.first(slice) + row;
    const auto place = [&](size_t k) { return k + 1 == layers ? wave.df(k, slice, row) : wave.h(k + 1, slice, row); };
    net_.forward_block(rows_of(wave.input, first, count), first, size_t(plan_.recomputed), place, alone);
    auto [gradient, output] = top(first, count, wave.df(layers - 1, slice, row));
    if (output) {
      T* const df = wave.df(layers - 1, slice, row);
      relu_backward<T>(gradient, output, df, nullptr, alone, net_.layers.back().scale);
      gradient = Matrix<const T>::contiguous(df, count, net_.plan.top);
    } else if (row == 0) {
      tops_[size_t(slice)] = rows_of(gradient, 0, wave.rows(slice));
    }
    for (size_t k = layers - 1; k > lowest; --k) {
      T* const below = wave.df(k - 1, slice, row);
      hidden_gradient<T>(gradient, net_.layers[k], wave.h(k, slice, row), net_.layers[k - 1].scale, below, nullptr,
                         alone, further(k, first));
      gradient = Matrix<const T>::contiguous(below, count, net_.layers[k].d_in());
    }
    if (grads_.input) gradient_of_input(gradient, first, alone);
  }

  // dh_0 from df_0 of a block of rows, from row `first` on.
  void gradient_of_input(Matrix<const T> df, int64_t first, const Workers& workers) const {
    const auto& layer = net_.layers[0];
    if (grads_.input.wide) {
      input_gradient<T>(df, layer, grads_.input.wide + first * layer.d_in(), workers);
    } else {
      input_gradient<T>(df, layer, grads_.input.data + first * layer.d_in(), workers);
    }
  }

  const T* further(size_t k, int64_t first) const {
    if (!second_.further) return nullptr;
    return Activations{const_cast<T*>(second_.further), net_.plan.batch, first}.at(net_, k);
  }

  // Parallel region 2: the gradients of all slices and layers form one sequence, of which each thread computes an equal
  // part. It is measured in numbers of d(Omega_k); a number of d(beta_k), for a pass over memory, takes as long as 16.
  void gradients_of_layers(const Wave& wave) const {
    constexpr int64_t kBias = 16;
    const double work = net_.plan.multiply_adds(plan_.slices * wave.rows(0));
    const int64_t parts = parts_of(work, workers_), slice_length = plan_.weight_sums + kBias * plan_.bias_sums;
    workers_.run(parts, work, [&](int64_t begin, int64_t end) {
      const Workers alone = workers_.alone();
      const auto bound = [&](int64_t part) {
        return int64_t(double(plan_.slices) * double(slice_length) * double(part) / double(parts));
      };
      int64_t from = bound(begin), to = bound(end);  // seen from the next gradient on
      for (int64_t slice = 0; slice < plan_.slices && to > 0; ++slice) {
        for (size_t k = size_t(plan_.lowest); k < net_.layers.size(); ++k) {
          if (sums_.beta(slice, k)) {
            const int64_t length = kBias * net_.layers[k].d_out(), middle = length / 2;
            if (from <= middle && middle < to) bias_gradient_of(wave, slice, k, alone);
            from -= length, to -= length;
          }
          if (sums_.omega(slice, k)) {
            weight_gradient_of(wave, slice, k, from, to, alone);
            const int64_t length = net_.layers[k].d_out() * net_.layers[k].d_in();
            from -= length, to -= length;
          }
        }
      }
    });
  }

  // Calls f(row, count, begins, ends) for the chunks of a slice, as far as they lie in the wave; whether one begins or
  // ends there.
  template <typename F>
  void for_each_chunk(const Wave& wave, int64_t slice, const F& f) const {
    for (int64_t row = 0, rows = wave.rows(slice), count; row < rows; row += count) {
      const int64_t start = (wave.offset + row) % plan_.chunk_rows;
      count = std::min(plan_.chunk_rows - start, rows - row);
      const int64_t end = wave.offset + row + count;
      f(row, count, start == 0, end % plan_.chunk_rows == 0 || end == slice_rows(slice));
    }
  }

  // The numbers [from, to) of d(Omega_k) of a slice, rounded to whole units, so that few threads take whole layers and
  // many take pieces that are about square: the shorter side is cut into bands of about kBand, each of these into strips,
  // a register tile wide, and these units are numbered band by band.
  void weight_gradient_of(const Wave& wave, int64_t slice, size_t k, int64_t from, int64_t to,
                          const Workers& alone) const {
    constexpr int64_t kBand = 128;
    const int64_t d_out = net_.layers[k].d_out(), d_in = net_.layers[k].d_in();
    if (from >= d_out * d_in || to <= 0) return;
    const bool by_rows = d_out >= d_in;
    const int64_t longer = by_rows ? d_out : d_in, shorter = by_rows ? d_in : d_out;
    // No piece may be one number: see grid_of.
    const int64_t tile = by_rows ? kernel_table().tile_rows : kernel_table().tile_cols;
    const int64_t width = shorter == 1 && longer % tile == 1 ? longer : tile;
    const int64_t bands = std::max<int64_t>(shorter / kBand, 1), strips = ceil_div(longer, width);
    const auto unit_at = [&](int64_t number) {
      return std::clamp<int64_t>(int64_t(double(number) / double(d_out * d_in) * double(bands * strips) + 0.5), 0,
                                 bands * strips);
    };
    const int64_t last = unit_at(to);
    for (int64_t unit = unit_at(from), next; unit < last; unit = next) {
      const int64_t band = unit / strips, strip = unit % strips;
      // Whole bands, or strips of one.
      const int64_t last_band = strip == 0 ? std::max(last / strips, band + 1) : band + 1;
      next = std::min(last_band * strips, last);
      const int64_t last_strip = next - (last_band - 1) * strips;
      const int64_t first_long = strip * width, last_long = std::min(last_strip * width, longer);
      const int64_t first_short = band * kBand, last_short = last_band == bands ? shorter : last_band * kBand;
      compute_piece(wave, slice, k,
                    by_rows ? Piece{first_long, last_long, first_short, last_short}
                            : Piece{first_short, last_short, first_long, last_long},
                    alone);
    }
  }
  void compute_piece(const Wave& wave, int64_t slice, size_t k, const Piece& piece, const Workers& alone) const {
    const int64_t d_in = net_.layers[k].d_in();
    for_each_chunk(wave, slice, [&](int64_t row, int64_t count, bool begins, bool ends) {
      const WeightGradient<T> gradient{wave.df_matrix(k, slice, row, count), wave.h_matrix(k, slice, row, count),
                                       sums_.omega(slice, k), /*accumulate=*/!begins, plan_.unit_rows};
      gradient.compute(piece, alone.workspace());
      if (!ends) return;
      const int64_t chunk = (wave.offset + row) / plan_.chunk_rows;
      const bool is_last = wave.offset + row + count >= slice_rows(slice);
      if (piece.first_col == 0 && piece.last_col == d_in) {
        return sums_.add_chunk_of_layer(slice, k, chunk == 0, is_last, slice, piece.first_row * d_in,
                                        piece.last_row * d_in);
      }
      for (int64_t i = piece.first_row; i < piece.last_row; ++i) {
        sums_.add_chunk_of_layer(slice, k, chunk == 0, is_last, slice, i * d_in + piece.first_col,
                                 i * d_in + piece.last_col);
      }
    });
  }

  // d(beta_k) of a slice. In a tall batch, the order of sums is that of hidden_gradient on one thread.
  void bias_gradient_of(const Wave& wave, int64_t slice, size_t k, const Workers& alone) const {
    const bool by_tiles = net_.plan.way == Way::kTall && k + 1 < net_.layers.size() &&
                          is_masked_in_tile<T>(net_.layers[k].d_out(), net_.layers[k].scale);
    for_each_chunk(wave, slice, [&](int64_t row, int64_t count, bool, bool) {
      const auto df = wave.df_matrix(k, slice, row, count);
      if (!by_tiles) return bias_gradient<T>(df, sums_.beta(slice, k), alone);
      ReluBackward<T> p{};
      p.rows = count;
      p.cols = df.cols;
      p.grad = df.data;
      p.grad_row = df.row_stride;
      p.grad_col = df.col_stride;
      p.column_sum = sums_.beta(slice, k);
      kernels<T>().sum_by_tiles(p);
    });
  }

  int64_t slice_rows(int64_t slice) const {
    return std::min(plan_.slice_rows, net_.plan.batch - slice * plan_.slice_rows);
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
  // In waves, df_{K-1} of each slice if no ReLU ends the network: a view of the gradient of the output, not a copy.
  std::vector<Matrix<const T>> tops_;
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
        if (group.wide_target) group.wide_target += row * group.target_row;
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
