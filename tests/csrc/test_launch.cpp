// Tests launch.cuh with a fake CUDA runtime: the calls that a launch makes, and how it handles errors.

#include "cuda_test.h"

// This is not emulated, so that it compiles the code that runs on a GPU.
#undef MBP_EMULATED

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

// The calls so far, in order, and the results of the next calls.
struct Runtime {
  std::vector<std::string> calls;
  int64_t opted_in = 0, shared = 0;
  dim3 grid, block;
  void* stream = nullptr;
  int argument = 0;
  cudaError_t attribute_result = cudaSuccess, launch_result = cudaSuccess, last = cudaSuccess;
};
static Runtime runtime;

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int value) {
  runtime.calls.push_back("attribute");
  runtime.opted_in = value;
  return runtime.last = runtime.attribute_result;
}
static cudaError_t cudaLaunchKernel(const void*, dim3 grid, dim3 block, void** arguments, size_t shared,
                                    cudaStream_t stream) {
  runtime.calls.push_back("launch");
  runtime.grid = grid;
  runtime.block = block;
  runtime.shared = int64_t(shared);
  runtime.stream = stream;
  runtime.argument = *static_cast<int*>(arguments[0]);
  return runtime.last = runtime.launch_result;
}
static cudaError_t cudaGetLastError() { return std::exchange(runtime.last, cudaSuccess); }
static const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }

#include "../../csrc/cuda/launch.cuh"

namespace manualbp::cuda {

static void kernel(int) {}

using Calls = std::vector<std::string>;

// Launches on a grid; the calls must be `calls`, and the error, if any, must contain `error`.
static void test(const char* name, const Grid& grid, const Calls& calls, const std::string& error = "") {
  begin_case("launch,", name);
  runtime.calls.clear();
  std::string message;
  int stream;
  try {
    launch("its_name", &kernel, grid, &stream, 7);
  } catch (const std::runtime_error& e) {
    message = e.what();
  }
  if (message.find(error) == std::string::npos || message.empty() != error.empty()) {
    throw std::runtime_error("the error is '" + message + "', expected one with '" + error + "'");
  }
  if (runtime.calls != calls) throw std::runtime_error("other calls than expected");
  if (runtime.last != cudaSuccess) throw std::runtime_error("the error was not cleared");
  if (calls.empty() || calls.back() != "launch") return;
  expect("grid.x", 0, runtime.grid.x, double(grid.x));
  expect("grid.y", 0, runtime.grid.y, double(grid.y));
  expect("block.x", 0, runtime.block.x, grid.block.x);
  expect("block.y", 0, runtime.block.y, grid.block.y);
  expect("shared", 0, double(runtime.shared), double(grid.shared_bytes));
  expect("argument", 0, runtime.argument, 7);
  if (runtime.stream != &stream) throw std::runtime_error("not on the stream");
  if (calls.front() == "attribute") expect("opted in", 0, double(runtime.opted_in), double(grid.shared_bytes));
}

static void test_all() {
  const dim3 block(32, 8);
  test("ordinary", {3, 2, block}, {"launch"});
  test("48 KiB of shared memory", {1, 1, block, 48 << 10}, {"launch"});
  for (int i = 0; i < 2; ++i) {  // every time, since the limit belongs to the current device
    test("more than 48 KiB", {1, 1, block, (48 << 10) + 16}, {"attribute", "launch"});
  }
  test("the largest grid", {2147483647, 65535, block}, {"launch"});
  const std::string beyond = "is beyond the limits of CUDA";
  test("too wide", {2147483648, 1, block}, {}, "its_name: a grid of 2147483648 x 1 blocks " + beyond);
  test("too wide for 32 bits", {int64_t(1) << 32, 1, block}, {}, beyond);
  test("too high", {1, 65536, block}, {}, beyond);
  test("no blocks", {0, 1, block}, {}, beyond);
  runtime.attribute_result = cudaErrorInvalidValue;
  test("shared memory refused", {1, 1, block, 64 << 10}, {"attribute"}, "its_name: CUDA reports: invalid argument");
  runtime = {};
  runtime.launch_result = cudaErrorInvalidValue;
  test("launch refused", {1, 1, block}, {"launch"}, "its_name: CUDA reports: invalid argument");
}

}  // namespace manualbp::cuda

int main() {
  return manualbp::cuda::run_tests([] { manualbp::cuda::test_all(); });
}
