// SPDX-License-Identifier: Apache-2.0
// Sums of values by cluster, shared by kmeans_attn.cpp and kmeans_pool.cpp.
//
// Positions are cut into chunks that depend on the sizes alone. Each chunk adds into bins of its own, and the bins are
// added up in the order of the chunks: the result has the same bits whatever the number of threads.
#pragma once
#include "vec.h"

namespace pyvseg::kmeans {

// Channels x positions of one image, adjacent along one of the two; strides in elements.
struct Map {
  const void* data;
  int64_t channels, positions, channel_stride, position_stride;
  Number number;
};

constexpr int64_t kRun = 192;  // positions assigned, then summed, at a time; a multiple of every kernel's tile

// A row of bins: the channels, padded to whole vectors, then the count. The line more keeps rows that are far apart from
// falling into one set of the cache.
constexpr int64_t count_column(int64_t channels) { return (channels + 15) / 16 * 16; }
constexpr int64_t bin_stride(int64_t channels) { return count_column(channels) + 16; }

struct Totals {
  const float* bins;  // (chunks, clusters + 1, bin_stride)
  int64_t chunks, clusters, channels;
  float* update;      // (clusters, channels)
  float* count;       // (clusters)
};

#ifdef PYVSEG_ISA
namespace {

PYVSEG_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

PYVSEG_INLINE bool positions_adjacent(const Map& map) { return map.position_stride == 1 || map.positions <= 1; }

// Asks for one of `parts` equal parts of the map at `count` positions from `first` on, into the second-level cache.
PYVSEG_INLINE void prefetch(const Map& map, int64_t first, int64_t count, int64_t part, int64_t parts) {
  const int64_t size = bytes_of(map.number);
  const bool columns = positions_adjacent(map);
  const int64_t rows = columns ? map.channels : count, length = (columns ? count : map.channels) * size;
  const int64_t stride = (columns ? map.channel_stride : map.position_stride) * size;
  const char* data = (const char*)map.data + first * map.position_stride * size;
  for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row)
    for (int64_t byte = 0; byte < length + 63; byte += 64) __builtin_prefetch(data + row * stride + byte, 0, 2);
}

// The largest score so far of each lane's position. NaN is larger than any number and the first of equals stays, as in
// torch.argmax.
struct Best {
  vfloat score = splat(-__builtin_inff());
  vint cluster{};
};

PYVSEG_INLINE void consider(Best& best, vfloat score, int32_t cluster) {
  const vint better = ~(score <= best.score) & (best.score == best.score);
  best.score = better ? score : best.score;
  best.cluster = better ? splat(cluster) : best.cluster;
}

// Adds `row(i, w)`, the w-th vector of channels at position i, to the position's bin. Neighbours of one cluster are added
// up before: a bin is slow to load when it has just been stored.
template <int wide, typename Row>
PYVSEG_INLINE void add_rows(int64_t positions, const int64_t* offset, float* bins, const Row& row) {
  vfloat sum[wide] = {};
  for (int64_t i = 0; i < positions; ++i) {
    if (i && offset[i] != offset[i - 1])
#pragma GCC unroll 4
      for (int w = 0; w < wide; ++w) {
        float* bin = bins + offset[i - 1] + w * kLanes;
        store(bin, load(bin) + sum[w]);
        sum[w] = vfloat{};
      }
#pragma GCC unroll 4
    for (int w = 0; w < wide; ++w) sum[w] += row(i, w);
  }
#pragma GCC unroll 4
  for (int w = 0; w < wide; ++w) {
    float* bin = bins + offset[positions - 1] + w * kLanes;
    store(bin, load(bin) + sum[w]);
  }
}

// Positions of a square: as many as a row of words holds.
template <typename T>
constexpr int kSpan = __is_same(T, bfloat16) ? 2 * kLanes : kLanes;

// Up to kLanes channels at up to kSpan positions, where positions are adjacent; zeros where there are fewer.
template <typename T>
PYVSEG_INLINE void turn(const T* from, int64_t channel_stride, int64_t channels, int64_t positions, vfloat out[kSpan<T>]) {
  vuint v[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    const T* row = from + i * channel_stride;
    if constexpr (__is_same(T, bfloat16)) {
      v[i] = vuint{};
      if (i < channels) __builtin_memcpy(&v[i], row, positions >= kSpan<T> ? sizeof v[i] : size_t(positions) * sizeof(T));
    } else {
      v[i] = i < channels ? (vuint)load_some(row, positions) : vuint{};
    }
  }
  transpose(v);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if constexpr (__is_same(T, bfloat16)) {
      out[2 * i] = (vfloat)(v[i] << 16);
      out[2 * i + 1] = (vfloat)(v[i] & 0xffff0000);
    } else {
      out[i] = (vfloat)v[i];
    }
  }
}

// `wide` vectors of channels from `first` on at positions begin..end, at most kRun of them.
template <typename T, int wide>
void add_channels(const Map& map, int64_t first, int64_t begin, int64_t end, const int64_t* offset, float* bins) {
  const T* from = (const T*)map.data + first * map.channel_stride + begin * map.position_stride;
  const int64_t channels = smaller(map.channels - first, wide * kLanes);
  if (!positions_adjacent(map))
    return add_rows<wide>(end - begin, offset, bins, [&](int64_t i, int w) {
      return load_some(from + i * map.position_stride + w * kLanes, wide > 1 ? kLanes : channels);
    });
  for (int64_t m = 0; m < end - begin; m += kSpan<T>) {
    const int64_t positions = smaller(end - begin - m, kSpan<T>);
    vfloat rows[wide][kSpan<T>];
    for (int w = 0; w < wide; ++w) {
      const T* square = from + w * kLanes * map.channel_stride + m;
      if (channels == wide * kLanes && positions == kSpan<T>)
        turn(square, map.channel_stride, kLanes, kSpan<T>, rows[w]);
      else
        turn(square, map.channel_stride, channels - w * kLanes, positions, rows[w]);
    }
    add_rows<wide>(positions, offset + m, bins, [&](int64_t i, int w) { return rows[w][i]; });
  }
}

// Positions begin..end, at most kRun of them. One more row of bins takes those whose cluster is none of 0..clusters-1.
template <typename T>
void add_values(const Map& map, int64_t begin, int64_t end, const int32_t* assign, int64_t clusters, float* bins) {
  const int64_t stride = bin_stride(map.channels), column = count_column(map.channels);
  int64_t offset[kRun];
  for (int64_t m = begin; m < end; ++m) {
    const int64_t cluster = assign[m] >= 0 && assign[m] < clusters ? assign[m] : clusters;
    offset[m - begin] = cluster * stride;
    bins[cluster * stride + column] += 1;
  }
  int64_t c = 0;
  for (; c + 4 * kLanes <= map.channels; c += 4 * kLanes) add_channels<T, 4>(map, c, begin, end, offset, bins + c);
  for (; c < map.channels; c += kLanes) add_channels<T, 1>(map, c, begin, end, offset, bins + c);
}

void add_run(const Map& value, int64_t begin, int64_t end, const int32_t* assign, int64_t clusters, float* bins) {
  with_number(value.number, [&](auto number) { add_values<decltype(number)>(value, begin, end, assign, clusters, bins); });
}

void add_up(const Totals& t, int64_t begin, int64_t end) {
  const int64_t stride = bin_stride(t.channels), column = count_column(t.channels), size = (t.clusters + 1) * stride;
  for (int64_t n = begin; n < end; ++n) {
    const float* bin = t.bins + n * stride;
    for (int64_t c = 0; c < t.channels; c += kLanes) {
      vfloat total{};
      for (int64_t i = 0; i < t.chunks; ++i) total += load(bin + i * size + c);
      store_some(t.update + n * t.channels + c, total, t.channels - c);
    }
    float count = 0;
    for (int64_t i = 0; i < t.chunks; ++i) count += bin[i * size + column];
    t.count[n] = count;
  }
}

}  // namespace
#endif
}  // namespace pyvseg::kmeans

#ifndef PYVSEG_ISA
#include <atomic>

#include "launch.h"

namespace pyvseg::kmeans {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// t (B, channels, positions), copied where neither dimension is adjacent.
inline Tensor adjacent(const Tensor& t) {
  const bool is = t.stride(1) == 1 || t.stride(2) == 1 || t.size(1) <= 1 || t.size(2) <= 1;
  return is ? t : torch::stable::contiguous(t);
}

inline Map map_of(const Tensor& t, int64_t b) {
  const Number number = number_of(t);
  const char* data = static_cast<const char*>(t.const_data_ptr()) + b * t.stride(0) * bytes_of(number);
  return {data, t.size(1), t.size(2), t.stride(1), t.stride(2), number};
}

// Chunks of positions of an image: long beside the number of bins to fill and to add up, and not too many.
struct Chunks {
  int64_t size, count;
};

inline Chunks chunks_of(int64_t positions, int64_t clusters) {
  constexpr int64_t kMost = 64;
  const int64_t least = std::max({8 * clusters, divide_up(positions, kMost), kRun});
  const int64_t wanted = std::max<int64_t>(divide_up(positions, least), 1);
  const int64_t even = wanted > 1 ? divide_up(wanted, 2) * 2 : 1;
  const int64_t size = std::max(divide_up(divide_up(positions, even), 48) * 48, kRun);
  return {size, divide_up(positions, size)};
}

// (B, N, D) and (B, N): what `work(image, begin, end, bins)`, run for every chunk, adds to its bins.
// `make_work()` is called once on each thread.
template <typename MakeWork>
std::tuple<Tensor, Tensor> sum_chunks(const Tensor& value, int64_t N, void (*add_up)(const Totals&, int64_t, int64_t),
                                      const MakeWork& make_work) {
  const int64_t B = value.size(0), D = value.size(1), M = value.size(2), size = (N + 1) * bin_stride(D);
  const Chunks chunks = chunks_of(M, N);
  const Tensor bins = torch::stable::new_empty(value, {B, chunks.count, size}, ScalarType::Float);
  Tensor update = torch::stable::new_empty(value, {B, N, D}, ScalarType::Float);
  Tensor count = torch::stable::new_empty(value, {B, N}, ScalarType::Float);
  std::atomic<int64_t> next{0};  // whoever is free takes the next chunk
  const int64_t tasks = B * chunks.count, worth = divide_up(tasks, grain_of(std::min(chunks.size, M) * (N + D)));
  const int64_t threads = std::min({int64_t(torch::stable::get_num_threads()), tasks, worth});
  parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    auto work = make_work();
    for (int64_t task; (task = next++) < tasks;) {
      float* own = const_cast<Tensor&>(bins).mutable_data_ptr<float>() + task * size;
      std::fill_n(own, size, 0.0f);
      const int64_t begin = task % chunks.count * chunks.size;
      work(task / chunks.count, begin, std::min(begin + chunks.size, M), own);
    }
  });
  parallel_for(0, B * N, std::max<int64_t>(65536 / (chunks.count * (D + 1) + 1), 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / N;
      const Totals totals{bins.const_data_ptr<float>() + b * chunks.count * size, chunks.count, N, D,
                          update.mutable_data_ptr<float>() + b * N * D, count.mutable_data_ptr<float>() + b * N};
      add_up(totals, row % N, row % N + 1);
    }
  });
  return {update, count};
}

}  // namespace pyvseg::kmeans
#endif
