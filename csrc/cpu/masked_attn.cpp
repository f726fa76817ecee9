// SPDX-License-Identifier: Apache-2.0
// Attention of queries that each look at some of the keys only (see pyvseg/ops/masked_attn.py). Scores exist for a panel of
// keys at a time, softmax adds up as it goes, and a panel is computed only for the queries that look into it.
#include <cstdint>

#include "../isa.h"
#include "vec.h"

namespace pyvseg::masked_attn {

struct Problem {
  const char *query, *key, *value;  // (B, N, C), (B, M, C) twice
  const uint64_t* open;             // (B, N, panels), one bit for each key of a panel
  char* out;                        // (B, N, C)
  int64_t N, M, panels, heads, width;  // C = heads * width
  Number number;
  float scale;
};

struct Kernels {
  int64_t keys, pad;  // of a panel; widths are padded to a multiple
  void (*open_keys)(const void* masks, Number number, int64_t M, uint64_t* open);
  void (*attend)(const Problem&, int64_t b, int64_t head, int64_t begin, int64_t end, float* scratch);
};

constexpr int kRows = 4;  // queries at a time
constexpr int64_t kBlock = 64;  // queries of a task, at most

// Floats that `attend` needs.
constexpr int64_t scratch_size(int64_t keys, int64_t padded) { return 2 * (kBlock + 1) * (padded + 1) + (2 * padded + kRows) * keys; }

#ifdef PYVSEG_ISA
namespace {

constexpr int kVectors = kLanes == 16 ? 4 : 2;  // accumulators fill the registers
constexpr int64_t kKeys = kVectors * kLanes, kPad = 2 * kLanes;

// Bit j of panel i: the query looks at key i * kKeys + j, because its mask there is not negative, or because it is negative everywhere.
void open_keys(const void* masks, Number number, int64_t M, uint64_t* open) {
  uint64_t any = 0;
  for (int64_t start = 0, panel = 0; start < M; start += kKeys, ++panel) {
    uint64_t bits = 0;
    with_number(number, [&](auto type) {
      const auto* row = (const decltype(type)*)masks + start;
      const int64_t count = M - start < kKeys ? M - start : kKeys;
      for (int64_t j = 0; j < count; j += kLanes) bits |= uint64_t(greater_mask(vfloat{}, load_some(row + j, count - j))) << j;
      bits = ~bits & (~uint64_t{0} >> (64 - count));
    });
    open[panel] = bits;
    any |= bits;
  }
  for (int64_t start = 0, panel = 0; !any && start < M; start += kKeys, ++panel)
    open[panel] = ~uint64_t{0} >> (64 - (M - start < kKeys ? M - start : kKeys));
}

PYVSEG_INLINE float largest(vfloat v) {
  const vuint lane = (vuint)lane_index();
#pragma GCC unroll 4
  for (int step = kLanes / 2; step; step /= 2) {
    const vfloat other = (vfloat)shuffle((vuint)v, (vuint)v, lane ^ step);
    v = other > v ? other : v;
  }
  return v[0];
}

// v where the bit of the lane is set
PYVSEG_INLINE vfloat where(uint64_t bits, vfloat v, float otherwise) {
  return (splat(int32_t(bits)) & (1 << lane_index())) != 0 ? v : splat(otherwise);
}

// rows[j][d] for `count` rows of `width`, zeros up to `padded`.
template <typename T>
void copy_rows(const T* from, int64_t stride, int64_t count, int64_t width, int64_t padded, float scale, float* rows) {
  for (int64_t j = 0; j < count; ++j, from += stride, rows += padded) {
    for (int64_t d = 0; d < padded; d += kLanes) store(rows + d, load_some(from + d, width - d) * scale);
  }
}

// columns[d][j] = rows[j][d] for kKeys rows; d < padded.
void transpose_rows(const float* rows, int64_t padded, float* columns) {
  for (int64_t j = 0; j < kKeys; j += kLanes)
    for (int64_t d = 0; d < padded; d += kLanes) {
      vuint square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) square[i] = (vuint)load(rows + (j + i) * padded + d);
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(columns + (d + i) * kKeys + j, (vfloat)square[i]);
    }
}

struct State {
  const float* query;  // (kBlock + 1, padded): the last one stands in where fewer than kRows are left
  float *sums, *highest, *total;
};

// kRows queries and a panel of keys: adds up values and totals, both over exp(highest).
PYVSEG_INLINE void attend_panel(const State& s, const int32_t* who, const uint64_t* open, const float* keys, const float* values,
                                int64_t width, int64_t padded, float* shares) {
  vfloat score[kRows][kVectors] = {};
  const float* query[kRows];
  for (int r = 0; r < kRows; ++r) query[r] = s.query + who[r] * padded;
  for (int64_t d = 0; d < width; ++d) {
    vfloat key[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) key[v] = load(keys + d * kKeys + v * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const vfloat one = splat(query[r][d]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) score[r][v] += one * key[v];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    vfloat high = splat(-__builtin_inff()), sums{};
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      score[r][v] = where(open[r] >> (v * kLanes), score[r][v], -__builtin_inff());
      high = score[r][v] > high ? score[r][v] : high;
    }
    const float top = largest(high);
    if (top > s.highest[who[r]]) {
      const float shrink = exp_nonpositive(splat(s.highest[who[r]] - top))[0];
      s.highest[who[r]] = top;
      s.total[who[r]] *= shrink;
      float* row = s.sums + who[r] * padded;
      for (int64_t d = 0; d < padded; d += kLanes) store(row + d, load(row + d) * shrink);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const vfloat share = where(open[r] >> (v * kLanes), exp_nonpositive(score[r][v] - s.highest[who[r]]), 0.0f);
      store(shares + r * kKeys + v * kLanes, share);
      sums += share;
    }
    s.total[who[r]] += sum(sums);
  }
  for (int64_t d = 0; d < padded; d += kPad) {
    vfloat sums[kRows][2];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < 2; ++v) sums[r][v] = load(s.sums + who[r] * padded + d + v * kLanes);
    for (int64_t j = 0; j < kKeys; ++j) {
      const vfloat low = load(values + j * padded + d), high = load(values + j * padded + d + kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const vfloat share = splat(shares[r * kKeys + j]);
        sums[r][0] += share * low;
        sums[r][1] += share * high;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < 2; ++v) store(s.sums + who[r] * padded + d + v * kLanes, sums[r][v]);
  }
}

template <typename T>
void attend_typed(const Problem& p, int64_t b, int64_t head, int64_t begin, int64_t end, float* scratch) {
  const int64_t C = p.heads * p.width, padded = (p.width + kPad - 1) / kPad * kPad, rows = end - begin, at = head * p.width;
  float* query = scratch;
  float* sums = query + (kBlock + 1) * padded;
  float *highest = sums + (kBlock + 1) * padded, *total = highest + kBlock + 1;
  float* keys = total + kBlock + 1;
  float *values = keys + padded * kKeys, *shares = values + padded * kKeys;
  copy_rows((const T*)p.query + (b * p.N + begin) * C + at, C, rows, p.width, padded, p.scale, query);
  for (int64_t i = rows * padded; i < (kBlock + 1) * padded; ++i) query[i] = 0;
  for (int64_t i = 0; i < (kBlock + 1) * padded; ++i) sums[i] = 0;
  for (int64_t i = 0; i <= kBlock; ++i) highest[i] = -__builtin_inff(), total[i] = 0;
  const State state{query, sums, highest, total};
  for (int64_t panel = 0; panel < p.panels; ++panel) {
    int32_t who[kBlock + kRows];
    uint64_t open[kBlock + kRows];
    int64_t count = 0;
    for (int64_t i = 0; i < rows; ++i) {
      open[count] = p.open[(b * p.N + begin + i) * p.panels + panel];
      who[count] = int32_t(i);
      count += open[count] != 0;
    }
    if (!count) continue;
    for (int r = 0; r < kRows; ++r) who[count + r] = int32_t(kBlock), open[count + r] = ~uint64_t{0};
    const int64_t first = panel * kKeys, there = p.M - first < kKeys ? p.M - first : kKeys;
    copy_rows((const T*)p.key + (b * p.M + first) * C + at, C, there, p.width, padded, 1.0f, values);
    for (int64_t i = there * padded; i < kKeys * padded; ++i) values[i] = 0;
    transpose_rows(values, padded, keys);
    copy_rows((const T*)p.value + (b * p.M + first) * C + at, C, there, p.width, padded, 1.0f, values);
    for (int64_t i = 0; i < count; i += kRows) attend_panel(state, who + i, open + i, keys, values, p.width, padded, shares);
  }
  T* out = (T*)p.out + (b * p.N + begin) * C + at;
  for (int64_t i = 0; i < rows; ++i, out += C) {
    float* row = sums + i * padded;
    for (int64_t d = 0; d < padded; d += kLanes) store(row + d, load(row + d) / total[i]);
    copy_rounded(out, row, p.width);
  }
}

void attend(const Problem& p, int64_t b, int64_t head, int64_t begin, int64_t end, float* scratch) {
  with_number(p.number, [&](auto number) { attend_typed<decltype(number)>(p, b, head, begin, end, scratch); });
}

}  // namespace

PYVSEG_KERNELS = {kKeys, kPad, open_keys, attend};
#else
}  // namespace pyvseg::masked_attn

#include <cmath>

#include "launch.h"

namespace pyvseg::masked_attn {

PYVSEG_KERNEL_TABLE

namespace {

// query (B, N, C), key and value (B, M, C), masks (B, N, M) of one dtype -> (B, N, C)
Tensor masked_attn(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& masks, int64_t heads) {
  STD_TORCH_CHECK(query.dim() == 3 && key.dim() == 3 && value.dim() == 3 && masks.dim() == 3, "masked_attn: three dimensions each");
  const int64_t B = query.size(0), N = query.size(1), C = query.size(2), M = key.size(1);
  STD_TORCH_CHECK(key.size(0) == B && key.size(2) == C && value.size(0) == B && value.size(1) == M && value.size(2) == C &&
                      masks.size(0) == B && masks.size(1) == N && masks.size(2) == M,
                  "masked_attn: query (B, N, C), key and value (B, M, C), masks (B, N, M)");
  STD_TORCH_CHECK(heads > 0 && C % heads == 0, "masked_attn: heads must divide the channels");
  const Number number = number_of(query);
  STD_TORCH_CHECK(number == number_of(key) && number == number_of(value) && number == number_of(masks), "masked_attn: one dtype");
  const Tensor q = dense(query), k = dense(key), v = dense(value), m = dense(masks);
  Tensor out = torch::stable::new_empty(query, {B, N, C});
  if (B * N * C == 0) return out;
  STD_TORCH_CHECK(M > 0, "masked_attn: there must be keys");
  const Kernels& kernel = kernels();
  const int64_t panels = (M + kernel.keys - 1) / kernel.keys, width = C / heads, bytes = bytes_of(number);
  std::vector<uint64_t> open(B * N * panels);
  const char* mask_rows = static_cast<const char*>(m.const_data_ptr());
  parallel_for(0, B * N, grain_of(M), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernel.open_keys(mask_rows + i * M * bytes, number, M, open.data() + i * panels);
  });
  const Problem problem{static_cast<const char*>(q.const_data_ptr()), static_cast<const char*>(k.const_data_ptr()),
                        static_cast<const char*>(v.const_data_ptr()), open.data(), static_cast<char*>(out.mutable_data_ptr()),
                        N, M, panels, heads, width, number, 1.0f / std::sqrt(float(width))};
  const int64_t blocks = (N + kBlock - 1) / kBlock, rows = (N + blocks - 1) / blocks;
  const int64_t padded = (width + kernel.pad - 1) / kernel.pad * kernel.pad;
  parallel_for(0, B * heads * blocks, grain_of(rows * M * width / 10), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[scratch_size(kernel.keys, padded)]);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * rows, head = i / blocks % heads;
      if (first < N) kernel.attend(problem, i / blocks / heads, head, first, std::min(first + rows, N), scratch.get());
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvseg, m) {
  m.def("masked_attn(Tensor query, Tensor key, Tensor value, Tensor masks, int heads) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(pyvseg, CPU, m) {
  m.impl("masked_attn", TORCH_BOX(&masked_attn));
}
#endif

}  // namespace pyvseg::masked_attn
