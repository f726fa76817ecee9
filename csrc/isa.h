// SPDX-License-Identifier: Apache-2.0
// Which instruction set the CPU kernels run on, chosen at run time.
//
// A file csrc/cpu/<op>.cpp is compiled once as launcher (torch headers, any x86-64-v2 machine) and once per instruction
// set with PYVSEG_ISA defined as its name. The kernel part sees raw pointers only and includes neither torch nor standard
// headers with inline functions: the linker keeps one copy of an inline function, and it might keep the AVX-512 one.
#pragma once

#if defined(PYVSEG_SANITIZE) && defined(__x86_64__)  // a build for tests: the two that differ most
#define PYVSEG_ISAS(X) X(baseline) X(avx512_bf16)
#elif defined(__x86_64__) || defined(_M_X64)
#define PYVSEG_ISAS(X) X(baseline) X(avx2) X(avx512) X(avx512_bf16)
#else
#define PYVSEG_ISAS(X) X(baseline)
#endif

namespace pyvseg {
int isa_count();               // levels compiled, ascending
const char* isa_name(int isa);
bool isa_supported(int isa);   // by this CPU and operating system
int isa();                     // the level in use
void set_isa(int isa);
}  // namespace pyvseg

// Both parts stand in the op's own namespace, which declares `struct Kernels { pointers to functions };`.
#ifdef PYVSEG_ISA
// Kernel part: `PYVSEG_KERNELS = {kernel, ...};` publishes the kernels of this level.
#define PYVSEG_KERNELS             \
  extern const Kernels PYVSEG_ISA; \
  const Kernels PYVSEG_ISA
#else
// Launcher part: `PYVSEG_KERNEL_TABLE` (outside an unnamed namespace) defines `kernels()`, those of the level in use.
#define PYVSEG_EXTERN_(isa) extern const Kernels isa;
#define PYVSEG_ADDRESS_(isa) &isa,
#define PYVSEG_KERNEL_TABLE                                                       \
  PYVSEG_ISAS(PYVSEG_EXTERN_)                                                     \
  static const Kernels& kernels() {                                               \
    static const Kernels* const levels[] = {PYVSEG_ISAS(PYVSEG_ADDRESS_)};        \
    return *levels[isa()];                                                        \
  }
#endif
