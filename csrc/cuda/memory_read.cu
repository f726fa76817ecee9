// SPDX-License-Identifier: Apache-2.0
// Space-time memory read (see pyvseg/ops/memory_read.py) in three steps: the sweep finds the best similarity of every eight
// memory positions (memory_sweep.cuh), a block per query scores its best groups again in float32 and picks the k best
// positions (memory_select.cuh), the readout gathers rows of values for all objects (memory_rows.cuh).
#include <algorithm>
#include <cmath>

#include "memory_rows.cuh"
#include "memory_sweep.cuh"

namespace pyvseg::memory_read {
namespace {

constexpr int kChoiceThreads = 128;
#ifdef PYVSEG_EMULATE
constexpr int64_t kBufferWords = 1 << 12;  // so that small tests take several chunks
#else
constexpr int64_t kBufferWords = 1 << 23;  // of a chunk of queries: 32 MB stay in a large GPU's second-level cache
#endif

struct Choice {
  Sweep sweep;         // of the chunk
  int64_t top_k, groups;
  float scale;         // of the softmax
  int32_t* group;      // (M, groups) the best, ascending
  int32_t* score;      // (M, groups x 8) ordered integers
  int32_t* index;      // (M, top_k) out, ascending
  float* weight;       // (M, top_k) out
};

// In several sums side by side: less rounding than one long sum, and less waiting.
template <typename T, bool Wide>
__device__ float dot(const T* a, const T* b, int64_t n) {
  constexpr int kEach = Wide ? kPerLoad<T> : 4;
  float sums[kEach] = {};
#pragma unroll 4
  for (int64_t i = 0; i < n; i += kEach) {
    float x[kEach], y[kEach];
    if constexpr (Wide) {
      load_readonly<kEach>(a + i, x);
      load_readonly<kEach>(b + i, y);
    } else {
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        x[j] = i + j < n ? to_float(a[i + j]) : 0;
        y[j] = i + j < n ? to_float(b[i + j]) : 0;
      }
    }
#pragma unroll
    for (int j = 0; j < kEach; ++j) sums[j] += x[j] * y[j];
  }
#pragma unroll
  for (int width = kEach / 2; width > 0; width /= 2)
#pragma unroll
    for (int j = 0; j < width; ++j) sums[j] += sums[j + width];
  return sums[0];
}

// Sum over the block of what `term(i)` gives for i < n.
template <typename Term>
__device__ float block_sum(int64_t n, const Term& term) {
  __shared__ float totals[kChoiceThreads / kWarp];
  float mine = 0;
  for (int64_t i = threadIdx.x; i < n; i += kChoiceThreads) mine += term(i);
  mine = warp_sum(mine);
  if (threadIdx.x % kWarp == 0) totals[threadIdx.x / kWarp] = mine;
  __syncthreads();
  float sum = 0;
  for (float total : totals) sum += total;
  return sum;
}

// A block per query.
template <typename T, bool Wide>
__global__ void __launch_bounds__(kChoiceThreads) choose(Choice a) {
  const int64_t m = blockIdx.x, candidates = a.groups * kGroup;
  int32_t* group = a.group + m * a.groups;
  int32_t* score = a.score + m * candidates;
  int32_t* index = a.index + m * a.top_k;
  float* weight = a.weight + m * a.top_k;
  select_largest<kChoiceThreads>(a.sweep.maxima + m * a.sweep.groups, a.sweep.groups, unsigned(a.groups),
                                 [&](unsigned rank, int64_t at) { group[rank] = int32_t(at); });
  __syncthreads();

  __shared__ int32_t largest;
  if (threadIdx.x == 0) largest = INT32_MIN;
  __syncthreads();
  const T* query = static_cast<const T*>(a.sweep.query) + m * a.sweep.query_row;
  int32_t best = INT32_MIN;
  for (int64_t i = threadIdx.x; i < candidates; i += kChoiceThreads) {
    const int64_t n = int64_t(group[i / kGroup]) * kGroup + i % kGroup;
    int32_t key = INT32_MIN;
    if (n < a.sweep.N)
      key = ordered(dot<T, Wide>(static_cast<const T*>(a.sweep.memory) + n * a.sweep.memory_row, query, a.sweep.CK) -
                    __ldg(a.sweep.half_norm + n));
    score[i] = key;
    best = max(best, key);
  }
  atomicMax(&largest, __reduce_max_sync(kFullWarp, best));
  __syncthreads();

  const float top = unordered(largest);
  select_largest<kChoiceThreads>(score, candidates, unsigned(a.top_k), [&](unsigned rank, int64_t at) {
    index[rank] = group[at / kGroup] * kGroup + int32_t(at % kGroup);
    weight[rank] = expf((unordered(score[at]) - top) * a.scale);
  });
  __syncthreads();
  const float inverse = 1.0f / block_sum(a.top_k, [&](int64_t i) { return weight[i]; });
  for (int64_t i = threadIdx.x; i < a.top_k; i += kChoiceThreads) weight[i] *= inverse;
}

template <bool Wide>
void search(const Tensor& key, const Tensor& query, int64_t top_k, bool dot_form, const Tensor& index, const Tensor& weight) {
  const int64_t B = key.size(0), N = key.size(1), CK = key.size(2), M = query.size(1);
  const int64_t all_groups = ceil_div(N, kGroup), groups = std::min(top_k, all_groups);
  const int64_t words = all_groups + groups * (1 + kGroup);
  const int64_t chunk = std::min({std::max<int64_t>(kBufferWords / words, 1), M, int64_t(65535) * kTileQueries});
  const Tensor half_norm = torch::stable::new_empty(key, {N}, ScalarType::Float);
  const Tensor buffer = torch::stable::new_empty(key, {chunk, words}, ScalarType::Int);
  int32_t* maxima = data<int32_t>(buffer);
  for_number(key, [&](auto number) {
    using T = decltype(number);
    for (int64_t b = 0; b < B; ++b) {
      const T* memory = data<T>(key) + b * key.stride(0);
      launch(half_norms<T>, blocks(N, 128 / kWarp), 128, 0, memory, key.stride(1), N, CK, dot_form, data<float>(half_norm));
      for (int64_t first = 0; first < M; first += chunk) {
        const int64_t rows = std::min(chunk, M - first), out = (b * M + first) * top_k;
        const T* queries = data<T>(query) + b * query.stride(0) + first * query.stride(1);
        const Sweep s{memory, queries, key.stride(1), query.stride(1), data<float>(half_norm), N, rows, CK, all_groups, maxima};
        sweep<Wide>(s, key);
        int32_t* const group = maxima + chunk * all_groups;
        const float scale = dot_form ? 1.0f : float(2 / std::sqrt(double(CK)));
        const Choice choice{s,     top_k, groups, scale, group, group + chunk * groups, data<int32_t>(index) + out,
                            data<float>(weight) + out};
        launch(choose<T, Wide>, blocks(rows, 1), kChoiceThreads, 0, choice);
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> memory_read(const Tensor& key, const Tensor& value, const Tensor& query, int64_t top_k,
                                               bool dot_form) {
  STD_TORCH_CHECK(key.dim() == 3 && query.dim() == 3 && value.dim() == 4, "memory_read: wrong number of dimensions");
  const int64_t B = key.size(0), N = key.size(1), M = query.size(1), O = value.size(1), CV = value.size(3);
  STD_TORCH_CHECK(query.size(0) == B && query.size(2) == key.size(2) && value.size(0) == B && value.size(2) == N,
                  "memory_read: shapes do not agree");
  STD_TORCH_CHECK(top_k >= 1 && top_k <= N && N < INT32_MAX - kGroup, "memory_read: top_k must be in 1..N");
  STD_TORCH_CHECK(query.scalar_type() == key.scalar_type(), "memory_read: keys must have one dtype");
  const OnDeviceOf device(key);
  const Tensor keys = rows_contiguous(key), queries = rows_contiguous(query), values = rows_contiguous(value);
  Tensor out = torch::stable::new_empty(value, {B, O, M, CV});
  Tensor index = torch::stable::new_empty(value, {B, M, top_k}, ScalarType::Int);
  Tensor weight = torch::stable::new_empty(value, {B, M, top_k}, ScalarType::Float);
  if (wide(keys) && wide(queries)) search<true>(keys, queries, top_k, dot_form, index, weight);
  else search<false>(keys, queries, top_k, dot_form, index, weight);
  gather({data<int32_t>(index), data<float>(weight), top_k, M}, values, out);
  return {out, index, weight};
}

}  // namespace

PYVSEG_CUDA_IMPL(m) { m.impl("memory_read", TORCH_BOX(&memory_read)); }

}  // namespace pyvseg::memory_read
