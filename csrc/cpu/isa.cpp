#include "isa.h"

#include <cstdlib>

#include "../error.h"

namespace manualbp {

namespace baseline {
extern const KernelTable kTable;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable kTable;
}
namespace avx512 {
extern const KernelTable kTable;
}
namespace avx512_bf16 {
extern const Products<bfloat16> kProducts;
}
#ifdef MBP_BF16_MODEL
namespace bf16_model {  // tests/csrc/bf16_model.cpp
extern const KernelTable kTable;
}
#endif
#elif defined(__aarch64__)
namespace neon {
extern const KernelTable kTable;
}
#endif

namespace {

struct Level {
  const KernelTable* table;
  bool (*supported)();
};

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && has_avx2();
}
#endif

#if defined(__x86_64__)
const KernelTable kWithPairs = [] {
  KernelTable table = avx512::kTable;
  table.name = "avx512_bf16";
  static_cast<Products<bfloat16>&>(table.bf16) = avx512_bf16::kProducts;
  return table;
}();
#endif

// Best first: the first one that the machine supports is used. The baseline, last, runs everywhere.
const Level kLevels[] = {
#if defined(__x86_64__)
    {&kWithPairs, [] { return __builtin_cpu_supports("avx512bf16") && has_avx512(); }},
    {&avx512::kTable, has_avx512},
    {&avx2::kTable, has_avx2},
#elif defined(__aarch64__)
    {&neon::kTable, [] { return true; }},
#endif
    {&baseline::kTable, [] { return true; }},
#if defined(__x86_64__) && defined(MBP_BF16_MODEL)
    {&bf16_model::kTable, has_avx2},  // after the one that runs everywhere: only if it is forced
#endif
};

const KernelTable& choose() {
  const char* forced = std::getenv("MANUALBP_ISA");
  std::string names;
  for (const Level& level : kLevels) {
    const std::string name = level.table->name;
    names += (names.empty() ? "" : ", ") + name;
    if (forced && *forced) {
      if (name != forced) continue;
      MBP_CHECK(level.supported(), "MANUALBP_ISA=", forced, ": this machine does not have these instructions");
      return *level.table;
    }
    if (level.supported()) return *level.table;
  }
  raise("MANUALBP_ISA=", forced, " is not a level of this build (", names, ")");
}

}  // namespace

const KernelTable& kernel_table() {
  static const KernelTable& table = choose();
  return table;
}

std::string isa() { return kernel_table().name; }

template <>
const Kernels<double>& kernels() {
  return kernel_table().f64;
}
template <>
const Kernels<float>& kernels() {
  return kernel_table().f32;
}
template <>
const Kernels<bfloat16>& kernels() {
  return kernel_table().bf16;
}
template <>
const Kernels<float16>& kernels() {
  return kernel_table().f16;
}

}  // namespace manualbp
