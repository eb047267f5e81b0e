// Links the oldest versions of glibc's symbols, so that the binary runs wherever torch does: with glibc >= 2.28, even
// if it is built with a newer one. setup.py includes this first in every file. Other libraries of C need nothing.
//
// glibc 2.29 has new versions of exp, log and pow, which differ from the old ones in how they report errors to errno;
// glibc 2.34 moved the functions of libdl and libpthread, which torch loads, into libc.
#pragma once

#if defined(__linux__)
#include <features.h>
#endif

#if defined(__GLIBC__) && (defined(__x86_64__) || defined(__aarch64__))

#if defined(__x86_64__)
#define MBP_OLDEST "GLIBC_2.2.5"
#else
#define MBP_OLDEST "GLIBC_2.17"
#endif
#define MBP_SYMVER(name) __asm__(".symver " #name "," #name "@" MBP_OLDEST)
MBP_SYMVER(exp);
MBP_SYMVER(log);
MBP_SYMVER(pow);
MBP_SYMVER(dlsym);
MBP_SYMVER(pthread_mutex_trylock);
#undef MBP_SYMVER
#undef MBP_OLDEST

// A variable since glibc 2.32, by which shared_ptr counts without atomic instructions while there is one thread only.
#if __has_include(<sys/single_threaded.h>)
#include <sys/single_threaded.h>
static constexpr char manualbp_single_threaded = 0;
#define __libc_single_threaded manualbp_single_threaded
#endif

#endif  // glibc
