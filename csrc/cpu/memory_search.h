// SPDX-License-Identifier: Apache-2.0
// Exact top-k search of the memory read, kernel part: which memory positions are most similar to a block of 64 queries.
//
// The block stays in L1 with vector lanes = queries while the memory streams past it in segments. A first, branch-free
// sweep finds for every three rows an upper bound of their best score; on AVX-512 BF16 it multiplies pairs of bfloat16.
// Only rows whose bound beats a query's threshold are scored in float32. The N x M affinity never exists.
#pragma once
#include "vec.h"

namespace pyvseg::memory_read {

constexpr int kQueries = 64;  // per block

struct Search {
  const void* memory;       // N rows of CK keys
  const void* query;        // M rows of CK keys
  int64_t memory_stride, query_stride, N, M;
  int64_t CK, top_k;
  Number type;              // of both keys
  bool dot;                 // score <mk, qk> instead of (2 <mk, qk> - |mk|^2) / sqrt(CK)
  float* half_norm;         // (N) |memory|^2 / 2, or zeros
  float* slack;             // (N) rounding error of a score per unit of query length; infinite: score the row in any case
  uint32_t* prepared;       // (N, steps) keys in the form that the sweep wants them
  int64_t steps;
  int32_t* index;           // (M, top_k) out, ascending
  float* weight;            // (M, top_k) out
};

#ifdef PYVSEG_ISA
namespace {

constexpr int kRows = 6;                        // memory rows of a tile
constexpr int kColumns = kLanes == 16 ? 4 : 2;  // vectors of queries of a tile: 6 x 4 (6 x 2) accumulators fit
constexpr int kGroup = kColumns * kLanes;
constexpr int kTriple = 3;                      // rows that share a bound
constexpr float kInfinity = __builtin_inff();
constexpr int kSegment = 1024 * kRows;          // rows at a time: their bounds take 512 KiB

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
PYVSEG_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Block {
  float threshold[kQueries];  // a triple must have a greater bound to be scored
  int32_t least[kQueries];    // of the kept scores once k are kept, as ordered integers: a score must be greater
  int32_t count[kQueries];
  int64_t capacity;           // of a query's candidates
  int32_t* scores;            // (64, capacity) ordered integers
  int32_t* positions;         // (64, capacity) ascending
  uint32_t* queries;          // (64 / group, steps, group) as the sweep wants them
  bool wild[kQueries];        // not finite: every row is scored
  float longest;              // length of the other queries
  float* bounds;              // (triples of a segment, 64)
  float* peaks;               // (groups of triples, 64)
};

PYVSEG_INLINE int64_t capacity(int64_t N, int64_t k) { return round_up(2 * k + 32 < N ? 2 * k + 32 : N, 16) + 16; }

PYVSEG_INLINE int64_t count_greater(const int32_t* scores, int64_t n, int32_t than) {
  vint total{};
  for (int64_t i = 0; i < n; i += kLanes) total -= load(scores + i) > than;
  return sum(total);
}

// Keeps the k best of a query's candidates in order of position; among equals the earlier ones.
void prune(Block& block, int64_t q, int64_t k) {
  const int64_t n = block.count[q], padded = round_up(n, kLanes);
  int32_t* scores = block.scores + q * block.capacity;
  int32_t* positions = block.positions + q * block.capacity;
  int64_t low = INT32_MAX, high = INT32_MIN, above = 0;
  for (int64_t i = 0; i < n; ++i) {
    low = scores[i] < low ? scores[i] : low;
    high = scores[i] > high ? scores[i] : high;
  }
  for (int64_t i = n; i < padded; ++i) scores[i] = INT32_MIN;
  --low;  // from here on count(> low) >= k >= count(> high) = above
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
  block.least[q] = least;
}

PYVSEG_INLINE void consider(Block& block, int64_t q, int64_t n, float score, int64_t k) {
  const int32_t value = ordered(score);
  if (value <= block.least[q]) return;
  const int64_t at = q * block.capacity + block.count[q];
  block.scores[at] = value;
  block.positions[at] = int32_t(n);
  if (++block.count[q] == block.capacity) prune(block, q, k);
}

// A step of the sweep: one float of the keys, or (AVX-512 BF16) two bfloat16.
#if defined(__AVX512BF16__)
PYVSEG_INLINE vfloat step(vfloat acc, const uint32_t* query, const uint32_t* row) {
  return (vfloat)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_loadu_si512(query), (__m512bh)_mm512_set1_epi32(int32_t(*row)));
}
#else
PYVSEG_INLINE vfloat step(vfloat acc, const uint32_t* query, const uint32_t* row) {
  float key;
  __builtin_memcpy(&key, row, 4);
  return acc + load((const float*)query) * key;
}
#endif

// Bounds of two triples of rows for one group of queries.
PYVSEG_INLINE void sweep_tile(const uint32_t* const* rows, const uint32_t* queries, int64_t steps, const float* offset,
                              float* bounds) {
  vfloat acc[kRows][kColumns] = {};
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c)
        acc[r][c] = step(acc[r][c], queries + s * kGroup + c * kLanes, rows[r] + s);
  }
#pragma GCC unroll 8
  for (int t = 0; t < kRows; t += kTriple)
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      const vfloat a = acc[t][c] - offset[t], b = acc[t + 1][c] - offset[t + 1], d = acc[t + 2][c] - offset[t + 2];
      const vfloat ab = a > b ? a : b;
      store(bounds + t / kTriple * kQueries + c * kLanes, ab > d ? ab : d);
    }
}

// Bounds of the rows begin..end for the whole block.
void sweep(const Search& s, const Block& block, int64_t live, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n += kRows) {
    const uint32_t* rows[kRows];
    float offset[kRows];
    for (int64_t r = 0; r < kRows; ++r) {  // past the end, the last row again
      const int64_t row = n + r < end ? n + r : end - 1;
      rows[r] = s.prepared + row * s.steps;
      // The factor keeps the slack from drowning in the rounding of a norm that is far larger.
      offset[r] = s.slack[row] < kInfinity ? s.half_norm[row] * (1 - 0x1p-23f) - s.slack[row] * block.longest : -kInfinity;
    }
    float* bounds = block.bounds + (n - begin) / kTriple * kQueries;
    for (int64_t group = 0; group * kGroup < live; ++group)
      sweep_tile(rows, block.queries + group * s.steps * kGroup, s.steps, offset, bounds + group * kGroup);
  }
}

// Thresholds that somewhat more than k triples of the segment exceed, by bisection over the peaks of groups of triples.
void guess_thresholds(Block& block, int64_t triples, int64_t k) {
  const int64_t wanted = k + k / 8 + 4, fitting = triples / (4 * wanted);
  const int64_t size = fitting > 1 ? fitting : 1, groups = triples / size;
  for (int64_t q = 0; q < kQueries; q += kLanes) {
    vfloat low = splat(kInfinity), high = splat(-kInfinity);
    for (int64_t g = 0; g < groups; ++g) {
      vfloat peak = load(block.bounds + g * size * kQueries + q);
      for (int64_t t = 1; t < size; ++t) {
        const vfloat bound = load(block.bounds + (g * size + t) * kQueries + q);
        peak = bound > peak ? bound : peak;
      }
      store(block.peaks + g * kQueries + q, peak);
      low = peak < low ? peak : low;
      high = peak > high ? peak : high;
    }
    if (groups < wanted) high = low = splat(-kInfinity);
    for (int i = 0; groups >= wanted && i < 12; ++i) {
      const vfloat middle = 0.5f * low + 0.5f * high;
      vint above{};
      for (int64_t g = 0; g < groups; ++g) above -= load(block.peaks + g * kQueries + q) > middle;
      const vint enough = above >= int32_t(wanted);
      low = enough ? middle : low;
      high = enough ? high : middle;
    }
    store(block.threshold + q, low);
  }
}

// Scores the triples of the segment whose bound exceeds the query's threshold.
template <typename Key>
void score_candidates(const Search& s, Block& block, int64_t first, int64_t live, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n += kTriple) {
    const float* bounds = block.bounds + (n - begin) / kTriple * kQueries;
    for (int64_t group = 0; group < live; group += kLanes) {
      uint32_t passing = greater_mask(load(bounds + group), load(block.threshold + group));
      for (; passing; passing &= passing - 1) {
        const int64_t q = group + __builtin_ctz(passing);
        const Key* query = (const Key*)s.query + (first + q) * s.query_stride;
        for (int64_t row = n; row < n + kTriple && row < end; ++row) {
          const Key* key = (const Key*)s.memory + row * s.memory_stride;
          consider(block, q, row, dot(key, query, s.CK) - s.half_norm[row], s.top_k);
        }
      }
    }
  }
}

// A guess holds if the least kept score is above it: no row that it passed over can then be better, or equal and earlier.
// Queries whose guess was too high start over below the least score of what they found. Returns whether there are any.
bool settle_guesses(Block& block, int64_t live, int64_t k) {
  bool missed = false;
  for (int64_t q = 0; q < live; ++q) {
    const float guess = block.threshold[q];
    block.threshold[q] = kInfinity;
    if (block.count[q] >= k) prune(block, q, k);
    const bool full = block.count[q] == k;
    if (guess == -kInfinity || (full && block.least[q] > ordered(guess))) continue;
    block.threshold[q] = full && block.least[q] < ordered(kInfinity) ? unordered(block.least[q] - 2) : -kInfinity;
    block.count[q] = 0;
    block.least[q] = INT32_MIN;
    missed = true;
  }
  return missed;
}

// The k best positions of each live query of the block, into its candidates.
template <typename Key>
void find(const Search& s, Block& block, int64_t first, int64_t live) {
  for (int64_t begin = 0; begin < s.N; begin += kSegment) {
    const int64_t end = begin + kSegment < s.N ? begin + kSegment : s.N;
    sweep(s, block, live, begin, end);
    if (begin == 0) guess_thresholds(block, (end + kTriple - 1) / kTriple, s.top_k);
    for (int64_t q = 0; q < kQueries; ++q)
      if (q >= live || block.wild[q]) block.threshold[q] = q < live ? -kInfinity : kInfinity;
    score_candidates<Key>(s, block, first, live, begin, end);
    if (begin == 0 && settle_guesses(block, live, s.top_k)) score_candidates<Key>(s, block, first, live, begin, end);
    for (int64_t q = 0; q < live; ++q) {
      if (block.count[q] >= s.top_k) prune(block, q, s.top_k);
      block.threshold[q] = block.count[q] == s.top_k ? unordered(block.least[q]) : -kInfinity;
    }
  }
}

// Weights of the k candidates that are left, and their positions, as row m of the results.
void softmax(const Search& s, const Block& block, int64_t q, int64_t m) {
  const int64_t k = s.top_k, padded = round_up(k, kLanes);
  const int32_t* scores = block.scores + q * block.capacity;
  float* weights = (float*)scores;
  int32_t best = INT32_MIN;
  for (int64_t i = 0; i < k; ++i) best = scores[i] > best ? scores[i] : best;
  const float largest = unordered(best), scale = s.dot ? 1.0f : 2.0f / __builtin_sqrtf(float(s.CK));
  for (int64_t i = 0; i < k; ++i) weights[i] = (unordered(scores[i]) - largest) * scale;
  for (int64_t i = k; i < padded; ++i) weights[i] = -kInfinity;
  vfloat total{};
  for (int64_t i = 0; i < padded; i += kLanes) {
    const vfloat e = exp_nonpositive(load(weights + i));
    store(weights + i, e);
    total += e;
  }
  const float inverse = 1.0f / sum(total);
  for (int64_t i = 0; i < k; ++i) {
    s.weight[m * k + i] = weights[i] * inverse;
    s.index[m * k + i] = block.positions[q * block.capacity + i];
  }
}

}  // namespace
#endif
}  // namespace pyvseg::memory_read
