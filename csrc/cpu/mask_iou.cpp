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

PYVSEG_INLINE bool is_set(uint8_t x) { return x != 0; }
template <typename Number>
PYVSEG_INLINE bool is_set(Number x) {
  return load1(&x) > 0;
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
      uint64_t bits = 0;
      for (int64_t j = 0; j < p.numel % 64; ++j) bits |= uint64_t(is_set(from[n * 64 + j])) << j;
      to[n] = bits;
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
  for (int64_t w = has_vector_count() ? count_vectors(a, b, o.words, counts) : 0; w < o.words; ++w)
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

}  // namespace

PYVSEG_KERNELS = {pack, overlap, area};
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

// masks (N, P) bool, uint8, float32, bfloat16 or float16 -> bits (N, ceil(P / 64)) int64
Tensor pack_masks(const Tensor& masks) {
  STD_TORCH_CHECK(masks.dim() == 2, "pack_masks: masks must have two dimensions");
  const Tensor rows = torch::stable::contiguous(masks);
  const int64_t N = rows.size(0), numel = rows.size(1), words = (numel + 63) / 64;
  Tensor bits = torch::stable::new_empty(masks, {N, words}, ScalarType::Long);
  const Pack pack{rows.const_data_ptr(), static_cast<uint64_t*>(bits.mutable_data_ptr()), numel, words, element_of(masks)};
  const Kernels& kernel = kernels();
  parallel_for(0, N * words, 1024, [&](int64_t begin, int64_t end) { kernel.pack(pack, begin, end); });
  return bits;
}

Tensor areas(const Tensor& bits) {
  const int64_t words = bits.size(1);
  Tensor area = torch::stable::new_empty(bits, {bits.size(0)}, ScalarType::Long);
  const uint64_t* from = static_cast<const uint64_t*>(bits.const_data_ptr());
  int64_t* to = area.mutable_data_ptr<int64_t>();
  const Kernels& kernel = kernels();
  parallel_for(0, bits.size(0), 16, [&](int64_t begin, int64_t end) { kernel.area(from, words, to, begin, end); });
  return area;
}

// The counts that make the ratio: bits (N, W), (M, W) int64 -> intersection (N, M), areas (N), (M), all int64
std::tuple<Tensor, Tensor, Tensor> mask_iou(const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(1), "mask_iou: need (N, W) and (M, W)");
  STD_TORCH_CHECK(a.scalar_type() == ScalarType::Long && b.scalar_type() == ScalarType::Long,
                  "mask_iou: packed masks must be int64");
  const Tensor rows = torch::stable::contiguous(a), columns = torch::stable::contiguous(b);
  const int64_t N = rows.size(0), M = columns.size(0);
  Tensor intersection = torch::stable::new_empty(a, {N, M}, ScalarType::Long);
  const Overlap overlap{static_cast<const uint64_t*>(rows.const_data_ptr()),
                        static_cast<const uint64_t*>(columns.const_data_ptr()), N, M, rows.size(1),
                        intersection.mutable_data_ptr<int64_t>()};
  const int64_t tiles = N && M ? ((N + kTile - 1) / kTile) * ((M + kTile - 1) / kTile) : 0;
  const Kernels& kernel = kernels();
  parallel_for(0, tiles, 4, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) kernel.overlap(overlap, tile);
  });
  return {intersection, areas(rows), areas(columns)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvseg, m) {
  m.def("pack_masks(Tensor masks) -> Tensor");
  m.def("mask_iou(Tensor a, Tensor b) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(pyvseg, CPU, m) {
  m.impl("pack_masks", TORCH_BOX(&pack_masks));
  m.impl("mask_iou", TORCH_BOX(&mask_iou));
}
#endif

}  // namespace pyvseg::mask_iou
