// SPDX-License-Identifier: Apache-2.0
// Space-time memory read: exact top-k by L2 similarity, softmax, weighted sum of values (see pyvseg/ops/memory_read.py).
//
// Search: a block of 64 queries stays in L1 with vector lanes = queries, the memory streams past it, six rows at a time.
// A score enters a query's candidate buffer only if it beats that query's running threshold, so the N x M affinity never
// exists. Readout: rows of values are gathered, channels in chunks that keep the touched memory in the last-level cache.
#include <cstdint>

#include "../isa.h"
#include "vec.h"

namespace pyvseg::memory_read {

constexpr int kQueries = 64;  // per block

struct Search {
  const void* memory;        // N rows of CK keys
  const void* query;         // M rows of CK keys
  int64_t memory_stride, query_stride, N, M;
  int64_t CK, top_k;
  bool bf16;                 // dtype of both keys
  float* half_norm;          // (N) |memory|^2 / 2
  uint32_t* prepared;        // (N, prepared_words) keys in the form that the block wants them, when prepared_words > 0
  int64_t prepared_words;
  int32_t* index;            // (M, top_k) out, ascending
  float* weight;             // (M, top_k) out
};

struct Readout {
  const void* value;         // of one object: N rows of CV
  void* out;                 // of one object: M rows of CV, contiguous
  int64_t value_stride, CV, top_k;
  bool bf16;
  const int32_t* index;
  const float* weight;
};

struct Kernels {
  int64_t (*prepared_words)(int64_t CK, bool bf16);
  void (*prepare)(const Search&, int64_t begin, int64_t end);
  int64_t (*scratch_bytes)(const Search&);
  void (*search)(const Search&, int64_t block, void* scratch);
  void (*readout)(const Readout&, int64_t channel, int64_t channels, int64_t begin, int64_t end);
};

#ifdef PYVSEG_ISA
namespace {

constexpr int kRows = 6;                              // memory rows at a time
constexpr int kColumns = kLanes == 16 ? 4 : 2;        // vectors of queries at a time: 6 x 4 (6 x 2) accumulators fit
constexpr int kGroup = kColumns * kLanes;

// float with its order as an integer: any NaN highest, -0 equal to 0.
PYVSEG_INLINE int32_t ordered(float x) {
  if (x != x) return INT32_MAX;
  x += 0.0f;
  int32_t i;
  __builtin_memcpy(&i, &x, 4);
  return i < 0 ? i ^ 0x7fffffff : i;
}
PYVSEG_INLINE float unordered(int32_t i) {
  if (i < 0) i ^= 0x7fffffff;
  float x;
  __builtin_memcpy(&x, &i, 4);
  return x;
}

struct Block {
  float threshold[kQueries];     // a score must be greater (or the threshold NaN) to be looked at
  int32_t bound[kQueries];       // the same as an ordered integer, and decisive
  int32_t count[kQueries];
  float scores[kRows][kQueries];
  const char* rows[kRows];
};

struct Candidates {
  int32_t* scores;       // (64, capacity), ordered integers
  int32_t* positions;    // (64, capacity), ascending
  int64_t capacity;      // multiple of 16
};

PYVSEG_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

PYVSEG_INLINE int64_t capacity(int64_t N, int64_t k) {
  const int64_t roomy = 2 * k + 32;
  return round_up(roomy < N ? roomy : N, 16) + 16;
}

PYVSEG_INLINE int64_t count_greater(const int32_t* scores, int64_t n, int32_t than) {
  vint total{};
  for (int64_t i = 0; i < n; i += kLanes) total -= load(scores + i) > than;
  return sum(total);
}

// Keeps the k best of a query's n candidates in order of position; among equals the earlier ones.
void prune(Block& block, const Candidates& candidates, int64_t q, int64_t n, int64_t k) {
  int32_t* scores = candidates.scores + q * candidates.capacity;
  int32_t* positions = candidates.positions + q * candidates.capacity;
  // The bound itself may be among the kept. count(> low) > k >= count(> high) = above
  int64_t low = int64_t(block.bound[q]) - 1, high = INT32_MIN, above = 0;
  for (int64_t i = 0; i < n; ++i) high = scores[i] > high ? scores[i] : high;
  const int64_t padded = round_up(n, kLanes);
  for (int64_t i = n; i < padded; ++i) scores[i] = INT32_MIN;
  while (high - low > 1 && above != k) {
    const int64_t middle = (low + high) >> 1;
    const int64_t greater = count_greater(scores, padded, int32_t(middle));
    if (greater > k) {
      low = middle;
    } else {
      high = middle;
      above = greater;
    }
  }
  int64_t equals = k - above, kept = 0;
  int32_t least = INT32_MAX;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t score = scores[i], position = positions[i];
    const bool equal = score == high && equals > 0;
    const bool keep = score > high || equal;
    equals -= equal;
    scores[kept] = score;
    positions[kept] = position;
    kept += keep;
    least = keep && score < least ? score : least;
  }
  block.count[q] = int32_t(kept);
  block.bound[q] = least;
  block.threshold[q] = unordered(least);
}

PYVSEG_INLINE void consider(Block& block, const Candidates& candidates, int64_t q, int64_t n, float score, int64_t k) {
  const int32_t value = ordered(score);
  if (value <= block.bound[q]) return;
  const int64_t at = q * candidates.capacity + block.count[q];
  candidates.scores[at] = value;
  candidates.positions[at] = int32_t(n);
  if (++block.count[q] == candidates.capacity) prune(block, candidates, q, candidates.capacity, k);
}

// How a block sees keys: one float per step, or (AVX-512 BF16) two bfloat16 per step.
struct Floats {
  static constexpr int kKeys = 1;
  PYVSEG_INLINE vfloat step(vfloat acc, const char* query, const char* row) {
    float key;
    __builtin_memcpy(&key, row, 4);
    return acc + load((const float*)query) * key;
  }
};
#if defined(__AVX512BF16__)
struct Pairs {
  static constexpr int kKeys = 2;
  PYVSEG_INLINE vfloat step(vfloat acc, const char* query, const char* row) {
    int32_t keys;
    __builtin_memcpy(&keys, row, 4);
    return (vfloat)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_loadu_si512(query), (__m512bh)_mm512_set1_epi32(keys));
  }
};
#endif

// Scores of six rows against one group of queries, into block.scores; returns whether any beats its threshold.
template <typename Step>
PYVSEG_INLINE bool score_group(Block& block, const char* queries, const float* half_norm, int64_t steps, int64_t group) {
  vfloat acc[kRows][kColumns] = {};
  for (int64_t s = 0; s < steps; ++s) {
    const char* query = queries + s * kGroup * 4;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c)
        acc[r][c] = Step::step(acc[r][c], query + c * kLanes * 4, block.rows[r] + s * 4);
  }
  uint32_t any = 0;
#pragma GCC unroll 8
  for (int c = 0; c < kColumns; ++c) {
    const vfloat threshold = load(block.threshold + group * kGroup + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      acc[r][c] -= half_norm[r];
      any |= not_le_mask(acc[r][c], threshold);
    }
  }
  if (any == 0) return false;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) store(block.scores[r] + group * kGroup + c * kLanes, acc[r][c]);
  return true;
}

// Walks the memory past the block. Exact: scores are the similarities; otherwise upper bounds that `consider` replaces.
template <typename Step, typename Rescore>
void stream(const Search& s, Block& block, const Candidates& candidates, const char* queries, int64_t live,
            const char* keys, int64_t key_bytes, int64_t steps, Rescore rescore) {
  for (int64_t n = 0; n < s.N; n += kRows) {
    const int64_t rows = s.N - n < kRows ? s.N - n : kRows;
    float half_norm[kRows];
    for (int64_t r = 0; r < kRows; ++r) {
      const int64_t row = n + (r < rows ? r : rows - 1);
      block.rows[r] = keys + row * key_bytes;
      half_norm[r] = s.half_norm[row];
    }
    for (int64_t group = 0; group * kGroup < live; ++group) {
      if (!score_group<Step>(block, queries + group * steps * kGroup * 4, half_norm, steps, group)) continue;
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t q = group * kGroup; q < (group + 1) * kGroup; q += kLanes) {
          uint32_t passing = not_le_mask(load(block.scores[r] + q), load(block.threshold + q));
          if (q + kLanes > live) passing &= q < live ? (1u << (live - q)) - 1 : 0;
          for (; passing; passing &= passing - 1) {
            const int64_t lane = q + __builtin_ctz(passing);
            consider(block, candidates, lane, n + r, rescore(lane, n + r, block.scores[r][lane]), s.top_k);
          }
        }
    }
  }
}

// Weights of the k candidates that are left, and their positions.
void softmax(const Search& s, const Candidates& candidates, int64_t q, int64_t m) {
  const int64_t k = s.top_k, padded = round_up(k, kLanes);
  int32_t* scores = candidates.scores + q * candidates.capacity;
  const int32_t* positions = candidates.positions + q * candidates.capacity;
  int32_t best = INT32_MIN;
  for (int64_t i = 0; i < k; ++i) best = scores[i] > best ? scores[i] : best;
  const float largest = unordered(best), scale = 2.0f / __builtin_sqrtf(float(s.CK));
  float* weights = (float*)scores;
  for (int64_t i = 0; i < k; ++i) {
    const float difference = (unordered(scores[i]) - largest) * scale;
    __builtin_memcpy(weights + i, &difference, 4);
  }
  for (int64_t i = k; i < padded; ++i) weights[i] = -1e30f;
  vfloat total{};
  for (int64_t i = 0; i < padded; i += kLanes) {
    const vfloat e = exp_nonpositive(load(weights + i));
    store(weights + i, e);
    total += e;
  }
  const float inverse = 1.0f / sum(total);
  for (int64_t i = 0; i < k; ++i) {
    s.weight[m * k + i] = weights[i] * inverse;
    s.index[m * k + i] = positions[i];
  }
}

// A key row as the block's steps want it. Where bfloat16 pairs stand in for floats, one more pair carries what rounding
// may have hidden: |mk.qk - bf(mk).bf(qk)| <= |mk - bf(mk)| |qk| + |bf(mk)| |qk - bf(qk)|, so the accumulated sum is an
// upper bound of the product, and only scores whose bound passes the threshold are computed in float32.
#if defined(__AVX512BF16__)
PYVSEG_INLINE int64_t words(int64_t CK, bool bf16) { return (CK + 1) / 2 + (bf16 ? 0 : 1); }

PYVSEG_INLINE uint32_t rounded_up(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return x == x ? (u + 0xffff) >> 16 : 0x7fc0;
}

void encode(const bfloat16* key, int64_t CK, uint32_t* out, bool) {
  if (CK % 2) out[CK / 2] = 0;
  __builtin_memcpy(out, key, size_t(CK) * 2);
}
void encode(const float* key, int64_t CK, uint32_t* out, bool is_query) {
  if (CK % 2) out[CK / 2] = 0;
  bfloat16* halves = (bfloat16*)out;
  vfloat error{}, norm{};
  int64_t i = 0;
  for (; i + kLanes <= CK; i += kLanes) {
    const vfloat x = load(key + i);
    store(halves + i, x);
    const vfloat lost = x - load(halves + i);
    error += lost * lost;
    norm += x * x;
  }
  float error2 = sum(error), norm2 = sum(norm);
  for (; i < CK; ++i) {
    store1(halves + i, key[i]);
    const float lost = key[i] - load1(halves + i);
    error2 += lost * lost;
    norm2 += key[i] * key[i];
  }
  // 2^-22 per term covers the rounding of both sums; the small constant what the pair product flushes to zero.
  const float length = __builtin_sqrtf(norm2) * 1.0001f;
  const float slack = __builtin_sqrtf(error2) * 1.0001f + length * float(CK + 8) * 0x1p-22f + 1e-18f;
  const uint32_t first = rounded_up(is_query ? length + slack : slack), second = rounded_up(is_query ? slack : length + slack);
  out[(CK + 1) / 2] = first | second << 16;
}
using BfloatStep = Pairs;
#else
PYVSEG_INLINE int64_t words(int64_t CK, bool bf16) { return bf16 ? CK : 0; }

void encode(const bfloat16* key, int64_t CK, uint32_t* out, bool) {
  for (int64_t i = 0; i < CK; ++i) out[i] = uint32_t(key[i].bits) << 16;
}
void encode(const float* key, int64_t CK, uint32_t* out, bool) { __builtin_memcpy(out, key, size_t(CK) * 4); }
using BfloatStep = Floats;
#endif

int64_t prepared_words(int64_t CK, bool bf16) { return words(CK, bf16); }

template <typename Key>
void prepare_keys(const Search& s, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const Key* key = (const Key*)s.memory + n * s.memory_stride;
    s.half_norm[n] = 0.5f * dot(key, key, s.CK);
    if (s.prepared_words > 0) encode(key, s.CK, s.prepared + n * s.prepared_words, false);
  }
}
void prepare(const Search& s, int64_t begin, int64_t end) {
  s.bf16 ? prepare_keys<bfloat16>(s, begin, end) : prepare_keys<float>(s, begin, end);
}

PYVSEG_INLINE int64_t steps_of(const Search& s) { return s.prepared_words > 0 ? s.prepared_words : s.CK; }

int64_t scratch_bytes(const Search& s) {
  return round_up(sizeof(Block), 64) + kQueries * capacity(s.N, s.top_k) * 8 + (kQueries + 1) * steps_of(s) * 4 + 256;
}

template <typename Key, typename Step>
void search_block(const Search& s, int64_t first, void* scratch) {
  const int64_t steps = steps_of(s), live = s.M - first < kQueries ? s.M - first : kQueries;
  char* at = (char*)round_up((int64_t)scratch, 64);
  Block& block = *(Block*)at;
  at += round_up(sizeof(Block), 64);
  uint32_t* queries = (uint32_t*)at;
  uint32_t* row = queries + kQueries * steps;
  Candidates candidates;
  candidates.capacity = capacity(s.N, s.top_k);
  candidates.scores = (int32_t*)round_up((int64_t)(row + steps), 64);
  candidates.positions = candidates.scores + kQueries * candidates.capacity;

  __builtin_memset(queries, 0, size_t(kQueries * steps) * 4);
  for (int64_t q = 0; q < kQueries; ++q) {
    block.threshold[q] = unordered(INT32_MAX);  // NaN: everything passes
    block.bound[q] = INT32_MIN;
    block.count[q] = 0;
    if (q >= live) continue;
    encode((const Key*)s.query + (first + q) * s.query_stride, s.CK, row, true);
    uint32_t* lane = queries + q / kGroup * steps * kGroup + q % kGroup;
    for (int64_t i = 0; i < steps; ++i) lane[i * kGroup] = row[i];
  }
  const char* keys = s.prepared_words > 0 ? (const char*)s.prepared : (const char*)s.memory;
  const int64_t key_bytes = s.prepared_words > 0 ? s.prepared_words * 4 : s.memory_stride * 4;
  if (Step::kKeys == 2 && !s.bf16) {
    stream<Step>(s, block, candidates, (const char*)queries, live, keys, key_bytes, steps,
                 [&](int64_t q, int64_t n, float) __attribute__((always_inline)) {
                   const Key* memory = (const Key*)s.memory + n * s.memory_stride;
                   return dot(memory, (const Key*)s.query + (first + q) * s.query_stride, s.CK) - s.half_norm[n];
                 });
  } else {
    stream<Step>(s, block, candidates, (const char*)queries, live, keys, key_bytes, steps,
                 [](int64_t, int64_t, float score) __attribute__((always_inline)) { return score; });
  }
  for (int64_t q = 0; q < live; ++q) {
    if (block.count[q] > s.top_k) prune(block, candidates, q, block.count[q], s.top_k);
    softmax(s, candidates, q, first + q);
  }
}
void search(const Search& s, int64_t block, void* scratch) {
  s.bf16 ? search_block<bfloat16, BfloatStep>(s, block * kQueries, scratch)
         : search_block<float, BfloatStep>(s, block * kQueries, scratch);
}

// out[m, channel...] = sum over rank of weight * value[index]: T vectors of channels at a time, later rows prefetched.
template <int T, typename Value>
PYVSEG_INLINE void gather(const Readout& r, int64_t m, int64_t last, int64_t channel) {
  const Value* value = (const Value*)r.value + channel;
  const int32_t* index = r.index + m * r.top_k;
  const float* weight = r.weight + m * r.top_k;
  vfloat acc[T] = {};
  for (int64_t j = 0; j < r.top_k; ++j) {
    const int64_t ahead = m * r.top_k + j + 4;
    const Value* next = value + r.index[ahead < last ? ahead : last] * r.value_stride;
#pragma GCC unroll 16
    for (int t = 0; t < int(T * kLanes * sizeof(Value)); t += 64) __builtin_prefetch((const char*)next + t);
    const Value* row = value + index[j] * r.value_stride;
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) acc[t] += weight[j] * load(row + t * kLanes);
  }
  Value* out = (Value*)r.out + m * r.CV + channel;
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) store(out + t * kLanes, acc[t]);
}

template <typename Value>
void readout_rows(const Readout& r, int64_t channel, int64_t channels, int64_t begin, int64_t end) {
  constexpr int kWide = kLanes == 16 ? 16 : 8;
  const int64_t stop = channel + channels, last = end * r.top_k - 1;
  for (int64_t m = begin; m < end; ++m) {
    int64_t c = channel;
    for (; c + kWide * kLanes <= stop; c += kWide * kLanes) gather<kWide, Value>(r, m, last, c);
    for (; c + 4 * kLanes <= stop; c += 4 * kLanes) gather<4, Value>(r, m, last, c);
    for (; c + kLanes <= stop; c += kLanes) gather<1, Value>(r, m, last, c);
    for (; c < stop; ++c) {
      float total = 0;
      for (int64_t j = m * r.top_k; j < (m + 1) * r.top_k; ++j)
        total += r.weight[j] * load1((const Value*)r.value + r.index[j] * r.value_stride + c);
      store1((Value*)r.out + m * r.CV + c, total);
    }
  }
}
void readout(const Readout& r, int64_t channel, int64_t channels, int64_t begin, int64_t end) {
  r.bf16 ? readout_rows<bfloat16>(r, channel, channels, begin, end) : readout_rows<float>(r, channel, channels, begin, end);
}

}  // namespace

PYVSEG_KERNELS = {prepared_words, prepare, scratch_bytes, search, readout};
#else
}  // namespace pyvseg::memory_read

#include "launch.h"

namespace pyvseg::memory_read {

PYVSEG_KERNEL_TABLE

namespace {

// The chunk of value channels that is gathered at a time: N rows of it stay in the last-level cache.
constexpr int64_t kCacheBytes = 16 << 20;

const char* at(const Tensor& t, bool bf16, int64_t i, int64_t j = 0) {
  const int64_t offset = i * t.stride(0) + (t.dim() > 3 ? j * t.stride(1) : 0);
  return static_cast<const char*>(t.const_data_ptr()) + offset * (bf16 ? 2 : 4);
}

// memory_key (B, N, CK), memory_value (B, O, N, CV), query_key (B, M, CK)
//   -> readout (B, O, M, CV), index (B, M, top_k) int32, weight (B, M, top_k) float32
std::tuple<Tensor, Tensor, Tensor> memory_read(const Tensor& key, const Tensor& value, const Tensor& query, int64_t top_k) {
  STD_TORCH_CHECK(key.dim() == 3 && query.dim() == 3 && value.dim() == 4, "memory_read: wrong number of dimensions");
  const int64_t B = key.size(0), N = key.size(1), CK = key.size(2), M = query.size(1), O = value.size(1), CV = value.size(3);
  STD_TORCH_CHECK(query.size(0) == B && query.size(2) == CK && value.size(0) == B && value.size(2) == N,
                  "memory_read: shapes do not agree");
  STD_TORCH_CHECK(top_k >= 1 && top_k <= N && N < INT32_MAX, "memory_read: top_k must be in 1..N");
  const bool key_bf16 = is_bf16(key), value_bf16 = is_bf16(value);
  STD_TORCH_CHECK(is_bf16(query) == key_bf16, "memory_read: keys must have one dtype");

  const Tensor keys = rows_contiguous(key), queries = rows_contiguous(query), values = rows_contiguous(value);
  Tensor out = torch::stable::new_empty(value, {B, O, M, CV});
  Tensor index = torch::stable::new_empty(value, {B, M, top_k}, ScalarType::Int);
  Tensor weight = torch::stable::new_empty(value, {B, M, top_k}, ScalarType::Float);
  const Kernels& kernel = kernels();

  const int64_t words = kernel.prepared_words(CK, key_bf16);
  std::vector<float> half_norms(B * N);
  std::unique_ptr<uint32_t[]> prepared(new uint32_t[B * N * words]);
  std::vector<Search> searches;
  for (int64_t b = 0; b < B; ++b)
    searches.push_back({at(keys, key_bf16, b), at(queries, key_bf16, b), keys.stride(1), queries.stride(1), N, M, CK, top_k,
                        key_bf16, half_norms.data() + b * N, prepared.get() + b * N * words, words,
                        index.mutable_data_ptr<int32_t>() + b * M * top_k, weight.mutable_data_ptr<float>() + b * M * top_k});
  for (const Search& search : searches)
    parallel_for(0, N, 512, [&](int64_t begin, int64_t end) { kernel.prepare(search, begin, end); });

  const int64_t blocks = (M + kQueries - 1) / kQueries;
  parallel_for(0, B * blocks, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char[]> scratch(new char[kernel.scratch_bytes(searches[begin / blocks])]);
    for (int64_t i = begin; i < end; ++i) kernel.search(searches[i / blocks], i % blocks, scratch.get());
  });

  const int64_t value_bytes = value_bf16 ? 2 : 4;
  const int64_t chunk = std::max<int64_t>(kCacheBytes / (N * value_bytes) / 64 * 64, 64);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t o = 0; o < O; ++o) {
      const Readout readout{at(values, value_bf16, b, o),
                            static_cast<char*>(out.mutable_data_ptr()) + (b * O + o) * M * CV * value_bytes,
                            values.stride(2), CV, top_k, value_bf16, searches[b].index, searches[b].weight};
      for (int64_t c = 0; c < CV; c += chunk)
        parallel_for(0, M, 16, [&](int64_t begin, int64_t end) {
          kernel.readout(readout, c, std::min(chunk, CV - c), begin, end);
        });
    }
  return {out, index, weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvseg, m) {
  m.def("memory_read(Tensor memory_key, Tensor memory_value, Tensor query_key, int top_k) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(pyvseg, CPU, m) { m.impl("memory_read", TORCH_BOX(&memory_read)); }
#endif

}  // namespace pyvseg::memory_read
