// The product of one warp on tensor cores: mma.sync.m16n8k16 for half precision, with sums in float.
//
// What each lane holds (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"), g = lane / 4, t = lane
// % 4:
//   A (16 x 16), 4 registers of two numbers:  rows g, g + 8, g, g + 8;   columns 2t, 2t + 1, from register 2 on + 8
//   B (16 x 8), 2 registers of two numbers:   rows 2t, 2t + 1, in register 1 + 8;   column g
//   C (16 x 8), 4 floats:                     rows g, g, g + 8, g + 8;   columns 2t, 2t + 1, 2t, 2t + 1
#pragma once

#include "device.cuh"

namespace manualbp::cuda {

// c += A B, by all lanes of a warp.
template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#if defined(MBP_EMULATED)

template <typename T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  emulation::WarpWords words(mine, 6);
  const int g = int(threadIdx.x) % kWarpSize / 4, t = int(threadIdx.x) % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, col = 2 * t + i % 2;
    double sum = 0;
    for (int k = 0; k < 16; ++k) {
      const uint32_t a_word = words.at(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2);
      const uint32_t b_word = words.at(col * 4 + k % 8 / 2, 4 + k / 8);
      sum += double(widen(T{uint16_t(a_word >> k % 2 * 16)})) * double(widen(T{uint16_t(b_word >> k % 2 * 16)}));
    }
    c[i] = float(double(c[i]) + sum);
  }
}

#else

#define MBP_MMA(T, type)                                                                                  \
  template <>                                                                                             \
  __device__ __forceinline__ void mma<T>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                   \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                   \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                     \
  }
MBP_MMA(float16, "f16")
MBP_MMA(bfloat16, "bf16")
#undef MBP_MMA

#endif

}  // namespace manualbp::cuda
