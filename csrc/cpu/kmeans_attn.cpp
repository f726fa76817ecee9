// SPDX-License-Identifier: Apache-2.0
// k-means attention: every position joins the cluster of its largest logit, clusters sum the values of their positions
// (see pyvseg/ops/kmeans_attn.py).
//
// Vector lanes are positions. A tile of them is packed to words [step][position], which stay in L1; the packed clusters
// [group][step][lane] stream past it from L2. The largest logit is found in the accumulators: logits are written only
// where they are wanted. A word is a float, or on AVX-512 BF16 the bfloat16 of two channels.
#include <cstdint>

#include "../isa.h"
#include "kmeans_sums.h"

namespace pyvseg::kmeans_attn {

using kmeans::Map;

// One image.
struct Problem {
  Map pixel, clusters, value;  // the channels of `clusters` are pixel's, its positions are the clusters
  const float *scale, *bias;
  int64_t scale_stride, bias_stride;  // 1, or 0 where one number serves all clusters
  int32_t* assign;
  void* logits;  // (clusters, positions) in pixel's number, or null
};

struct Kernels {
  int64_t (*words)(const Problem&, bool of_clusters);  // of packed clusters, or of a packed tile and its logits
  void (*pack_clusters)(const Problem&, uint32_t* packed);
  void (*chunk)(const Problem&, const uint32_t* packed, uint32_t* tile, int64_t begin, int64_t end, float* bins);
  void (*add_up)(const kmeans::Totals&, int64_t begin, int64_t end);
};

#ifdef PYVSEG_ISA
namespace {

using namespace kmeans;

constexpr int kRows = kLanes == 16 ? 8 : 4, kColumns = 3;  // clusters x vectors of positions that accumulate in registers
constexpr int kTile = kColumns * kLanes;
constexpr int64_t kDepth = 128;  // steps of a tile that stay in L1 while all clusters pass
static_assert(kRun % kTile == 0 && kLanes % kRows == 0);

#if defined(__AVX512BF16__)
template <typename T>
constexpr bool kPairs = sizeof(T) == 2 && __is_same(T, bfloat16);
#else
template <typename T>
constexpr bool kPairs = false;
#endif

PYVSEG_INLINE int64_t steps_of(const Map& map) {
#if defined(__AVX512BF16__)
  if (map.number == Number::kBfloat16) return (map.channels + 1) / 2;
#endif
  return map.channels;
}

PYVSEG_INLINE int64_t padded_clusters(const Problem& p) { return (p.clusters.positions + kLanes - 1) / kLanes * kLanes; }

// Behind the packed clusters stand their scales and biases.
PYVSEG_INLINE const float* scales(const Problem& p, const uint32_t* packed) {
  return (const float*)packed + steps_of(p.pixel) * padded_clusters(p);
}

// A vector of words along the channels or along the positions.
template <typename T>
PYVSEG_INLINE vuint words_along_channels(const T* p, int64_t channels) {
  if constexpr (kPairs<T>) {
    vuint v{};
    __builtin_memcpy(&v, p, channels >= 2 * kLanes ? sizeof v : size_t(channels) * sizeof(T));
    return v;
  } else {
    return (vuint)load_some(p, channels);
  }
}
template <typename T>
PYVSEG_INLINE vuint words_along_positions(const T* p, int64_t channel_stride, bool alone, int64_t positions) {
  const vuint first = (vuint)load_some(p, positions);
  if constexpr (kPairs<T>) {
    const vuint second = alone ? vuint{} : (vuint)load_some(p + channel_stride, positions);
    return first >> 16 | second;
  } else {
    return first;
  }
}

// kLanes positions from `first` on, of which `live` are there, as columns of `out`; the others are zero.
template <typename T>
void pack(const Map& map, int64_t first, int64_t live, uint32_t* out, int64_t stride) {
  constexpr int kWidth = kPairs<T> ? 2 : 1;  // channels of a word
  const int64_t steps = steps_of(map);
  if (positions_adjacent(map)) {
    const T* from = (const T*)map.data + first;
    for (int64_t s = 0; s < steps; ++s, from += kWidth * map.channel_stride)
      store((float*)out + s * stride,
            (vfloat)words_along_positions(from, map.channel_stride, s * kWidth + 1 == map.channels, live));
    return;
  }
  const T* from = (const T*)map.data + first * map.position_stride;
  for (int64_t s = 0; s < steps; s += kLanes) {
    vuint v[kLanes];
    const int64_t channels = map.channels - s * kWidth;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      v[i] = i < live ? words_along_channels(from + i * map.position_stride + s * kWidth, channels) : vuint{};
    transpose(v);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if (s + i < steps) store((float*)out + (s + i) * stride, (vfloat)v[i]);
  }
}

template <bool pairs>
PYVSEG_INLINE vfloat multiply_add(vfloat sum, const uint32_t* positions, const uint32_t* cluster) {
#if defined(__AVX512BF16__)
  if constexpr (pairs)
    return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(positions),
                                    (__m512bh)_mm512_set1_epi32(int32_t(*cluster)));
#endif
  float x;
  __builtin_memcpy(&x, cluster, 4);
  return sum + load((const float*)positions) * x;
}

// Adds the products of kRows clusters with a tile over `steps`.
template <bool pairs>
PYVSEG_INLINE void products(const uint32_t* tile, const uint32_t* cluster, int64_t steps, vfloat sum[kRows][kColumns]) {
  for (int64_t s = 0; s < steps; ++s, tile += kTile, cluster += kLanes)
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
      for (int j = 0; j < kColumns; ++j) sum[r][j] = multiply_add<pairs>(sum[r][j], tile + j * kLanes, cluster + r);
}

// The products over all steps but the last kDepth or fewer, as (clusters, tile), where there are more.
template <bool pairs>
int64_t begin_products(const uint32_t* packed, const uint32_t* tile, int64_t clusters, int64_t steps, float* begun) {
  int64_t first = 0;
  for (; first + kDepth < steps; first += kDepth)
    for (int64_t n = 0; n < clusters; n += kRows) {
      vfloat sum[kRows][kColumns] = {};
      float* row = begun + n * kTile;
      if (first) __builtin_memcpy(sum, row, sizeof sum);
      products<pairs>(tile + first * kTile, packed + (n / kLanes * steps + first) * kLanes + n % kLanes, kDepth, sum);
      __builtin_memcpy(row, sum, sizeof sum);
    }
  return first;
}

// Not inlined, so that `logit` need not be in memory where logits are not wanted.
template <typename T>
__attribute__((noinline)) void write_logits(const Problem& p, const vfloat logit[kRows][kColumns], int64_t n, int64_t first,
                                            int64_t live) {
  for (int64_t r = 0; r < kRows && n + r < p.clusters.positions; ++r) {
    T* out = (T*)p.logits + (n + r) * p.pixel.positions + first;
    for (int64_t j = 0; j < kColumns; ++j) store_some(out + j * kLanes, logit[r][j], live - j * kLanes);
  }
}

// The largest logit of kRows clusters from `n` on. Quicker than one `consider` after another, but blind to NaN.
PYVSEG_INLINE void consider_all(Best& best, const vfloat logit[kRows][kColumns], int j, int64_t n) {
  vfloat most = logit[0][j];
#pragma GCC unroll 8
  for (int r = 1; r < kRows; ++r) most = logit[r][j] > most ? logit[r][j] : most;
  vint row{};
#pragma GCC unroll 8
  for (int r = kRows - 1; r >= 0; --r) row = logit[r][j] == most ? splat(int32_t(r)) : row;
  best.cluster = most > best.score ? row + int32_t(n) : best.cluster;
  best.score = most > best.score ? most : best.score;
}

// Meanwhile it fetches a share of what the run that the tile is in will sum, and of the next run's pixels. Returns whether
// a logit was NaN; if so, what it has assigned is right only where it was careful.
template <typename T, bool careful>
bool assign_tile(const Problem& p, const uint32_t* packed, uint32_t* tile, int64_t run, int64_t first, int64_t live) {
  const int64_t steps = steps_of(p.pixel), clusters = p.clusters.positions, blocks = (clusters + kRows - 1) / kRows;
  const float *scale = scales(p, packed), *bias = scale + padded_clusters(p);
  float* begun = (float*)tile + steps * kTile;
  const int64_t done = begin_products<kPairs<T>>(packed, tile, clusters, steps, begun);
  Best best[kColumns];
  vfloat total[kColumns] = {};  // NaN if a logit is
  for (int64_t n = 0; n < clusters; n += kRows) {
    const int64_t part = (first - run) / kTile * blocks + n / kRows, parts = kRun / kTile * blocks;
    prefetch(p.value, run, smaller(kRun, p.value.positions - run), part, parts);
    prefetch(p.pixel, run + kRun, smaller(kRun, p.pixel.positions - run - kRun), part, parts);
    vfloat logit[kRows][kColumns] = {};
    if (done) __builtin_memcpy(logit, begun + n * kTile, sizeof logit);
    products<kPairs<T>>(tile + done * kTile, packed + (n / kLanes * steps + done) * kLanes + n % kLanes, steps - done, logit);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
      for (int j = 0; j < kColumns; ++j) {
        logit[r][j] = logit[r][j] * scale[n + r] + bias[n + r];
        total[j] += logit[r][j];
        if (careful) consider(best[j], logit[r][j], int32_t(n + r));
      }
    if (!careful)
#pragma GCC unroll 3
      for (int j = 0; j < kColumns; ++j) consider_all(best[j], logit, j, n);
    if (p.logits) {
      vfloat copy[kRows][kColumns];
      __builtin_memcpy(copy, logit, sizeof copy);
      write_logits<T>(p, copy, n, first, live);
    }
  }
  for (int j = 0; j < kColumns; ++j) store_some(p.assign + first + j * kLanes, best[j].cluster, live - j * kLanes);
  vint nan{};
  for (int j = 0; j < kColumns; ++j) nan |= total[j] != total[j];
  return sum(nan) != 0;
}

int64_t words(const Problem& p, bool of_clusters) {
  const int64_t steps = steps_of(p.pixel), clusters = padded_clusters(p);
  return of_clusters ? (steps + 2) * clusters : (steps + (steps > kDepth ? clusters : 0)) * kTile;
}

void pack_clusters(const Problem& p, uint32_t* packed) {
  const int64_t N = p.clusters.positions, size = steps_of(p.clusters) * kLanes;
  with_number(p.clusters.number, [&](auto number) {
    for (int64_t n = 0; n < N; n += kLanes)
      pack<decltype(number)>(p.clusters, n, smaller(N - n, kLanes), packed + n / kLanes * size, kLanes);
  });
  float *scale = (float*)scales(p, packed), *bias = scale + padded_clusters(p);
  for (int64_t n = 0; n < padded_clusters(p); ++n) {  // what pads the clusters is never the largest
    scale[n] = n < N ? p.scale[n * p.scale_stride] : 0;
    bias[n] = n < N ? p.bias[n * p.bias_stride] : -__builtin_inff();
  }
}

void chunk(const Problem& p, const uint32_t* packed, uint32_t* tile, int64_t begin, int64_t end, float* bins) {
  for (int64_t run = begin; run < end; run += kRun) {
    const int64_t stop = smaller(run + kRun, end);
    with_number(p.pixel.number, [&](auto number) {
      using T = decltype(number);
      for (int64_t m = run; m < stop; m += kTile) {
        const int64_t live = smaller(stop - m, kTile);
        if (p.clusters.positions == 1 && !p.logits) {
          __builtin_memset(p.assign + m, 0, size_t(live) * sizeof(int32_t));
          continue;
        }
        for (int j = 0; j < kColumns; ++j) pack<T>(p.pixel, m + j * kLanes, live - j * kLanes, tile + j * kLanes, kTile);
        if (assign_tile<T, false>(p, packed, tile, run, m, live)) assign_tile<T, true>(p, packed, tile, run, m, live);
      }
    });
    add_run(p.value, run, stop, p.assign, p.clusters.positions, bins);
  }
}

}  // namespace

PYVSEG_KERNELS = {words, pack_clusters, chunk, add_up};
#else

PYVSEG_KERNEL_TABLE

namespace {

using Terms = std::optional<Tensor>;

// One for each cluster, or one for all: `otherwise` where none is given.
struct PerCluster {
  PerCluster(const Terms& given, float otherwise, int64_t N) : otherwise(otherwise) {
    if (!given.has_value()) return;
    tensor = dense(*given);
    each = tensor.size(0) == N;
  }
  const float* data() const { return tensor.defined() ? tensor.const_data_ptr<float>() : &otherwise; }

  Tensor tensor;
  float otherwise;
  bool each = false;
};

void check(const Tensor& pixel, const Tensor& clusters, const Tensor& value, const Terms& scale, const Terms& bias) {
  STD_TORCH_CHECK(pixel.dim() == 3 && clusters.dim() == 3 && value.dim() == 3, "kmeans_attn: need three dimensions");
  const int64_t B = pixel.size(0), C = pixel.size(1), M = pixel.size(2), N = clusters.size(1);
  STD_TORCH_CHECK(clusters.size(0) == B && clusters.size(2) == C && value.size(0) == B && value.size(2) == M,
                  "kmeans_attn: shapes do not agree");
  STD_TORCH_CHECK(N > 0 && N < INT32_MAX, "kmeans_attn: need at least one cluster");
  STD_TORCH_CHECK(clusters.scalar_type() == pixel.scalar_type(), "kmeans_attn: clusters must have pixel's dtype");
  for (const Terms* t : {&scale, &bias})
    STD_TORCH_CHECK(!t->has_value() || ((*t)->scalar_type() == ScalarType::Float && (*t)->dim() == 1 && ((*t)->size(0) == N || (*t)->size(0) == 1)),
                    "kmeans_attn: scale and bias must be float32 of (N,) or (1,)");
}

// pixel (B, C, M), clusters (B, N, C), value (B, D, M), scale and bias float32 (N,) or (1,), or none: 1 and 0
//   -> update (B, N, D) float32, assign (B, M) int32, count (B, N) float32, logits (B, N, M) or (0,) in pixel's dtype
std::tuple<Tensor, Tensor, Tensor, Tensor> kmeans_attn(const Tensor& pixel, const Tensor& clusters, const Tensor& value,
                                                       const Terms& scale, const Terms& bias, bool want_logits) {
  check(pixel, clusters, value, scale, bias);
  const int64_t B = pixel.size(0), M = pixel.size(2), N = clusters.size(1);
  const Tensor pixels = kmeans::adjacent(pixel), values = kmeans::adjacent(value);
  const Tensor centers = kmeans::adjacent(torch::stable::transpose(clusters, 1, 2));
  const PerCluster scales(scale, 1, N), biases(bias, 0, N);
  Tensor assign = torch::stable::new_empty(pixel, {B, M}, ScalarType::Int);
  Tensor logits = want_logits ? torch::stable::new_empty(pixel, {B, N, M}) : torch::stable::new_empty(pixel, {0});
  const Kernels& kernel = kernels();

  const auto problem = [&](int64_t b) {
    const Map map = kmeans::map_of(pixels, b);
    char* out = want_logits ? static_cast<char*>(logits.mutable_data_ptr()) + b * N * M * bytes_of(map.number) : nullptr;
    return Problem{map, kmeans::map_of(centers, b), kmeans::map_of(values, b), scales.data(), biases.data(), scales.each, biases.each,
                   assign.mutable_data_ptr<int32_t>() + b * M, out};
  };
  const auto make_work = [&] {
    const Problem any = problem(0);
    const int64_t tile = kernel.words(any, false), all = tile + kernel.words(any, true);
    const void* packed = nullptr;  // clusters that this thread has packed
    return [&, tile, packed, words = std::unique_ptr<uint32_t[]>(new uint32_t[all])](
               int64_t b, int64_t begin, int64_t end, float* bins) mutable {
      const Problem p = problem(b);
      if (p.clusters.data != packed || !packed) kernel.pack_clusters(p, words.get() + tile);
      packed = p.clusters.data;
      kernel.chunk(p, words.get() + tile, words.get(), begin, end, bins);
    };
  };
  auto [update, count] = kmeans::sum_chunks(values, N, kernel.add_up, make_work);
  return {update, assign, count, logits};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvseg, m) {
  m.def(
      "kmeans_attn(Tensor pixel, Tensor clusters, Tensor value, Tensor? scale, Tensor? bias, bool want_logits)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(pyvseg, CPU, m) { m.impl("kmeans_attn", TORCH_BOX(&kmeans_attn)); }
#endif

}  // namespace pyvseg::kmeans_attn
