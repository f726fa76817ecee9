// SPDX-License-Identifier: Apache-2.0
// What the forward and the backward of the matching costs share: rows of masks, and their numbers as float vectors.
#pragma once
#include <cstdint>

namespace pyvseg::mask_cost {

enum class Element : int32_t { kFloat, kBfloat16, kHalf, kByte };  // the first three as Number of launch.h

struct Rows {
  const void* data;
  int64_t count, stride;  // stride in elements; the pixels of a row are contiguous
  Element element;
};

constexpr int64_t kChunk = 512;           // pixels whose targets are kept as floats
constexpr int64_t kStride = kChunk + 16;  // of rows of such: multiples of 4 KiB would fall on one set of the cache
constexpr int64_t kRows = 4;      // rows of logits that share one reading of the targets

}  // namespace pyvseg::mask_cost

#ifdef PYVSEG_ISA
#include "vec.h"

namespace pyvseg::mask_cost {

PYVSEG_INLINE vfloat load(const uint8_t* p) {
  typedef uint8_t vbyte __attribute__((vector_size(kLanes)));
  vbyte v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, vint) != 0 ? splat(1.0f) : vfloat{};
}
using pyvseg::load;

// The first n < kLanes elements, then zeros.
template <typename T>
PYVSEG_INLINE vfloat load_part(const T* p, int64_t n) {
  T part[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
}
template <typename T>
PYVSEG_INLINE void store_part(T* p, vfloat v, int64_t n) {
  T part[kLanes];
  store(part, v);
  for (int64_t i = 0; i < n; ++i) p[i] = part[i];
}

PYVSEG_INLINE int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// exp(-|x|), at least 2^-126; NaN for NaN.
PYVSEG_INLINE vfloat exp_minus_size(vfloat x) {
  const vfloat size = (vfloat)((vint)x & 0x7fffffff);
  const vfloat y = -(size > 87.0f ? splat(87.0f) : size);
  const vfloat shifted = y * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23 rounds to an integer kept in the low bits
  const vfloat n = shifted - 12582912.0f;
  const vfloat r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  // Pairs of terms first: the chain of dependent steps, not their number, decides the speed.
  const vfloat rr = r * r, high = 1.9875691500e-4f * r + 1.3981999507e-3f, middle = 8.3334519073e-3f * r + 4.1665795894e-2f;
  const vfloat p = ((high * rr + middle) * rr + (1.6666665459e-1f * r + 5.0000001201e-1f)) * rr + (r + 1.0f);
  return p * (vfloat)(((vint)shifted << 23) + (127 << 23));
}

// n targets as floats, zeros up to a whole vector; returns their sum.
template <typename T>
static float widen_row(const T* from, int64_t n, float* to) {
  vfloat total{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const vfloat t = load(from + i);
    store(to + i, t);
    total += t;
  }
  if (i < n) {
    const vfloat t = load_part(from + i, n - i);
    store(to + i, t);
    total += t;
  }
  return sum(total);
}
static float widen_row(const Rows& rows, int64_t row, int64_t begin, int64_t n, float* to) {
  const int64_t offset = row * rows.stride + begin;
  switch (rows.element) {
    case Element::kFloat: return widen_row((const float*)rows.data + offset, n, to);
    case Element::kBfloat16: return widen_row((const bfloat16*)rows.data + offset, n, to);
    case Element::kHalf: return widen_row((const float16*)rows.data + offset, n, to);
    default: return widen_row((const uint8_t*)rows.data + offset, n, to);
  }
}

}  // namespace pyvseg::mask_cost
#else
#include "launch.h"

namespace pyvseg::mask_cost {

static_assert(int(Element::kHalf) == int(Number::kHalf) && int(Element::kBfloat16) == int(Number::kBfloat16));

// (N, P) with contiguous pixels, of a floating dtype or bool.
inline Rows rows_of(const Tensor& t) {
  const bool bytes = t.scalar_type() == ScalarType::Bool || t.scalar_type() == ScalarType::Byte;
  return {t.const_data_ptr(), t.size(0), t.stride(0), bytes ? Element::kByte : Element(number_of(t))};
}

// Floats from a multiple of 64 bytes on: a vector that lies across two cache lines is read at half the speed.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : room_(floats + 16) {}
  float* data() { return room_.data() + (-reinterpret_cast<uintptr_t>(room_.data()) % 64) / sizeof(float); }

 private:
  std::vector<float> room_;
};

// How many pieces of `kChunk` pixels one task takes, so that there are some tasks whatever the machine's threads.
inline int64_t slice_of(int64_t pixels) {
  const int64_t chunks = (pixels + kChunk - 1) / kChunk;
  return std::max<int64_t>(1, (chunks + 15) / 16) * kChunk;
}

}  // namespace pyvseg::mask_cost
#endif
