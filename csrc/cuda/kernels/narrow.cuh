// A whole narrow network in one kernel: a tile of rows stays in shared memory while it goes through all layers, forward
// or backward. Widths up to 128; float32 with FMAs, half precision on tensor cores.
//
//   forward    f_k = beta_k + Omega_k h_k,  h_{k+1} = a[f_k]:        reads h_0, writes what is to be stored, no more
//   backward   df_k = I[h_{k+1} > 0] . dh_{k+1},  dh_k = df_k Omega_k:   reads each h_k once, writes each df_k once
//
// The library computes the gradients of the weights, df_k^T h_k: sums over the whole batch do not fit these tiles.
//
// A block keeps two matrices in shared memory, in rows of `ld` numbers: the tile (kRows, width) and the weight of the
// layer (D_out, D_in), transposed on the way backward. A product is computed into registers, then replaces the tile.
// Widths are padded with zeros to multiples of 16. The padding of a product is overwritten with zeros: NaN * 0 is NaN.
// `ld` is 16 bytes more than a multiple of 32, so that eight rows of 16 bytes lie in different banks.
//
// sm_80 and sm_90: 80 to 106 registers, none spilled (ptxas): two blocks of 256 threads a multiprocessor, 25 % of its
// threads; in float32 three on sm_90 forward. Shared memory at width 64: 34 KiB float32, 27 KiB half precision; at 128:
// 99 KiB and 68 KiB, so that an A100 (164 KiB) holds one block in float32, two in half precision; an H100 (228 KiB) two
// in both. Few threads are enough for a product in registers: each has 32 (float32) or 64 independent sums.
#pragma once

#include "mma.cuh"
#include "relu_backward.cuh"

namespace manualbp::cuda {

constexpr int kNarrowThreads = 256;

__host__ __device__ constexpr int padded(int width) { return (width + 15) / 16 * 16; }

// The numbers of a shared row for tiles up to `width` wide (padded).
template <typename T>
__host__ __device__ constexpr int narrow_ld(int width) {
  return width + kVectorWidth<T>;
}

// The product of a tile (kRows, K) and a weight (N, K), both in shared memory: what one thread holds of it.
template <typename T>
struct NarrowProduct;

// float32: 16 x 16 threads, each with 4 rows and every 16th column. Per 4 steps of k a thread reads 4 + 8 vectors for
// 128 FMAs.
template <>
struct NarrowProduct<float> {
  static constexpr int kRows = 64;
  float sums[4][8];

  __device__ __forceinline__ void multiply(const float* tile, const float* weight, int ld, int k, int n) {
    const int ty = int(threadIdx.x) / 16, tx = int(threadIdx.x) % 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) sums[i][j] = 0;
    }
    for (int k0 = 0; k0 < k; k0 += 4) {
      Vector<float, 4> h[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) h[i] = load<4>(tile + (ty * 4 + i) * ld + k0);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (j * 16 >= n) break;
        const Vector<float, 4> w = load<4>(weight + (tx + 16 * j) * ld + k0);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int v = 0; v < 4; ++v) sums[i][j] += h[i].items[v] * w.items[v];
        }
      }
    }
  }

  // f(row, column, sum) for each number of the product (kRows, n) that this thread holds.
  template <typename F>
  __device__ __forceinline__ void for_each(int n, const F& f) const {
    const int ty = int(threadIdx.x) / 16, tx = int(threadIdx.x) % 16;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (j * 16 >= n) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) f(ty * 4 + i, tx + 16 * j, sums[i][j]);
    }
  }
};

// Half precision: each of 8 warps multiplies 16 rows, in pieces of 8 columns.
template <typename T>
struct NarrowProduct {
  static constexpr int kRows = 128;
  float sums[16][4];

  __device__ __forceinline__ void multiply(const T* tile, const T* weight, int ld, int k, int n) {
    const int warp = int(threadIdx.x) / kWarpSize, g = int(threadIdx.x) % kWarpSize / 4, t = int(threadIdx.x) % 4;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[j][i] = 0;
    }
    const auto pair = [](const T* p) { return *reinterpret_cast<const uint32_t*>(p); };
    const T* const rows = tile + (warp * 16 + g) * ld + 2 * t;
    for (int k0 = 0; k0 < k; k0 += 16) {
      const uint32_t a[4] = {pair(rows + k0), pair(rows + 8 * ld + k0), pair(rows + k0 + 8),
                             pair(rows + 8 * ld + k0 + 8)};
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        if (j * 8 >= n) break;
        const T* const w = weight + (j * 8 + g) * ld + k0 + 2 * t;
        const uint32_t b[2] = {pair(w), pair(w + 8)};
        mma<T>(sums[j], a, b);
      }
    }
  }

  template <typename F>
  __device__ __forceinline__ void for_each(int n, const F& f) const {
    const int warp = int(threadIdx.x) / kWarpSize, g = int(threadIdx.x) % kWarpSize / 4, t = int(threadIdx.x) % 4;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      if (j * 8 >= n) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) f(warp * 16 + g + i / 2 * 8, j * 8 + 2 * t + i % 2, sums[j][i]);
    }
  }
};

// f(row, column, constant N) for all numbers of a (rows, cols) matrix, N of a row at a time, by all threads of the
// block. `whole`: every row begins at a multiple of 16 bytes and holds whole vectors.
template <typename T, typename F>
__device__ __forceinline__ void for_each_vector(int rows, int cols, bool whole, const F& f) {
  if (whole) {
    constexpr int N = kVectorWidth<T>;
    const int across = cols / N;
    for (int i = int(threadIdx.x); i < rows * across; i += kNarrowThreads) {
      f(i / across, i % across * N, std::integral_constant<int, N>());
    }
  } else {
    for (int i = int(threadIdx.x); i < rows * cols; i += kNarrowThreads) {
      f(i / cols, i % cols, std::integral_constant<int, 1>());
    }
  }
}

template <typename T>
__device__ __forceinline__ bool whole_vectors(const T* p, int64_t row, int cols) {
  constexpr int N = kVectorWidth<T>;
  return cols % N == 0 && row % N == 0 && reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// tile (rows, cols) <- p, rows `row` apart; zeros in the padding and in the rows up to kRows.
template <typename T>
__device__ __forceinline__ void load_tile(T* tile, int ld, const T* p, int64_t row, int rows, int cols) {
  constexpr int kRows = NarrowProduct<T>::kRows;
  const int pad = padded(cols) - cols;
  for (int i = int(threadIdx.x); i < kRows * pad; i += kNarrowThreads) {
    tile[i / pad * ld + cols + i % pad] = T{};
  }
  for_each_vector<T>(kRows, cols, whole_vectors(p, row, cols), [&](int r, int c, auto n) {
    store(tile + r * ld + c, r < rows ? load<n.value>(p + r * row + c) : Vector<T, n.value>{});
  });
}

// p (rows, cols) contiguous <- tile.
template <typename T>
__device__ __forceinline__ void store_tile(T* p, const T* tile, int ld, int rows, int cols) {
  for_each_vector<T>(rows, cols, whole_vectors(p, cols, cols),
                     [&](int r, int c, auto n) { store(p + int64_t(r) * cols + c, load<n.value>(tile + r * ld + c)); });
}

// weight <- omega (d_out, d_in) contiguous, or its transpose; zeros in the padding.
template <typename T>
__device__ __forceinline__ void load_weight(T* weight, int ld, const T* omega, int d_out, int d_in, bool transpose) {
  const int rows = transpose ? d_in : d_out, cols = transpose ? d_out : d_in;
  const int all = padded(cols);
  for (int i = int(threadIdx.x); i < padded(rows) * all; i += kNarrowThreads) {
    const int r = i / all, c = i % all;
    if (r >= rows || c >= cols) weight[r * ld + c] = T{};
  }
  const bool whole = whole_vectors(omega, d_in, d_in);
  if (!transpose) {
    for_each_vector<T>(d_out, d_in, whole,
                       [&](int r, int c, auto n) { store(weight + r * ld + c, load<n.value>(omega + r * d_in + c)); });
  } else if (whole) {
    // Neighbouring threads read neighbouring rows of omega, so that they write side by side.
    constexpr int N = kVectorWidth<T>;
    for (int i = int(threadIdx.x); i < d_out * (d_in / N); i += kNarrowThreads) {
      const int r = i % d_out, c = i / d_out * N;
      const Vector<T, N> w = load<N>(omega + r * d_in + c);
#pragma unroll
      for (int v = 0; v < N; ++v) weight[(c + v) * ld + r] = w.items[v];
    }
  } else {
    for (int i = int(threadIdx.x); i < d_out * d_in; i += kNarrowThreads) {
      weight[i / d_out * ld + i % d_out] = omega[i % d_out * d_in + i / d_out];
    }
  }
}

template <typename T>
__device__ __forceinline__ int narrow_width(const NarrowNetwork<T>& net) {
  int widest = 0;
  for (int k = 0; k <= net.layers; ++k) widest = net.widths[k] > widest ? net.widths[k] : widest;
  return padded(widest);
}

template <typename T>
__global__ void __launch_bounds__(kNarrowThreads, 2) narrow_forward_kernel(const NarrowForward<T> p) {
  constexpr int kRows = NarrowProduct<T>::kRows;
  const auto& net = p.net;
  const int ld = narrow_ld<T>(narrow_width(net));
  T* const tile = shared_memory<T>();
  T* const weight = tile + kRows * ld;
  const int layers = p.output ? net.layers : net.layers - 1;
  for (int64_t first = int64_t(blockIdx.x) * kRows; first < net.rows; first += int64_t(gridDim.x) * kRows) {
    const int rows = net.rows - first < kRows ? int(net.rows - first) : kRows;
    __syncthreads();  // the last tile has been stored
    load_tile(tile, ld, p.input + first * p.input_row, p.input_row, rows, net.widths[0]);
    T* hidden = p.hidden;
    for (int k = 0; k < layers; ++k) {
      const int d_in = net.widths[k], d_out = net.widths[k + 1];
      const bool last = k + 1 == net.layers, with_relu = !last || p.final_relu;
      load_weight(weight, ld, net.omega[k], d_out, d_in, false);
      __syncthreads();
      NarrowProduct<T> product;
      product.multiply(tile, weight, ld, padded(d_in), padded(d_out));
      __syncthreads();  // every thread has read the tile
      const T* const beta = p.beta[k];
      product.for_each(padded(d_out), [&](int row, int col, float f) {
        if (beta && col < d_out) f += widen(beta[col]);
        if (with_relu) f = relu(f);
        tile[row * ld + col] = col < d_out ? narrow<T>(f) : T{};
      });
      __syncthreads();
      if (last) {
        store_tile(p.output + first * d_out, tile, ld, rows, d_out);
      } else if (hidden) {
        store_tile(hidden + first * d_out, tile, ld, rows, d_out);
        hidden += net.rows * d_out;
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kNarrowThreads, 2) narrow_backward_kernel(const NarrowBackward<T> p) {
  using A = accumulator_t<T>;
  constexpr int kRows = NarrowProduct<T>::kRows;
  const auto& net = p.net;
  const int ld = narrow_ld<T>(narrow_width(net));
  T* const tile = shared_memory<T>();
  T* const weight = tile + kRows * ld;
  const int64_t step = int64_t(gridDim.x) * kRows;
  for (int64_t first = int64_t(blockIdx.x) * kRows; first < net.rows; first += step) {
    const int rows = net.rows - first < kRows ? int(net.rows - first) : kRows;
    __syncthreads();  // the last tile has been stored
    load_tile(tile, ld, p.grad_output + first * p.grad_row, p.grad_row, rows, net.widths[net.layers]);
    __syncthreads();
    // Pointers to the end of each, since the layers are visited in descending order.
    const T* activation = p.hidden;
    for (int k = 1; k < net.layers; ++k) activation += net.rows * net.widths[k];
    T* df = p.df;
    int64_t sums = 0;
    for (int k = p.lowest; k < net.layers; ++k) {
      df += net.rows * net.widths[k + 1];
      sums += net.widths[k + 1];
    }
    for (int k = net.layers - 1; k >= p.lowest; --k) {
      const int d_in = net.widths[k], d_out = net.widths[k + 1];
      const bool last = k + 1 == net.layers;
      df -= net.rows * d_out;
      sums -= d_out;
      // The tile is dh_{k+1}; masked, it becomes df_k.
      const T* const h = (last ? p.output : activation) ? (last ? p.output : activation) + first * d_out : nullptr;
      if (h) {
        T* const out = df + first * d_out;
        for_each_vector<T>(rows, d_out, whole_vectors(h, d_out, d_out) && whole_vectors(out, d_out, d_out),
                           [&](int r, int c, auto n) {
                             Vector<T, n.value> g = load<n.value>(tile + r * ld + c);
                             const Vector<T, n.value> a = load<n.value>(h + int64_t(r) * d_out + c);
                             for (int i = 0; i < n.value; ++i) {
                               if (widen(a.items[i]) <= A(0)) g.items[i] = T{};
                             }
                             store(tile + r * ld + c, g);
                             store(out + int64_t(r) * d_out + c, g);
                           });
      }
      if (k > 0) activation -= net.rows * d_in;
      const bool go_on = k > p.lowest || (k == 0 && p.grad_input);
      if (go_on) load_weight(weight, ld, net.omega[k], d_out, d_in, true);
      __syncthreads();
      if (p.dbeta && int(threadIdx.x) < d_out) {
        A sum = 0;
        for (int r = 0; r < rows; ++r) sum += widen(tile[r * ld + int(threadIdx.x)]);
        A* const total = p.dbeta + int64_t(blockIdx.x) * p.dbeta_row + sums + threadIdx.x;
        *total = first < step ? sum : *total + sum;
      }
      if (!go_on) break;
      NarrowProduct<T> product;
      product.multiply(tile, weight, ld, padded(d_out), padded(d_in));
      __syncthreads();  // every thread has read the tile
      product.for_each(padded(d_in),
                       [&](int row, int col, float g) { tile[row * ld + col] = col < d_in ? narrow<T>(g) : T{}; });
      __syncthreads();
      if (k == 0) store_tile(p.grad_input + first * d_in, tile, ld, rows, d_in);
    }
  }
}

// The bias gradients of all layers, with the blocks of reduce_kernel.
template <typename T>
__global__ void __launch_bounds__(kReduceLanes* kReduceRows) narrow_biases_kernel(const NarrowBiases<T> p) {
  const int col = int(blockIdx.x) * kReduceLanes + int(threadIdx.x), cols = p.ends[p.layers - 1];
  const accumulator_t<T> sum = sum_of_slices<accumulator_t<T>>(p.partial, p.slices, cols, col, cols);
  if (threadIdx.y != 0 || col >= cols) return;
  int k = 0;
  while (col >= p.ends[k]) ++k;
  if (p.out[k]) p.out[k][col - (k == 0 ? 0 : p.ends[k - 1])] = narrow<T>(sum);
}

}  // namespace manualbp::cuda
