// The boundary between libtorch's C interface and C++ exceptions.
//
// An exception thrown inside an op reaches Python as RuntimeError with its text. In the other direction, a failed call
// of libtorch (out of memory, say) returns only a code up to torch 2.12. From 2.13 on libtorch keeps the text of the
// last exception; the binary targets 2.10, so the function that returns it is looked up at run time.
#pragma once

#include <dlfcn.h>

#include <sstream>
#include <stdexcept>
#include <string>

namespace manualbp {

[[noreturn]] inline void raise_libtorch_error(const char* call) {
  using WhatFn = const char* (*)();
  static const auto what = reinterpret_cast<WhatFn>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  throw std::runtime_error(what ? std::string(what()) : std::string("torch_manualbp: ") + call + " failed");
}

template <typename... Parts>
[[noreturn]] void raise(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace manualbp

// Calls a function of libtorch's C interface.
#define MBP_TORCH(call)                                       \
  do {                                                        \
    if ((call) != 0) ::manualbp::raise_libtorch_error(#call); \
  } while (0)

// Checks an argument. The message names it, what was expected, and what was passed.
#define MBP_CHECK(condition, ...)                     \
  do {                                                \
    if (!(condition)) ::manualbp::raise(__VA_ARGS__); \
  } while (0)
