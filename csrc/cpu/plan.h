// How the batch of a network is cut, and how much memory its passes take: computed from sizes alone, without torch.
// The passes (network.h, backward.h) cut and allocate as the plan says; the op `plan` (plan.cpp) reports it.
//
// Layer k maps D_k to D_{k+1} features; B is the number of rows of the batch. The terms, from the outside in:
//   slice   the rows whose gradients are summed in one buffer, on one thread if there are several slices; the sums of
//           the slices are added in order at the end
//   chunk   the part of a slice over which the gradient of a weight is summed in the accumulator type; the sums of the
//           chunks of a slice are added up in double
//   block   the rows that are computed together, layer by layer
//   unit    kUnitRows or kLongUnitRows (kernels/params.h) whose sum is complete before it is added to anything else
//
// Three ways to cut a batch:
//   tall    Many rows. Each block goes through all layers on one thread while it fits into that thread's cache; the
//           backward pass sums gradients over slices.
//           If there are too few slices for the threads, waves of rows, a part of each slice, go through the two
//           parallel regions of a short batch instead.
//   short   Few rows, small layers. Parallel region 1: each thread runs its rows forward and back to df_0. Parallel
//           region 2: the weight and bias gradients of all layers are divided among the threads. Two barriers in total,
//           regardless of depth.
//   wide    Large layers. A block, of as many rows as memory allows, goes through one layer after the other; each step
//           is divided among the threads.
// The way, the slices, the chunks, the blocks and the units depend on the sizes alone, never on the number of threads. So
// do results.
#pragma once

#include <algorithm>
#include <cstddef>
#include <utility>
#include <vector>

#include "isa.h"

namespace manualbp {

// Minimum work per thread, in multiply-adds (10 to 20 us). Below it, waking the thread and moving freshly written cache
// lines to it costs more than it saves: on 17-64-64-6 with 64 rows two threads took as long as one, and on a busy
// machine twice as long.
constexpr int64_t kGrain = 1024 * 1024;

// Fetching an element of a weight takes as long as this many multiply-adds. (One row and 1024 x 1024: 0.13 ms to fetch
// the weight, 0.02 ms to multiply by it.)
constexpr int64_t kFetchRows = 8;

// The loss is summed over groups of this many rows, whatever the blocks are: blocks and slices begin at multiples of
// it.
constexpr int64_t kLossRows = 16;

// Of tall batches: rows of a chunk, and most units of a block. Adding the sums of a chunk to the total takes 0.5 % of
// the time.
constexpr int64_t kChunkRows = 24 * kUnitRows, kMostUnits = 6;

enum class Way : int64_t { kTall, kShort, kWide };

// A layer as the plan sees it: its sizes, and which gradients the backward pass computes.
struct LayerPlan {
  int64_t d_in, d_out;
  int64_t row_stride, col_stride;  // of the weight (D_out, D_in)
  bool weight_gradient = false, bias_gradient = false;
  // Filled in by the plan. start: the sum of the widths of f_0 ... f_{k-1}, so that f_k begins at B times that if all
  // lie one after another. weight_sums, bias_sums: where the sums of this layer's gradients begin among those of a
  // slice.
  int64_t start = 0, weight_sums = 0, bias_sums = 0;
};

// A forward pass. Unless the activations are stored, the layers read from and write to two buffers in turn; each thread
// has two of its own, except in a wide batch.
struct ForwardPlan {
  int64_t rows;  // of a block
  int64_t buffer;  // elements of one buffer
  int64_t elements;  // of all buffers
  int64_t workspace;  // bytes in which one thread packs the matrices of a product
};

// A backward pass. It computes the activations of the first `recomputed` layers itself: none if they are stored, those
// of all layers but the last if they are not, and those of all layers if the pass begins with the loss.
struct BackwardPlan {
  int64_t recomputed;
  int64_t lowest;  // the lowest layer with a gradient to compute; the pass ends there
  int64_t first_packed;  // the lowest layer whose weight the pass multiplies by
  int64_t slices, slice_rows, chunk_rows;
  int64_t rows;  // of a block
  int64_t unit_rows;
  int64_t wave_rows;  // of each slice, which go through two parallel regions together; 0: slice after slice
  int64_t buffer;  // elements of each of the two buffers for df_k and df_{k-1}; in waves 0, since all df_k are kept
  int64_t part;  // elements for df and activations: one thread's in a tall batch, else all
  int64_t elements;  // of all parts
  int64_t workspace;  // bytes in which one thread packs the matrices of a product
  int64_t weight_sums = 0, bias_sums = 0;  // elements of a slice's sums: in the accumulator type, and in double
  int64_t widest_bias = 0;  // the largest D_{k+1} whose bias has a gradient to compute
  int64_t totals;  // rows of `weight_sums` doubles in which the sums of chunks are added up
  bool in_place;  // whether gradients of weights are summed in the result itself
};

// T: the storage type, whose kernels say what a packed weight and the workspace of a product take.
template <typename T>
struct Plan {
  Plan(int64_t batch, std::vector<LayerPlan> shapes, int64_t threads)
      : batch(batch), threads(threads), layers(std::move(shapes)), widest(layers[0].d_in), top(layers.back().d_out) {
    for (size_t k = 0; k < layers.size(); ++k) {
      LayerPlan& layer = layers[k];
      if (k > 0) {
        widest_hidden = std::max(widest_hidden, layer.d_in);
        hidden += layer.d_in;
      }
      layer.start = hidden;
      widest = std::max(widest, layer.d_out);
      parameters += (layer.d_in + 1) * layer.d_out;
    }
    slice_rows = choose_slice_rows();
    way = slice_rows < batch ? Way::kTall : is_short() ? Way::kShort : Way::kWide;
    packs = way == Way::kTall || (way == Way::kShort && !threads_pack());
  }

  ForwardPlan forward(bool store) const {
    const bool wide = way == Way::kWide;
    ForwardPlan pass;
    pass.rows = !wide   ? std::min(block_rows(2 * widest), thread_rows(batch))
                : store ? batch
                        : std::min(batch, long_rows(2 * widest_hidden));
    pass.buffer = store ? 0 : pass.rows * widest_hidden;
    pass.elements = 2 * pass.buffer * (wide ? 1 : threads);
    pass.workspace = workspace_bytes(widest);
    return pass;
  }

  // Reads which gradients the layers have to compute, and writes where their sums begin.
  BackwardPlan backward(int64_t recomputed, bool input_gradient) {
    BackwardPlan pass;
    pass.recomputed = recomputed;
    const auto is_frozen = [](const LayerPlan& layer) { return !layer.weight_gradient && !layer.bias_gradient; };
    pass.lowest = 0;
    while (!input_gradient && pass.lowest < count() && is_frozen(layers[size_t(pass.lowest)])) ++pass.lowest;
    pass.first_packed = input_gradient ? 0 : pass.lowest + 1;
    for (LayerPlan& layer : layers) {
      layer.weight_sums = pass.weight_sums;
      layer.bias_sums = pass.bias_sums;
      if (layer.weight_gradient) pass.weight_sums += layer.d_out * layer.d_in;
      if (layer.bias_gradient) pass.bias_sums += layer.d_out;
      if (layer.bias_gradient) pass.widest_bias = std::max(pass.widest_bias, layer.d_out);
    }
    const int64_t kept = recomputed ? hidden : 0, touched = 2 * widest + kept;
    if (way == Way::kTall) {
      pass.slice_rows = slice_rows;
      pass.chunk_rows = kChunkRows;
      pass.rows = std::min(slice_rows, block_rows(touched));
      pass.unit_rows = kUnitRows;
    } else {
      pass.slice_rows = batch;
      pass.chunk_rows = way == Way::kWide ? long_rows(1) : batch;
      pass.rows = way == Way::kWide ? std::min(batch, long_rows(recomputed ? touched : 1)) : batch;
      pass.unit_rows = kLongUnitRows;
    }
    pass.slices = way == Way::kTall ? ceil_div(batch, slice_rows) : 1;
    pass.wave_rows = 0;
    pass.buffer = pass.rows * std::max(widest_hidden, top);
    pass.part = 2 * pass.buffer + pass.rows * kept;
    pass.elements = pass.part * (way == Way::kTall ? threads : 1);
    pass.workspace = workspace_bytes(std::max(widest, pass.rows));
    pass.totals = pass.chunk_rows < pass.slice_rows ? std::min(threads, pass.slices) : 0;
    pass.in_place = pass.slices == 1 && sizeof(T) == sizeof(A);
    return pass;
  }

  // The same results by waves: of a short batch, and of a tall one whose slices would keep the threads busy for more than
  // 1.25 times as long as an even division of the work.
  void divide_into_waves(BackwardPlan& pass) const {
    const bool idles = 4 * ceil_div(pass.slices, threads) * threads > 5 * pass.slices;
    if (way == Way::kWide || (way == Way::kTall && !idles)) return;
    const int64_t width = hidden + top + (pass.recomputed ? hidden : 0);
    pass.wave_rows = pass.slice_rows;
    if (way == Way::kTall) {  // waves of equal length, of whole units
      const int64_t most = threads * wave_bytes / int64_t(sizeof(T)) / (std::max<int64_t>(width, 1) * pass.slices);
      const int64_t units = ceil_div(pass.slice_rows, kUnitRows);
      const int64_t waves = ceil_div(units, std::max<int64_t>(most / kUnitRows, 1));
      if (waves > 1) pass.wave_rows = ceil_div(units, waves) * kUnitRows;
    }
    pass.buffer = 0;
    pass.part = pass.elements = pass.slices * pass.wave_rows * width;
    pass.workspace = workspace_bytes(std::max(widest, std::min(pass.wave_rows, pass.chunk_rows)));
    if (pass.totals) pass.totals = pass.slices;
  }

  // Elements of the packed weight of layer k, Omega^T for the forward pass (`transposed`) or Omega for the input
  // gradient; 0: not packed. A matrix of one column needs no packing. Few rows do not pay for packing a weight that the
  // input gradient can read where it lies.
  int64_t packed_size(int64_t k, bool transposed) const {
    const LayerPlan& layer = layers[size_t(k)];
    const auto& kernel = kernels<T>();
    if (!packs || (transposed ? layer.d_out : layer.d_in) == 1) return 0;
    if (transposed) return kernel.packed_size(layer.d_in, layer.d_out);
    if (way == Way::kShort && kernel.reads_in_place(batch, layer.row_stride, layer.col_stride, layer.d_in)) return 0;
    return kernel.packed_size(layer.d_out, layer.d_in);
  }

  // Bytes that a pass allocates beside its results.
  int64_t bytes(const ForwardPlan& pass) const {
    return threads * pass.workspace + packed_bytes(0, count(), true) + pass.elements * int64_t(sizeof(T));
  }
  int64_t bytes(const BackwardPlan& pass) const {
    // In a wide batch, relu_backward (layer.h) sums a bias gradient in units: one row of a buffer each, and one for
    // what is in the sum already.
    const int64_t units = way == Way::kWide ? ceil_div(pass.rows, kUnitRows) : 1;
    const int64_t weight_sums = pass.in_place ? 0 : pass.slices * pass.weight_sums * int64_t(sizeof(A));
    const int64_t doubles = pass.slices * pass.bias_sums + pass.totals * pass.weight_sums +
                            (units > 1 ? (1 + units) * pass.widest_bias : 0);
    return threads * pass.workspace + packed_bytes(pass.first_packed, count(), false) +
           packed_bytes(0, pass.recomputed, true) + weight_sums + doubles * int64_t(sizeof(double)) +
           pass.elements * int64_t(sizeof(T));
  }

  int64_t count() const { return int64_t(layers.size()); }
  // The cost of multiplying all weights by the batch, or by this many rows.
  double multiply_adds() const { return multiply_adds(batch); }
  double multiply_adds(int64_t rows) const { return double(rows + kFetchRows) * double(parameters); }

  // The rows of each thread if `rows` are divided evenly: whole register tiles and groups of the loss.
  int64_t thread_rows(int64_t rows) const {
    const int64_t step = rows >= 4 * 48 * threads ? 48 : kLossRows;
    return std::max<int64_t>(ceil_div(ceil_div(rows, threads), step), 1) * step;
  }

  int64_t batch, threads;
  std::vector<LayerPlan> layers;
  int64_t widest, top;  // the largest D_k, and D_K
  int64_t widest_hidden = 0, hidden = 0;  // the largest of D_1 ... D_{K-1}, and their sum
  int64_t parameters = 0;
  int64_t slice_rows;  // of the backward pass; B where there is one slice
  Way way;
  bool packs;  // whether weights are packed once, before the blocks that multiply by them
  int64_t wave_bytes = 2 << 20;  // of the df and activations of a wave: of each thread, about what its cache holds

 private:
  using A = accumulator_t<T>;

  // Slices are used where they pay: a slice reads and writes its sums once per block, and they are added up at the end.
  // If the sums do not fit into the second-level cache, it takes 512 rows to make that 3 % of the work, else 64. The
  // sums of all slices must not take more than 16 MiB.
  int64_t choose_slice_rows() const {
    constexpr int64_t kFewest = 4, kMost = 32, kAllBytes = 16 << 20, kCachedBytes = 384 << 10;
    const int64_t bytes = std::max<int64_t>(parameters, 1) * int64_t(sizeof(A));
    const int64_t fewest_rows = bytes <= kCachedBytes ? 64 : 512;
    const int64_t slices = std::min({kMost, kAllBytes / bytes, batch / fewest_rows});
    return slices < kFewest ? batch : ceil_div(ceil_div(batch, slices), kLossRows) * kLossRows;
  }

  // Use the short scheme when the packed weights and all df_k are small (4 and 16 MiB in float32) and a 5 us barrier
  // per layer would matter; above kShortLayer multiply-adds per layer (512 x 512, 32 rows), splitting each layer by
  // columns is faster. A batch of kLossRows rows is one thread's and would idle the others, so it qualifies only if the
  // step is too small to parallelise at all.
  bool is_short() const {
    constexpr double kShortLayer = 8 << 20;
    return (batch > kLossRows || multiply_adds() < 2 * kGrain) &&
           multiply_adds() <= kShortLayer * double(layers.size()) && parameters <= (1 << 20) &&
           batch * (hidden + top) <= (4 << 20);
  }

  // In a short batch with few rows per thread, each thread packs a weight itself, just before it multiplies by it.
  // Fetching what another core has packed takes longer (64 wide, 50 layers, 32 rows, two threads: forward 184 us with
  // shared packing, 137 us without). If all rows are one thread's, each weight is read only once (10-400-400-3, one
  // row: 36 us with packing ahead, 20 us without).
  bool threads_pack() const {
    constexpr int64_t kOwnPackRows = 32;
    const int64_t rows = thread_rows(batch);
    const bool parallel = threads > 1 && multiply_adds() >= 2 * kGrain;
    return rows <= kOwnPackRows && (parallel || batch <= rows);
  }

  // The rows of a block for which one thread keeps accessing `width` features per row: half of a 1 MiB cache.
  static int64_t block_rows(int64_t width) {
    const int64_t units = 128 * 1024 / std::max<int64_t>(width, 1) / kUnitRows;
    return std::clamp<int64_t>(units, 1, kMostUnits) * kUnitRows;
  }

  // The same for a block that goes layer by layer over all threads, where long blocks pay: up to 32 MiB, blocks of
  // equal length, and at most 16 times the depth of a product's block, over which sums are made in the accumulator
  // type.
  int64_t long_rows(int64_t width) const {
    const int64_t fitting = (32 << 20) / int64_t(sizeof(T)) / std::max<int64_t>(width, 1);
    const int64_t most = std::clamp(fitting, kLongUnitRows, 16 * kLongUnitRows);
    const int64_t blocks = std::max<int64_t>(ceil_div(batch, most), 1);
    return std::max<int64_t>(ceil_div(ceil_div(batch, blocks), kLongUnitRows), 1) * kLongUnitRows;
  }

  // A thread's workspace for products of at most `widest` columns and this depth, in whole cache lines.
  int64_t workspace_bytes(int64_t depth) const {
    return ceil_div(kernels<T>().workspace_bytes(widest, depth), 64) * 64;
  }

  int64_t packed_bytes(int64_t first, int64_t last, bool transposed) const {
    int64_t size = 0;
    for (int64_t k = first; k < last; ++k) size += packed_size(k, transposed);
    return size * int64_t(sizeof(A));
  }
};

}  // namespace manualbp
