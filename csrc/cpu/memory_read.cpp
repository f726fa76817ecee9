// SPDX-License-Identifier: Apache-2.0
// Space-time memory read: exact top-k by L2 similarity, softmax, weighted sum of values (see pyvseg/ops/memory_read.py).
// The search stands in memory_search.h. The readout gathers rows of values, channels in chunks that keep the touched
// memory in the last-level cache.
#include <cstdint>

#include "../isa.h"
#include "memory_search.h"

namespace pyvseg::memory_read {

struct Readout {
  const void* value;         // of one object: N rows of CV
  void* out;                 // of one object: M rows of CV, contiguous
  int64_t value_stride, CV, top_k;
  Number type;
  const int32_t* index;
  const float* weight;
};

struct Kernels {
  int64_t (*steps)(int64_t CK, Number type);
  void (*prepare)(const Search&, int64_t begin, int64_t end);
  int64_t (*scratch_bytes)(const Search&);
  void (*search)(const Search&, int64_t block, void* scratch);
  void (*readout)(const Readout&, int64_t channel, int64_t channels, int64_t begin, int64_t end);
};

#ifdef PYVSEG_ISA
namespace {

// Longer keys than this are treated as not finite: their rows are scored in any case, the sweep sees zeros.
constexpr float kLongest = 1e18f;

// A key as the sweep wants it, and what the sweep cannot see of it. Where pairs of bfloat16 stand in for floats, one more
// pair carries what rounding hides: |mk.qk - bf(mk).bf(qk)| <= |mk - bf(mk)| |qk| + |bf(mk)| |qk - bf(qk)|, so that the
// sum is an upper bound of the product. Returns the key's length, rounded up.
#if defined(__AVX512BF16__)
int64_t steps(int64_t CK, Number type) { return (CK + 1) / 2 + (type == Number::kBfloat16 ? 0 : 1); }

PYVSEG_INLINE uint32_t rounded_up(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return (u + 0xffff) >> 16;
}

PYVSEG_INLINE void encode_row(const bfloat16* key, int64_t CK, uint32_t* out, float, bool) {
  out[(CK - 1) / 2] = 0;
  __builtin_memcpy(out, key, size_t(CK) * 2);
}
template <typename Key>
PYVSEG_INLINE void encode_row(const Key* key, int64_t CK, uint32_t* out, float length, bool is_query) {
  out[(CK - 1) / 2] = 0;
  bfloat16* halves = (bfloat16*)out;
  vfloat lost2{};
  int64_t i = 0;
  for (; i + kLanes <= CK; i += kLanes) {
    const vfloat x = load(key + i);
    store(halves + i, x);
    const vfloat lost = x - load(halves + i);
    lost2 += lost * lost;
  }
  float total = sum(lost2);
  for (; i < CK; ++i) {
    const float x = load1(key + i);
    store1(halves + i, x);
    const float lost = x - load1(halves + i);
    total += lost * lost;
  }
  const uint32_t lost = rounded_up(__builtin_sqrtf(total) * 1.0001f), all = rounded_up(length * 1.01f);
  out[(CK + 1) / 2] = is_query ? all | lost << 16 : lost | all << 16;
}
#else
int64_t steps(int64_t CK, Number) { return CK; }

template <typename Key>
PYVSEG_INLINE void encode_row(const Key* key, int64_t CK, uint32_t* out, float, bool) {
  for (int64_t i = 0; i < CK; ++i) store1((float*)out + i, load1(key + i));
}
#endif

template <typename Key>
float encode(const Key* key, Number type, int64_t CK, uint32_t* out, float norm2, bool is_query) {
  const float length = __builtin_sqrtf(norm2) * 1.0001f + 1e-18f;  // the constant covers what underflows
  if (length < kLongest)
    encode_row(key, CK, out, length, is_query);
  else
    __builtin_memset(out, 0, size_t(steps(CK, type)) * 4);
  return length;
}

template <typename Key>
void prepare_keys(const Search& s, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const Key* key = (const Key*)s.memory + n * s.memory_stride;
    const float norm2 = dot(key, key, s.CK), length = encode(key, s.type, s.CK, s.prepared + n * s.steps, norm2, false);
    s.half_norm[n] = s.dot ? 0.0f : 0.5f * norm2;
    // 2^-22 per term covers the rounding of the sweep's sum and of the score's.
    s.slack[n] = length < kLongest ? length * float(s.CK + 8) * 0x1p-22f : kInfinity;
  }
}
void prepare(const Search& s, int64_t begin, int64_t end) {
  with_number(s.type, [&](auto key) { prepare_keys<decltype(key)>(s, begin, end); });
}

PYVSEG_INLINE int64_t triples(const Search& s) { return round_up(s.N < kSegment ? s.N : kSegment, kRows) / kTriple; }

int64_t scratch_bytes(const Search& s) {
  return kQueries * (capacity(s.N, s.top_k) * 8 + s.steps * 4 + 2 * triples(s) * 4) + s.steps * 4 +
         round_up(sizeof(Block), 64) + 256;
}

template <typename Key>
void search_block(const Search& s, int64_t first, void* scratch) {
  const int64_t live = s.M - first < kQueries ? s.M - first : kQueries;
  char* at = (char*)round_up((int64_t)scratch, 64);
  Block& block = *(Block*)at;
  block.bounds = (float*)(at + round_up(sizeof(Block), 64));
  block.peaks = block.bounds + kQueries * triples(s);
  block.capacity = capacity(s.N, s.top_k);
  block.scores = (int32_t*)(block.peaks + kQueries * triples(s));
  block.positions = block.scores + kQueries * block.capacity;
  block.queries = (uint32_t*)(block.positions + kQueries * block.capacity);
  uint32_t* row = block.queries + kQueries * s.steps;

  __builtin_memset(block.queries, 0, size_t(kQueries * s.steps) * 4);
  block.longest = 0;
  for (int64_t q = 0; q < kQueries; ++q) {
    block.least[q] = INT32_MIN;
    block.count[q] = 0;
    block.wild[q] = false;
    if (q >= live) continue;
    const Key* query = (const Key*)s.query + (first + q) * s.query_stride;
    const float length = encode(query, s.type, s.CK, row, dot(query, query, s.CK), true);
    block.wild[q] = !(length < kLongest);
    if (!block.wild[q] && length > block.longest) block.longest = length;
    uint32_t* lane = block.queries + q / kGroup * s.steps * kGroup + q % kGroup;
    for (int64_t i = 0; i < s.steps; ++i) lane[i * kGroup] = row[i];
  }
  find<Key>(s, block, first, live);
  for (int64_t q = 0; q < live; ++q) softmax(s, block, q, first + q);
}
void search(const Search& s, int64_t block, void* scratch) {
  with_number(s.type, [&](auto key) { search_block<decltype(key)>(s, block * kQueries, scratch); });
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
  with_number(r.type, [&](auto value) { readout_rows<decltype(value)>(r, channel, channels, begin, end); });
}

}  // namespace

PYVSEG_KERNELS = {steps, prepare, scratch_bytes, search, readout};
#else
}  // namespace pyvseg::memory_read

#include "launch.h"

namespace pyvseg::memory_read {

PYVSEG_KERNEL_TABLE

namespace {

// The chunk of value channels that is gathered at a time: N rows of it stay in the last-level cache.
constexpr int64_t kCacheBytes = 16 << 20;

const char* at(const Tensor& t, int64_t i, int64_t j = 0) {
  const int64_t offset = i * t.stride(0) + (t.dim() > 3 ? j * t.stride(1) : 0);
  return static_cast<const char*>(t.const_data_ptr()) + offset * bytes_of(number_of(t));
}

// memory_key (B, N, CK), memory_value (B, O, N, CV), query_key (B, M, CK)
//   -> readout (B, O, M, CV), index (B, M, top_k) int32, weight (B, M, top_k) float32
std::tuple<Tensor, Tensor, Tensor> memory_read(const Tensor& key, const Tensor& value, const Tensor& query, int64_t top_k,
                                               bool dot) {
  STD_TORCH_CHECK(key.dim() == 3 && query.dim() == 3 && value.dim() == 4, "memory_read: wrong number of dimensions");
  const int64_t B = key.size(0), N = key.size(1), CK = key.size(2), M = query.size(1), O = value.size(1), CV = value.size(3);
  STD_TORCH_CHECK(query.size(0) == B && query.size(2) == CK && value.size(0) == B && value.size(2) == N,
                  "memory_read: shapes do not agree");
  STD_TORCH_CHECK(top_k >= 1 && top_k <= N && N < INT32_MAX, "memory_read: top_k must be in 1..N");
  const Number type = number_of(key), value_type = number_of(value);
  STD_TORCH_CHECK(number_of(query) == type, "memory_read: keys must have one dtype");

  const Tensor keys = rows_contiguous(key), queries = rows_contiguous(query), values = rows_contiguous(value);
  Tensor out = torch::stable::new_empty(value, {B, O, M, CV});
  Tensor index = torch::stable::new_empty(value, {B, M, top_k}, ScalarType::Int);
  Tensor weight = torch::stable::new_empty(value, {B, M, top_k}, ScalarType::Float);
  const Kernels& kernel = kernels();

  const int64_t steps = kernel.steps(CK, type);
  std::vector<float> half_norms(B * N), slacks(B * N);
  const std::unique_ptr<uint32_t[]> prepared(new uint32_t[B * N * steps]);
  std::vector<Search> searches;
  for (int64_t b = 0; b < B; ++b)
    searches.push_back({at(keys, b), at(queries, b), keys.stride(1), queries.stride(1), N, M, CK, top_k, type, dot,
                        half_norms.data() + b * N, slacks.data() + b * N, prepared.get() + b * N * steps, steps,
                        index.mutable_data_ptr<int32_t>() + b * M * top_k, weight.mutable_data_ptr<float>() + b * M * top_k});
  for (const Search& search : searches)
    parallel_for(0, N, 512, [&](int64_t begin, int64_t end) { kernel.prepare(search, begin, end); });

  const int64_t blocks = (M + kQueries - 1) / kQueries;
  parallel_for(0, B * blocks, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char[]> scratch(new char[kernel.scratch_bytes(searches[begin / blocks])]);
    for (int64_t i = begin; i < end; ++i) kernel.search(searches[i / blocks], i % blocks, scratch.get());
  });

  const int64_t value_bytes = bytes_of(value_type);
  const int64_t chunk = std::max<int64_t>(kCacheBytes / (N * value_bytes) / 64 * 64, 64);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t o = 0; o < O; ++o) {
      const Readout readout{at(values, b, o),
                            static_cast<char*>(out.mutable_data_ptr()) + (b * O + o) * M * CV * value_bytes,
                            values.stride(2), CV, top_k, value_type, searches[b].index, searches[b].weight};
      for (int64_t c = 0; c < CV; c += chunk)
        parallel_for(0, M, 16, [&](int64_t begin, int64_t end) {
          kernel.readout(readout, c, std::min(chunk, CV - c), begin, end);
        });
    }
  return {out, index, weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvseg, m) {
  m.def(
      "memory_read(Tensor memory_key, Tensor memory_value, Tensor query_key, int top_k, bool dot=False)"
      " -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(pyvseg, CPU, m) { m.impl("memory_read", TORCH_BOX(&memory_read)); }
#endif

}  // namespace pyvseg::memory_read
