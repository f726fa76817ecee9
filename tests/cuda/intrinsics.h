// SPDX-License-Identifier: Apache-2.0
// CUDA's words for emulate.h: indices, barriers, warp intrinsics, atomics and arithmetic that a CPU compiler lacks.
#pragma once
#include <cmath>
#include <type_traits>

#undef __shared__
#define __shared__ static  // blocks run one after the other
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#undef __constant__
#define __constant__ static

#define threadIdx (::pyvseg::emulate::self->index)
#define blockIdx (::pyvseg::emulate::block.index)
#define blockDim (::pyvseg::emulate::block.size)
#define gridDim (::pyvseg::emulate::block.grid)
constexpr int warpSize = 32;

#define PYVSEG_TEXT_(x) #x
#define PYVSEG_TEXT(x) PYVSEG_TEXT_(x)
#define PYVSEG_HERE(what) what " of " __FILE__ ":" PYVSEG_TEXT(__LINE__)
#define __syncthreads() (void)::pyvseg::emulate::barrier(PYVSEG_HERE("__syncthreads"))
#define __syncthreads_count(p) ::pyvseg::emulate::barrier(PYVSEG_HERE("__syncthreads_count"), (p) != 0)
#define __syncthreads_or(p) int(__syncthreads_count(p) != 0)
#define __syncthreads_and(p) int(__syncthreads_count(!(p)) == 0)

// Warps. A lane that is not in the meeting, or not in the block, gives NaN or all bits set.
inline unsigned __activemask() { return pyvseg::emulate::self->warp->alive; }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  pyvseg::emulate::meet("__syncwarp", mask, 0, [](auto&, unsigned) { return 0; });
}

namespace pyvseg::emulate {
// The value that `source` left, in the calling lane's segment of `width` lanes, or its own where `inside` is false.
template <typename T>
T take(const char* what, unsigned mask, T value, int source, bool inside) {
  return meet(what, mask, value, [&](auto& values, unsigned) {
    T taken = value;
    if (inside) std::memcpy(&taken, values[source], sizeof taken);
    return taken;
  });
}
inline int lane() { return int(self->lane); }
inline int first(int width) { return lane() & ~(width - 1); }
}  // namespace pyvseg::emulate

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  using namespace pyvseg::emulate;
  return take("__shfl_sync", mask, value, first(width) | (source & (width - 1)), true);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  using namespace pyvseg::emulate;
  const int source = lane() - int(delta);
  return take("__shfl_up_sync", mask, value, source, source >= first(width));
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  using namespace pyvseg::emulate;
  const int source = lane() + int(delta);
  return take("__shfl_down_sync", mask, value, source, source < first(width) + width);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  using namespace pyvseg::emulate;
  const int source = lane() ^ bits;
  return take("__shfl_xor_sync", mask, value, source, source < first(width) + width);
}

namespace pyvseg::emulate {
inline unsigned votes(const char* what, unsigned mask, bool vote, unsigned* voters = nullptr) {
  return meet(what, mask, uint32_t(vote), [&](auto& values, unsigned arrived) {
    unsigned set = 0;
    for (int i = 0; i < kLanes; ++i) {
      uint32_t x;
      std::memcpy(&x, values[i], sizeof x);
      if (arrived >> i & 1) set |= x << i;
    }
    if (voters) *voters = arrived;
    return set;
  });
}
// f over what the lanes of the meeting left.
template <typename T, typename F>
T reduce(const char* what, unsigned mask, T value, F f) {
  return meet(what, mask, value, [&](auto& values, unsigned arrived) {
    bool any = false;
    T total{};
    for (int i = 0; i < kLanes; ++i) {
      if (!(arrived >> i & 1)) continue;
      T x;
      std::memcpy(&x, values[i], sizeof x);
      total = any ? f(total, x) : x;
      any = true;
    }
    return total;
  });
}
}  // namespace pyvseg::emulate

inline unsigned __ballot_sync(unsigned mask, int vote) { return pyvseg::emulate::votes("__ballot_sync", mask, vote); }
inline int __any_sync(unsigned mask, int vote) { return pyvseg::emulate::votes("__any_sync", mask, vote) != 0; }
inline int __all_sync(unsigned mask, int vote) {
  unsigned voters = 0;
  const unsigned set = pyvseg::emulate::votes("__all_sync", mask, vote, &voters);
  return set == voters;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
  return pyvseg::emulate::meet("__match_any_sync", mask, value, [&](auto& values, unsigned arrived) {
    unsigned same = 0;
    for (int i = 0; i < 32; ++i) same |= unsigned(arrived >> i & 1 && !std::memcmp(values[i], &value, sizeof value)) << i;
    return same;
  });
}
template <typename T>
T __reduce_add_sync(unsigned mask, T x) {
  return pyvseg::emulate::reduce("__reduce_add_sync", mask, x, [](T a, T b) { return T(a + b); });
}
template <typename T>
T __reduce_min_sync(unsigned mask, T x) {
  return pyvseg::emulate::reduce("__reduce_min_sync", mask, x, [](T a, T b) { return a < b ? a : b; });
}
template <typename T>
T __reduce_max_sync(unsigned mask, T x) {
  return pyvseg::emulate::reduce("__reduce_max_sync", mask, x, [](T a, T b) { return a > b ? a : b; });
}
template <typename T>
T __reduce_or_sync(unsigned mask, T x) {
  return pyvseg::emulate::reduce("__reduce_or_sync", mask, x, [](T a, T b) { return T(a | b); });
}
template <typename T>
T __reduce_and_sync(unsigned mask, T x) {
  return pyvseg::emulate::reduce("__reduce_and_sync", mask, x, [](T a, T b) { return T(a & b); });
}

// Atomics: one fiber runs at a time.
namespace pyvseg::emulate {
template <typename T>
using Same = std::common_type_t<T>;
template <typename T, typename F>
T update(T* p, F f) {
  const T before = *p;
  *p = f(before);
  return before;
}
}  // namespace pyvseg::emulate

#define PYVSEG_ATOMIC(name, expression)                                            \
  template <typename T>                                                            \
  T name(T* p, pyvseg::emulate::Same<T> x) {                                       \
    return pyvseg::emulate::update(p, [&](T old) { return T(expression); });       \
  }
PYVSEG_ATOMIC(atomicAdd, old + x)
PYVSEG_ATOMIC(atomicSub, old - x)
PYVSEG_ATOMIC(atomicExch, ((void)old, x))
PYVSEG_ATOMIC(atomicMin, x < old ? x : old)
PYVSEG_ATOMIC(atomicMax, x > old ? x : old)
PYVSEG_ATOMIC(atomicAnd, old & x)
PYVSEG_ATOMIC(atomicOr, old | x)
PYVSEG_ATOMIC(atomicXor, old ^ x)
PYVSEG_ATOMIC(atomicInc, old >= x ? 0 : old + 1)
#undef PYVSEG_ATOMIC
template <typename T>
T atomicCAS(T* p, pyvseg::emulate::Same<T> expected, pyvseg::emulate::Same<T> x) {
  return pyvseg::emulate::update(p, [&](T old) { return old == expected ? T(x) : old; });
}
inline float4 atomicAdd(float4* p, float4 x) {
  return pyvseg::emulate::update(p, [&](float4 old) { return make_float4(old.x + x.x, old.y + x.y, old.z + x.z, old.w + x.w); });
}
inline float2 atomicAdd(float2* p, float2 x) {
  return pyvseg::emulate::update(p, [&](float2 old) { return make_float2(old.x + x.x, old.y + x.y); });
}

// Memory
template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
void __stcs(T* p, T x) {
  *p = x;
}
template <typename T>
void __stcg(T* p, T x) {
  *p = x;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __trap() { pyvseg::emulate::fail("__trap"); }

// Numbers
template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(T(a), T(b));
  return T(b) < T(a) ? T(b) : T(a);
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(T(a), T(b));
  return T(a) < T(b) ? T(b) : T(a);
}
namespace pyvseg::emulate {
template <typename To, typename From>
To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline int to_int(float x) {  // as the hardware does: saturating, zero for NaN
  return x != x ? 0 : x >= 2147483648.0f ? INT32_MAX : x < -2147483648.0f ? INT32_MIN : int(x);
}
}  // namespace pyvseg::emulate
inline int __float_as_int(float x) { return pyvseg::emulate::bits<int>(x); }
inline unsigned __float_as_uint(float x) { return pyvseg::emulate::bits<unsigned>(x); }
inline float __int_as_float(int x) { return pyvseg::emulate::bits<float>(x); }
inline float __uint_as_float(unsigned x) { return pyvseg::emulate::bits<float>(x); }
inline int __float2int_rz(float x) { return pyvseg::emulate::to_int(x); }
inline int __float2int_rd(float x) { return pyvseg::emulate::to_int(std::floor(x)); }
inline int __float2int_ru(float x) { return pyvseg::emulate::to_int(std::ceil(x)); }
inline int __float2int_rn(float x) { return pyvseg::emulate::to_int(std::nearbyint(x)); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
  return y;
}
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
