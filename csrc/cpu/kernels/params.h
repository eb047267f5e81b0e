// The parameter structs of the kernels, and the table of kernels that each instruction-set level fills. Kernels see
// nothing else: neither torch nor the standard library.
//
// Size letters, here and in every kernel:
//   B batch rows    D_in, D_out layer widths    M, N, K  sizes of a product C (M x N) = A (M x K) B (K x N)
// Strides are in elements, not bytes. Structs are filled by name: `Gemm<T, T> p{}; p.m = ...`.
#pragma once

#include "../../types.h"

namespace manualbp {

// How long sums are made. The error of adding n numbers one after another grows with the square root of n, that of
// adding parts of c numbers with the square root of c + n/c. Shorter parts cost time: 128 terms 0.5 to 1 %, 64 terms 1
// to 2 %, 32 terms 3 to 5 %.
constexpr int64_t kSumDepth = 64;
// Sums over rows of a batch are made in units: of kUnitRows in tall batches, whose blocks are short, else of
// kLongUnitRows.
constexpr int64_t kUnitRows = 96, kLongUnitRows = 4 * kUnitRows;
// The error of adding equal numbers grows with n itself, at worst to 9.8e-7 in parts of 64 and 7.4e-7 in parts of 48,
// and a batch may have many equal rows: a unit that is longer than one part is summed in parts of 48 rows.
constexpr int64_t kSumRows = 48;

// C = A B, then optionally + bias and ReLU. The three products of a layer are all of this form:
//   forward       f    = h Omega^T + beta   A = h,   B = Omega^T, with bias and ReLU in the same pass
//   input grad    dh   = df Omega           A = df,  B = Omega, with the mask and the column sums of the layer below
//   weight grad   dOmega = df^T h           A = df^T, B = h
// A and B may have any strides (transposed, expanded, overlapping); C's columns are contiguous.
template <typename T, typename Out>
struct Gemm {
  int64_t m, n, k;
  const T* a;  // (M, K)
  int64_t a_m, a_k;
  const T* b;  // (K, N)
  int64_t b_k, b_n;
  Out* c;  // (M, N)
  int64_t c_m;
  const T* bias = nullptr;  // (N), or nullptr
  int64_t bias_stride = 0;
  bool relu = false;
  bool accumulate = false;                     // C += A B
  const accumulator_t<T>* packed_b = nullptr;  // B as `pack` leaves it, or nullptr: packed on the way
  // C = I[mask > 0] . C by the rule of ReluBackward, and the column sums of the result, row after row. Only if N is a
  // multiple of the register tile, and not in half precision.
  const Out* mask = nullptr;  // (M, N), columns contiguous, or nullptr
  int64_t mask_m = 0;
  double* column_sum = nullptr;  // (N): added to what is in it; nullptr: not wanted
  // If K counts rows of a batch: the unit in which they are summed, kUnitRows or kLongUnitRows. 0: K counts features.
  int64_t unit_rows = 0;
};

// df = scale I[h > 0] . dh and, in the same pass, the column sums of df, which are d(beta); units are added in double.
// As in PyTorch, a gradient passes unless h <= 0: NaN lets it pass, 0 does not. scale: 1, or that of the dropout that
// made h; it multiplies what passes. 1 without h.
template <typename T>
struct ReluBackward {
  int64_t rows, cols;
  const T* grad;  // (rows, cols), any strides
  int64_t grad_row, grad_col;
  const T* h;  // (rows, cols), columns contiguous; nullptr: no mask
  int64_t h_row;
  T* out;  // (rows, cols) contiguous; may be grad itself; nullptr: only the sums are wanted
  double* column_sum;  // (cols): added to what is in it; nullptr: not wanted
  accumulator_t<T> scale = 1;
  int64_t first_col, last_col;  // computes these columns [first_col, last_col): all, or a stripe if cols > 32
};

// h = m . h, in place, with m = scale where `kept` is not 0, and 0 elsewhere: dropout, once its mask has been drawn. As in
// PyTorch it is a product: NaN stays NaN, and Inf that is dropped becomes NaN.
template <typename T>
struct Dropout {
  T* h;
  const uint8_t* kept;
  accumulator_t<T> scale;
};

// out[i] = sum over s of partial[s][i], in a fixed order: groups of four slices, which are added in double.
template <typename T, typename Partial>
struct Reduce {
  int64_t slices, stride;
  const Partial* partial;  // (slices, stride)
  T* out;  // (size)
};

// total (+)= sum, in double; for the last sum, sum = total + sum instead.
template <typename A>
struct AddUp {
  A* sum;
  double* total;
  bool first, last;
};

// A loss of f (rows, cols): the kernel returns the sum over rows and, if `gradient`, replaces f by df.
template <typename T>
struct Loss {
  int64_t rows, cols;
  T* f;  // (rows, cols) contiguous
  const T* target;  // (rows, cols), or nullptr
  const accumulator_t<T>* wide_target;  // the same, if it is float32 and T is not (autocast), or nullptr
  const int64_t* classes;  // (rows), or nullptr
  int64_t target_row, target_col;
  double scale;  // of the gradient: 1, or 1 / (number of terms) for a mean
  bool gradient;
  int64_t ignore_index;
  double label_smoothing;
};

// The kernel of one kind of loss.
template <typename T>
using LossKernel = double (*)(const Loss<T>&);

// A layer whose flow is measured: f = beta + Omega h before the ReLU, if one follows, and df, (rows, cols) contiguous.
template <typename T>
struct LayerFlow {
  int64_t rows, cols;
  const T* f;
  const T* df;
  bool relu;
};
struct FlowSums {
  double f, h, df;  // sums of squares of f, a[f] and df
  double off, on;  // columns in which no row, or every row, is above 0
};
struct Moments {
  double sum, square;
};

// The scalars of an optimizer step, in the type A of its arithmetic. They are computed in double, as Python does, and then
// rounded (`in_both_types`), as torch does with a Python number.
template <typename A>
struct UpdateScalars {
  A step_size = 0;  // SGD: lr; Adam: lr / (1 - beta1^t)
  A weight_decay = 0;  // the gradient is increased by this times the parameter
  A shrink = 1;  // decoupled weight decay, 1 - lr weight_decay: the parameter is multiplied by it
  A momentum = 0;  // SGD
  A gain = 1;  // SGD: 1 - dampening
  A weight1 = 0;  // Adam: 1 - beta1
  A beta2 = 0;  // Adam
  A weight2 = 0;  // Adam: 1 - beta2
  A correction2 = 1;  // Adam: (1 - beta2^t)^(1/2)
  A eps = 0;  // Adam
  A gradient_scale = 1;  // the gradient is multiplied by it, and rounded to the storage type
  bool maximize = false;  // the gradient is then negated
  bool nesterov = false;  // SGD
  // What follows from these.
  bool scales = false, decays = false, shrinks = false;  // whether gradient_scale, weight_decay and shrink matter
};
// The tensors as runs of numbers in the same order, whatever their shape.
struct Update {
  void* parameter;
  const void* gradient;
  void* first;  // momentum_buffer or exp_avg; nullptr: SGD without momentum
  void* second;  // exp_avg_sq; nullptr: SGD
  void* largest;  // max_exp_avg_sq; nullptr: not amsgrad
  bool fresh;  // `first` is a momentum buffer that holds nothing yet
};
// In both types, so that the kernels of all storage types have the same arguments.
struct AllUpdateScalars {
  UpdateScalars<double> f64;
  UpdateScalars<float> f32;
};
inline AllUpdateScalars in_both_types(UpdateScalars<double> s) {
  s.scales = s.gradient_scale != 1;
  s.decays = s.weight_decay != 0;
  s.shrinks = s.shrink != 1;
  UpdateScalars<float> f;
  f.step_size = float(s.step_size);
  f.weight_decay = float(s.weight_decay);
  f.shrink = float(s.shrink);
  f.momentum = float(s.momentum);
  f.gain = float(s.gain);
  f.weight1 = float(s.weight1);
  f.beta2 = float(s.beta2);
  f.weight2 = float(s.weight2);
  f.correction2 = float(s.correction2);
  f.eps = float(s.eps);
  f.gradient_scale = float(s.gradient_scale);
  f.maximize = s.maximize;
  f.nesterov = s.nesterov;
  f.scales = s.scales;
  f.decays = s.decays;
  f.shrinks = s.shrinks;
  return {s, f};
}

// Updates the numbers begin ... end - 1. Bits do not depend on how a run is cut.
using UpdateKernel = void (*)(const Update&, const AllUpdateScalars&, int64_t begin, int64_t end);

// The kernels of one storage type at one instruction-set level. Each runs on the calling thread. A level may have products
// of its own and all else from another one (isa.cpp).
template <typename T>
struct Products {
  using A = accumulator_t<T>;
  // Whether a product of m rows reads B (K, N) where it lies, without packing.
  bool (*reads_in_place)(int64_t m, int64_t b_k, int64_t b_n, int64_t n);
  // Elements of B (K, N) when packed, and the packing. Columns are packed in panels of `tile_cols`, one after another, so
  // that column n, a multiple of it, begins at packed_size(k, n).
  int64_t (*packed_size)(int64_t k, int64_t n);
  void (*pack)(const T* b, int64_t b_k, int64_t b_n, int64_t k, int64_t n, accumulator_t<T>* out);
  void (*gemm)(const Gemm<T, T>&, void* workspace);
  void (*gemm_accumulated)(const Gemm<T, A>&, void* workspace);  // C in the accumulator type
  // What `workspace` must hold for products with at most n columns and depth k; 64-byte aligned.
  int64_t (*workspace_bytes)(int64_t n, int64_t k);
};

template <typename T>
struct Kernels : Products<T> {
  using A = accumulator_t<T>;
  void (*relu_backward)(const ReluBackward<T>&);
  void (*sum_by_tiles)(const ReluBackward<T>&);  // only column_sum, with the bits of Gemm::column_sum
  void (*dropout)(const Dropout<T>&, int64_t begin, int64_t end);
  void (*reduce)(const Reduce<T, A>&, int64_t begin, int64_t end);
  void (*reduce_double)(const Reduce<T, double>&, int64_t begin, int64_t end);
  void (*add_up)(const AddUp<A>&, int64_t begin, int64_t end);
  LossKernel<T> (*loss)(LossKind);
  void (*store)(double value, T* out);
  void (*narrow)(const A* in, T* out, int64_t n);  // rounds n numbers
  FlowSums (*layer_flow)(const LayerFlow<T>&);
  Moments (*moments)(const T* x, const T* y, T* copy, int64_t size);
  UpdateKernel update;
};

// One instruction-set level; isa.cpp chooses among them.
struct KernelTable {
  const char* name;
  int64_t tile_rows;  // rows of a register tile: work is divided at multiples of it
  int64_t tile_cols;  // float columns of a register tile
  int64_t gradient_rows, gradient_cols;  // the block of a weight's gradient that is one product
  Kernels<double> f64;
  Kernels<float> f32;
  Kernels<bfloat16> bf16;
  Kernels<float16> f16;
};

}  // namespace manualbp
