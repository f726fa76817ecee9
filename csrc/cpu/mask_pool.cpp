// SPDX-License-Identifier: Apache-2.0
// Sums of rows that bits select: features pooled by masks, and their gradient (see pyvseg/ops/kernel_update.py).
//
// Masks become bits first, words of 64 sources. A block of 64 source rows then stays in L1 while every output adds the
// rows that its word selects: bit by bit where few are set, else four bits at a time from a table of the sixteen sums
// that four rows have (the method of the Four Russians), which takes a quarter of a matrix product's additions.
// Rows that no bit selects are never added, so that a NaN in them stays there.
#include <cstdint>

#include "../isa.h"
#include "number.h"
#include "vec.h"

namespace pyvseg::mask_pool {

struct Pack {
  const void* masks;  // rows of M logits, `stride` elements apart; set where > 0
  Number number;
  int64_t N, M, stride;
  uint64_t* bits;     // (ceil(M / 64), N)
};

// out[o] = sum of the source rows s whose bit, s % 64 of word (s / 64, o), is set. Strides in elements.
struct Sums {
  const uint64_t* bits;  // (ceil(sources / 64), outputs)
  int64_t sources, outputs, channels;
  const void* in;
  Number in_number;
  int64_t in_row, in_channel;    // one of them 1
  void* out;
  Number out_number;
  int64_t out_row, out_channel;  // one of them 1
};

struct Kernels {
  int chunk;  // channels that `sum` takes at a time
  void (*pack)(const Pack&, int64_t begin, int64_t end);  // masks
  // (ceil(M / 64), N) words of bits over M -> (ceil(N / 64), M) words over N; columns of the latter, 64 at a time
  void (*turn)(const uint64_t* bits, int64_t N, int64_t M, uint64_t* turned, int64_t begin, int64_t end);
  int64_t (*scratch_floats)(int64_t outputs);
  void (*sum)(const Sums&, int64_t channel, int64_t begin, int64_t end, float* scratch);  // 64-byte aligned
};

#ifdef PYVSEG_ISA
namespace {

constexpr int kVectors = 8;  // accumulators: enough to hide the latency of an addition
constexpr int kChunk = kVectors * kLanes;
constexpr int kFew = 4;      // outputs up to which laying out the rows costs more than adding them
constexpr int kGroup = 1024;  // sources that are summed before they join the total: short sums round less

template <typename T>
PYVSEG_INLINE uint64_t bits64(const T* p) {
  uint64_t bits = 0;
  for (int i = 0; i < 64; i += kLanes) bits |= uint64_t(greater_mask(load(p + i), vfloat{})) << i;
  return bits;
}

void pack(const Pack& p, int64_t begin, int64_t end) {
  with_number(p.number, [&](auto number) {
    for (int64_t n = begin; n < end; ++n) {
      const auto* row = (const decltype(number)*)p.masks + n * p.stride;
      int64_t m = 0;
      for (; m + 64 <= p.M; m += 64) p.bits[m / 64 * p.N + n] = bits64(row + m);
      if (m == p.M) continue;
      uint64_t bits = 0;
      for (int64_t i = m; i < p.M; ++i) bits |= uint64_t(load1(row + i) > 0) << (i - m);
      p.bits[m / 64 * p.N + n] = bits;
    }
  });
}

// 64 x 64 bits: swaps quadrants of ever smaller squares.
void transpose_bits(uint64_t* a) {
  uint64_t mask = 0xffffffffull;
  for (int size = 32; size; size >>= 1, mask ^= mask << size)
    for (int i = 0; i < 64; i = (i + size + 1) & ~size) {
      const uint64_t swap = ((a[i] >> size) ^ a[i + size]) & mask;
      a[i] ^= swap << size;
      a[i + size] ^= swap;
    }
}

void turn(const uint64_t* bits, int64_t N, int64_t M, uint64_t* turned, int64_t begin, int64_t end) {
  for (int64_t w = begin; w < end; ++w)
    for (int64_t n = 0; n < N; n += 64) {
      uint64_t square[64];
      for (int i = 0; i < 64; ++i) square[i] = n + i < N ? bits[w * N + n + i] : 0;
      transpose_bits(square);
      for (int64_t i = 0; i < 64 && w * 64 + i < M; ++i) turned[n / 64 * M + w * 64 + i] = square[i];
    }
}

// rows[i][c] = in[row + i][channel + c] in float32, zero past the last channel. The next block's rows are fetched ahead.
template <int V, typename T>
void fill(const Sums& s, int64_t row, int64_t channel, float* rows) {
  constexpr int kWidth = V * kLanes;
  const T* in = (const T*)s.in + row * s.in_row + channel * s.in_channel;
  const int64_t count = s.sources - row < 64 ? s.sources - row : 64;
  const int64_t channels = s.channels - channel < kWidth ? s.channels - channel : kWidth;
  const int64_t whole = channels / kLanes * kLanes, tile = s.in_channel == 1 ? 1 : kLanes;
  int64_t i = 0;
  for (; i + tile <= count; i += tile)
    for (int64_t c = 0; c < whole; c += kLanes) {
      if (tile == 1) {
        const T* from = in + i * s.in_row + c;
        __builtin_prefetch(from + 64 * s.in_row, 0, 2);
        store(rows + i * kWidth + c, load(from));
        continue;
      }
      vuint square[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        const T* from = in + (c + j) * s.in_channel + i;
        __builtin_prefetch(from + 64, 0, 2);
        square[j] = (vuint)load(from);
      }
      transpose(square);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) store(rows + (i + j) * kWidth + c, (vfloat)square[j]);
    }
  for (int64_t j = 0; j < count; ++j) {  // what whole vectors did not cover
    for (int64_t c = j < i ? whole : 0; c < channels; ++c) rows[j * kWidth + c] = load1(in + j * s.in_row + c * s.in_channel);
    for (int64_t c = channels; c < kWidth; ++c) rows[j * kWidth + c] = 0;
  }
}

// The sums of `count` rows, written as the output's type and layout.
template <int V, typename T>
void emit(const Sums& s, int64_t row, int64_t count, int64_t channel, const float* sums) {
  constexpr int kWidth = V * kLanes;
  T* out = (T*)s.out + row * s.out_row + channel * s.out_channel;
  const int64_t channels = s.channels - channel < kWidth ? s.channels - channel : kWidth;
  if (s.out_channel == 1) {
    for (int64_t i = 0; i < count; ++i) copy_rounded(out + i * s.out_row, sums + i * kWidth, channels);
    return;
  }
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int64_t c = 0; c < channels; c += kLanes) {
      vuint square[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) square[j] = (vuint)load(sums + (i + j) * kWidth + c);
      transpose(square);
      for (int j = 0; j < kLanes && c + j < channels; ++j) store(out + (c + j) * s.out_channel + i, (vfloat)square[j]);
    }
  for (; i < count; ++i)
    for (int64_t c = 0; c < channels; ++c) store1(out + c * s.out_channel + i, sums[i * kWidth + c]);
}

template <int V>
PYVSEG_INLINE void add_bits(uint64_t word, const float* rows, float* sum) {
  vfloat total[V] = {};
  for (; word; word &= word - 1) {
    const float* row = rows + __builtin_ctzll(word) * (V * kLanes);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) total[v] += load(row + v * kLanes);
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) store(sum + v * kLanes, load(sum + v * kLanes) + total[v]);
}

// The sixteen sums of four rows; entry 0 is zero and stays so.
template <int V>
PYVSEG_INLINE void tabulate(const float* rows, float* table) {
  constexpr int kWidth = V * kLanes;
  for (int c = 0; c < kWidth; c += kLanes) {
    vfloat sums[16] = {};
#pragma GCC unroll 4
    for (int bit = 0; bit < 4; ++bit) {
      const vfloat row = load(rows + bit * kWidth + c);
#pragma GCC unroll 8
      for (int rest = 0; rest < 1 << bit; ++rest) sums[(1 << bit) + rest] = rest ? sums[rest] + row : row;
    }
#pragma GCC unroll 16
    for (int i = 1; i < 16; ++i) store(table + i * kWidth + c, sums[i]);
  }
}

// Sixteen bits, from four tables.
template <int V>
PYVSEG_INLINE void add_nibbles(uint32_t word, const float* tables, float* sum) {
  constexpr int kWidth = V * kLanes;
  const float* entry[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) entry[i] = tables + (16 * i + (word >> 4 * i & 15)) * kWidth;
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    const int c = v * kLanes;
    store(sum + c, load(sum + c) + ((load(entry[0] + c) + load(entry[1] + c)) + (load(entry[2] + c) + load(entry[3] + c))));
  }
}

bool any(const uint64_t* words, int64_t count) {
  uint64_t bits = 0;
  for (int64_t i = 0; i < count; ++i) bits |= words[i];
  return bits;
}

template <int V>
void add_block(const uint64_t* words, int64_t outputs, const float* rows, float* tables, float* sums) {
  constexpr int kWidth = V * kLanes;
  int64_t bits = 0, used = 0;
  for (int64_t o = 0; o < outputs; ++o) {
    bits += __builtin_popcountll(words[o]);
    used += words[o] != 0;
  }
  // Measured in rows read: an output costs 4 beside its bits, or 36 with tables, whose making costs 500.
  if (bits + 4 * used < 500 + 36 * used) {
    for (int64_t o = 0; o < outputs; ++o)
      if (words[o]) add_bits<V>(words[o], rows, sums + o * kWidth);
    return;
  }
  for (int part = 0; part < 64; part += 16) {
    for (int i = 0; i < 4; ++i) tabulate<V>(rows + (part + 4 * i) * kWidth, tables + 16 * i * kWidth);
    for (int64_t o = 0; o < outputs; ++o)
      if (const uint32_t word = words[o] >> part & 0xffff) add_nibbles<V>(word, tables, sums + o * kWidth);
  }
}

template <int V>
void sum_chunk(const Sums& s, int64_t channel, int64_t begin, int64_t end, float* scratch) {
  constexpr int kWidth = V * kLanes;
  const int64_t size = (end - begin) * kWidth;
  float *rows = scratch, *tables = rows + 64 * kWidth, *sums = tables + 64 * kWidth, *totals = sums + size;
  __builtin_memset(scratch, 0, (2 * 64 * kWidth + 2 * size) * 4);
  for (int64_t row = 0; row < s.sources; row += 64) {
    const uint64_t* words = s.bits + row / 64 * s.outputs + begin;
    if (any(words, end - begin)) {
      with_number(s.in_number, [&](auto number) { fill<V, decltype(number)>(s, row, channel, rows); });
      add_block<V>(words, end - begin, rows, tables, sums);
    }
    if (row % kGroup != kGroup - 64 && row + 64 < s.sources) continue;
    for (int64_t i = 0; i < size; i += kLanes) {
      store(totals + i, load(totals + i) + load(sums + i));
      store(sums + i, vfloat{});
    }
  }
  with_number(s.out_number, [&](auto number) { emit<V, decltype(number)>(s, begin, end - begin, channel, totals); });
}

// Few outputs of rows that stand in columns: a channel at a time, in lanes along the sources, nothing laid out.
template <typename T>
void sum_few(const Sums& s, int64_t channel, int64_t begin, int64_t end) {
  constexpr int kSteps = 64 / kLanes;
  const int64_t last = channel + kChunk < s.channels ? channel + kChunk : s.channels;
  vint lane_bit;
  for (int i = 0; i < kLanes; ++i) lane_bit[i] = 1 << i;
  for (int64_t o = begin; o < end; ++o)
    for (int64_t c = channel; c < last; ++c) {
      const T* in = (const T*)s.in + c * s.in_channel;
      float total = 0;
      for (int64_t group = 0; group < s.sources; group += kGroup) {
        vfloat sums[kSteps] = {};
        float rest = 0;
        for (int64_t row = group; row < group + kGroup && row < s.sources; row += 64) {
          uint64_t word = s.bits[row / 64 * s.outputs + o];
          if (!word) continue;
          if (row + 64 > s.sources)
            for (; word; word &= word - 1) rest += load1(in + row + __builtin_ctzll(word));
          else
#pragma GCC unroll 16
            for (int i = 0; i < kSteps; ++i) {
              const vint on = splat(int32_t(word >> i * kLanes)) & lane_bit;
              sums[i] += on != 0 ? load(in + row + i * kLanes) : vfloat{};
            }
        }
        for (int i = 0; i < kSteps; ++i) rest += sum(sums[i]);
        total += rest;
      }
      store1((float*)s.out + o * s.out_row + c, total);
    }
}

int64_t scratch_floats(int64_t outputs) { return (2 * 64 + 2 * outputs) * kChunk; }

void sum(const Sums& s, int64_t channel, int64_t begin, int64_t end, float* scratch) {
  if (s.outputs <= kFew && s.in_row == 1 && s.out_number == Number::kFloat && s.out_channel == 1)
    return with_number(s.in_number, [&](auto number) { sum_few<decltype(number)>(s, channel, begin, end); });
  const int64_t left = s.channels - channel;
  if (left > 4 * kLanes) return sum_chunk<8>(s, channel, begin, end, scratch);
  if (left > 2 * kLanes) return sum_chunk<4>(s, channel, begin, end, scratch);
  if (left > kLanes) return sum_chunk<2>(s, channel, begin, end, scratch);
  sum_chunk<1>(s, channel, begin, end, scratch);
}

}  // namespace

PYVSEG_KERNELS = {kChunk, pack, turn, scratch_floats, sum};
#else
}  // namespace pyvseg::mask_pool

#include "launch.h"

namespace pyvseg::mask_pool {

PYVSEG_KERNEL_TABLE

namespace {

using Bits = std::vector<uint64_t>;
constexpr int64_t kTile = 256;  // outputs whose sums are kept in L2

int64_t words(int64_t n) { return (n + 63) / 64; }

// The set elements of masks (N, M) as words over M: (ceil(M / 64), N)
Bits packed(const Tensor& masks, int64_t b) {
  const int64_t N = masks.size(1), M = masks.size(2);
  Bits bits(words(M) * N);
  const Number number = number_of(masks);
  const char* from = static_cast<const char*>(masks.const_data_ptr()) + b * masks.stride(0) * bytes_of(number);
  const Pack pack{from, number, N, M, masks.stride(1), bits.data()};
  const Kernels& kernel = kernels();
  parallel_for(0, N, grain_of(M / 4), [&](int64_t begin, int64_t end) { kernel.pack(pack, begin, end); });
  return bits;
}

Bits turned(const Bits& bits, int64_t N, int64_t M) {
  Bits result(words(N) * M);
  const Kernels& kernel = kernels();
  parallel_for(0, words(M), grain_of(16 * N), [&](int64_t begin, int64_t end) { kernel.turn(bits.data(), N, M, result.data(), begin, end); });
  return result;
}

// Every output's sum is taken in the order of its sources, so that the result does not depend on the threads.
void run(const Sums& sums) {
  const Kernels& kernel = kernels();
  const int64_t chunks = (sums.channels + kernel.chunk - 1) / kernel.chunk;
  if (!chunks || !sums.outputs) return;
  const int64_t wanted = (torch::stable::get_num_threads() + chunks - 1) / chunks;  // tiles, so that every thread has work
  const int64_t tiles = std::max((sums.outputs + kTile - 1) / kTile, std::min(wanted, (sums.outputs + 15) / 16));
  const int64_t tile = (sums.outputs + tiles - 1) / tiles;
  const int64_t grain = grain_of(tile * sums.sources * std::min(sums.channels, int64_t(kernel.chunk)) / 50);  // few masks are on
  parallel_for(0, tiles * chunks, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> buffer(new float[kernel.scratch_floats(tile) + 16]);
    float* scratch = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(buffer.get()) + 63) & ~uintptr_t(63));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % tiles * tile, last = std::min(first + tile, sums.outputs);
      if (first < last) kernel.sum(sums, i / tiles * kernel.chunk, first, last, scratch);
    }
  });
}

// masks (B, N, M) logits, features (B, C, M) -> sums (B, N, C) float32 of the features where a logit is above zero
Tensor mask_pool(const Tensor& masks, const Tensor& features) {
  STD_TORCH_CHECK(masks.dim() == 3 && features.dim() == 3, "mask_pool: masks and features must have three dimensions");
  const int64_t B = masks.size(0), N = masks.size(1), M = masks.size(2), C = features.size(1);
  STD_TORCH_CHECK(features.size(0) == B && features.size(2) == M, "mask_pool: shapes do not agree");
  const Tensor rows = rows_contiguous(masks);
  const bool adjacent = features.stride(1) == 1 || features.stride(2) == 1;
  const Tensor from = adjacent ? features : dense(features);
  Tensor out = torch::stable::new_empty(features, {B, N, C}, ScalarType::Float);
  const Number number = number_of(from);
  for (int64_t b = 0; b < B; ++b) {
    const Bits bits = packed(rows, b);
    const char* in = static_cast<const char*>(from.const_data_ptr()) + b * from.stride(0) * bytes_of(number);
    run({bits.data(), M, N, C, in, number, from.stride(2), from.stride(1), out.mutable_data_ptr<float>() + b * N * C,
         Number::kFloat, C, 1});
  }
  return out;
}

// grad (B, N, C) float32, masks (B, N, M) -> gradient of the features, (B, C, M) of `dtype`; channels_last: the
// transpose of a contiguous (B, M, C)
Tensor mask_pool_backward(const Tensor& grad, const Tensor& masks, ScalarType dtype, bool channels_last) {
  STD_TORCH_CHECK(masks.dim() == 3 && grad.dim() == 3, "mask_pool_backward: grad and masks must have three dimensions");
  const int64_t B = masks.size(0), N = masks.size(1), M = masks.size(2), C = grad.size(2);
  STD_TORCH_CHECK(grad.size(0) == B && grad.size(1) == N, "mask_pool_backward: shapes do not agree");
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float, "mask_pool_backward: grad must be float32");
  const Tensor rows = rows_contiguous(masks), from = dense(grad);
  Tensor out = torch::stable::new_empty(grad, {B, channels_last ? M : C, channels_last ? C : M}, dtype);
  const Number number = number_of(out);
  for (int64_t b = 0; b < B; ++b) {
    const Bits bits = turned(packed(rows, b), N, M);
    char* to = static_cast<char*>(out.mutable_data_ptr()) + b * C * M * bytes_of(number);
    run({bits.data(), N, M, C, from.const_data_ptr<float>() + b * N * C, Number::kFloat, C, 1, to, number,
         channels_last ? C : 1, channels_last ? 1 : M});
  }
  return channels_last ? torch::stable::transpose(out, 1, 2) : out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvseg, m) {
  m.def("mask_pool(Tensor masks, Tensor features) -> Tensor");
  m.def("mask_pool_backward(Tensor grad, Tensor masks, ScalarType dtype, bool channels_last) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(pyvseg, CPU, m) {
  m.impl("mask_pool", TORCH_BOX(&mask_pool));
  m.impl("mask_pool_backward", TORCH_BOX(&mask_pool_backward));
}
#endif

}  // namespace pyvseg::mask_pool
