// SPDX-License-Identifier: Apache-2.0
// Masks as bits on the GPU: packing, and the overlaps of N x M packed masks by population count (see pyvseg/ops/mask_iou.py).
#include <algorithm>

#include "launch.cuh"

namespace pyvseg::mask_iou {
namespace {

constexpr int kBits = 16;     // elements that a thread packs
constexpr int kThreads = 256;
constexpr int kTile = 32;     // masks of a and of b that a block compares
constexpr int kWords = 32;    // words of each that it holds in shared memory

__device__ inline bool is_set(uint8_t x) { return x != 0; }
template <typename T>
__device__ inline bool is_set(T x) {
  return to_float(x) > 0;
}

// Rows of `numel` elements to rows of `words` words, `blocks_per_row` blocks to each. Wide: every row starts at a multiple
// of 16 bytes.
template <typename T, bool Wide>
__global__ void pack(const T* masks, uint16_t* bits, int64_t numel, int64_t words, unsigned blocks_per_row) {
  const int64_t row = blockIdx.x / blocks_per_row, i = int64_t(blockIdx.x % blocks_per_row) * kThreads + threadIdx.x;
  if (i >= words * (64 / kBits)) return;
  const int64_t left = numel - i * kBits;
  const T* from = masks + row * numel + i * kBits;
  unsigned packed = 0;
  if (Wide && left >= kBits) {
    constexpr int kEach = 16 / sizeof(T);
#pragma unroll
    for (int j = 0; j < kBits; j += kEach) {
      const uint4 word = __ldg(reinterpret_cast<const uint4*>(from + j));
      T elements[kEach];
      memcpy(elements, &word, sizeof word);
#pragma unroll
      for (int k = 0; k < kEach; ++k) packed |= unsigned(is_set(elements[k])) << (j + k);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kBits; ++j)
      if (j < left) packed |= unsigned(is_set(from[j])) << j;
  }
  bits[row * words * (64 / kBits) + i] = uint16_t(packed);
}

template <typename T>
void pack_rows(const Tensor& masks, const Tensor& bits) {
  const int64_t N = masks.size(0), numel = masks.size(1), words = bits.size(1);
  const T* from = data<T>(masks);
  const int64_t blocks_per_row = ceil_div(words * (64 / kBits), kThreads);
  const bool wide = aligned(from, 16) && numel * int64_t(sizeof(T)) % 16 == 0;
  launch(wide ? pack<T, true> : pack<T, false>, blocks(N * blocks_per_row, 1), kThreads, 0, from, data<uint16_t>(bits), numel, words,
         unsigned(blocks_per_row));
}

// masks (N, P) bool, uint8, float32, bfloat16 or float16 -> bits (N, ceil(P / 64)) int64
Tensor pack_masks(const Tensor& masks) {
  STD_TORCH_CHECK(masks.dim() == 2, "pack_masks: masks must have two dimensions");
  const OnDeviceOf device(masks);
  const Tensor rows = torch::stable::contiguous(masks);
  Tensor bits = torch::stable::new_empty(masks, {rows.size(0), ceil_div(rows.size(1), 64)}, ScalarType::Long);
  const ScalarType type = masks.scalar_type();
  if (type == ScalarType::Bool || type == ScalarType::Byte)
    pack_rows<uint8_t>(rows, bits);
  else
    for_number(rows, [&](auto number) { pack_rows<decltype(number)>(rows, bits); });
  return bits;
}

using Word = unsigned long long;

// A block per mask, first those of a, then those of b: a hundred masks alone would not occupy a GPU with a warp each.
__global__ void __launch_bounds__(kThreads)
    count_areas(const Word* a, const Word* b, int64_t N, int64_t words, Word* area_a, Word* area_b) {
  __shared__ Word parts[kThreads / kWarp];
  const int64_t mask = blockIdx.x;
  const Word* bits = mask < N ? a + mask * words : b + (mask - N) * words;
  Word total = 0;
  for (int64_t w = threadIdx.x; w < words; w += kThreads) total += __popcll(__ldg(bits + w));
  total = warp_sum(total);
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = total;
  __syncthreads();
  if (threadIdx.x != 0) return;
  total = 0;
  for (const Word part : parts) total += part;
  *(mask < N ? area_a + mask : area_b + (mask - N)) = total;
}

// kTile rows of `words` words, of which kWords from `word`, into shared memory; zeros outside.
__device__ inline void fetch(const Word* bits, int64_t first, int64_t rows, int64_t words, int64_t word, int64_t end, Word (*to)[kWords + 1]) {
  for (int i = threadIdx.x; i < kTile * kWords; i += kThreads) {
    const int64_t row = first + i / kWords, w = word + i % kWords;
    to[i / kWords][i % kWords] = row < rows && w < end ? __ldg(bits + row * words + w) : 0;
  }
}

// A block takes kTile x kTile pairs over a slice of the words; slices add up by integer atomics, in any order the same.
// Each thread takes 2 x 2 pairs, 16 masks apart.
__global__ void count_overlaps(const Word* a, const Word* b, int64_t N, int64_t M, int64_t words, int64_t slice, Word* intersection) {
  __shared__ Word left[kTile][kWords + 1], right[kTile][kWords + 1];  // padded: a column lies in 32 banks
  const int64_t row = blockIdx.y * int64_t(kTile), column = blockIdx.x * int64_t(kTile);
  const int64_t begin = blockIdx.z * slice, end = begin + slice < words ? begin + slice : words;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  Word total[2][2] = {};
  for (int64_t word = begin; word < end; word += kWords) {
    fetch(a, row, N, words, word, end, left);
    fetch(b, column, M, words, word, end, right);
    __syncthreads();
    unsigned count[2][2] = {};
#pragma unroll 8
    for (int k = 0; k < kWords; ++k) {
      const Word l[2] = {left[ty][k], left[ty + 16][k]}, r[2] = {right[tx][k], right[tx + 16][k]};
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) count[i][j] += __popcll(l[i] & r[j]);
    }
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j) total[i][j] += count[i][j];
    __syncthreads();
  }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 2; ++j) {
      const int64_t n = row + ty + 16 * i, m = column + tx + 16 * j;
      if (n < N && m < M) atomicAdd(intersection + n * M + m, total[i][j]);
    }
}

// That occupy a GPU: fewer pairs than that share out their words.
#ifdef PYVSEG_EMULATE
constexpr int64_t kBlocks = 4;  // so that small tests meet blocks of several rounds
#else
constexpr int64_t kBlocks = 512;
#endif

// bits (N, W), (M, W) int64 -> intersection (N, M), areas (N), (M), all int64
std::tuple<Tensor, Tensor, Tensor> mask_iou(const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(1), "mask_iou: need (N, W) and (M, W)");
  STD_TORCH_CHECK(a.scalar_type() == ScalarType::Long && b.scalar_type() == ScalarType::Long, "mask_iou: packed masks must be int64");
  const OnDeviceOf device(a);
  const Tensor rows = torch::stable::contiguous(a), columns = torch::stable::contiguous(b);
  const int64_t N = rows.size(0), M = columns.size(0), W = rows.size(1);
  Tensor intersection = torch::stable::new_zeros(a, {N, M}), area_a = torch::stable::new_empty(a, {N}), area_b = torch::stable::new_empty(a, {M});
  launch(count_areas, blocks(N + M, 1), kThreads, 0, data<Word>(rows), data<Word>(columns), N, W, data<Word>(area_a), data<Word>(area_b));
  const int64_t down = ceil_div(N, kTile), across = ceil_div(M, kTile), chunks = ceil_div(W, kWords);
  if (!N || !M || !W) return {intersection, area_a, area_b};
  STD_TORCH_CHECK(down <= 65535, "mask_iou: more than 2^21 masks in a");
  const int64_t slices = std::max<int64_t>(1, std::min({chunks, kBlocks / (down * across), int64_t(65535)}));
  const int64_t slice = ceil_div(chunks, slices) * kWords;
  launch(count_overlaps, dim3(blocks(across, 1), unsigned(down), unsigned(ceil_div(W, slice))), kThreads, 0, data<Word>(rows), data<Word>(columns),
         N, M, W, slice, data<Word>(intersection));
  return {intersection, area_a, area_b};
}

}  // namespace

PYVSEG_CUDA_IMPL(m) {
  m.impl("pack_masks", TORCH_BOX(&pack_masks));
  m.impl("mask_iou", TORCH_BOX(&mask_iou));
}

}  // namespace pyvseg::mask_iou
