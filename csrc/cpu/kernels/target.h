// Target regions: what stands between MBP_TARGET_BEGIN("avx2,fma") and MBP_TARGET_END is compiled for these
// instructions, whatever flags the file is compiled with.
//
// No standard header may be included inside a region: the linker keeps one copy of an inline std function for the whole
// program, and if that were the one compiled for these instructions, an older machine would crash.
#pragma once

#define MBP_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define MBP_TARGET_BEGIN(features) \
  MBP_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define MBP_TARGET_END MBP_PRAGMA(clang attribute pop)
#else
#define MBP_TARGET_BEGIN(features) MBP_PRAGMA(GCC push_options) MBP_PRAGMA(GCC target(features))
#define MBP_TARGET_END MBP_PRAGMA(GCC pop_options)
#endif
