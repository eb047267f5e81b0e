// Compares the losses and their gradients with double: every type, odd shapes, smoothing, ignored rows, special values.

#include "cuda_test.h"

#include "../../csrc/cuda/loss.cu"

namespace manualbp::cuda {

double log_sum_exp(const std::vector<double>& f, size_t first, size_t cols) {
  const double largest = *std::max_element(f.begin() + first, f.begin() + first + cols);
  double total = 0;
  for (size_t j = 0; j < cols; ++j) total += std::exp(f[first + j] - largest);
  return largest + std::log(total);
}

// Returns the value, and writes the gradient of each element to `df`.
double expected(LossKind kind, const std::vector<double>& f, const std::vector<double>& y,
                const std::vector<int64_t>& classes, int64_t cols, double smoothing, int64_t ignore,
                std::vector<double>& df) {
  double sum = 0;
  df.assign(f.size(), 0.0);
  for (size_t i = 0; i < f.size(); ++i) {
    const size_t row = i / size_t(cols), col = i % size_t(cols);
    if (kind == LossKind::mse) {
      sum += (f[i] - y[i]) * (f[i] - y[i]);
      df[i] = 2 * (f[i] - y[i]);
    } else if (kind == LossKind::bce_with_logits) {
      sum += std::max(f[i], 0.0) - f[i] * y[i] + std::log1p(std::exp(-std::fabs(f[i])));
      df[i] = 1 / (1 + std::exp(-f[i])) - y[i];
    } else if (classes[row] != ignore) {
      const double log_p = f[i] - log_sum_exp(f, row * size_t(cols), size_t(cols));
      const double target = (col == size_t(classes[row]) ? 1 - smoothing : 0.0) + smoothing / double(cols);
      if (target != 0) sum -= target * log_p;
      df[i] = std::exp(log_p) - target;
    }
  }
  return sum;
}

template <typename T>
void test(LossKind kind, int64_t rows, int64_t cols, double smoothing = 0, bool mean = false, bool gradient = true) {
  const char* const names[] = {"mse", "bce_with_logits", "cross_entropy"};
  begin_case(names[int(kind)], kTypeName<T>, rows, "x", cols, "smoothing", smoothing, mean ? "mean" : "sum",
             gradient ? "" : "no gradient");
  constexpr int64_t kIgnore = -100, kStride = 2;
  Random random;
  Buffer<T> f(rows * cols), target(rows * cols);
  std::vector<int64_t> classes(static_cast<size_t>(rows));
  std::unique_ptr<int64_t[]> strided(new int64_t[size_t(std::max<int64_t>(rows * kStride - 1, 0))]);
  int64_t counted = 0;
  for (int64_t i = 0; i < f.size(); ++i) {
    f.set(i, 4 * random.uniform());
    target.set(i, (random.uniform() + 1) / 2);
  }
  for (int64_t i = 0; i < rows; ++i) {
    classes[size_t(i)] = random.below(5) == 0 ? kIgnore : random.below(cols);
    strided[size_t(i * kStride)] = classes[size_t(i)];
    counted += classes[size_t(i)] != kIgnore;
  }
  if (kind == LossKind::bce_with_logits && f.size() > 2) {
    f.set(0, 200);  // exp would overflow
    f.set(1, -200);
  }
  const auto before = f.values(), y = target.values();
  std::vector<double> df;
  const double sum = expected(kind, before, y, classes, cols, smoothing, kIgnore, df);

  const bool is_class = kind == LossKind::cross_entropy;
  const double count = is_class ? double(counted) : double(rows * cols), scale = mean && !is_class ? 1 / count : 1;
  const double divisor = mean && is_class ? count : 1;
  std::unique_ptr<unsigned long long> counter(new unsigned long long(0));
  if (is_class) {
    count_classes({rows, cols, strided.get(), kStride, kIgnore, counter.get()}, nullptr);
    expect("counted", 0, double(*counter), count);
  }
  const unsigned long long* const counts = is_class && mean ? counter.get() : nullptr;
  const int64_t blocks = loss_blocks(kind, rows, cols);
  std::unique_ptr<double[]> sums(new double[size_t(blocks)]);
  loss<T>(kind,
          {rows, cols, f.data(), is_class ? nullptr : target.data(), is_class ? strided.get() : nullptr, kStride,
           kIgnore, smoothing, scale, counts, gradient, sums.get()},
          nullptr);
  Buffer<T> out(1);
  loss_total<T>({blocks, sums.get(), scale, counts, out.data()}, nullptr);

  const double want = sum * scale / divisor;
  expect("loss", 0, out.at(0), want, std::fabs(want) * (kRounding<T> + 32 * kSumRounding<T>));
  for (int64_t i = 0; i < f.size(); ++i) {
    const double d = gradient ? df[size_t(i)] * scale / divisor : before[size_t(i)];
    expect("df", i, f.at(i), d,
           gradient ? std::fabs(d) * kRounding<T> + 32 * kSumRounding<T> * scale + (sizeof(T) == 2 ? 0x1p-24 : 0) : 0);
  }
}

// NaN and infinity of an output stay in its row, even if ignored; the target class may be the non-finite one.
template <typename T>
void test_special(double value, bool ignored) {
  begin_case("cross_entropy, special value", kTypeName<T>, value, ignored);
  Buffer<T> f(9);
  for (int64_t i = 0; i < 9; ++i) f.set(i, double(i % 3));
  f.set(4, value);
  const int64_t classes[3] = {0, ignored ? -100 : 1, 2};
  double sums[1];
  loss<T>(LossKind::cross_entropy, {3, 3, f.data(), nullptr, classes, 1, -100, 0.0, 1.0, nullptr, true, sums}, nullptr);
  for (int64_t i = 0; i < 9; ++i) {
    const bool is_nan = std::isnan(f.at(i)), expected_nan = i / 3 == 1 && !(value < 0);
    if (is_nan != expected_nan) throw std::runtime_error("NaN in the wrong place");
  }
  // minus infinity at the target class gives probability zero and an infinite loss
  if (ignored ? !std::isfinite(sums[0]) : value < 0 ? sums[0] != INFINITY : !std::isnan(sums[0]))
    throw std::runtime_error("the loss hides it");
}

template <typename T>
void test_all(bool thorough) {
  for (const auto kind : {LossKind::mse, LossKind::bce_with_logits, LossKind::cross_entropy}) {
    for (const int64_t cols : thorough ? Sizes{1, 10, 33} : Sizes{33}) {
      for (const int64_t rows : thorough ? Sizes{1, 20} : Sizes{9}) test<T>(kind, rows, cols, 0, rows != 1);
    }
    test<T>(kind, 0, 5);
    test<T>(kind, 6, 5, 0, true, false);
  }
  test<T>(LossKind::cross_entropy, 20, 7, 0.3);
  test<T>(LossKind::cross_entropy, 20, 40, 1.0, true);
  for (const double value : {double(NAN), double(INFINITY), -double(INFINITY)}) {
    for (const bool ignored : {false, true}) test_special<T>(value, ignored);
  }
}

void test_out_of_bounds() {
  for (const int64_t c : {int64_t(3), int64_t(-1)}) {
    begin_case("a class out of bounds:", c);
    Buffer<float> f(3);
    const int64_t classes[1] = {c};
    double sums[1];
    try {
      loss<float>(LossKind::cross_entropy, {1, 3, f.data(), nullptr, classes, 1, -100, 0.0, 1.0, nullptr, true, sums},
                  nullptr);
    } catch (const std::runtime_error& error) {
      if (std::string(error.what()).find("out of bounds") != std::string::npos) continue;
    }
    throw std::runtime_error("was accepted");
  }
}

// More elements than 32 bits can count; runs the block with the last row. All logits but the last are zero.
void test_large() {
  begin_case("losses, 64-bit indices");
  using T = float16;
  const int64_t cols = 1 << 20, rows = 4097, size = rows * cols;
  Reserved<T> f(size), target(size);
  const int64_t classes[1] = {cols - 1};
  std::vector<double> sums(528);
  const auto run = [&](LossKind kind, int64_t block) {
    f.set(size - 1, 6);
    run_block(block, 0, [&] {
      loss<T>(kind, {rows, cols, f.data(), target.data(), classes, 0, -100, 0.0, 1.0, nullptr, true, sums.data()},
              nullptr);
    });
    return sums[size_t(block)];
  };
  const int64_t block = (size - 1) / kLossThreads % int64_t(sums.size());
  expect("mse", block, run(LossKind::mse, block), 36);
  expect("df", size - 1, f.at(size - 1), 12);
  const double log_total = std::log(double(cols - 1) + std::exp(6.0)), log_p = 6 - log_total;
  expect("cross entropy", 512, run(LossKind::cross_entropy, 512), -log_p, 1e-3);
  expect("df", size - 1, f.at(size - 1), std::exp(log_p) - 1, 1e-3);
}

}  // namespace manualbp::cuda

int main() {
  using namespace manualbp::cuda;
  using manualbp::bfloat16, manualbp::float16, manualbp::LossKind;
  return run_tests<float, double, float16, bfloat16>(
      [](auto zero, bool thorough) { test_all<decltype(zero)>(thorough); },
      [] {
        test_out_of_bounds();
        test<float>(LossKind::mse, 14000, 10, 0, true);  // more elements than threads
        test<double>(LossKind::cross_entropy, 4300, 3, 0.1, true);
        test_large();
      });
}
