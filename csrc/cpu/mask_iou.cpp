// SPDX-License-Identifier: Apache-2.0
// Masks as bits: packing, and the overlaps of N x M packed masks by population count (see pyvseg/ops/mask_iou.py).
#include <cstdint>

#include "../isa.h"
#include "vec.h"

namespace pyvseg::mask_iou {

enum class Element : int32_t { kFloat, kBfloat16, kHalf, kByte };  // the first three as Number of launch.h

struct Pack {
  const void* masks;  // rows of `numel` elements, contiguous
  uint64_t* bits;     // rows of `words`; bit i of word w is element 64 w + i, the rest zero
  int64_t numel, words;
  Element element;
};

struct Overlap {
  const uint64_t* a;        // (N, words)
  const uint64_t* b;        // (M, words)
  int64_t N, M, words;
  int64_t* intersection;    // (N, M)
};

struct Kernels {
  void (*pack)(const Pack&, int64_t begin, int64_t end);  // words of all rows, counted through
  void (*overlap)(const Overlap&, int64_t tile);           // tile of kTile x kTile pairs, row-major
  void (*area)(const uint64_t* bits, int64_t words, int64_t* area, int64_t begin, int64_t end);
  void (*ratio)(const int64_t* intersection, int64_t area, const int64_t* areas, int64_t n, float* ratio);  // one row
};

constexpr int kTile = 4;

#ifdef PYVSEG_ISA
namespace {

// One bit for each of 64 elements that counts as set: a non-zero byte, a number above zero (NaN is not).
PYVSEG_INLINE uint64_t bits64(const uint8_t* p) {
  uint64_t bits = 0;
#if defined(__AVX512BW__)
  const __m512i x = _mm512_loadu_si512(p);
  bits = _mm512_test_epi8_mask(x, x);
#elif defined(__AVX2__)
  for (int i = 0; i < 64; i += 32) {
    const __m256i zero = _mm256_cmpeq_epi8(_mm256_loadu_si256((const __m256i*)(p + i)), _mm256_setzero_si256());
    bits |= uint64_t(~uint32_t(_mm256_movemask_epi8(zero))) << i;
  }
#elif defined(__SSE2__)
  for (int i = 0; i < 64; i += 16) {
    const __m128i zero = _mm_cmpeq_epi8(_mm_loadu_si128((const __m128i*)(p + i)), _mm_setzero_si128());
    bits |= uint64_t(~uint32_t(_mm_movemask_epi8(zero)) & 0xffff) << i;
  }
#else
  for (int i = 0; i < 64; ++i) bits |= uint64_t(p[i] != 0) << i;
#endif
  return bits;
}

template <typename Number>
PYVSEG_INLINE uint64_t bits64(const Number* p) {
  uint64_t bits = 0;
  for (int i = 0; i < 64; i += kLanes) bits |= uint64_t(greater_mask(load(p + i), vfloat{})) << i;
  return bits;
}

// Memory, not arithmetic, binds this: lines are asked for some pages ahead, which the hardware by itself does not do.
constexpr int64_t kAhead = 4096;  // bytes

template <typename T>
PYVSEG_INLINE void prefetch64(const T* p) {
  for (size_t byte = 0; byte < 64 * sizeof(T); byte += 64) __builtin_prefetch((const char*)p + kAhead + byte);
}

template <typename T>
void pack_words(const Pack& p, int64_t begin, int64_t end) {
  const int64_t whole = p.numel / 64;
  for (int64_t i = begin; i < end;) {
    const int64_t row = i / p.words, word = i % p.words;
    const T* from = (const T*)p.masks + row * p.numel + word * 64;
    int64_t n = p.words - word < end - i ? p.words - word : end - i;  // up to the row's or the range's end
    uint64_t* to = p.bits + i;
    i += n;
    if (word + n > whole) {
      n = whole - word;
      T last[64] = {};
      __builtin_memcpy(last, from + n * 64, p.numel % 64 * sizeof(T));
      to[n] = bits64(last);
    }
    for (int64_t w = 0; w < n; ++w) {
      prefetch64(from + w * 64);
      to[w] = bits64(from + w * 64);
    }
  }
}
void pack(const Pack& p, int64_t begin, int64_t end) {
  if (p.element == Element::kByte) pack_words<uint8_t>(p, begin, end);
  if (p.element == Element::kFloat) pack_words<float>(p, begin, end);
  if (p.element == Element::kBfloat16) pack_words<bfloat16>(p, begin, end);
  if (p.element == Element::kHalf) pack_words<float16>(p, begin, end);
}

// counts[i][j] += set bits of a_i & b_j over the words from `begin` that whole vectors cover; returns where they end.
#if defined(__AVX512F__)
__attribute__((target("avx512vpopcntdq"))) int64_t count_vectors(const uint64_t* const* a, const uint64_t* const* b,
                                                                  int64_t words, int64_t counts[kTile][kTile]) {
  __m512i total[kTile][kTile];
#pragma GCC unroll 4
  for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kTile; ++j) total[i][j] = _mm512_setzero_si512();
  int64_t w = 0;
  for (; w + 8 <= words; w += 8) {
    __m512i other[kTile];
#pragma GCC unroll 4
    for (int j = 0; j < kTile; ++j) other[j] = _mm512_loadu_si512(b[j] + w);
#pragma GCC unroll 4
    for (int i = 0; i < kTile; ++i) {
      const __m512i one = _mm512_loadu_si512(a[i] + w);
#pragma GCC unroll 4
      for (int j = 0; j < kTile; ++j)
        total[i][j] = _mm512_add_epi64(total[i][j], _mm512_popcnt_epi64(_mm512_and_si512(one, other[j])));
    }
  }
  for (int i = 0; i < kTile; ++i)
    for (int j = 0; j < kTile; ++j) {
      int64_t lanes[8];
      _mm512_storeu_si512(lanes, total[i][j]);
      for (int l = 0; l < 8; ++l) counts[i][j] += lanes[l];
    }
  return w;
}
// Its own check: AVX-512 machines with this instruction but without bfloat16 are common.
bool has_vector_count() { return __builtin_cpu_supports("avx512vpopcntdq"); }
#else
int64_t count_vectors(const uint64_t* const*, const uint64_t* const*, int64_t, int64_t[kTile][kTile]) { return 0; }
bool has_vector_count() { return false; }
#endif

void overlap(const Overlap& o, int64_t tile) {
  const int64_t across = (o.M + kTile - 1) / kTile, row = tile / across * kTile, column = tile % across * kTile;
  const uint64_t *a[kTile], *b[kTile];
  int64_t counts[kTile][kTile] = {};
  for (int64_t i = 0; i < kTile; ++i) {  // rows past the end repeat the last one and are not written
    a[i] = o.a + (row + i < o.N ? row + i : o.N - 1) * o.words;
    b[i] = o.b + (column + i < o.M ? column + i : o.M - 1) * o.words;
  }
  for (int64_t w = o.words >= 8 && has_vector_count() ? count_vectors(a, b, o.words, counts) : 0; w < o.words; ++w)
#pragma GCC unroll 4
    for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kTile; ++j) counts[i][j] += __builtin_popcountll(a[i][w] & b[j][w]);
  for (int64_t i = 0; i < kTile && row + i < o.N; ++i)
    for (int64_t j = 0; j < kTile && column + j < o.M; ++j) o.intersection[(row + i) * o.M + column + j] = counts[i][j];
}

void area(const uint64_t* bits, int64_t words, int64_t* areas, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    int64_t total = 0;
    for (int64_t w = i * words; w < (i + 1) * words; ++w) total += __builtin_popcountll(bits[w]);
    areas[i] = total;
  }
}

// Intersection over union, both rounded to floats; 0 where both masks are empty.
void ratio(const int64_t* intersection, int64_t area, const int64_t* areas, int64_t n, float* ratio) {
  for (int64_t j = 0; j < n; ++j) {
    const int64_t either = area + areas[j] - intersection[j];
    ratio[j] = float(intersection[j]) / float(either > 0 ? either : 1);
  }
}

}  // namespace

PYVSEG_KERNELS = {pack, overlap, area, ratio};
#else
}  // namespace pyvseg::mask_iou

#include "launch.h"

namespace pyvseg::mask_iou {

PYVSEG_KERNEL_TABLE

namespace {

Element element_of(const Tensor& masks) {
  const ScalarType type = masks.scalar_type();
  if (type == ScalarType::Bool || type == ScalarType::Byte) return Element::kByte;
  return Element(number_of(masks));
}

int64_t words_of(int64_t numel) { return (numel + 63) / 64; }

// masks (N, P) -> rows of words
void pack_into(const Tensor& masks, uint64_t* bits) {
  const Tensor rows = dense(masks);
  const int64_t words = words_of(rows.size(1));
  const Pack pack{rows.const_data_ptr(), bits, rows.size(1), words, element_of(masks)};
  const Kernels& kernel = kernels();
  parallel_for(0, rows.size(0) * words, 1024, [&](int64_t begin, int64_t end) { kernel.pack(pack, begin, end); });
}

void count(const Overlap& overlap, int64_t* area_a, int64_t* area_b) {
  const int64_t N = overlap.N, M = overlap.M, words = overlap.words;
  const int64_t tiles = N && M ? ((N + kTile - 1) / kTile) * ((M + kTile - 1) / kTile) : 0;
  const Kernels& kernel = kernels();
  parallel_for(0, tiles, std::max<int64_t>(4, 8192 / (words + 8)), [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) kernel.overlap(overlap, tile);
  });
  const int64_t grain = std::max<int64_t>(16, 16384 / (words + 1));
  parallel_for(0, N, grain, [&](int64_t begin, int64_t end) { kernel.area(overlap.a, words, area_a, begin, end); });
  parallel_for(0, M, grain, [&](int64_t begin, int64_t end) { kernel.area(overlap.b, words, area_b, begin, end); });
}

// masks (N, P) bool, uint8, float32, bfloat16 or float16 -> bits (N, ceil(P / 64)) int64
Tensor pack_masks(const Tensor& masks) {
  STD_TORCH_CHECK(masks.dim() == 2, "pack_masks: masks must have two dimensions");
  Tensor bits = torch::stable::new_empty(masks, {masks.size(0), words_of(masks.size(1))}, ScalarType::Long);
  pack_into(masks, static_cast<uint64_t*>(bits.mutable_data_ptr()));
  return bits;
}

// The counts that make the ratio: bits (N, W), (M, W) int64 -> intersection (N, M), areas (N), (M), all int64
std::tuple<Tensor, Tensor, Tensor> mask_iou(const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(1), "mask_iou: need (N, W) and (M, W)");
  STD_TORCH_CHECK(a.scalar_type() == ScalarType::Long && b.scalar_type() == ScalarType::Long,
                  "mask_iou: packed masks must be int64");
  const Tensor rows = dense(a), columns = dense(b);
  const int64_t N = rows.size(0), M = columns.size(0);
  const auto empty = [&](std::vector<int64_t> shape) { return torch::stable::new_empty(a, shape, ScalarType::Long); };
  Tensor intersection = empty({N, M}), area_a = empty({N}), area_b = empty({M});
  count({static_cast<const uint64_t*>(rows.const_data_ptr()), static_cast<const uint64_t*>(columns.const_data_ptr()), N, M, rows.size(1),
         intersection.mutable_data_ptr<int64_t>()},
        area_a.mutable_data_ptr<int64_t>(), area_b.mutable_data_ptr<int64_t>());
  return {intersection, area_a, area_b};
}

// All of it in one call, for masks (N, P), (M, P) as above -> intersection over union (N, M) float32
Tensor mask_ratio(const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(1), "mask_ratio: need (N, P) and (M, P)");
  const int64_t N = a.size(0), M = b.size(0), words = words_of(a.size(1));
  Tensor ratio = torch::stable::new_empty(a, {N, M}, ScalarType::Float);
  const std::unique_ptr<uint64_t[]> bits(new uint64_t[(N + M) * words]);
  const std::unique_ptr<int64_t[]> counts(new int64_t[N * M + N + M]);
  pack_into(a, bits.get());
  pack_into(b, bits.get() + N * words);
  int64_t *area_a = counts.get() + N * M, *area_b = area_a + N;
  count({bits.get(), bits.get() + N * words, N, M, words, counts.get()}, area_a, area_b);
  float* to = ratio.mutable_data_ptr<float>();
  const Kernels& kernel = kernels();
  for (int64_t i = 0; i < N; ++i) kernel.ratio(counts.get() + i * M, area_a[i], area_b, M, to + i * M);
  return ratio;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvseg, m) {
  m.def("pack_masks(Tensor masks) -> Tensor");
  m.def("mask_iou(Tensor a, Tensor b) -> (Tensor, Tensor, Tensor)");
  m.def("mask_ratio(Tensor a, Tensor b) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(pyvseg, CPU, m) {
  m.impl("pack_masks", TORCH_BOX(&pack_masks));
  m.impl("mask_iou", TORCH_BOX(&mask_iou));
  m.impl("mask_ratio", TORCH_BOX(&mask_ratio));
}
#endif

}  // namespace pyvseg::mask_iou
