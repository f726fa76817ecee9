// SPDX-License-Identifier: Apache-2.0
// Multi-scale deformable attention, what forward and backward share: where samples lie and what they weigh.
//
// Kernels work on one head of one image at a time. The samples of a query fill `lanes` lanes, L * P rounded up to whole
// vectors; what lane i must know of its level stands in entry i of a Map's rows. Values are read from a padded copy, in
// which zero pixels surround each level so that no sample needs a test for the border, or in place.
#pragma once
#include "vec.h"

namespace pyvseg::ms_deform_attn {

// How pixels are numbered, padded or in place.
struct Map {
  const float *width, *height;  // lanes entries each
  const int32_t* stride;        // from a pixel to the one below
  const int32_t* origin;        // of pixel (0, 0)
  const int32_t* level;
  int64_t pixels;               // all of them; pixel 0 of a padded copy takes samples that miss the map
};

struct Problem {
  int64_t B, H, D, Q, L, P, lanes;
  int64_t block;                // queries at a time
  const int64_t* shapes;        // (L, 2) heights and widths
  Number number, geometry;      // of the value; of places and weights
  const void* value;            // strides in elements, D contiguous
  int64_t value_batch, value_pixel, value_head;
  const void* place;            // locations or offsets, (H, L, P, 2) contiguous for a query
  const void* weight;           // weights or logits, (H, L, P) contiguous for a query
  int64_t place_batch, place_query, weight_batch, weight_query;
  const void *place_end, *weight_end;
  const float* reference;       // fused form: (B, Q, L, reference_width), else null
  int64_t reference_width;      // 2: points, 4: boxes
};

#ifdef PYVSEG_ISA
namespace {

// The samples of a block of queries, a row of `lanes` for each query.
struct Samples {
  int32_t* pixel;            // upper left of the four
  float* corner[4];          // attention times share of upper left, upper right, lower left, lower right
  float *attention, *x, *y;  // x, y: fraction of a pixel from `pixel` to the sample
  int32_t* inside;           // bit c is set where corner c is on the map
  void* spare;               // room for a query's places
};
constexpr float kInfinity = __builtin_inff();
constexpr int64_t kBlockRows = 9, kSpareRows = 2;

PYVSEG_INLINE int64_t samples_bytes(const Problem& p) { return (p.block * kBlockRows + kSpareRows) * (p.lanes + kLanes) * 4 + 64; }

PYVSEG_INLINE Samples samples_in(void* scratch, const Problem& p) {
  float* at = (float*)(((uintptr_t)scratch + 63) & ~(uintptr_t)63);
  const auto take = [&](int64_t rows) {
    float* taken = at;
    at += rows * (p.lanes + kLanes);
    return taken;
  };
  Samples s;
  s.pixel = (int32_t*)take(p.block);
  s.inside = (int32_t*)take(p.block);
  for (float*& row : s.corner) row = take(p.block);
  s.attention = take(p.block), s.x = take(p.block), s.y = take(p.block);
  s.spare = take(kSpareRows);
  return s;
}

PYVSEG_INLINE void deinterleave(vfloat a, vfloat b, vfloat& even, vfloat& odd) {
  vuint lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = 2 * i;
  even = (vfloat)shuffle((vuint)a, (vuint)b, lane);
  odd = (vfloat)shuffle((vuint)a, (vuint)b, lane + 1);
}

// Folds lanes that lie 1, 2, 4, ... apart, so that every lane ends with the result of all.
template <typename Fold>
PYVSEG_INLINE vfloat fold(vfloat v, const Fold& with) {
  const vuint lane = (vuint)lane_index();
#pragma GCC unroll 4
  for (int step = kLanes / 2; step > 0; step /= 2) v = with(v, (vfloat)shuffle((vuint)v, (vuint)v, lane ^ step));
  return v;
}

// row = softmax of `count` logits; the other lanes of whole vectors become zero.
template <typename G>
PYVSEG_INLINE void softmax(const G* logits, float* row, int64_t count, int64_t lanes) {
  const vint lane = lane_index();
  const auto at = [&](int64_t i) { return lane + int32_t(i) < int32_t(count) ? load(logits + i) : splat(-kInfinity); };
  // Lanes without a sample take the exponential of 0, and then zero: one of -infinity would underflow, which is slow.
  const auto exponential = [&](int64_t i, vfloat most) {
    const vint live = lane + int32_t(i) < int32_t(count);
    return live ? exp_nonpositive(live ? load(logits + i) - most : vfloat{}) : vfloat{};
  };
  const auto larger = [](vfloat a, vfloat b) { return a > b ? a : b; };
  const auto plus = [](vfloat a, vfloat b) { return a + b; };
  if (lanes == kLanes) {
    const vfloat e = exponential(0, fold(at(0), larger));
    store(row, e * (1.0f / fold(e, plus)));
    return;
  }
  vfloat most = at(0), total{};
  for (int64_t i = kLanes; i < lanes; i += kLanes) most = larger(at(i), most);
  most = fold(most, larger);
  for (int64_t i = 0; i < lanes; i += kLanes) {
    const vfloat e = exponential(i, most);
    total += e;
    store(row + i, e);
  }
  const vfloat scale = 1.0f / fold(total, plus);
  for (int64_t i = 0; i < lanes; i += kLanes) store(row + i, load(row + i) * scale);
}

// Samples lie at base * size + scale * place - 1/2, in pixels.
struct Frame {
  vfloat base_x, base_y, scale_x, scale_y;
};

// Of the lanes from i on, for query q of image b. Selected in registers: a row written level by level and read as a
// vector would wait for all its stores.
PYVSEG_INLINE Frame frame_of(const Problem& p, const Map& map, int64_t b, int64_t q, int64_t i) {
  const vfloat width = load(map.width + i), height = load(map.height + i);
  if (!p.reference) return {vfloat{}, vfloat{}, width, height};
  Frame f{vfloat{}, vfloat{}, splat(1.0f), splat(1.0f)};
  const float* r = p.reference + (b * p.Q + q) * p.L * p.reference_width;
  const vint level = load(map.level + i);
  for (int32_t l = 0; l < int32_t(p.L); ++l, r += p.reference_width) {
    f.base_x = level == l ? splat(r[0]) : f.base_x;
    f.base_y = level == l ? splat(r[1]) : f.base_y;
    if (p.reference_width == 2) continue;
    f.scale_x = level == l ? splat(r[2]) : f.scale_x;
    f.scale_y = level == l ? splat(r[3]) : f.scale_y;
  }
  if (p.reference_width == 4) {
    f.scale_x *= width * (0.5f / float(p.P));
    f.scale_y *= height * (0.5f / float(p.P));
  }
  return f;
}

// a * b + c, rounded once: a sample far from the origin keeps its fraction.
PYVSEG_INLINE vfloat multiply_add(vfloat a, vfloat b, vfloat c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return a * b + c;
#else
  typedef double vdouble __attribute__((vector_size(PYVSEG_VECTOR_BYTES * 2)));
  const auto wide = [](vfloat v) { return __builtin_convertvector(v, vdouble); };
  return __builtin_convertvector(wide(a) * wide(b) + wide(c), vfloat);
#endif
}

PYVSEG_INLINE vint floor(vfloat x) {
  const vint toward_zero = __builtin_convertvector(x, vint);
  return toward_zero + (vint)(__builtin_convertvector(toward_zero, vfloat) > x);
}

// `count` numbers from where whole vectors can be read: at home, or in `spare` where that would run over the tensor.
template <typename G>
PYVSEG_INLINE const G* readable(const G* from, int64_t count, int64_t whole, const void* end, void* spare) {
  return from + whole <= (const G*)end ? from : (const G*)__builtin_memcpy(spare, from, size_t(count) * sizeof(G));
}

// The attention of head h for the samples of query q, in row `row`.
template <typename G>
PYVSEG_INLINE void weigh(const Problem& p, int64_t b, int64_t q, int64_t h, const Samples& s, int64_t row) {
  const int64_t n = p.L * p.P;
  const G* weight = (const G*)p.weight + b * p.weight_batch + q * p.weight_query + h * n;
  weight = readable(weight, n, p.lanes, p.weight_end, s.spare);
  float* attention = s.attention + row * p.lanes;
  if (p.reference) return softmax(weight, attention, n, p.lanes);
  for (int64_t i = 0; i < p.lanes; i += kLanes) store(attention + i, load(weight + i));
}

// Where they lie, and what their corners weigh.
template <bool kInPlace, typename G>
PYVSEG_INLINE void locate(const Problem& p, const Map& map, int64_t b, int64_t q, int64_t h, const Samples& s, int64_t row) {
  const int64_t n = p.L * p.P, lanes = p.lanes, at = row * lanes;
  const G* place = (const G*)p.place + b * p.place_batch + q * p.place_query + h * n * 2;
  place = readable(place, 2 * n, 2 * lanes, p.place_end, s.spare);
  for (int64_t i = 0; i < lanes; i += kLanes) {
    vfloat x, y;
    deinterleave(load(place + 2 * i), load(place + 2 * i + kLanes), x, y);
    const vfloat width = load(map.width + i), height = load(map.height + i);
    const Frame f = frame_of(p, map, b, q, i);
    x = multiply_add(f.base_x, width, multiply_add(f.scale_x, x, splat(-0.5f)));
    y = multiply_add(f.base_y, height, multiply_add(f.scale_y, y, splat(-0.5f)));
    const vint hit = (x > -1.0f) & (x < width) & (y > -1.0f) & (y < height);  // NaN does not
    x = hit ? x : vfloat{};
    y = hit ? y : vfloat{};
    const vint left = floor(x), top = floor(y);
    x -= __builtin_convertvector(left, vfloat);
    y -= __builtin_convertvector(top, vfloat);
    const vint pixel = top * load(map.stride + i) + left + load(map.origin + i);
    store(s.pixel + at + i, hit ? pixel : vint{});
    store(s.x + at + i, x);
    store(s.y + at + i, y);
    const vfloat attention = load(s.attention + at + i), lower = attention * y, upper = attention * (1.0f - y);
    store(s.corner[0] + at + i, upper * (1.0f - x));
    store(s.corner[1] + at + i, upper * x);
    store(s.corner[2] + at + i, lower * (1.0f - x));
    store(s.corner[3] + at + i, lower * x);
    if (!kInPlace) continue;
    const vint columns = __builtin_convertvector(width, vint), rows = __builtin_convertvector(height, vint);
    const vint west = hit & (left >= 0), east = hit & (left + 1 < columns), north = top >= 0, south = top + 1 < rows;
    store(s.inside + at + i, (west & north & 1) | (east & north & 2) | (west & south & 4) | (east & south & 8));
  }
}

template <bool kInPlace>
PYVSEG_INLINE void locate_block(const Problem& p, const Map& map, int64_t b, int64_t h, const Samples& s, int64_t begin, int64_t end) {
  with_number(p.geometry, [&](auto g) {
    // Two loops: the softmax is one long chain of dependent steps, of which processors run several side by side.
    for (int64_t q = begin; q < end; ++q) weigh<decltype(g)>(p, b, q, h, s, q - begin);
    for (int64_t q = begin; q < end; ++q) locate<kInPlace, decltype(g)>(p, map, b, q, h, s, q - begin);
  });
}

PYVSEG_INLINE int64_t padded(int64_t D) { return (D + kLanes - 1) / kLanes * kLanes; }

// Between number types, one of them float.
template <typename T>
PYVSEG_INLINE void copy_row(float* to, const T* from, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  for (; i < n; ++i) to[i] = load1(from + i);
}
PYVSEG_INLINE void copy_row(bfloat16* to, const float* from, int64_t n) { copy_rounded(to, from, n); }
PYVSEG_INLINE void copy_row(float16* to, const float* from, int64_t n) { copy_rounded(to, from, n); }

// Copies a head into rows of padded(D) floats; the rows around the maps and the channels past D stay as they are, zero.
template <typename V>
PYVSEG_INLINE void pack_head(const Problem& p, const Map& map, int64_t b, int64_t h, float* rows) {
  const int64_t step = padded(p.D);
  const V* from = (const V*)p.value + b * p.value_batch + h * p.value_head;
  for (int64_t l = 0; l < p.L; ++l) {
    const int64_t height = p.shapes[2 * l], width = p.shapes[2 * l + 1];
    for (int64_t y = 0; y < height; ++y) {
      float* to = rows + (map.origin[l * p.P] + y * map.stride[l * p.P]) * step;
      for (int64_t x = 0; x < width; ++x, to += step, from += p.value_pixel) copy_row(to, from, p.D);
    }
  }
}

}  // namespace
#endif
}  // namespace pyvseg::ms_deform_attn
