// SPDX-License-Identifier: Apache-2.0
#include "isa.h"

namespace pyvseg {
namespace {

#define PYVSEG_NAME_(isa) #isa,
const char* const kNames[] = {PYVSEG_ISAS(PYVSEG_NAME_)};
constexpr int kCount = sizeof(kNames) / sizeof(kNames[0]);

int best() {
  int isa = kCount - 1;
  while (isa > 0 && !isa_supported(isa)) --isa;
  return isa;
}

int current = -1;

}  // namespace

int isa_count() { return kCount; }

const char* isa_name(int isa) { return kNames[isa]; }

// Each level's list follows its flags in CMakeLists.txt; the compiler's check includes the operating system's support.
#define PYVSEG_VALUE_(isa) isa,
bool isa_supported(int isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  [[maybe_unused]] const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2");
  [[maybe_unused]] const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512cd");
  const bool avx512_bf16 =
      avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vpopcntdq");
  const bool baseline = true;
  const bool supported[] = {PYVSEG_ISAS(PYVSEG_VALUE_)};
  return supported[isa];
#else
  return isa == 0;
#endif
}

int isa() {
  if (current < 0) current = best();
  return current;
}

void set_isa(int isa) { current = isa; }

}  // namespace pyvseg
