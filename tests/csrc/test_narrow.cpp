// Compares the narrow kernels with double, per layer: every type, odd widths and depths, special values, alignments.

#include "cuda_test.h"

#include "../../csrc/cuda/narrow.cu"

namespace manualbp::cuda {

struct Options {
  bool final_relu = false, biases = true, integers = true, grad_input = true, dbeta = true, store = true;
  int lowest = 0;
  int64_t skip = 0, input_gap = 0;
  double special = 0;  // a value put into the input and the gradient
  double weight = 0;   // all weights
};

// out (m, n) = a (m, k) b (k, n), and the sums of absolute values; b(k, n) = b[k * b_k + n * b_n].
struct Reference {
  std::vector<double> values, sums;
};
Reference multiply(const std::vector<double>& a, const std::vector<double>& b, int64_t m, int64_t n, int64_t k,
                   int64_t b_k, int64_t b_n) {
  Reference out{std::vector<double>(size_t(m * n)), std::vector<double>(size_t(m * n))};
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t x = 0; x < k; ++x) {
        const double term = a[size_t(i * k + x)] * b[size_t(x * b_k + j * b_n)];
        out.values[size_t(i * n + j)] += term;
        out.sums[size_t(i * n + j)] += std::fabs(term);
      }
    }
  }
  return out;
}

// Integers must be equal, real numbers within the rounding of the sums and of the stored number. Each layer is checked
// from what the kernel stored of the previous one, so that neither errors nor flipped ReLUs propagate.
template <typename T>
void expect_near(const char* what, int64_t i, double got, double want, double sum, bool integers) {
  expect(what, i, got, want, integers ? 0 : std::fabs(want) * kRounding<T> + 32 * sum * kSumRounding<T>);
}

template <typename T>
void test(int64_t rows, const std::vector<int>& widths, const Options& o = {}) {
  std::string text;
  for (const int w : widths) text += std::to_string(w) + "-";
  begin_case("narrow", kTypeName<T>, rows, "x", text, o.final_relu ? "final ReLU" : "", o.biases ? "" : "no biases",
             o.integers ? "integers" : "real", o.grad_input ? "" : "no input gradient", "lowest", o.lowest, "skip",
             o.skip, o.input_gap, o.special);
  const int layers = int(widths.size()) - 1;
  Random random;
  const auto fill = [&](Buffer<T>& buffer, double high) {
    for (int64_t i = 0; i < buffer.size(); ++i) {
      buffer.set(i, o.integers ? std::max(-high, std::min(high, double(random.integer()))) : random.uniform());
    }
  };
  const int64_t d_0 = widths[0], d_k = widths.back(), input_row = d_0 + o.input_gap;
  Buffer<T> input(std::max<int64_t>(rows * input_row - o.input_gap, 0), o.skip), output(rows * d_k);
  Buffer<T> grad_output(rows * d_k, o.skip), grad_input(rows * d_0);
  fill(input, 2);
  fill(grad_output, 2);
  if (o.special != 0) {
    input.set(std::min<int64_t>(1, d_0 - 1), o.special);
    grad_output.set(0, o.special);
  }
  std::vector<Buffer<T>> omega, beta;
  int64_t hidden_width = 0, df_width = 0;
  for (int k = 0; k < layers; ++k) {
    omega.emplace_back(widths[k] * widths[k + 1], o.skip);
    beta.emplace_back(widths[k + 1]);
    fill(beta.back(), 2);
    fill(omega.back(), 1);
    for (int64_t i = 0; o.integers && i < omega[k].size(); ++i) {  // few terms a row keep sums exact in bfloat16
      if (random.below(widths[size_t(k)]) >= 5) omega[size_t(k)].set(i, 0);
    }
    for (int64_t i = 0; o.weight != 0 && i < omega[size_t(k)].size(); ++i) omega[size_t(k)].set(i, o.weight);
    hidden_width += k + 1 < layers ? widths[k + 1] : 0;
    df_width += k >= o.lowest ? widths[k + 1] : 0;
  }
  Buffer<T> hidden(o.store ? rows * hidden_width : 0), df(rows * df_width);
  NarrowForward<T> forward{};
  forward.net.rows = rows;
  forward.net.layers = layers;
  for (int k = 0; k <= layers; ++k) forward.net.widths[k] = widths[size_t(k)];
  for (int k = 0; k < layers; ++k) {
    forward.net.omega[k] = omega[size_t(k)].data();
    forward.beta[k] = o.biases ? beta[size_t(k)].data() : nullptr;
  }
  forward.final_relu = o.final_relu;
  forward.input = input.data();
  forward.input_row = input_row;
  forward.hidden = o.store ? hidden.data() : nullptr;
  forward.output = output.data();
  narrow_forward(forward, nullptr);
  if (!o.store) return;  // another case compared the outputs; this one checks only memory

  std::vector<std::vector<double>> h(1);
  for (int64_t i = 0; i < rows * d_0; ++i) h[0].push_back(input.at(i / d_0 * input_row + i % d_0));
  int64_t offset = 0;
  for (int k = 0; k < layers; ++k) {
    const int64_t d_in = widths[size_t(k)], d_out = widths[size_t(k) + 1];
    const bool last = k + 1 == layers, relu = !last || o.final_relu;
    const auto f = multiply(h.back(), omega[size_t(k)].values(), rows, d_out, d_in, 1, d_in);
    std::vector<double> stored;
    for (int64_t i = 0; i < rows * d_out; ++i) {
      const double b = o.biases ? beta[size_t(k)].at(i % d_out) : 0.0, value = f.values[size_t(i)] + b;
      stored.push_back(last ? output.at(i) : hidden.at(offset + i));
      expect_near<T>("h", i, stored.back(), relu && value < 0 ? 0.0 : value, f.sums[size_t(i)] + std::fabs(b),
                     o.integers);
    }
    if (!last) offset += rows * d_out;
    h.push_back(stored);
  }

  const int64_t blocks = narrow_blocks<T>(rows);
  Buffer<accumulator_t<T>> dbeta(o.dbeta ? blocks * df_width : 0);
  NarrowBackward<T> backward{};
  backward.net = forward.net;
  backward.lowest = o.lowest;
  backward.grad_output = grad_output.data();
  backward.grad_row = d_k;
  backward.hidden = hidden.data();
  backward.output = o.final_relu ? output.data() : nullptr;
  backward.df = df.data();
  backward.grad_input = o.grad_input && o.lowest == 0 ? grad_input.data() : nullptr;
  backward.dbeta = o.dbeta ? dbeta.data() : nullptr;
  backward.dbeta_row = df_width;
  narrow_backward(backward, nullptr);

  std::vector<Buffer<T>> reduced;
  NarrowBiases<T> biases{};
  biases.slices = blocks;
  biases.partial = dbeta.data();
  for (int k = o.lowest, end = 0; k < layers; ++k) {
    reduced.emplace_back(widths[size_t(k) + 1]);
    biases.ends[biases.layers] = end += widths[size_t(k) + 1];
    biases.out[biases.layers++] = reduced.back().data();
  }
  if (o.dbeta) narrow_biases(biases, nullptr);

  std::vector<double> dh = grad_output.values(), sums(dh.size(), 0.0);
  int64_t df_offset = rows * df_width;
  for (int k = layers - 1; k >= o.lowest; --k) {
    const int64_t d_in = widths[size_t(k)], d_out = widths[size_t(k) + 1];
    const bool masked = k + 1 < layers || o.final_relu;
    df_offset -= rows * d_out;
    std::vector<double> column(size_t(d_out), 0.0), column_sums(size_t(d_out), 0.0);
    for (int64_t i = 0; i < rows * d_out; ++i) {
      if (masked) {
        const double want = h[size_t(k) + 1][size_t(i)] <= 0 ? 0.0 : dh[size_t(i)];
        expect_near<T>("df", i, df.at(df_offset + i), want, sums[size_t(i)], o.integers);
        dh[size_t(i)] = df.at(df_offset + i);
      }
      column[size_t(i % d_out)] += dh[size_t(i)];
      column_sums[size_t(i % d_out)] += std::fabs(dh[size_t(i)]);
    }
    for (int64_t j = 0; o.dbeta && j < d_out; ++j) {
      const double sum = reduced[size_t(k - o.lowest)].at(j);
      expect_near<T>("dbeta", j, sum, column[size_t(j)], column_sums[size_t(j)], o.integers);
    }
    const auto product = multiply(dh, omega[size_t(k)].values(), rows, d_in, d_out, d_in, 1);
    dh = product.values;
    sums = product.sums;
  }
  for (int64_t i = 0; backward.grad_input && i < rows * d_0; ++i) {
    expect_near<T>("dh_0", i, grad_input.at(i), dh[size_t(i)], sums[size_t(i)], o.integers);
  }
}

// Compares mma with the product in double; all numbers differ, so that a fragment in the wrong lane is detected.
template <typename T>
__global__ void mma_kernel(const Buffer<float>* out) {
  const int g = int(threadIdx.x) / 4, t = int(threadIdx.x) % 4;
  const auto pair = [](int x, int y) {
    return uint32_t(narrow<T>(float(x)).bits) | uint32_t(narrow<T>(float(y)).bits) << 16;
  };
  const auto a = [](int row, int k) { return (row * 3 + k * 5) % 11 - 5; };
  const auto b = [](int k, int col) { return (k * 7 + col * 2) % 13 - 6; };
  const uint32_t a_words[4] = {pair(a(g, 2 * t), a(g, 2 * t + 1)), pair(a(g + 8, 2 * t), a(g + 8, 2 * t + 1)),
                               pair(a(g, 2 * t + 8), a(g, 2 * t + 9)), pair(a(g + 8, 2 * t + 8), a(g + 8, 2 * t + 9))};
  const uint32_t b_words[2] = {pair(b(2 * t, g), b(2 * t + 1, g)), pair(b(2 * t + 8, g), b(2 * t + 9, g))};
  float c[4];
  for (int i = 0; i < 4; ++i) c[i] = float((g + i / 2 * 8) * 8 + 2 * t + i % 2);
  mma<T>(c, a_words, b_words);
  for (int i = 0; i < 4; ++i) (*const_cast<Buffer<float>*>(out))[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i];
}
template <typename T>
void test_mma() {
  begin_case("mma", kTypeName<T>);
  Buffer<float> out(128);
  emulation::run(&mma_kernel<T>, dim3(1), dim3(32), 0, &out);
  for (int row = 0; row < 16; ++row) {
    for (int col = 0; col < 8; ++col) {
      double want = row * 8 + col;
      for (int k = 0; k < 16; ++k) want += double(((row * 3 + k * 5) % 11 - 5) * ((k * 7 + col * 2) % 13 - 6));
      expect("c", row * 8 + col, out.at(row * 8 + col), want);
    }
  }
}

template <typename T>
void test_all(bool thorough) {
  if constexpr (sizeof(T) == 2) test_mma<T>();
  Options real, closed, bare, odd;
  real.integers = false;
  closed.final_relu = true;
  closed.lowest = 1;
  bare.biases = bare.grad_input = bare.dbeta = false;
  odd.skip = 1;
  odd.input_gap = 3;
  test<T>(70, {7, 33, 16, 5}, closed);
  test<T>(3, {5, 20, 2}, odd);
  if (!thorough) return;
  test<T>(5, {1, 1});
  test<T>(200, {3, 1, 17, 4}, real);
  test<T>(33, {16, 32, 48, 8}, bare);
  test<T>(64, {24, 8, 24}, odd);
  test<T>(150, {128, 100, 128}, real);
  test<T>(2, {9, 8, 7, 6, 5, 4, 3, 2, 1});
  closed.store = false;
  test<T>(10, {6, 5, 4}, closed);
  for (const double value : {double(NAN), double(INFINITY), -double(INFINITY)}) {
    Options special;
    special.special = value;
    test<T>(9, {5, 7, 3}, special);
    special.final_relu = true;
    test<T>(9, {5, 7, 3}, special);
    special.weight = -1;  // infinity times a weight is then not NaN, but times the zeros of the padding it is
    test<T>(9, {5, 7, 3}, special);
  }
}

// More elements than 32 bits can count, in h_1; runs the last block of a grid with one block per tile. All numbers but
// the last row are zero.
template <typename T>
void test_large() {
  const int64_t rows = (int64_t(1) << 32) / 128 + 3;
  const int widths[] = {16, 128, 16};
  begin_case("narrow, 64-bit indices", kTypeName<T>, rows);
  Reserved<T> input(rows * 16), hidden(rows * 128), output(rows * 16), df(rows * 144), grad_input(rows * 16);
  Buffer<T> omega_0(16 * 128), omega_1(16 * 128);
  for (int64_t i = 0; i < 16 * 128; ++i) omega_0.set(i, 1);
  for (int64_t i = 0; i < 16 * 128; ++i) omega_1.set(i, 1.0 / 128);
  for (int64_t i = rows * 16 - 16; i < rows * 16; ++i) input.set(i, 1);
  NarrowForward<T> forward{};
  forward.net.rows = rows;
  forward.net.layers = 2;
  std::copy_n(widths, 3, forward.net.widths);
  forward.net.omega[0] = omega_0.data();
  forward.net.omega[1] = omega_1.data();
  forward.input = input.data();
  forward.input_row = 16;
  forward.hidden = hidden.data();
  forward.output = output.data();
  const int64_t tiles = ceil_div(rows, NarrowProduct<T>::kRows);
  Reserved<float> dbeta(tiles * 144);
  NarrowBackward<T> backward{};
  backward.net = forward.net;
  backward.grad_output = input.data();  // ones in the last row
  backward.grad_row = 16;
  backward.hidden = hidden.data();
  backward.df = df.data();
  backward.grad_input = grad_input.data();
  backward.dbeta = dbeta.data();
  backward.dbeta_row = 144;
  run_block(tiles - 1, 0, [&] {
    const dim3 grid = unsigned(tiles);
    const auto shared = size_t(shared_bytes(forward.net));
    emulation::run(&narrow_forward_kernel<T>, grid, kNarrowThreads, shared, forward);
    emulation::run(&narrow_backward_kernel<T>, grid, kNarrowThreads, shared, backward);
  });
  expect("h", rows * 128 - 1, hidden.at(rows * 128 - 1), 16);
  expect("f", rows * 16 - 1, output.at(rows * 16 - 1), 16);
  expect("df", rows * 128 - 1, df.at(rows * 128 - 1), 0.125);  // df_0 comes first
  expect("dh_0", rows * 16 - 1, grad_input.at(rows * 16 - 1), 16);
  expect("dbeta", tiles * 144 - 1, dbeta.at(tiles * 144 - 1), 1);
  expect("dbeta", tiles * 144 - 144, dbeta.at(tiles * 144 - 144), 0.125);
}

}  // namespace manualbp::cuda

int main() {
  using namespace manualbp::cuda;
  using manualbp::bfloat16, manualbp::float16;
  return run_tests<float, float16, bfloat16>([](auto zero, bool thorough) { test_all<decltype(zero)>(thorough); },
                                             [] {
                                               test<float>(264 * 64 + 70, {2, 3, 1});  // more tiles than blocks
                                               test<bfloat16>(264 * 128 + 130, {2, 1});
                                               test_large<float>();
                                               test_large<bfloat16>();
                                             });
}
