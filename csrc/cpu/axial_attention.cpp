// SPDX-License-Identifier: Apache-2.0
// Attention within the rows or columns of a map, with learned vectors for distances (see pyvseg/ops/axial_attention.py).
// Vectors run over sequences: then a vector of the tables is one number for all lanes, and tiles of queries times keys, of
// queries times channels, stay in registers. A similarity exists for a few queries at a time only.
#include <cstdint>

#include "../isa.h"
#include "number.h"
#ifdef PYVSEG_ISA
#include "vec.h"
#endif

namespace pyvseg::axial_attention {

struct Problem {
  Number number;                                             // of every tensor
  const void *qkv, *query_table, *key_table, *value_table;   // tables (distances, depth)
  const void *scales, *value_scale;                          // (3, heads), (heads, value)
  void* out;
  int64_t heads, key, value;              // the depths of a head
  int64_t length, center;                 // of a sequence; the tables' row for distance 0
  int64_t sequences, inner;               // sequence n is (n / inner, n % inner)
  int64_t outer_stride, inner_stride, step;  // of qkv, in numbers; a step is from one position to the next
  int64_t out_outer, out_inner, out_step;
};

struct Kernels {
  int64_t lanes;  // sequences at a time
  int64_t (*scratch)(const Problem&);  // floats, aligned to vectors
  void (*attend)(const Problem&, int64_t head, int64_t first, float* scratch);
};

#ifdef PYVSEG_ISA
namespace {

constexpr int kQueries = kLanes == 16 ? 4 : 2, kKeys = 4, kChannels = 4;  // of a tile: accumulators fill the registers

PYVSEG_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows of lanes, but for the tables, which hold distances -(length - 1) and on, scaled for the head.
struct Scratch {
  float *query, *key;  // (length, depth)
  float* value;        // (groups of kChannels, length, channels of the group)
  float* weights;      // (kQueries, length)
  float* out;          // (kQueries, value)
  float *query_table, *key_table, *value_table;  // (2 length - 1, depth)
  int64_t floats;

  Scratch(const Problem& p, float* memory) : floats(0) {
    const int64_t distances = 2 * p.length - 1;
    const auto take = [&](int64_t count) {
      float* part = memory ? memory + floats : nullptr;
      floats += (count + kLanes - 1) / kLanes * kLanes;
      return part;
    };
    query = take(p.length * p.key * kLanes);
    key = take(p.length * p.key * kLanes);
    value = take(p.length * p.value * kLanes);
    weights = take(kQueries * p.length * kLanes);
    out = take(kQueries * p.value * kLanes);
    query_table = take(distances * p.key);
    key_table = take(distances * p.key);
    value_table = take(distances * p.value);
  }
};

int64_t scratch(const Problem& p) { return Scratch(p, nullptr).floats; }

// place(c)[lane] = rows[lane][c], c < count
template <typename T, typename Place>
PYVSEG_INLINE void gather(const T* const* rows, int64_t count, const Place& place) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    vuint square[kLanes];
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) square[j] = (vuint)load(rows[j] + c);
    transpose(square);
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) store(place(c + j), (vfloat)square[j]);
  }
  for (; c < count; ++c)
    for (int j = 0; j < kLanes; ++j) place(c)[j] = load1(rows[j] + c);
}

// rows[lane][c] = from[c][lane], c < count, lane < lanes
template <typename T>
PYVSEG_INLINE void scatter(const float* from, int64_t count, T* const* rows, int64_t lanes) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    vuint square[kLanes];
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) square[j] = (vuint)load(from + (c + j) * kLanes);
    transpose(square);
    for (int64_t j = 0; j < lanes; ++j) store(rows[j] + c, (vfloat)square[j]);
  }
  for (; c < count; ++c)
    for (int64_t j = 0; j < lanes; ++j) store1(rows[j] + c, from[c * kLanes + j]);
}

// Sequences lie far apart, where no hardware foresees the next position.
template <typename T>
PYVSEG_INLINE void prefetch(const T* from, int64_t count) {
  for (int64_t c = 0; c < count; c += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + c);
}

template <typename T>
void load_sequences(const Problem& p, int64_t head, const T* const* rows, const Scratch& s) {
  for (int64_t l = 0; l < p.length; ++l) {
    const T *query[kLanes], *key[kLanes], *value[kLanes];
    for (int j = 0; j < kLanes; ++j) {
      query[j] = rows[j] + l * p.step + head * p.key;
      key[j] = query[j] + p.heads * p.key;
      value[j] = rows[j] + l * p.step + 2 * p.heads * p.key + head * p.value;
      const int64_t ahead = least(l + 2, p.length - 1) - l;
      prefetch(query[j] + ahead * p.step, p.key);
      prefetch(key[j] + ahead * p.step, p.key);
      prefetch(value[j] + ahead * p.step, p.value);
    }
    gather(query, p.key, [&](int64_t c) { return s.query + (l * p.key + c) * kLanes; });
    gather(key, p.key, [&](int64_t c) { return s.key + (l * p.key + c) * kLanes; });
    gather(value, p.value, [&](int64_t c) {
      const int64_t group = c / kChannels * kChannels, width = least(kChannels, p.value - group);
      return s.value + (group * p.length + l * width + c - group) * kLanes;
    });
  }
}

template <typename T>
void load_tables(const Problem& p, int64_t head, const Scratch& s) {
  const float of_queries = load1((const T*)p.scales + p.heads + head), of_keys = load1((const T*)p.scales + 2 * p.heads + head);
  const T* of_values = (const T*)p.value_scale + head * p.value;
  for (int64_t i = 0; i < 2 * p.length - 1; ++i) {
    const int64_t row = p.center - (p.length - 1) + i;
    for (int64_t d = 0; d < p.key; ++d) {
      s.query_table[i * p.key + d] = of_queries * load1((const T*)p.query_table + row * p.key + d);
      s.key_table[i * p.key + d] = of_keys * load1((const T*)p.key_table + row * p.key + d);
    }
    for (int64_t d = 0; d < p.value; ++d)
      s.value_table[i * p.value + d] = load1(of_values + d) * load1((const T*)p.value_table + row * p.value + d);
  }
}

// Of R queries from l on and C keys from m on.
template <int R, int C>
PYVSEG_INLINE void similarities(const Problem& p, const Scratch& s, float content, int64_t l, int64_t m) {
  const int64_t row = p.key * kLanes;
  const float *query = s.query + l * row, *key = s.key + m * row;
  vfloat total[R][C] = {};
  for (int64_t d = 0; d < p.key; ++d) {
    vfloat k[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) k[c] = load(key + c * row + d * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const vfloat q = load(query + r * row + d * kLanes);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) total[r][c] += q * k[c];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) total[r][c] *= content;
  // Queries and keys of a tile are R + C - 1 distances apart.
  const int64_t nearest = (m - l - (R - 1) + p.length - 1) * p.key;
  const float *query_table = s.query_table + nearest, *key_table = s.key_table + nearest;
  for (int64_t d = 0; d < p.key; ++d) {
    vfloat t[R + C - 1];
#pragma GCC unroll 8
    for (int i = 0; i < R + C - 1; ++i) t[i] = splat(query_table[i * p.key + d]);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const vfloat q = load(query + r * row + d * kLanes);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) total[r][c] += q * t[c - r + R - 1];
    }
#pragma GCC unroll 8
    for (int i = 0; i < R + C - 1; ++i) t[i] = splat(key_table[i * p.key + d]);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const vfloat k = load(key + c * row + d * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) total[r][c] += k * t[c - r + R - 1];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(s.weights + (r * p.length + m + c) * kLanes, total[r][c]);
}

// A query's similarities become weights, not yet divided by their sum, which is returned.
PYVSEG_INLINE vfloat exponentials(float* weights, int64_t length) {
  vfloat top = load(weights), total{};
  for (int64_t m = 1; m < length; ++m) {
    top = larger(load(weights + m * kLanes), top);
  }
  for (int64_t m = 0; m < length; ++m) {
    const vfloat x = exp_nonpositive(load(weights + m * kLanes) - top);
    store(weights + m * kLanes, x);
    total += x;
  }
  return total;
}

// What R queries from l on read of D channels; `value` holds them for each position, `width` rows of lanes apart.
template <int R, int D>
PYVSEG_INLINE void read(const Problem& p, const Scratch& s, const vfloat* share, int64_t l, int64_t channel, const float* value, int64_t width) {
  const float* table = s.value_table + (p.length - 1 - l) * p.value + channel;
  vfloat total[R][D] = {};
  for (int64_t m = 0; m < p.length; ++m) {
    vfloat w[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) w[r] = load(s.weights + (r * p.length + m) * kLanes);
#pragma GCC unroll 4
    for (int d = 0; d < D; ++d) {
      const vfloat v = load(value + (m * width + d) * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) total[r][d] += w[r] * v;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) total[r][d] += w[r] * splat(table[(m - r) * p.value + d]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int d = 0; d < D; ++d) store(s.out + (r * p.value + channel + d) * kLanes, total[r][d] * share[r]);
}

// R queries from l on, keys C at a time.
template <int R, int C, typename T>
void attend_queries(const Problem& p, const Scratch& s, float content, int64_t l, T* const* rows, int64_t lanes) {
  for (int64_t m = 0; m < p.length; m += C) similarities<R, C>(p, s, content, l, least(m, p.length - C));
  vfloat share[R];
  for (int r = 0; r < R; ++r) share[r] = 1.0f / exponentials(s.weights + r * p.length * kLanes, p.length);
  for (int64_t channel = 0; channel < p.value; channel += kChannels) {
    const float* value = s.value + channel * p.length * kLanes;
    const int64_t width = least(kChannels, p.value - channel);
    if (width == kChannels)
      read<R, kChannels>(p, s, share, l, channel, value, width);
    else
      for (int64_t d = 0; d < width; ++d) read<R, 1>(p, s, share, l, channel + d, value + d * kLanes, width);
  }
  for (int r = 0; r < R; ++r) {
    T* to[kLanes];
    for (int64_t j = 0; j < lanes; ++j) to[j] = rows[j] + (l + r) * p.out_step;
    scatter(s.out + r * p.value * kLanes, p.value, to, lanes);
  }
}

template <typename T>
void attend_as(const Problem& p, int64_t head, int64_t first, float* memory) {
  const Scratch s(p, memory);
  const int64_t lanes = least(kLanes, p.sequences - first);
  const T* from[kLanes];
  T* to[kLanes];
  for (int j = 0; j < kLanes; ++j) {
    const int64_t n = first + least(j, lanes - 1);  // lanes without a sequence repeat the last one
    from[j] = (const T*)p.qkv + n / p.inner * p.outer_stride + n % p.inner * p.inner_stride;
    to[j] = (T*)p.out + n / p.inner * p.out_outer + n % p.inner * p.out_inner + head * p.value;
  }
  load_sequences(p, head, from, s);
  load_tables<T>(p, head, s);
  const float content = load1((const T*)p.scales + head);
  if (p.length < kKeys) {
    for (int64_t l = 0; l < p.length; ++l) attend_queries<1, 1>(p, s, content, l, to, lanes);
    return;
  }
  for (int64_t l = 0; l < p.length; l += kQueries)  // the last tile goes over some queries again, as its last keys do
    attend_queries<kQueries, kKeys>(p, s, content, least(l, p.length - kQueries), to, lanes);
}

void attend(const Problem& p, int64_t head, int64_t first, float* memory) {
  with_number(p.number, [&](auto number) { attend_as<decltype(number)>(p, head, first, memory); });
}

}  // namespace

PYVSEG_KERNELS = {kLanes, scratch, attend};
#else
}  // namespace pyvseg::axial_attention

#include "launch.h"

namespace pyvseg::axial_attention {

PYVSEG_KERNEL_TABLE

namespace {

constexpr int64_t kAlignment = 16;  // floats of the widest vector

void check_table(const Tensor& table, const Tensor& qkv, int64_t depth, int64_t rows) {
  STD_TORCH_CHECK(table.dim() == 2 && table.size(0) == rows && table.size(1) == depth && table.scalar_type() == qkv.scalar_type(),
                  "axial_attention: tables must be (R, depth) of qkv's dtype");
}

// qkv (B, H, W, heads * (2 K + V)); tables (R, K), (R, K), (R, V), R odd; scales (3, heads), value_scale (heads, V);
// axis 1 or 2, the one to attend along -> (B, H, W, heads * V)
Tensor axial_attention(const Tensor& qkv, const Tensor& query_table, const Tensor& key_table, const Tensor& value_table, const Tensor& scales,
                       const Tensor& value_scale, int64_t axis) {
  STD_TORCH_CHECK(qkv.dim() == 4 && (axis == 1 || axis == 2), "axial_attention: qkv must be (B, H, W, C), axis 1 or 2");
  STD_TORCH_CHECK(query_table.dim() == 2 && value_table.dim() == 2 && value_scale.dim() == 2, "axial_attention: tables");
  const int64_t heads = value_scale.size(0), key = query_table.size(1), value = value_table.size(1), rows = query_table.size(0);
  STD_TORCH_CHECK(qkv.size(3) == heads * (2 * key + value), "axial_attention: channels of qkv");
  check_table(query_table, qkv, key, rows);
  check_table(key_table, qkv, key, rows);
  check_table(value_table, qkv, value, rows);
  check_table(scales, qkv, heads, 3);
  check_table(value_scale, qkv, value, heads);
  const int64_t B = qkv.size(0), across = 3 - axis, length = qkv.size(axis);
  STD_TORCH_CHECK(rows % 2 == 1 && length <= (rows + 1) / 2, "axial_attention: tables too short for the sequences");
  Tensor out = torch::stable::new_empty(qkv, {B, qkv.size(1), qkv.size(2), heads * value});
  if (out.numel() == 0) return out;
  const Tensor x = rows_contiguous(qkv), tables[] = {dense(query_table), dense(key_table), dense(value_table), dense(scales), dense(value_scale)};
  const Problem p{number_of(x), x.const_data_ptr(), tables[0].const_data_ptr(), tables[1].const_data_ptr(), tables[2].const_data_ptr(),
                  tables[3].const_data_ptr(), tables[4].const_data_ptr(), out.mutable_data_ptr(), heads, key, value, length, rows / 2,
                  B * x.size(across), x.size(across), x.stride(0), x.stride(across), x.stride(axis), out.stride(0), out.stride(across),
                  out.stride(axis)};
  const Kernels& kernel = kernels();
  const int64_t groups = (p.sequences + kernel.lanes - 1) / kernel.lanes, floats = kernel.scratch(p);
  parallel_for(0, heads * groups, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> memory(new float[floats + kAlignment]);
    const uintptr_t bytes = kAlignment * sizeof(float), address = reinterpret_cast<uintptr_t>(memory.get());
    float* const scratch = reinterpret_cast<float*>((address + bytes - 1) / bytes * bytes);
    for (int64_t i = begin; i < end; ++i) kernel.attend(p, i / groups, i % groups * kernel.lanes, scratch);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvseg, m) {
  m.def("axial_attention(Tensor qkv, Tensor query_table, Tensor key_table, Tensor value_table, Tensor scales, Tensor value_scale, int axis) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(pyvseg, CPU, m) {
  m.impl("axial_attention", TORCH_BOX(&axial_attention));
}
#endif

}  // namespace pyvseg::axial_attention
