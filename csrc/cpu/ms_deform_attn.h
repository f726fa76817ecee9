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
  // One row each: a sample lies at base + scale * place, base normalised and scale in pixels.
  float *base_x, *base_y, *scale_x, *scale_y;
  char* tail;                // places and weights of a query whose samples do not fill whole vectors
};
constexpr float kInfinity = __builtin_inff();
constexpr int64_t kBlockRows = 9, kSingleRows = 4 + 3;

PYVSEG_INLINE int64_t samples_bytes(const Problem& p) { return (p.block * kBlockRows + kSingleRows) * (p.lanes + kLanes) * 4 + 64; }

PYVSEG_INLINE Samples samples_in(void* scratch, const Problem& p, const Map& map) {
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
  s.base_x = take(1), s.base_y = take(1), s.scale_x = take(1), s.scale_y = take(1);
  s.tail = (char*)take(3);
  for (int64_t i = 0; i < p.lanes; ++i) {
    s.base_x[i] = s.base_y[i] = 0;
    s.scale_x[i] = p.reference ? 1.0f : map.width[i];
    s.scale_y[i] = p.reference ? 1.0f : map.height[i];
  }
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
  vuint lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
#pragma GCC unroll 4
  for (int step = kLanes / 2; step > 0; step /= 2) v = with(v, (vfloat)shuffle((vuint)v, (vuint)v, lane ^ step));
  return v;
}

// Softmax of the first `count` of whole vectors of logits; the other lanes become zero.
PYVSEG_INLINE void softmax(float* row, int64_t count, int64_t lanes) {
  for (int64_t i = count; i < lanes; ++i) row[i] = -kInfinity;
  vfloat most = load(row);
  for (int64_t i = kLanes; i < lanes; i += kLanes) most = load(row + i) > most ? load(row + i) : most;
  most = fold(most, [](vfloat a, vfloat b) { return a > b ? a : b; });
  vfloat total{};
  for (int64_t i = 0; i < lanes; i += kLanes) {
    const vfloat e = exp_nonpositive(load(row + i) - most);
    total += e;
    store(row + i, e);
  }
  const vfloat scale = 1.0f / fold(total, [](vfloat a, vfloat b) { return a + b; });
  for (int64_t i = 0; i < lanes; i += kLanes) store(row + i, load(row + i) * scale);
}

// row[l * P + point] = x for the points of level l. Overruns into level l + 1, which is written after it.
PYVSEG_INLINE void spread(float* row, int64_t l, int64_t P, float x) {
  for (int64_t i = l * P; i < (l + 1) * P; i += kLanes) store(row + i, splat(x));
}

// Base and scale of the fused form, from the query's reference points or boxes.
PYVSEG_INLINE void refer(const Problem& p, const Map& map, int64_t b, int64_t q, const Samples& s) {
  for (int64_t l = 0; l < p.L; ++l) {
    const float* r = p.reference + ((b * p.Q + q) * p.L + l) * p.reference_width;
    const float width = map.width[l * p.P], height = map.height[l * p.P];
    spread(s.base_x, l, p.P, r[0]);
    spread(s.base_y, l, p.P, r[1]);
    if (p.reference_width == 4) {
      spread(s.scale_x, l, p.P, r[2] * width * (0.5f / float(p.P)));
      spread(s.scale_y, l, p.P, r[3] * height * (0.5f / float(p.P)));
    }
  }
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

// Fills row `row` of the samples with those of head h of query q.
template <bool kInPlace, typename G>
PYVSEG_INLINE void locate(const Problem& p, const Map& map, int64_t b, int64_t q, int64_t h, const Samples& s, int64_t row) {
  const int64_t n = p.L * p.P, lanes = p.lanes, at = row * lanes;
  const G* place = (const G*)p.place + b * p.place_batch + q * p.place_query + h * n * 2;
  const G* weight = (const G*)p.weight + b * p.weight_batch + q * p.weight_query + h * n;
  if ((p.H - 1 - h) * n < lanes - n) {  // whole vectors would run over the query's last head
    place = (const G*)__builtin_memcpy(s.tail, place, size_t(n) * 2 * sizeof(G));
    weight = (const G*)__builtin_memcpy(s.tail + 2 * lanes * sizeof(G), weight, size_t(n) * sizeof(G));
  }
  if (p.reference) refer(p, map, b, q, s);
  for (int64_t i = 0; i < lanes; i += kLanes) store(s.attention + at + i, load(weight + i));
  if (p.reference) softmax(s.attention + at, n, lanes);
  for (int64_t i = 0; i < lanes; i += kLanes) {
    vfloat x, y;
    deinterleave(load(place + 2 * i), load(place + 2 * i + kLanes), x, y);
    const vfloat width = load(map.width + i), height = load(map.height + i);
    x = multiply_add(load(s.base_x + i), width, multiply_add(load(s.scale_x + i), x, splat(-0.5f)));
    y = multiply_add(load(s.base_y + i), height, multiply_add(load(s.scale_y + i), y, splat(-0.5f)));
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
