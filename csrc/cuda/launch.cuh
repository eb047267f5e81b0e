// Launches a kernel: checks the limits of the grid, requests shared memory beyond 48 KiB, and throws the error that
// CUDA reports immediately. Nothing here waits or allocates, so that a launch can be captured in a CUDA graph.
#pragma once

#include "../error.h"
#include "kernels.h"

namespace manualbp::cuda {

constexpr int64_t kMaxGridX = 2147483647, kMaxGridY = 65535;

struct Grid {
  int64_t x = 1, y = 1;
  dim3 block;
  int64_t shared_bytes = 0;
};

template <typename Params>
void launch(const char* name, void (*kernel)(Params), const Grid& grid, Stream stream, const Params& params) {
  MBP_CHECK(grid.x >= 1 && grid.x <= kMaxGridX && grid.y >= 1 && grid.y <= kMaxGridY, name, ": a grid of ", grid.x,
            " x ", grid.y, " blocks is beyond the limits of CUDA");
  const dim3 blocks{unsigned(grid.x), unsigned(grid.y), 1};
#if defined(MBP_EMULATED)
  emulation::launches().push_back(name);
  emulation::run(kernel, blocks, grid.block, size_t(grid.shared_bytes), params);
#else
  constexpr int64_t kWithoutAsking = 48 << 10;
  const auto check = [&](cudaError_t error) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // CUDA keeps it, and torch would report it of its next launch
    raise(name, ": CUDA reports: ", cudaGetErrorString(error));
  };
  if (grid.shared_bytes > kWithoutAsking) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(grid.shared_bytes)));
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), blocks, grid.block, arguments,
                         size_t(grid.shared_bytes), static_cast<cudaStream_t>(stream)));
#endif
}

}  // namespace manualbp::cuda

// Every storage type, for explicit instantiation: MBP_FOR_EACH_TYPE(MACRO).
#define MBP_FOR_EACH_TYPE(macro) macro(float) macro(double) macro(::manualbp::bfloat16) macro(::manualbp::float16)
