// The passes of csrc/cpu/network.h, backward.h and double_backward.h, and the updates of update.h, on several threads,
// without torch (torch_stub/); the sanitizers run this and kernels.cpp. Several threads must give the same bits as one,
// stored activations the same as recomputed ones, and the one-pass loss the same as forward and backward.
//
//   network [CASES]        the networks listed below, and this many random ones, in each dtype
//   network CASES two      the same in float32 and bfloat16 (at the level bf16_model, only bfloat16)
//
// Exit status 77: this machine does not support the level MANUALBP_ISA.

#include "../../csrc/cpu/double_backward.h"
#include "../../csrc/cpu/update.h"

#include <algorithm>
#include <cstdio>
#include <exception>
#include <iterator>
#include <string>

#include "common.h"

namespace {

// rounds: with numbers whose sums are rounded, so that their bits tell in which order they were made; else all sums are
// small integers, and exact.
template <typename T>
struct Case {
  Case(int64_t batch_, const std::vector<int64_t>& sizes_, bool bias, bool final_relu_, bool dropout_, bool rounds_)
      : batch(batch_),
        sizes(sizes_),
        final_relu(final_relu_),
        dropout(dropout_),
        rounds(rounds_),
        input(batch * sizes[0]),
        end(batch * sizes.back()) {
    const auto fill = [&](Exact<T>& numbers) {
      numbers.fill(2);
      for (int64_t i = 0; rounds && i < numbers.size; ++i) numbers.data[i] = rounded<T>(double(below(2001)) / 1000 - 1);
    };
    fill(input), fill(end);
    for (size_t k = 0; k + 1 < sizes.size(); ++k) {
      weights.push_back(std::make_unique<Exact<T>>(sizes[k] * sizes[k + 1]));
      biases.push_back(std::make_unique<Exact<T>>(sizes[k + 1]));
      fill(*weights[k]), fill(*biases[k]);
      // About six numbers per row are not 0, so that sums are small enough to be exact in every dtype.
      for (int64_t i = 0; !rounds && i < weights[k]->size; ++i) {
        weights[k]->data[i] = rounded<T>(below(sizes[k]) < 4 ? double(below(3) - 1) : 0.0);
      }
      if (!bias) biases[k].reset();
    }
    // Dropout after every other ReLU, by powers of two, so that sums stay exact.
    for (size_t k = 0; k < weights.size(); ++k) {
      kept.push_back(std::make_unique<Exact<uint8_t>>(batch * sizes[k + 1]));
      for (int64_t i = 0; i < kept[k]->size; ++i) kept[k]->data[i] = uint8_t(below(3) > 0);
    }
  }
  bool drops(size_t k) const { return dropout && k % 2 == 0 && (k + 1 < weights.size() || final_relu); }
  std::vector<Layer<T>> layers() const {
    std::vector<Layer<T>> layers(weights.size());
    for (size_t k = 0; k < weights.size(); ++k) {
      layers[k].omega = Matrix<const T>::contiguous(weights[k]->data, sizes[k + 1], sizes[k]);
      layers[k].beta = {biases[k] ? biases[k]->data : nullptr, 1};
      if (!drops(k)) continue;
      layers[k].scale = kScale;
      layers[k].kept = kept[k]->data;
    }
    return layers;
  }
  Network<T> network() const {
    Network<T> net(batch, layers(), final_relu);
    if (rounds) net.plan.wave_bytes = 4 << 10;  // so that these small batches take several waves
    return net;
  }
  Matrix<const T> matrix(const Exact<T>& memory, int64_t cols) const {
    return Matrix<const T>::contiguous(memory.data, batch, cols);
  }
  int64_t batch;
  std::vector<int64_t> sizes;
  bool final_relu, dropout, rounds;
  Exact<T> input, end;
  std::vector<std::unique_ptr<Exact<T>>> weights, biases;
  std::vector<std::unique_ptr<Exact<uint8_t>>> kept;
  static constexpr int kScale = 2;
};

// The gradients of a network, each in separate memory.
template <typename T>
struct Results {
  explicit Results(const Case<T>& c) : input(c.batch * c.sizes[0]) {
    gradients.input = input.data;
    for (size_t k = 0; k < c.weights.size(); ++k) {
      parameters.push_back(std::make_unique<Exact<T>>(c.weights[k]->size));
      gradients.omega.push_back(parameters.back()->data);
      parameters.push_back(std::make_unique<Exact<T>>(c.sizes[k + 1]));
      gradients.beta.push_back(parameters.back()->data);
    }
  }
  bool equals(const Results& other) const {
    bool same = equal(input, other.input);
    for (size_t i = 0; i < parameters.size(); ++i) same = same && equal(*parameters[i], *other.parameters[i]);
    return same;
  }
  static bool equal(const Exact<T>& one, const Exact<T>& other) {
    return one.size == 0 || std::memcmp(one.data, other.data, size_t(one.size) * sizeof(T)) == 0;
  }
  Exact<T> input;
  std::vector<std::unique_ptr<Exact<T>>> parameters;
  Gradients<T> gradients;
};

// The results of the backward pass of the backward pass.
template <typename T>
struct SecondResults {
  SecondResults(const Case<T>& c, const Cotangents<T>& from)
      : grad_output(c.batch * c.sizes.back()), weights(c.weights.size()) {
    gradients.grad_output = grad_output.data;
    for (size_t k = 0; k < c.weights.size(); ++k) {
      h.push_back(std::make_unique<Exact<T>>(c.batch * c.sizes[k]));
      gradients.h.push_back(from.omega[k] ? h[k]->data : nullptr);
      weights[k] = std::make_unique<Exact<T>>(c.weights[k]->size);
      gradients.omega.push_back(from.reach(k) ? weights[k]->data : nullptr);
    }
  }
  bool equals(const SecondResults& other) const {
    bool same = Results<T>::equal(grad_output, other.grad_output);
    for (size_t k = 0; k < h.size(); ++k) {
      same = same && (!gradients.h[k] || Results<T>::equal(*h[k], *other.h[k]));
      same = same && (!gradients.omega[k] || Results<T>::equal(*weights[k], *other.weights[k]));
    }
    return same;
  }
  Exact<T> grad_output;
  std::vector<std::unique_ptr<Exact<T>>> h, weights;
  SecondGradients<T> gradients;
};

// Whether the backward pass of the backward pass gives the same bits on several threads, for the gradient by the input
// alone and for those by all results.
template <typename T>
bool check_double_backward(const Case<T>& c, const Exact<T>& output, const Exact<T>& hidden) {
  const size_t layers = c.weights.size();
  const auto input = c.matrix(c.input, c.sizes[0]), end = c.matrix(c.end, c.sizes.back());
  const T* const mask = c.final_relu ? output.data : nullptr;
  std::unique_ptr<SecondResults<T>> first[2];
  for (const uint32_t threads : {1u, 4u}) {
    stub_threads = threads;
    auto net = c.network();
    Results<T> once(c), stored(c);
    Exact<T> df(hidden.size);
    backward<T>(net, input, hidden.data, false, end, mask, once.gradients);
    backward<T>(net, input, hidden.data, false, end, mask, stored.gradients, {df.data});
    if (!stored.equals(once)) return false;
    for (const bool all : {false, true}) {
      Cotangents<T> from{input, std::vector<std::optional<Matrix<const T>>>(layers),
                         std::vector<std::optional<Bias<T>>>(layers)};
      for (size_t k = 0; k < layers && all; ++k) {
        from.omega[k] = Matrix<const T>::contiguous(c.weights[k]->data, c.sizes[k + 1], c.sizes[k]);
        if (c.biases[k]) from.beta[k] = Bias<T>{c.biases[k]->data, 1};
      }
      auto results = std::make_unique<SecondResults<T>>(c, from);
      DoubleBackwardPass<T>(net, from, results->gradients).run(input, hidden.data, df.data, end, mask);
      if (!first[all]) {
        first[all] = std::move(results);
      } else if (!results->equals(*first[all])) {
        return false;
      }
    }
  }
  return true;
}

// Returns how the batch is split. many: on up to 192 threads, with numbers whose sums are rounded.
template <typename T>
Way check(int64_t batch, const std::vector<int64_t>& sizes, bool bias, bool final_relu, bool dropout = false,
          bool many = false) {
  const Case<T> c(batch, sizes, bias, final_relu, dropout, /*rounds=*/many);
  const auto require = [&](bool fine, const char* what) {
    if (fine) return;
    std::printf("%s: wrong for %lld rows of", what, (long long)batch);
    for (const int64_t size : sizes) std::printf(" %lld", (long long)size);
    std::printf(", %s, level %s\n", name_of<T>(), kernel_table().name);
    std::exit(1);
  };
  const auto input = c.matrix(c.input, sizes[0]), end = c.matrix(c.end, sizes.back());
  const int64_t hidden_size = c.network().hidden_size();
  Exact<T> first_output(batch * sizes.back()), first_hidden(hidden_size);
  Results<T> first(c), first_recomputed(c), first_loss(c);
  double first_value = 0;
  const std::vector<uint32_t> few{1, 2, 4}, most{1, 3, 7, 40, 192};
  for (const uint32_t threads : many ? most : few) {
    stub_threads = threads;
    Exact<T> output(batch * sizes.back()), hidden(hidden_size), again(batch * sizes.back());
    c.network().forward(input, hidden.data, output.data);
    c.network().forward(input, nullptr, again.data);
    require(Results<T>::equal(output, again), "forward without stored activations");
    Results<T> stored(c), recomputed(c), loss(c);
    const T* const mask = final_relu ? output.data : nullptr;
    auto net = c.network();
    backward<T>(net, input, hidden.data, false, end, mask, stored.gradients);
    backward<T>(net, input, nullptr, true, end, mask, recomputed.gradients);
    require(many || stored.equals(recomputed), "backward that computes the activations again");
    double value = 0;
    if (!final_relu) {
      Loss<T> terms{};
      terms.cols = sizes.back(), terms.scale = 1, terms.gradient = true;
      terms.target = c.end.data, terms.target_row = sizes.back(), terms.target_col = 1;
      LossPass<T> pass(net, kernels<T>().loss(LossKind::mse), loss.gradients);
      const double once = pass.run(input, terms);
      value = pass.run(input, terms);
      require(value == once, "loss, computed twice in the same memory");
    }
    if (threads == 1) {
      std::memcpy(first_output.data, output.data, size_t(output.size) * sizeof(T));
      std::memcpy(first_hidden.data, hidden.data, size_t(hidden.size) * sizeof(T));
      backward<T>(net, input, hidden.data, false, end, mask, first.gradients);
      backward<T>(net, input, nullptr, true, end, mask, first_recomputed.gradients);
      first_value = value;
      std::swap(first_loss.input.data, loss.input.data);
      first_loss.parameters.swap(loss.parameters);
      continue;
    }
    require(Results<T>::equal(output, first_output) && Results<T>::equal(hidden, first_hidden), "forward on threads");
    require(stored.equals(first) && recomputed.equals(first_recomputed), "backward on threads");
    require(final_relu || (loss.equals(first_loss) && value == first_value), "loss on threads");
  }
  require(check_double_backward(c, first_output, first_hidden), "the backward pass of the backward pass on threads");
  if (many) return c.network().plan.way;
  // Compares forward, the reference of the checks above, with naive loops.
  std::vector<double> h(size_t(batch * sizes[0]));
  for (size_t i = 0; i < h.size(); ++i) h[i] = to_double(c.input.data[i]);
  for (size_t k = 0; k + 1 < sizes.size(); ++k) {
    std::vector<double> f(size_t(batch * sizes[k + 1]));
    for (int64_t i = 0; i < batch; ++i) {
      for (int64_t j = 0; j < sizes[k + 1]; ++j) {
        double sum = c.biases[k] ? to_double(c.biases[k]->data[j]) : 0;
        for (int64_t m = 0; m < sizes[k]; ++m) {
          sum += h[size_t(i * sizes[k] + m)] * to_double(c.weights[k]->data[j * sizes[k] + m]);
        }
        if (sum < 0 && (k + 2 < sizes.size() || final_relu)) sum = 0;
        const int64_t at = i * sizes[k + 1] + j;
        if (c.drops(k)) sum *= c.kept[k]->data[at] ? Case<T>::kScale : 0;
        f[size_t(at)] = to_double(rounded<T>(sum));
      }
    }
    h = f;
  }
  for (size_t i = 0; i < h.size(); ++i) require(to_double(first_output.data[i]) == h[i], "forward");

  // The conditions that decide how gradients are summed must not depend on the number of threads.
  Plan<T> plan = plan_of(batch, c.layers(), 1), other = plan_of(batch, c.layers(), 7);
  const BackwardPlan pass = plan.backward(0, true), other_pass = other.backward(0, true);
  require(plan.way == other.way && pass.slice_rows == other_pass.slice_rows &&
              pass.chunk_rows == other_pass.chunk_rows && pass.rows == other_pass.rows &&
              pass.unit_rows == other_pass.unit_rows,
          "plan on threads");
  return plan.way;
}

template <typename T>
int32_t dtype_number() {
  return std::is_same_v<T, double>     ? aoti_torch_dtype_float64()
         : std::is_same_v<T, float>    ? aoti_torch_dtype_float32()
         : std::is_same_v<T, bfloat16> ? aoti_torch_dtype_bfloat16()
                                       : aoti_torch_dtype_float16();
}

// Three steps of an optimizer whose parameters have these sizes.
template <typename T>
void check_update(const char* rule, const std::vector<int64_t>& sizes) {
  const bool adam = std::string(rule) == "adam";
  const size_t count = sizes.size(), lists = adam ? 3 : 1;
  std::vector<std::unique_ptr<Exact<T>>> start, gradients, first;
  const auto draw = [&](std::vector<std::unique_ptr<Exact<T>>>& list, int64_t size) {
    list.push_back(std::make_unique<Exact<T>>(size));
    for (int64_t i = 0; i < size; ++i) list.back()->data[i] = rounded<T>(double(below(1000)) / 1000);
  };
  for (const int64_t size : sizes) draw(gradients, size);
  for (size_t k = 0; k < (1 + lists) * count; ++k) draw(start, sizes[k % count]);
  for (const uint32_t threads : {1u, 2u, 5u}) {
    stub_threads = threads;
    std::vector<std::unique_ptr<Exact<T>>> memory;
    std::vector<Tensor> tensors;
    std::vector<float> steps(count, 0.0f);
    for (const auto& each : start) {
      memory.push_back(std::make_unique<Exact<T>>(each->size));
      if (each->size) std::memcpy(memory.back()->data, each->data, size_t(each->size) * sizeof(T));
      const std::shared_ptr<void> data(memory.back()->data, [](void*) {});
      tensors.emplace_back(new AtenTensorOpaque{{each->size}, {1}, dtype_number<T>(), data});
    }
    const std::vector<Tensor> parameters(tensors.begin(), tensors.begin() + int64_t(count));
    std::vector<Tensor> states(tensors.begin() + int64_t(count), tensors.end());
    for (size_t i = 0; adam && i < count; ++i) {  // step, between exp_avg_sq and max_exp_avg_sq
      const std::shared_ptr<void> data(&steps[i], [](void*) {});
      states.insert(states.begin() + int64_t(2 * count + i),
                    Tensor(new AtenTensorOpaque{{}, {}, aoti_torch_dtype_float32(), data}));
    }
    const std::vector<double> options =
        adam ? std::vector<double>{0.1, 0.9, 0.99, 1e-8, 0.1, 0, 1, 0} : std::vector<double>{0.1, 0.9, 0, 0.1, 1, 0};
    Updater updater("update", rule, parameters, states, options, std::vector<int64_t>(count, 0),
                    std::vector<bool>(adam ? 0 : count, true));
    updater.set_gradient_scale(0.5);
    for (int step = 0; step < 3; ++step) {
      for (size_t i = 0; i < count; ++i) updater.set_gradient(int64_t(i), gradients[i]->data);
      updater.next_step();
      updater.run();
    }
    if (threads == 1) first.swap(memory);
    for (size_t k = 0; k < memory.size(); ++k) {
      if (Results<T>::equal(*memory[k], *first[k])) continue;
      std::printf("update by %s on %d threads: wrong, %s, level %s\n", rule, int(threads), name_of<T>(),
                  kernel_table().name);
      std::exit(1);
    }
  }
}

// Whether the level is the model of avx512_bf16: slow, and of interest only for products of bfloat16.
bool is_model() { return std::string(kernel_table().name) == "bf16_model"; }

template <typename T>
void check_all(int cases) {
  for (const char* rule : {"sgd", "adam"}) {
    check_update<T>(rule, {70001, 1, 0, 40002, 3, 4096, 50000});
    check_update<T>(rule, {3, 1});
  }
  // Many parameters, few rows, one row, one output, deep: covers every way to split the work over threads.
  const Way ways[] = {
      check<T>(1500, {33, 100, 64, 7}, true, false),
      check<T>(250, {30, 100, 90, 20}, true, true),
      check<T>(250, {30, 100, 90, 20}, false, false),
      check<T>(90, {300, 520, 10}, true, false),
      check<T>(5, {1100, 1000, 3}, true, false),
      check<T>(1, {10, 200, 300, 3}, true, false),
      check<T>(300, {40, 200, 1}, true, false),
      check<T>(40, {64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64}, true, true),
  };
  check<T>(1500, {33, 100, 64, 7}, true, false, true);
  check<T>(250, {30, 100, 90, 20}, true, true, true);
  check<T>(5, {1100, 1000, 3}, true, true, true);
  for (const Way way : {Way::kTall, Way::kShort, Way::kWide}) {
    if (std::count(std::begin(ways), std::end(ways), way)) continue;
    std::printf("%s: no network is cut in way %d\n", name_of<T>(), int(way));
    std::exit(1);
  }
  if constexpr (sizeof(T) == sizeof(float)) check<T>(80000, {2, 3, 1}, true, false);  // slices of several chunks
  // More threads than slices: tall batches in waves, also of a part of a chunk; short and wide ones in small pieces.
  check<T>(900, {33, 64, 96, 64, 7}, true, false, false, true);
  check<T>(900, {33, 64, 97, 64, 5}, true, true, true, true);
  check<T>(150, {100, 200, 130, 20}, true, true, false, true);
  if (!is_model()) {
    check<T>(2500, {200, 300, 1}, true, false, false, true);
    check<T>(70, {500, 1100, 900, 3}, true, false, false, true);
  }
  if constexpr (sizeof(T) == sizeof(float)) check<T>(80000, {3, 64, 1}, true, false, false, true);
  for (int i = 0; i < cases; ++i) {
    std::vector<int64_t> sizes(size_t(2 + below(4)));
    for (auto& size : sizes) size = chance(70) ? below(20) : 1 + below(100);
    check<T>(chance(60) ? below(40) : below(600), sizes, chance(70), chance(50), chance(30));
  }
}

}  // namespace

int main(int count, char** arguments) {
  const std::string cases = count > 1 ? arguments[1] : "20";
  try {
    kernel_table();
  } catch (const std::exception& error) {
    std::printf("skipped: %s\n", error.what());
    return 77;
  }
  if (!is_model()) check_all<float>(std::atoi(cases.c_str()));
  check_all<bfloat16>(std::atoi(cases.c_str()));
  if (!is_model() && (count < 3 || std::string(arguments[2]) != "two")) {  // the passes are those of the other dtypes
    check_all<double>(std::atoi(cases.c_str()));
    check_all<float16>(std::atoi(cases.c_str()));
  }
  std::printf("%s: %s passed\n", kernel_table().name, cases.c_str());
}
