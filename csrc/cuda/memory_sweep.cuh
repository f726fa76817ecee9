// SPDX-License-Identifier: Apache-2.0
// Similarities of all queries and memory positions, of which only the best of every eight positions is kept.
//
// The k best positions of a query lie in its k best groups: a group that k others precede cannot hold one. Groups are of
// neighbours, so that among equals the order of groups is that of positions.
#pragma once
#include "memory_select.cuh"
#include "mma.cuh"

namespace pyvseg::memory_read {

constexpr int kGroup = 8;             // memory positions
constexpr int kTileQueries = 64, kTileMemory = 128, kSweepThreads = 128;

struct Sweep {
  const void* memory;                 // (N, CK)
  const void* query;                  // (M, CK)
  int64_t memory_row, query_row;      // strides
  const float* half_norm;             // (N) |memory|^2 / 2, or zeros
  int64_t N, M, CK, groups;
  int32_t* maxima;                    // (M, groups) ordered integers
};

// Rows [0, Count) of a slice of keys into shared memory, zeros where there are none: transposed floats ...
template <int Count, int Slice, bool Wide>
__device__ inline void stage(const float* rows, int64_t stride, int64_t there, int64_t width, float* to) {
  for (int i = threadIdx.x; i < Count * Slice / 4; i += kSweepThreads) {
    const int row = i / (Slice / 4), k = i % (Slice / 4) * 4;
    float x[4] = {};
    if (row < there) {
      if constexpr (Wide) {
        if (k < width) load_readonly<4>(rows + row * stride + k, x);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) x[j] = k + j < width ? rows[row * stride + k + j] : 0;
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) to[(k + j) * (Count + 4) + row] = x[j];
  }
}
// ... or rows of half-precision numbers as they are, at a pitch that meets every bank once.
template <int Count, int Slice, bool Wide>
__device__ inline void stage(const uint16_t* rows, int64_t stride, int64_t there, int64_t width, uint16_t* to) {
  for (int i = threadIdx.x; i < Count * Slice / 8; i += kSweepThreads) {
    const int row = i / (Slice / 8), k = i % (Slice / 8) * 8;
    alignas(16) uint16_t x[8] = {};
    if (row < there) {
      if constexpr (Wide) {
        if (k < width) *reinterpret_cast<uint4*>(x) = __ldg(reinterpret_cast<const uint4*>(rows + row * stride + k));
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) x[j] = k + j < width ? rows[row * stride + k + j] : 0;
      }
    }
    *reinterpret_cast<uint4*>(to + row * (Slice + 8) + k) = *reinterpret_cast<const uint4*>(x);
  }
}

// Each thread: 8 queries times one group, in float32.
template <bool Wide>
__global__ void __launch_bounds__(kSweepThreads) sweep_floats(Sweep s) {
  constexpr int kSlice = 16, kMemoryPitch = kTileMemory + 4, kQueryPitch = kTileQueries + 4;
  __shared__ __align__(16) float memory[kSlice * kMemoryPitch];
  __shared__ __align__(16) float queries[kSlice * kQueryPitch];
  const int64_t n0 = blockIdx.x * int64_t(kTileMemory), m0 = blockIdx.y * int64_t(kTileQueries);
  const float* from_memory = static_cast<const float*>(s.memory) + n0 * s.memory_row;
  const float* from_query = static_cast<const float*>(s.query) + m0 * s.query_row;
  const int mine = threadIdx.x / 8, column = threadIdx.x % 8 * 4;
  float sum[8][kGroup] = {};
  for (int64_t k0 = 0; k0 < s.CK; k0 += kSlice) {
    __syncthreads();
    stage<kTileMemory, kSlice, Wide>(from_memory + k0, s.memory_row, s.N - n0, s.CK - k0, memory);
    stage<kTileQueries, kSlice, Wide>(from_query + k0, s.query_row, s.M - m0, s.CK - k0, queries);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kSlice; ++k) {
      float key[kGroup], low[4], high[4];
      load<kGroup>(memory + k * kMemoryPitch + mine * kGroup, key);
      load<4>(queries + k * kQueryPitch + column, low);
      load<4>(queries + k * kQueryPitch + 32 + column, high);
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < kGroup; ++j) sum[i][j] += (i < 4 ? low[i % 4] : high[i % 4]) * key[j];
    }
  }
  const int64_t group = n0 / kGroup + mine;
  if (group >= s.groups) return;
  float half_norm[kGroup];
#pragma unroll
  for (int j = 0; j < kGroup; ++j) half_norm[j] = group * kGroup + j < s.N ? __ldg(s.half_norm + group * kGroup + j) : 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int64_t m = m0 + (i < 4 ? column + i : 32 + column + i - 4);
    if (m >= s.M) continue;
    int32_t best = INT32_MIN;
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
      if (group * kGroup + j < s.N) best = max(best, ordered(sum[i][j] - half_norm[j]));
    s.maxima[m * s.groups + group] = best;
  }
}

// Each warp: 32 queries times 8 groups on tensor cores. Products of half-precision numbers are exact in float32.
template <typename T, bool Wide>
__global__ void __launch_bounds__(kSweepThreads) sweep_halves(Sweep s) {
  constexpr int kSlice = 32, kPitch = kSlice + 8;
  __shared__ __align__(16) uint16_t memory[kTileMemory * kPitch];
  __shared__ __align__(16) uint16_t queries[kTileQueries * kPitch];
  const int64_t n0 = blockIdx.x * int64_t(kTileMemory), m0 = blockIdx.y * int64_t(kTileQueries);
  const uint16_t* from_memory = static_cast<const uint16_t*>(s.memory) + n0 * s.memory_row;
  const uint16_t* from_query = static_cast<const uint16_t*>(s.query) + m0 * s.query_row;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const uint16_t* my_memory = memory + (warp / 2 * 64 + g) * kPitch + 2 * t;
  const uint16_t* my_queries = queries + (warp % 2 * 32 + g) * kPitch + 2 * t;
  const auto word = [](const uint16_t* p) { return *reinterpret_cast<const uint32_t*>(p); };
  float sum[2][8][4] = {};
  for (int64_t k0 = 0; k0 < s.CK; k0 += kSlice) {
    __syncthreads();
    stage<kTileMemory, kSlice, Wide>(from_memory + k0, s.memory_row, s.N - n0, s.CK - k0, memory);
    stage<kTileQueries, kSlice, Wide>(from_query + k0, s.query_row, s.M - m0, s.CK - k0, queries);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kSlice; k += 16) {
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int part = 0; part < 4; ++part) a[i][part] = word(my_queries + (i * 16 + part % 2 * 8) * kPitch + k + part / 2 * 8);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const uint32_t b[2] = {word(my_memory + j * 8 * kPitch + k), word(my_memory + j * 8 * kPitch + k + 8)};
#pragma unroll
        for (int i = 0; i < 2; ++i) multiply_add<T>(sum[i][j], a[i], b);
      }
    }
  }
  const int64_t first_group = n0 / kGroup + warp / 2 * 8;
#pragma unroll
  for (int quarter = 0; quarter < 4; ++quarter) {  // the queries m0 + ... + 8 quarter + g of the warp
    int32_t kept[2];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int64_t n = (first_group + j) * kGroup + 2 * t;
      int32_t best = INT32_MIN;
#pragma unroll
      for (int c = 0; c < 2; ++c)
        if (n + c < s.N) best = max(best, ordered(sum[quarter / 2][j][quarter % 2 * 2 + c] - __ldg(s.half_norm + n + c)));
      best = max(best, __shfl_xor_sync(kFullWarp, best, 1));
      best = max(best, __shfl_xor_sync(kFullWarp, best, 2));
      if (j % 4 == t) kept[j / 4] = best;
    }
    const int64_t m = m0 + warp % 2 * 32 + quarter * 8 + g;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t group = first_group + half * 4 + t;
      if (m < s.M && group < s.groups) s.maxima[m * s.groups + group] = kept[half];
    }
  }
}

// |row|^2 / 2 of N rows, a warp for each; zeros for scores that are plain products.
template <typename T>
__global__ void half_norms(const T* rows, int64_t stride, int64_t N, int64_t CK, bool dot, float* out) {
  const int64_t n = (blockIdx.x * int64_t(blockDim.x) + threadIdx.x) / kWarp;
  if (n >= N) return;
  float sum = 0;
  for (int64_t c = threadIdx.x % kWarp; c < CK && !dot; c += kWarp) {
    const float x = to_float(rows[n * stride + c]);
    sum += x * x;
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) out[n] = 0.5f * sum;
}

template <bool Wide>
void sweep(const Sweep& s, const Tensor& like) {
  const dim3 grid(blocks(s.N, kTileMemory), blocks(s.M, kTileQueries));
  for_number(like, [&](auto number) {
    using T = decltype(number);
    if constexpr (sizeof(T) == 4) launch(sweep_floats<Wide>, grid, kSweepThreads, 0, s);
    else launch(sweep_halves<T, Wide>, grid, kSweepThreads, 0, s);
  });
}

}  // namespace pyvseg::memory_read
