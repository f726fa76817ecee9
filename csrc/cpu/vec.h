// SPDX-License-Identifier: Apache-2.0
// Vectors of the instruction set that a kernel part is compiled for: one source, every level, Arm included.
// All functions are always inlined and static: nothing here may become a symbol that another level could pick up.
#pragma once
#include <cstddef>
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include "number.h"

#define PYVSEG_INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define PYVSEG_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define PYVSEG_VECTOR_BYTES 32
#else
#define PYVSEG_VECTOR_BYTES 16
#endif

namespace pyvseg {

constexpr int kLanes = PYVSEG_VECTOR_BYTES / 4;  // floats in a vector
typedef float vfloat __attribute__((vector_size(PYVSEG_VECTOR_BYTES)));
typedef int32_t vint __attribute__((vector_size(PYVSEG_VECTOR_BYTES)));
typedef uint32_t vuint __attribute__((vector_size(PYVSEG_VECTOR_BYTES)));
typedef uint16_t vhalf __attribute__((vector_size(PYVSEG_VECTOR_BYTES / 2)));

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// body(float{}), body(bfloat16{}) or body(float16{}): a kernel for each type, the one for `number` runs.
template <typename Body>
PYVSEG_INLINE auto with_number(Number number, const Body& body) {
  switch (number) {
    case Number::kBfloat16: return body(bfloat16{});
    case Number::kHalf: return body(float16{});
    default: return body(float{});
  }
}

PYVSEG_INLINE vfloat splat(float x) { return x - vfloat{}; }
PYVSEG_INLINE vint splat(int32_t x) { return x - vint{}; }

// 0, 1, 2, ...
PYVSEG_INLINE vint lane_index() {
  vint v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

PYVSEG_INLINE vint load(const int32_t* p) {
  vint v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
PYVSEG_INLINE vfloat load(const float* p) {
  vfloat v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
PYVSEG_INLINE vfloat load(const bfloat16* p) {
  vhalf h;
  __builtin_memcpy(&h, p, sizeof h);
  return (vfloat)(__builtin_convertvector(h, vuint) << 16);
}

// Half precision in integer arithmetic, for machines without the instruction; exact, subnormals, infinities and NaN included.
PYVSEG_INLINE vfloat widen(vuint h) {
  const vuint magnitude = h & 0x7fff;
  const vfloat scaled = (vfloat)(magnitude << 13) * 0x1p112f;  // moves the exponent's bias, subnormals too
  const vuint finite = (vuint)scaled, special = (magnitude << 13) | 0x7f800000;
  return (vfloat)((magnitude >= 0x7c00 ? special : finite) | (h & 0x8000) << 16);
}
PYVSEG_INLINE vuint narrow(vfloat v) {
  const vuint u = (vuint)v, sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  const vuint normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 leaves multiples of 2^-24, the step of subnormals, in the low bits, rounded to nearest even.
  const vuint subnormal = (vuint)((vfloat)magnitude + 0.5f) - 0x3f000000;
  const vuint finite = magnitude < 0x38800000 ? subnormal : normal;
  const vuint special = magnitude > 0x7f800000 ? (0x7e00 | (magnitude >> 13 & 0x3ff)) : magnitude - magnitude + 0x7c00;
  return (magnitude >= 0x477ff000 ? special : finite) | sign;
}

PYVSEG_INLINE vfloat load(const float16* p) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vhalf h;
  __builtin_memcpy(&h, p, sizeof h);
  return widen(__builtin_convertvector(h, vuint));
#endif
}

PYVSEG_INLINE float load1(const float* p) { return *p; }
PYVSEG_INLINE float load1(const float16* p) {
#if defined(__F16C__)
  return _cvtsh_ss(p->bits);
#else
  return widen(p->bits + vuint{})[0];
#endif
}
PYVSEG_INLINE float load1(const bfloat16* p) {
  const uint32_t u = uint32_t(p->bits) << 16;
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
}

PYVSEG_INLINE void store(float* p, vfloat v) { __builtin_memcpy(p, &v, sizeof v); }
PYVSEG_INLINE void store(int32_t* p, vint v) { __builtin_memcpy(p, &v, sizeof v); }
// Round to nearest even; a NaN stays one.
PYVSEG_INLINE void store(bfloat16* p, vfloat v) {
  const vuint u = (vuint)v;
  const vuint rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const vhalf h = __builtin_convertvector(v == v ? rounded : (u >> 16) | 0x40, vhalf);
  __builtin_memcpy(p, &h, sizeof h);
}
// Round to nearest even; too large becomes infinite.
PYVSEG_INLINE void store(float16* p, vfloat v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  const vhalf h = __builtin_convertvector(narrow(v), vhalf);
  __builtin_memcpy(p, &h, sizeof h);
#endif
}

PYVSEG_INLINE void store1(float* p, float x) { *p = x; }
PYVSEG_INLINE void store1(float16* p, float x) {
#if defined(__F16C__)
  p->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  p->bits = uint16_t(narrow(splat(x))[0]);
#endif
}
PYVSEG_INLINE void store1(bfloat16* p, float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  p->bits = uint16_t(x == x ? (u + 0x7fff + ((u >> 16) & 1)) >> 16 : (u >> 16) | 0x40);
}

#if defined(__AVX512F__)
PYVSEG_INLINE __mmask16 lanes_before(int64_t n) { return n >= kLanes ? 0xffff : n > 0 ? (1u << n) - 1 : 0; }
#endif

// The first n elements, zeros behind them; all where n is larger than a vector, none where it is negative.
template <typename T>
PYVSEG_INLINE auto load_some(const T* p, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (__is_same(T, float)) return (vfloat)_mm512_maskz_loadu_ps(lanes_before(n), p);
  if constexpr (__is_same(T, int32_t)) return (vint)_mm512_maskz_loadu_epi32(lanes_before(n), p);
  if constexpr (__is_same(T, bfloat16)) return (vfloat)((vuint)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes_before(n), p)) << 16);
  if constexpr (__is_same(T, float16)) return (vfloat)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes_before(n), p));
#else
  if (n >= kLanes) return load(p);
  T some[kLanes] = {};
  if (n > 0) __builtin_memcpy(some, p, size_t(n) * sizeof(T));
  return load(some);
#endif
}
template <typename T, typename V>
PYVSEG_INLINE void store_some(T* p, V v, int64_t n) {
  if (n >= kLanes) return store(p, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(p, lanes_before(n), (__m512)v);
#endif
  T some[kLanes];
  store(some, v);
  if (n > 0) __builtin_memcpy(p, some, size_t(n) * sizeof(T));
}

// Lane i of the result is lane which[i] of a followed by b.
PYVSEG_INLINE vuint shuffle(vuint a, vuint b, vuint which) {
#if defined(__clang__)
  vuint v;
  for (int i = 0; i < kLanes; ++i) v[i] = int(which[i]) < kLanes ? a[which[i]] : b[which[i] - kLanes];
  return v;
#else
  return __builtin_shuffle(a, b, which);
#endif
}

// A square of 32-bit words, one row in each vector.
PYVSEG_INLINE void transpose(vuint v[kLanes]) {
  const vuint lane = (vuint)lane_index();
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {  // swaps the off-diagonal squares of this size
    const vuint low = (lane & step) ? lane + (kLanes - step) : lane, high = (lane & step) ? lane + kLanes : lane + step;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & step) continue;
      const vuint a = v[i], b = v[i + step];
      v[i] = shuffle(a, b, low);
      v[i + step] = shuffle(a, b, high);
    }
  }
}

PYVSEG_INLINE float sum(vfloat v) {
#if defined(__AVX512F__)
  const __m256 eight = _mm512_castps512_ps256((__m512)v) + _mm512_extractf32x8_ps((__m512)v, 1);
  const __m128 x = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
#elif defined(__AVX2__)
  const __m128 x = _mm256_castps256_ps128((__m256)v) + _mm256_extractf128_ps((__m256)v, 1);
#else
  const vfloat x = v;
#endif
  return (x[0] + x[2]) + (x[1] + x[3]);
}
PYVSEG_INLINE int32_t sum(vint v) {
  int32_t lanes[kLanes], total = 0;
  store(lanes, v);
  for (int i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
}

// One bit per lane where a > b.
PYVSEG_INLINE uint32_t greater_mask(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)));
#elif defined(__SSE2__)
  return uint32_t(_mm_movemask_ps(_mm_cmpgt_ps((__m128)a, (__m128)b)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= uint32_t(a[i] > b[i]) << i;
  return bits;
#endif
}

// The larger of a and b, b where one is NaN. Unlike a comparison that something else needs too it is one instruction.
PYVSEG_INLINE vfloat larger(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

// exp(x) is the result times 2^e, where e lies in the low bits of `shifted`.
PYVSEG_INLINE vfloat exp_fraction(vfloat x, vfloat* shifted) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer kept in the low bits
  *shifted = x * 1.44269504088896341f + magic;
  const vfloat n = *shifted - magic;
  const vfloat r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vfloat p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * r * r + r + 1.0f;
}

// exp(x) for x <= 0, within 1 ulp of the rounded result; 0 below -104, NaN for NaN.
PYVSEG_INLINE vfloat exp_nonpositive(vfloat x) {
  vfloat shifted;
  const vfloat p = exp_fraction(x < -104.0f ? splat(-104.0f) : x, &shifted);
  // 2^n in two factors, so that results below 2^-126 come out as denormals.
  const vint e = (vint)shifted - (vint)splat(12582912.0f);
  const vint low = e >> 1;
  return p * (vfloat)((low + 127) << 23) * (vfloat)((e - low + 127) << 23);
}

// The same for sums in which nothing below exp(-80) shows: less there is the same as that, and so is NaN.
PYVSEG_INLINE vfloat exp_of_share(vfloat x) {
  vfloat shifted;
  const vfloat p = exp_fraction(larger(x, splat(-80.0f)), &shifted);
  return (vfloat)((vint)p + ((vint)shifted << 23));
}

// out[i] += scale * row[i], i < n
template <typename T>
PYVSEG_INLINE void axpy(float* out, float scale, const T* row, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(out + i) + scale * load(row + i));
  for (; i < n; ++i) out[i] += scale * load1(row + i);
}

template <typename T, typename U>
PYVSEG_INLINE float dot(const T* a, const U* b, int64_t n) {
  vfloat acc0{}, acc1{};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    acc0 += load(a + i) * load(b + i);
    acc1 += load(a + i + kLanes) * load(b + i + kLanes);
  }
  for (; i + kLanes <= n; i += kLanes) acc0 += load(a + i) * load(b + i);
  float total = sum(acc0 + acc1);
  for (; i < n; ++i) total += load1(a + i) * load1(b + i);
  return total;
}

template <typename T>
PYVSEG_INLINE void copy_rounded(T* out, const float* in, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(in + i));
  for (; i < n; ++i) store1(out + i, in[i]);
}

}  // namespace pyvseg
