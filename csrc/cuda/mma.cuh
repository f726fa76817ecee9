// SPDX-License-Identifier: Apache-2.0
// Products of half-precision matrices on tensor cores, accumulated in float32.
#pragma once
#include "launch.cuh"

namespace pyvseg {

// d (16 x 8) += a (16 x 16) b (16 x 8), by a whole warp. Of lane 4 g + t: a = pairs of neighbouring k at
// (row g, k 2t), (row g + 8, k 2t), (row g, k 2t + 8), (row g + 8, k 2t + 8); b = pairs at (k 2t, column g), (k 2t + 8, column g);
// d = (row g, columns 2t and 2t + 1), (row g + 8, columns 2t and 2t + 1).
template <typename T>
__device__ inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef PYVSEG_EMULATE
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  for (int half = 0; half < 2; ++half)
    for (int pair = 0; pair < 4; ++pair) {
      const uint32_t words[4] = {__shfl_sync(kFullWarp, a[2 * half], 4 * g + pair), __shfl_sync(kFullWarp, a[2 * half + 1], 4 * g + pair),
                                 __shfl_sync(kFullWarp, b[half], 8 * t + pair), __shfl_sync(kFullWarp, b[half], 8 * t + 4 + pair)};
      T numbers[4][2];
      memcpy(numbers, words, sizeof words);
      for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 2; ++k) d[i] += to_float(numbers[i / 2][k]) * to_float(numbers[2 + i % 2][k]);
    }
#else
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, float16>);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

}  // namespace pyvseg
