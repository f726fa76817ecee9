// SPDX-License-Identifier: Apache-2.0
// Memory for launchers, kept from call to call.
#pragma once
#include <sys/mman.h>

#include <cstdlib>

#include "launch.h"

namespace pyvseg {

constexpr size_t kHugePage = 2 << 20;

// A page fault per 4 KiB of a fresh large buffer would cost as much as filling it.
inline void prefer_huge_pages(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Scratch memory of one thread, kept for its next call: fresh pages would cost a tenth of a convolution.
struct Scratch {
  float* data = nullptr;
  size_t bytes = 0;
  ~Scratch() { std::free(data); }

  float* at_least(size_t wanted) {
    if (wanted > bytes) {
      std::free(data);
      bytes = (wanted + kHugePage - 1) / kHugePage * kHugePage;
      data = static_cast<float*>(std::aligned_alloc(kHugePage, bytes));
      if (!data) bytes = 0;
      STD_TORCH_CHECK(data, "pyvseg: out of memory");
      prefer_huge_pages(data, bytes);
    }
    return data;
  }
};

}  // namespace pyvseg
