// How evenly the passes of a network are divided among many threads: counts work instead of computing (balance.py).
//
// The passes are those of csrc/cpu, compiled against tests/csrc/torch_stub. Their kernels are replaced by functions that
// read and write nothing and add up what a kernel costs, in multiply-adds:
//   product                   m n k, and kFetchRows for each element of A and of B that it reads
//   mask, loss, dropout       16 per element, a pass over memory
//   packing, adding sums      kFetchRows per element that is read
// Between two barriers, a region takes as long as the thread with the most work.
//
//   balance ROWS THREADS D_0 D_1 ... D_K    a training step of a network D_0-...-D_K in float32
// Prints a line for "drop-in", forward with stored activations and backward, and one for "loss", all in one pass: the
// multiply-adds that a thread of THREADS would have taken as long for, and the number of parallel regions.

#include "../csrc/cpu/backward.h"

#include <cstdio>
#include <string>

using namespace manualbp;

namespace {

double work[1024];  // of each thread since the last barrier
double elapsed = 0;
int64_t regions = 0;

void count(double multiply_adds) { work[stub_thread] += multiply_adds; }

void barrier(bool is_end) {
  double most = 0;
  for (double& each : work) most = std::max(most, each), each = 0;
  elapsed += most;
  regions += is_end;
}

template <typename Out>
void product(const Gemm<float, Out>& p, void*) {
  count(double(p.m) * double(p.n) * double(p.k) + double(kFetchRows) * double(p.m + p.n) * double(p.k));
}

// The register tile is the largest of all levels, that of AVX-512.
KernelTable counting_table() {
  KernelTable table{};
  table.name = "counting";
  table.tile_rows = 12;
  table.tile_cols = 32;
  table.gradient_rows = table.gradient_cols = int64_t(1) << 40;  // a thread's piece of a product is counted as one
  auto& f32 = table.f32;
  f32.reads_in_place = [](int64_t m, int64_t, int64_t b_n, int64_t) { return b_n == 1 && m <= 24; };
  f32.packed_size = [](int64_t k, int64_t n) { return k * n; };
  f32.pack = [](const float*, int64_t, int64_t, int64_t k, int64_t n, float*) { count(double(kFetchRows * k * n)); };
  f32.gemm = product<float>;
  f32.gemm_accumulated = product<float>;
  f32.workspace_bytes = [](int64_t, int64_t) { return int64_t(64); };
  f32.relu_backward = [](const ReluBackward<float>& p) {
    count(16.0 * double(p.rows) * double(p.last_col - p.first_col));
  };
  f32.sum_by_tiles = [](const ReluBackward<float>& p) { count(16.0 * double(p.rows) * double(p.cols)); };
  const auto add = [](const auto& p, int64_t begin, int64_t end) {
    count(double(kFetchRows) * double(p.slices) * double(end - begin));
  };
  f32.reduce = add;
  f32.reduce_double = add;
  table.f64.reduce = add;  // of the sums of a bias gradient
  f32.add_up = [](const AddUp<float>&, int64_t begin, int64_t end) { count(double(kFetchRows) * double(end - begin)); };
  return table;
}

double loss_kernel(const Loss<float>& p) { return count(16.0 * double(p.rows) * double(p.cols)), 0; }

}  // namespace

namespace manualbp {
const KernelTable& kernel_table() {
  static const KernelTable table = counting_table();
  return table;
}
template <>
const Kernels<float>& kernels() {
  return kernel_table().f32;
}
template <>
const Kernels<double>& kernels() {
  return kernel_table().f64;
}
}  // namespace manualbp

int main(int argc, char** argv) {
  const int64_t rows = std::atoll(argv[1]);
  std::vector<int64_t> sizes;
  for (int i = 3; i < argc; ++i) sizes.push_back(std::atoll(argv[i]));
  // Memory that is never touched, at one address.
  float* const nowhere = reinterpret_cast<float*>(64);
  std::vector<Layer<float>> layers(sizes.size() - 1);
  Gradients<float> grads;
  for (size_t k = 0; k < layers.size(); ++k) {
    layers[k].omega = Matrix<const float>::contiguous(nowhere, sizes[k + 1], sizes[k]);
    layers[k].beta = {nowhere, 1};
    grads.omega.push_back(nowhere);
    grads.beta.push_back(nowhere);
  }
  const auto input = Matrix<const float>::contiguous(nowhere, rows, sizes.front());
  const auto grad_output = Matrix<const float>::contiguous(nowhere, rows, sizes.back());
  stub_barrier = barrier;
  stub_threads = uint32_t(std::atoi(argv[2]));
  const auto report = [](const char* name, const auto& step) {
    elapsed = 0, regions = 0;
    step();
    barrier(false);
    std::printf("%s %.0f %lld\n", name, elapsed, (long long)regions);
  };
  report("drop-in", [&] {
    Network<float>(rows, layers, false).forward(input, nowhere, nowhere);
    Network<float> net(rows, layers, false);
    backward<float>(net, input, nowhere, false, grad_output, nullptr, grads);
  });
  report("loss", [&] {
    Network<float> net(rows, layers, false);
    Loss<float> loss{};
    loss.cols = sizes.back();
    LossPass<float>(net, loss_kernel, grads).run(input, loss);
  });
}
