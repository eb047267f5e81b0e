// A network on the CPU: the lecture's two passes, over blocks of rows.
//
//   forward    h_0 = input;   f_k = beta_k + Omega_k h_k;   h_{k+1} = a[f_k];   output = f_{K-1} (or a[f_{K-1}])
//   backward   k = K-1 ... 0:   d(beta_k) = sum of df_k,   d(Omega_k) = df_k^T h_k,
//                               df_{k-1} = I[h_k > 0] . (df_k Omega_k)
//
// Layer k maps D_k to D_{k+1} features; B is the number of rows of the input. Three ways to cut the work:
//   tall    many rows: blocks of them go through all layers while they lie in the cache, each block on one thread; the
//           backward pass sums gradients over slices of the batch, added up in order at the end
//   short   few rows, small layers: each thread takes its rows through all layers and back to df_0, then the threads
//           share out the gradients of all layers: two meetings of the threads in all, whatever the depth
//   wide    large layers: all rows go through one layer after the other, each step cut over the threads
// The choice depends on the sizes alone, never on the number of threads: so do the results.
#pragma once

#include <atomic>
#include <optional>
#include <vector>

#include "layer.h"

namespace manualbp {

// What the backward pass writes: the tensors' memory, or nullptr where nobody asked.
template <typename T>
struct Gradients {
  T* input = nullptr;     // (B, D_0)
  std::vector<T*> omega;  // (D_{k+1}, D_k) each
  std::vector<T*> beta;   // (D_{k+1}) each

  // The lowest layer that has something to learn: the backward pass ends there.
  size_t lowest() const {
    if (input) return 0;
    size_t k = 0;
    while (k < omega.size() && !omega[k] && !beta[k]) ++k;
    return k;
  }
};

template <typename T>
class Network {
  using A = accumulator_t<T>;
  static constexpr int64_t kOwnPackRows = 32;
  static constexpr int64_t kLossRows = 16;  // blocks and slices begin at multiples of it
  static constexpr int64_t kMostUnits = 6;               // in a block of a tall batch
  static constexpr int64_t kChunkRows =
      24 * kUnitRows;  // of it; adding their sums to the total takes 0.5 % of the time

 public:
  Network(int64_t batch, std::vector<Layer<T>> layers, bool final_relu)
      : layers_(std::move(layers)), batch_(batch), final_relu_(final_relu), widest_(layers_[0].d_in()) {
    check_countable(batch_, layers_);
    starts_ = {0, 0};
    for (size_t k = 0; k < layers_.size(); ++k) {
      widest_ = std::max(widest_, layers_[k].d_out());
      parameters_ += (layers_[k].d_in() + 1) * layers_[k].d_out();
      if (k + 1 < layers_.size()) {
        widest_hidden_ = std::max(widest_hidden_, layers_[k].d_out());
        starts_.push_back(starts_.back() + layers_[k].d_out());
      }
    }
    slice_rows_ = choose_slice_rows();
  }

  // Elements of h_1 ... h_{K-1}, stored one after another.
  int64_t hidden_size() const { return batch_ * starts_.back(); }

  // output (B, D_K), contiguous. hidden: where h_1 ... h_{K-1} are stored, or nullptr.
  void forward(Matrix<const T> input, T* hidden, T* output) {
    if (batch_ * layers_.back().d_out() == 0 && (!hidden || hidden_size() == 0)) return;
    const Team<T> team(widest_, widest_);
    const auto& workers = team.workers;
    const Buffer<A> packed(pack(&Layer<T>::packed_transposed, 0, layers_.size(), workers));
    const int64_t rows = !is_wide() ? std::min(block_rows(2 * widest_), share_rows(workers.threads()))
                         : hidden   ? batch_
                                    : std::min(batch_, long_rows(2 * widest_hidden_));
    const int64_t turn = hidden ? 0 : rows * widest_hidden_;  // without store, two buffers a thread take turns
    const Buffer<T> memory(2 * turn * (is_wide() ? 1 : workers.threads()));
    const auto block = [&](int64_t first, T* turns, const Workers& who) {
      const auto place = [&](size_t k) -> T* {
        if (k + 1 == layers_.size()) return output + first * layers_[k].d_out();
        return hidden ? Activations{hidden, batch_, first}.at(*this, k + 1) : turns + int64_t(k % 2) * turn;
      };
      forward_block(rows_of(input, first, std::min(rows, batch_ - first)), layers_.size(), place, who);
    };
    if (is_wide()) {
      for (int64_t first = 0; first < batch_; first += rows) block(first, memory.data, workers);
      return;
    }
    workers.run(ceil_div(batch_, rows), multiply_adds(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) block(i * rows, memory.data + 2 * turn * workers.index(), workers.alone());
    });
  }

  // From the gradient of the output. hidden: h_1 ... h_{K-1} as forward stored them; recompute: they are computed
  // again, block by block. output: what forward returned if a ReLU ended it, else nullptr.
  void backward(Matrix<const T> input, const T* hidden, bool recompute, Matrix<const T> grad_output, const T* output,
                const Gradients<T>& grads) {
    if (grads.lowest() == layers_.size()) return;
    run_backward(
        input, hidden, recompute ? layers_.size() - 1 : 0, grads, [&](int64_t first, int64_t count, T*) -> Top {
          return {rows_of(grad_output, first, count), output ? output + first * layers_.back().d_out() : nullptr};
        });
  }

  // Forward, loss and backward in one pass over blocks of rows; returns the loss summed over all rows.
  // loss: describes the whole batch; its rows and f are filled in here, block by block.
  double loss_backward(Matrix<const T> input, double (*kernel)(const Loss<T>&), const Loss<T>& loss,
                       const Gradients<T>& grads) {
    std::vector<double> sums(size_t(ceil_div(batch_, kLossRows)), 0.0);  // of units of rows, whatever the blocks are
    run_backward(input, nullptr, layers_.size(), grads, [&](int64_t first, int64_t count, T* f) -> Top {
      for (int64_t row = first; row < first + count; row += kLossRows) {
        Loss<T> unit = loss;
        unit.rows = std::min(kLossRows, first + count - row);
        unit.f = f + (row - first) * layers_.back().d_out();
        if (unit.target) unit.target += row * unit.target_row;
        if (unit.classes) unit.classes += row * unit.target_row;
        sums[size_t(row / kLossRows)] = kernel(unit);
      }
      return {Matrix<const T>::contiguous(f, count, layers_.back().d_out()), nullptr};
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
      return data + capacity * net.starts_[k] + first * net.layers_[k].d_in();
    }
  };

  // Where the backward pass of a block starts: the gradient of the output, and the output if a ReLU ended the network.
  struct Top {
    Matrix<const T> gradient;
    const T* output;
  };

  // Where each slice of the batch sums its gradients. d(beta): a row of a buffer, in double. d(Omega): the gradient itself
  // if there is one slice and its sums need no rounding, else a row of a buffer; if a slice is several chunks of rows,
  // there lies the sum of a chunk, and the total of those before it in double.
  class Sums {
   public:
    // running: slices that are summed at the same time.
    Sums(const std::vector<Layer<T>>& layers, const Gradients<T>& grads, int64_t slices, int64_t running, bool chunks)
        : layers_(layers), grads_(grads), slices_(slices), direct_(slices == 1 && sizeof(T) == sizeof(A)) {
      for (size_t k = 0; k < layers.size(); ++k) {
        beta_at_.push_back(betas_size_);
        if (grads.beta[k]) betas_size_ += layers[k].d_out();
        omega_at_.push_back(omegas_size_);
        if (grads.omega[k]) omegas_size_ += layers[k].d_out() * layers[k].d_in();
      }
      betas_.emplace(slices * betas_size_);
      std::fill_n(betas_->data, slices * betas_size_, 0.0);
      if (!direct_) omegas_.emplace(slices * omegas_size_);
      if (chunks) totals_.emplace(running * omegas_size_);
    }
    double* beta(int64_t slice, size_t k) const {
      return grads_.beta[k] ? betas_->data + slice * betas_size_ + beta_at_[k] : nullptr;
    }
    A* omega(int64_t slice, size_t k) const {
      T* const out = grads_.omega[k];
      if (!out) return nullptr;
      return direct_ ? reinterpret_cast<A*>(out) : omegas_->data + slice * omegas_size_ + omega_at_[k];
    }

    // Adds a chunk of a slice to its total, the total to the last. run: which of those at the same time the slice is.
    void add_up(int64_t slice, bool first, bool last, int64_t run, const Workers& workers) const {
      for (size_t k = 0; k < layers_.size() && !(first && last); ++k) {
        A* const sum = omega(slice, k);
        if (!sum) continue;
        double* const total = totals_->data + run * omegas_size_ + omega_at_[k];
        run_shares(size_of(k), 1, workers,
                   [&](int64_t begin, int64_t end) { kernels<A>().add_up({sum, total, first, last}, begin, end); });
      }
    }

    // Adds up the slices in order and rounds to the storage type.
    void finish(const Workers& workers) const {
      for (size_t k = 0; k < layers_.size(); ++k) {
        if (T* out = grads_.omega[k]; out && !direct_) {
          reduce<T>(omega(0, k), slices_, omegas_size_, size_of(k), out, workers);
        }
        if (T* out = grads_.beta[k]) reduce<T>(beta(0, k), slices_, betas_size_, layers_[k].d_out(), out, workers);
      }
    }

   private:
    int64_t size_of(size_t k) const { return layers_[k].d_out() * layers_[k].d_in(); }
    const std::vector<Layer<T>>& layers_;
    const Gradients<T>& grads_;
    int64_t slices_, betas_size_ = 0, omegas_size_ = 0;
    bool direct_;
    std::vector<int64_t> beta_at_, omega_at_;  // in a row of a buffer
    std::optional<Buffer<double>> betas_, totals_;
    std::optional<Buffer<A>> omegas_;
  };

  static Matrix<const T> rows_of(Matrix<const T> m, int64_t first, int64_t count) {
    return {m.data + first * m.row_stride, count, m.cols, m.row_stride, m.col_stride};
  }

  // The forward pass of a block of rows through the first `layers` layers; h_{k+1} goes to place(k).
  template <typename Place>
  void forward_block(Matrix<const T> h, size_t layers, const Place& place, const Workers& who) const {
    for (size_t k = 0; k < layers; ++k) {
      T* next = place(k);
      manualbp::forward<T>(h, layers_[k], k + 1 < layers_.size() || final_relu_, next, who);
      h = Matrix<const T>::contiguous(next, h.rows, layers_[k].d_out());
    }
  }

  // The backward pass over all blocks. hidden: the stored activations, unless the first `again` layers are computed
  // again. top(first, count, f) says where a block starts; f is its output, if that was computed again.
  template <typename TopOf>
  void run_backward(Matrix<const T> input, const T* hidden, size_t again, const Gradients<T>& grads, const TopOf& top) {
    if (is_short()) return short_backward(input, hidden, again, grads, top);
    const int64_t slice_rows = is_tall() ? slice_rows_ : batch_;
    const int64_t touched = 2 * widest_ + (again ? starts_.back() : 0);
    const int64_t chunk_rows = is_tall() ? kChunkRows : long_rows(1), unit_rows = is_tall() ? kUnitRows : kLongUnitRows;
    const int64_t rows =
        is_tall() ? std::min(slice_rows, block_rows(touched)) : std::min(batch_, long_rows(again ? touched : 1));
    const Team<T> team(widest_, std::max(widest_, rows));
    const auto& workers = team.workers;
    const size_t lowest = grads.lowest();
    const Buffer<A> packed(pack(&Layer<T>::packed, grads.input ? 0 : lowest + 1, layers_.size(), workers));
    const Buffer<A> packed_transposed(pack(&Layer<T>::packed_transposed, 0, again, workers));
    const Sums sums(layers_, grads, slices(), std::min(workers.threads(), slices()), chunk_rows < slice_rows);
    // A thread's memory: two buffers in which df takes turns, and the activations that are computed again.
    const int64_t turn = rows * std::max(widest_hidden_, layers_.back().d_out());
    const int64_t each = 2 * turn + (again ? rows * starts_.back() : 0);
    const Buffer<T> memory(each * (is_tall() ? workers.threads() : 1));

    const auto block = [&](int64_t first, int64_t count, int64_t slice, bool add, T* turns, const Workers& who) {
      const auto h0 = rows_of(input, first, count);
      const auto activations =
          again ? Activations{turns + 2 * turn, rows, 0} : Activations{const_cast<T*>(hidden), batch_, first};
      if (again) {
        const auto place = [&](size_t k) { return k + 1 == layers_.size() ? turns : activations.at(*this, k + 1); };
        forward_block(h0, again, place, who);
      }
      // df_{K-1} and d(beta_{K-1}): with a ReLU on top, the mask in the same pass.
      const auto [gradient, output] = top(first, count, turns);
      auto df = gradient;
      if (output) df = Matrix<const T>::contiguous(turns, count, layers_.back().d_out());
      if (double* dbeta = sums.beta(slice, layers_.size() - 1); output) {
        relu_backward<T>(gradient, output, turns, dbeta, who);
      } else if (dbeta) {
        bias_gradient<T>(gradient, dbeta, who);
      }
      for (size_t k = layers_.size(); k-- > lowest;) {
        const auto& layer = layers_[k];
        const auto h = k == 0 ? h0 : Matrix<const T>::contiguous(activations.at(*this, k), count, layer.d_in());
        if (A* domega = sums.omega(slice, k)) weight_gradient<T>(df, h, domega, add, unit_rows, who);
        if (k > lowest) {
          T* below = df.data == turns ? turns + turn : turns;
          hidden_gradient<T>(df, layer, h.data, below, sums.beta(slice, k - 1), who);
          df = Matrix<const T>::contiguous(below, count, layer.d_in());
        } else if (grads.input) {
          input_gradient<T>(df, layer, grads.input + first * layer.d_in(), who);
        }
      }
    };
    const auto slice = [&](int64_t s, int64_t run, T* mine, const Workers& who) {
      const int64_t start = s * slice_rows, stop = std::min(start + slice_rows, batch_);
      int64_t chunk = start;
      do {  // once even for an empty batch: its gradients are zero
        const int64_t end = std::min(chunk + chunk_rows, stop);
        int64_t first = chunk;
        do {
          block(first, std::min(rows, end - first), s, first > chunk, mine, who);
          first += rows;
        } while (first < end);
        sums.add_up(s, chunk == start, end == stop, run, who);
        chunk = end;
      } while (chunk < stop);
    };
    if (!is_tall()) {
      slice(0, 0, memory.data, workers);
    } else {
      std::atomic<int64_t> runs{0};
      workers.run(slices(), 3 * multiply_adds(), [&](int64_t begin, int64_t end) {
        const int64_t run = runs++;
        for (int64_t s = begin; s < end; ++s) slice(s, run, memory.data + each * workers.index(), workers.alone());
      });
    }
    sums.finish(workers);
  }

  // The same for few rows: see "short" above.
  template <typename TopOf>
  void short_backward(Matrix<const T> input, const T* hidden, size_t again, const Gradients<T>& grads,
                      const TopOf& top) {
    const Team<T> team(widest_, std::max(widest_, batch_));
    const auto& workers = team.workers;
    const size_t lowest = grads.lowest(), layers = layers_.size();
    const Buffer<A> packed(pack(&Layer<T>::packed, grads.input ? 0 : lowest + 1, layers, workers));
    const Buffer<A> packed_transposed(pack(&Layer<T>::packed_transposed, 0, again, workers));
    const Sums sums(layers_, grads, 1, 1, false);
    // df_k of all rows and layers, then the activations that are computed again.
    const int64_t hidden_width = starts_.back(), top_width = layers_.back().d_out();
    const Buffer<T> memory(batch_ * (hidden_width + top_width + (again ? hidden_width : 0)));
    T* const kept = again ? memory.data + batch_ * (hidden_width + top_width) : const_cast<T*>(hidden);
    std::vector<Matrix<const T>> df(layers);
    for (size_t k = 0; k < layers; ++k) {
      df[k] = Matrix<const T>::contiguous(memory.data + batch_ * starts_[k + 1], batch_, layers_[k].d_out());
    }
    const auto h_of = [&](size_t k) {
      return k == 0 ? input : Matrix<const T>::contiguous(kept + batch_ * starts_[k], batch_, layers_[k].d_in());
    };

    // First meeting: rows through all layers and back. Without a ReLU on top, df_{K-1} is the gradient of the output as
    // it came. Its first rows say where the whole of it is; the other threads do not read that before the second
    // meeting.
    Matrix<const T> whole{};
    const int64_t share = share_rows(workers.threads());
    workers.run(ceil_div(batch_, share), 2 * multiply_adds(), [&](int64_t begin, int64_t end) {
      const Workers alone = workers.alone();
      const int64_t first = begin * share, count = std::min(end * share, batch_) - first;
      const auto df_rows = [&](size_t k) { return const_cast<T*>(df[k].data) + first * layers_[k].d_out(); };
      if (again) {
        const auto place = [&](size_t k) {
          return k + 1 == layers ? df_rows(k) : kept + batch_ * starts_[k + 1] + first * layers_[k].d_out();
        };
        forward_block(rows_of(input, first, count), again, place, alone);
      }
      auto [gradient, output] = top(first, count, df_rows(layers - 1));
      if (output) {
        T* out = df_rows(layers - 1);
        relu_backward<T>(gradient, output, out, nullptr, alone);
        gradient = Matrix<const T>::contiguous(out, count, top_width);
      } else if (first == 0) {
        whole = {gradient.data, batch_, top_width, gradient.row_stride, gradient.col_stride};
      }
      for (size_t k = layers - 1; k > lowest; --k) {
        hidden_gradient<T>(gradient, layers_[k], rows_of(h_of(k), first, count).data, df_rows(k - 1), nullptr, alone);
        gradient = Matrix<const T>::contiguous(df_rows(k - 1), count, layers_[k].d_in());
      }
      if (grads.input) input_gradient<T>(gradient, layers_[0], grads.input + first * layers_[0].d_in(), alone);
    });

    if (whole.data) df[layers - 1] = whole;

    // Second meeting: blocks of d(Omega_k), and d(beta_k), of all layers.
    struct Task {
      size_t k;
      int64_t row, col;  // row < 0: d(beta_k)
    };
    std::vector<Task> tasks;
    for (size_t k = lowest; k < layers; ++k) {
      for (int64_t row = 0; grads.omega[k] && row < layers_[k].d_out(); row += kGradientRows) {
        for (int64_t col = 0; col < layers_[k].d_in(); col += kGradientCols) tasks.push_back({k, row, col});
      }
      if (grads.beta[k]) tasks.push_back({k, -1, 0});
    }
    workers.run(int64_t(tasks.size()), multiply_adds(), [&](int64_t begin, int64_t end) {
      const Workers alone = workers.alone();
      for (int64_t i = begin; i < end; ++i) {
        const auto [k, row, col] = tasks[size_t(i)];
        if (row < 0) {
          bias_gradient<T>(df[k], sums.beta(0, k), alone);
          continue;
        }
        const int64_t d_in = layers_[k].d_in();
        gradient_block<T>(columns_of(df[k], row, kGradientRows), columns_of(h_of(k), col, kGradientCols),
                          sums.omega(0, k) + row * d_in + col, d_in, false, kLongUnitRows, alone.workspace());
      }
    });
    sums.finish(workers);
  }

  bool is_tall() const { return slice_rows_ < batch_; }
  // Few enough numbers that packing the weights and keeping every df_k costs little memory (4 MiB and 16 MiB of floats),
  // and layers so small that meetings of the threads, 5 us each, count: above kShortLayer multiply-adds each (512 x 512
  // with 32 rows) cutting every layer by its columns is faster. Rows that are one thread's share leave the others
  // without work, unless it is not worth theirs anyway.
  bool is_short() const {
    constexpr double kShortLayer = 8 << 20;
    return !is_tall() && (batch_ > kLossRows || multiply_adds() < 2 * kGrain) &&
           multiply_adds() <= kShortLayer * double(layers_.size()) && parameters_ <= (1 << 20) &&
           batch_ * (starts_.back() + layers_.back().d_out()) <= (4 << 20);
  }
  bool is_wide() const { return !is_tall() && !is_short(); }
  // A thread's share of the rows: a whole number of register tiles and of units of the loss.
  int64_t share_rows(int64_t threads) const {
    const int64_t step = batch_ >= 4 * 48 * threads ? 48 : kLossRows;
    return std::max<int64_t>(ceil_div(ceil_div(batch_, threads), step), 1) * step;
  }
  int64_t slices() const { return is_tall() ? ceil_div(batch_, slice_rows_) : 1; }
  double multiply_adds() const { return double(batch_ + kFetchRows) * double(parameters_); }

  // Rows of a slice; all of them where slices do not pay. A slice reads and writes its sums once per block, and they
  // are added up at the end: with sums that leave the second-level cache, 512 rows are needed to make that 3 % of the
  // work, else 64. All sums together must not take more than 16 MiB.
  int64_t choose_slice_rows() const {
    constexpr int64_t kFewest = 4, kMost = 32, kAllBytes = 16 << 20, kCachedBytes = 384 << 10;
    const int64_t bytes = std::max<int64_t>(parameters_, 1) * int64_t(sizeof(A));
    const int64_t fewest_rows = bytes <= kCachedBytes ? 64 : 512;
    const int64_t slices = std::min({kMost, kAllBytes / bytes, batch_ / fewest_rows});
    return slices < kFewest ? batch_ : ceil_div(ceil_div(batch_, slices), kLossRows) * kLossRows;
  }

  // Rows of a block of which a thread touches `width` features a row again and again: half of a 1 MiB cache.
  static int64_t block_rows(int64_t width) {
    const int64_t units = 128 * 1024 / std::max<int64_t>(width, 1) / kUnitRows;
    return std::clamp<int64_t>(units, 1, kMostUnits) * kUnitRows;
  }

  // The same for rows that go layer by layer over all threads, where long blocks pay: up to 32 MiB, blocks alike, and no
  // more than 16 times the depth of a product's block, for which sums are made in the accumulator type.
  int64_t long_rows(int64_t width) const {
    const int64_t fitting = (32 << 20) / int64_t(sizeof(T)) / std::max<int64_t>(width, 1);
    const int64_t most = std::clamp(fitting, kLongUnitRows, 16 * kLongUnitRows);
    const int64_t blocks = std::max<int64_t>(ceil_div(batch_, most), 1);
    return std::max<int64_t>(ceil_div(ceil_div(batch_, blocks), kLongUnitRows), 1) * kLongUnitRows;
  }

  // Packs the weights of layers [first, last) once, for all the blocks that will multiply by them.
  // field: &Layer::packed_transposed (forward) or &Layer::packed (input gradient). Returns the memory.
  Buffer<A> pack(const A* Layer<T>::* field, size_t first, size_t last, const Workers& workers) {
    const bool transposed = field == &Layer<T>::packed_transposed;
    const auto& kernel = kernels<T>();
    std::vector<int64_t> offsets;
    int64_t size = 0;
    // Few rows a thread: each packs for itself, just before it multiplies. To fetch what another core has packed takes
    // longer (64 wide, 50 layers, 32 rows, two threads: forward 184 us so, 137 us without). Rows that are all in one
    // share read a weight once (10-400-400-3, one row: 36 us so, 20 us without).
    const int64_t share = share_rows(workers.threads());
    const bool shared = workers.threads() > 1 && multiply_adds() >= 2 * kGrain;
    if (is_short() && share <= kOwnPackRows && (shared || batch_ <= share)) return Buffer<A>(0);
    // Few rows do not pay for packing a weight that the input gradient can read where it lies.
    const auto in_place = [&](const Matrix<const T>& omega) {
      return !transposed && is_short() && kernel.reads_in_place(batch_, omega.row_stride, omega.col_stride, omega.cols);
    };
    std::vector<size_t> packed;
    for (size_t k = first; !is_wide() && k < last; ++k) {
      const auto& omega = layers_[k].omega;
      if (in_place(omega) || (transposed ? omega.rows : omega.cols) == 1) continue;
      packed.push_back(k);
      offsets.push_back(size);
      size += transposed ? kernel.packed_size(omega.cols, omega.rows) : kernel.packed_size(omega.rows, omega.cols);
    }
    Buffer<A> memory(size);
    workers.run(int64_t(packed.size()), double(kFetchRows) * double(size), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        auto& layer = layers_[packed[size_t(i)]];
        const auto& omega = layer.omega;
        A* out = memory.data + offsets[size_t(i)];
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
  int64_t batch_;
  bool final_relu_;
  int64_t widest_, widest_hidden_ = 0, parameters_ = 0, slice_rows_;
  std::vector<int64_t> starts_;  // h_k starts at row width starts_[k], for k = 1 ... K-1; the last item is the end
};

}  // namespace manualbp
