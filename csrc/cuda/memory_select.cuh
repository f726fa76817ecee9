// SPDX-License-Identifier: Apache-2.0
// The k largest of a row of keys, by a block of threads.
#pragma once
#include "launch.cuh"

namespace pyvseg::memory_read {

// float with its order as an integer: any NaN highest, -0 equal to 0.
__device__ inline int32_t ordered(float x) {
  const int32_t i = __float_as_int(x + 0.0f);
  return x != x ? INT32_MAX : i < 0 ? i ^ 0x7fffffff : i;
}
__device__ inline float unordered(int32_t i) { return __int_as_float(i < 0 ? i ^ 0x7fffffff : i); }

// Sum of what the threads before this one hold.
template <int Threads>
__device__ inline unsigned sum_before(unsigned mine) {
  __shared__ unsigned totals[Threads / kWarp];
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  unsigned sum = mine;
#pragma unroll
  for (unsigned offset = 1; offset < kWarp; offset *= 2) {
    const unsigned other = __shfl_up_sync(kFullWarp, sum, offset);
    if (lane >= offset) sum += other;
  }
  __syncthreads();  // the totals of an earlier call have been read
  if (lane == kWarp - 1) totals[warp] = sum;
  __syncthreads();
  for (unsigned w = 0; w < warp; ++w) sum += totals[w];
  return sum - mine;
}

struct Bound {
  uint32_t key;      // the k-th largest, as an unsigned number
  unsigned equals;   // how many keys equal to it belong to the k largest
};

// The k-th largest of n >= k >= 1 keys: digits of 11 bits from the top, each found in a histogram of those that share the
// digits before it.
template <int Threads>
__device__ Bound kth_largest(const int32_t* keys, int64_t n, unsigned k) {
  constexpr int kBins = 2048, kEach = kBins / Threads;
  __shared__ unsigned counts[kBins];
  __shared__ unsigned found[2];
  Bound bound{0, k};
  uint32_t known = 0;
  for (int shift = 21; shift >= 0; shift = shift == 21 ? 10 : shift - 10) {
    const uint32_t digit_mask = shift ? kBins - 1 : (1 << 10) - 1;
    for (int i = threadIdx.x; i < kBins; i += Threads) counts[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n; i += Threads) {
      const uint32_t key = uint32_t(keys[i]) ^ 0x80000000u;
      if ((key & known) == bound.key) atomicAdd(&counts[key >> shift & digit_mask], 1u);
    }
    __syncthreads();
    const int highest = kBins - 1 - int(threadIdx.x) * kEach;
    unsigned mine = 0;
    for (int i = 0; i < kEach; ++i) mine += counts[highest - i];
    unsigned above = sum_before<Threads>(mine);
    if (above < bound.equals && above + mine >= bound.equals) {
      int digit = highest;
      while (above + counts[digit] < bound.equals) above += counts[digit--];
      found[0] = unsigned(digit);
      found[1] = bound.equals - above;
    }
    __syncthreads();
    bound.key |= found[0] << shift;
    bound.equals = found[1];
    known |= digit_mask << shift;
  }
  return bound;
}

// emit(rank, position) for the k largest keys in order of position; among equals the earlier ones.
template <int Threads, typename Emit>
__device__ void select_largest(const int32_t* keys, int64_t n, unsigned k, const Emit& emit) {
  const Bound bound = kth_largest<Threads>(keys, n, k);
  __shared__ unsigned totals[2];
  unsigned greater_passed = 0, equals_passed = 0;
  for (int64_t first = 0; first < n && greater_passed + equals_passed < k; first += Threads) {
    const int64_t i = first + threadIdx.x;
    const uint32_t key = i < n ? uint32_t(keys[i]) ^ 0x80000000u : 0;
    const bool is_greater = i < n && key > bound.key, is_equal = i < n && key == bound.key;
    // Counts of both kinds in one number: a round has far fewer than 2^16.
    const unsigned passed = sum_before<Threads>(unsigned(is_greater) | unsigned(is_equal) << 16);
    const unsigned equals = equals_passed + (passed >> 16);
    if (is_greater || (is_equal && equals < bound.equals))
      emit(greater_passed + (passed & 0xffff) + min(equals, bound.equals), i);
    if (threadIdx.x == Threads - 1) {
      totals[0] = (passed & 0xffff) + is_greater;
      totals[1] = (passed >> 16) + is_equal;
    }
    __syncthreads();
    greater_passed += totals[0];
    equals_passed = min(equals_passed + totals[1], bound.equals);
  }
}

}  // namespace pyvseg::memory_read
