// SPDX-License-Identifier: Apache-2.0
// What the forward and backward kernels of multi-scale deformable attention share: the problem, the queries of a block,
// and where a sample lies (see pyvseg/ops/ms_deform_attn.py for the definition).
//
// A group of neighbouring lanes serves one query and head. Each lane works out the place and weight of one sample, then
// the group takes these in turn by shuffle while its lanes hold neighbouring channels, so that nothing is done twice.
#pragma once
#include <algorithm>
#include <utility>

#include "launch.cuh"

namespace pyvseg::ms_deform_attn {

constexpr int kMaxLevels = 16;
constexpr int kQueriesLog = 5, kQueries = 1 << kQueriesLog;  // of a block
constexpr int kMostImages = 65535;                           // along one dimension of a grid

// A kernel argument, so that no kernel reads shapes from memory.
struct Levels {
  int count = 0;
  int height[kMaxLevels], width[kMaxLevels], first[kMaxLevels];  // first: pixels before this level
};

// Blocks of queries. Where the queries are the pixels of the levels (an encoder), a block takes a tile of a map: its
// samples lie close together and are found in the first-level cache. Else it takes neighbours of the list.
struct Tiles {
  Levels grid;
  int across_log, down_log;
  int count;
};

template <typename Value, typename Geometry>
struct Problem {
  const Value* value;         // (B, S, H, D)
  const Geometry* reference;  // (B, Q, L, 2) points or (B, Q, L, 4) boxes; null in the plain form
  const Geometry* locations;  // (B, Q, H, L, P, 2), offsets in the fused form
  const Geometry* weights;    // (B, Q, H, L, P), logits in the fused form
  int64_t B, S, Q;
  int H, D, P, coordinates;   // coordinates of a reference
  Levels levels;
  Tiles tiles;
};

template <typename Value, typename Geometry>
Value value_of(const Problem<Value, Geometry>&);
template <typename Value, typename Geometry>
Geometry geometry_of(const Problem<Value, Geometry>&);
template <typename Problem>
using ValueOf = decltype(value_of(std::declval<Problem>()));
template <typename Problem>
using GeometryOf = decltype(geometry_of(std::declval<Problem>()));

// The query of place `i` in a tile, -1 where the tile hangs over its map.
__device__ inline int query_of(const Tiles& tiles, int tile, int i) {
  const int across = 1 << tiles.across_log, down = 1 << tiles.down_log;
  for (int level = 0; level < tiles.grid.count; ++level) {
    const int height = tiles.grid.height[level], width = tiles.grid.width[level];
    const int columns = (width + across - 1) >> tiles.across_log, rows = (height + down - 1) >> tiles.down_log;
    if (tile < rows * columns) {
      const int y = (tile / columns << tiles.down_log) + (i >> tiles.across_log);
      const int x = (tile % columns << tiles.across_log) + (i & (across - 1));
      return y < height && x < width ? tiles.grid.first[level] + y * width + x : -1;
    }
    tile -= rows * columns;
  }
  return -1;
}

// What a group of a block works on; heads of a tile are neighbours, so that they read the same lines of memory together.
struct Place {
  int head;
  bool live;  // false for a place of a tile without a query; it then names the first query
  int64_t image, query;  // query: b * Q + q
};
template <typename Value, typename Geometry>
__device__ inline Place place_of(const Problem<Value, Geometry>& p, int group) {
  const int64_t image = blockIdx.y + int64_t(kMostImages) * blockIdx.z;
  const int q = image < p.B ? query_of(p.tiles, blockIdx.x / p.H, threadIdx.x / group) : -1;
  return {int(blockIdx.x % p.H), q >= 0, q >= 0 ? image : 0, q >= 0 ? image * p.Q + q : 0};
}

// Numbers 2 i and 2 i + 1.
template <typename T>
__device__ inline float2 load_pair(const T* p, int64_t i) {
  float x[2];
  load_readonly<2>(p + 2 * i, x);
  return make_float2(x[0], x[1]);
}

// Pixel coordinates, in which 0 is the centre of the first pixel, of a sample of query `query` (b * Q + q) whose location
// or offset is `at`.
template <bool Fused, typename Value, typename Geometry>
__device__ inline float2 position_of(const Problem<Value, Geometry>& p, int64_t query, int level, float2 at) {
  const float width = float(p.levels.width[level]), height = float(p.levels.height[level]);
  if constexpr (Fused) {
    const int64_t reference = query * p.levels.count + level;
    if (p.coordinates == 2) {
      const float2 point = load_pair(p.reference, reference);
      return make_float2(fmaf(point.x, width, at.x - 0.5f), fmaf(point.y, height, at.y - 0.5f));
    }
    const float2 centre = load_pair(p.reference, 2 * reference), box = load_pair(p.reference, 2 * reference + 1);
    const float half = 0.5f / float(p.P);
    at = make_float2(fmaf(at.x, box.x * half, centre.x), fmaf(at.y, box.y * half, centre.y));
  }
  return make_float2(fmaf(at.x, width, -0.5f), fmaf(at.y, height, -0.5f));
}

// One axis of bilinear sampling at x: two neighbouring pixels of the map, by the first of them, and their weights. They
// are the neighbours of x as far as it has any in the map; the weight of others is zero. A map of one pixel has no second
// one. NaN and infinity weigh nothing, as fmaxf drops NaN.
struct Axis {
  int first;
  float past, near, far;  // past: x - first
};

__device__ inline Axis axis_at(float x, int size) {
  const float first = fminf(fmaxf(floorf(x), 0.0f), float(max(size - 2, 0))), past = x - first;
  return {int(first), past, fmaxf(1 - fabsf(past), 0.0f), size > 1 ? fmaxf(1 - fabsf(past - 1), 0.0f) : 0.0f};
}

// A sample as the group sees it: its window of four pixels by the row of value of the first, -1 where all weigh nothing.
struct Window {
  int row = -1;
  float weight[4] = {0, 0, 0, 0};  // upper left, upper right, lower left, lower right
};

__device__ inline Window window_of(const Levels& levels, int level, const Axis& x, const Axis& y, float weight) {
  const int height = levels.height[level], width = levels.width[level];
  const bool inside = x.near + x.far > 0 && y.near + y.far > 0 && height > 0 && width > 0;
  const float upper = weight * y.near, lower = weight * y.far;
  return {inside ? levels.first[level] + y.first * width + x.first : -1,
          {upper * x.near, upper * x.far, lower * x.near, lower * x.far}};
}

// Lane `lane`'s window to all lanes of each group.
template <int Group>
__device__ inline Window share(const Window& own, int lane) {
  Window window;
  window.row = __shfl_sync(kFullWarp, own.row, lane, Group);
#pragma unroll
  for (int i = 0; i < 4; ++i) window.weight[i] = __shfl_sync(kFullWarp, own.weight[i], lane, Group);
  return window;
}

// Numbers from a window's first pixel to the one on its right and the one below, for maps of `pixel` numbers a pixel.
struct Steps {
  int64_t right, down;
  __device__ int64_t to(int corner) const { return (corner & 1 ? right : 0) + (corner & 2 ? down : 0); }
};
__device__ inline Steps steps_of(const Levels& levels, int level, int pixel) {
  return {levels.width[level] > 1 ? pixel : 0, levels.height[level] > 1 ? int64_t(pixel) * levels.width[level] : 0};
}

// V numbers, of which the first n exist; all of them, aligned, where `Whole`.
template <bool Whole, int V, typename Value>
__device__ inline void load_channels(const Value* from, int n, float (&x)[V]) {
  if constexpr (Whole) {
    load_readonly<V>(from, x);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = i < n ? to_float(from[i]) : 0;
  }
}

// The largest of a query and head's logits, over the group.
template <int Group, typename Geometry>
__device__ inline float largest(const Geometry* logits, int count, int lane, bool live) {
  float peak = -INFINITY;
  for (int s = lane; live && s < count; s += Group) peak = fmaxf(peak, to_float(logits[s]));
  return warp_max<Group>(peak);
}

// Launchers' side.

inline Levels levels_of(const std::vector<int64_t>& shapes) {
  STD_TORCH_CHECK(shapes.size() % 2 == 0, "pyvseg: spatial_shapes must be pairs (height, width)");
  STD_TORCH_CHECK(shapes.size() <= 2 * kMaxLevels, "pyvseg: at most ", kMaxLevels, " levels, got ", shapes.size() / 2);
  Levels levels;
  int64_t pixels = 0;
  for (size_t i = 0; i < shapes.size(); i += 2) {
    STD_TORCH_CHECK(shapes[i] <= INT32_MAX && shapes[i + 1] <= INT32_MAX, "pyvseg: a level above 2^31 - 1 pixels");
    levels.height[levels.count] = int(shapes[i]);
    levels.width[levels.count] = int(shapes[i + 1]);
    levels.first[levels.count++] = int(pixels);
    pixels += shapes[i] * shapes[i + 1];
    STD_TORCH_CHECK(pixels <= INT32_MAX, "pyvseg: levels above 2^31 - 1 pixels");
  }
  return levels;
}

inline Tiles tiles_of(const Levels& levels, int64_t S, int64_t Q) {
  Tiles tiles{levels, 3, kQueriesLog - 3, 0};
  if (Q != S) {
    tiles = {{}, kQueriesLog, 0, 0};
    tiles.grid.count = 1;
    tiles.grid.height[0] = 1, tiles.grid.width[0] = int(Q), tiles.grid.first[0] = 0;
  }
  const int64_t across = 1 << tiles.across_log, down = 1 << tiles.down_log;
  for (int i = 0; i < tiles.grid.count; ++i)
    tiles.count += int(ceil_div(tiles.grid.width[i], across) * ceil_div(tiles.grid.height[i], down));
  return tiles;
}

// Contiguous and aligned as a new tensor is.
inline Tensor dense(const Tensor& t) {
  const Tensor rows = torch::stable::contiguous(t);
  return aligned(rows.data_ptr(), 16) ? rows : torch::stable::clone(rows);
}

// Inputs as the kernels take them: dense, and the geometry of one type, that of value or float32.
struct Inputs {
  Tensor value;
  std::vector<Tensor> geometry;  // locations and weights, or offsets, logits and reference
  std::vector<int64_t> shapes;

  Inputs(const Tensor& value, const std::vector<Tensor>& given, std::vector<int64_t> shapes)
      : value(dense(value)), shapes(shapes) {
    check(given);
    const ScalarType type = value.scalar_type();
    const bool same = std::all_of(given.begin(), given.end(), [&](const Tensor& t) { return t.scalar_type() == type; });
    for (const Tensor& t : given) geometry.push_back(dense(same ? t : torch::stable::to(t, ScalarType::Float)));
  }

  // The kernels read what these shapes say, whatever the tensors hold.
  void check(const std::vector<Tensor>& given) const {
    const Tensor &points = given[0], &weights = given[1];
    STD_TORCH_CHECK(value.dim() == 4 && weights.dim() == 5 && points.dim() == 6, "ms_deform_attn: wrong number of dimensions");
    const int64_t B = value.size(0), H = value.size(2), L = weights.size(3);
    bool fits = weights.size(0) == B && weights.size(2) == H && points.size(5) == 2 && int64_t(shapes.size()) == 2 * L;
    for (int i = 0; i < 5; ++i) fits = fits && points.size(i) == weights.size(i);
    if (given.size() == 3) {
      const Tensor& reference = given[2];
      fits = fits && reference.dim() == 4 && reference.size(0) == B && reference.size(1) == weights.size(1) &&
             reference.size(2) == L && (reference.size(3) == 2 || reference.size(3) == 4);
    }
    int64_t pixels = 0;
    for (size_t i = 0; fits && i < shapes.size(); i += 2) {
      fits = shapes[i] >= 0 && shapes[i + 1] >= 0 && shapes[i] <= INT32_MAX && shapes[i + 1] <= INT32_MAX;
      if (fits) pixels += shapes[i] * shapes[i + 1];
      fits = fits && pixels <= value.size(1);
    }
    STD_TORCH_CHECK(fits && pixels == value.size(1), "ms_deform_attn: shapes do not agree");
  }

  // Calls f(problem) with the problem's type.
  template <typename F>
  void visit(F&& f) const {
    for_number(value, [&](auto number) {
      using Value = decltype(number);
      if (geometry[0].scalar_type() == ScalarType::Float)
        f(problem<Value, float>());
      else
        f(problem<Value, Value>());
    });
  }

  template <typename Value, typename Geometry>
  Problem<Value, Geometry> problem() const {
    const Tensor& weights = geometry[1];
    const int64_t B = value.size(0), S = value.size(1), H = value.size(2), D = value.size(3), Q = weights.size(1);
    const int64_t samples = weights.size(3) * weights.size(4);
    STD_TORCH_CHECK(H * D <= INT32_MAX && Q <= INT32_MAX && samples <= INT32_MAX,
                    "pyvseg: more than 2^31 - 1 channels, queries, or samples of a query");
    const bool fused = geometry.size() == 3;
    const Levels levels = levels_of(shapes);
    return {data<const Value>(value),
            fused ? data<const Geometry>(geometry[2]) : nullptr,
            data<const Geometry>(geometry[0]),
            data<const Geometry>(weights),
            B, S, Q, int(H), int(D), int(weights.size(4)),
            fused ? int(geometry[2].size(3)) : 0,
            levels,
            tiles_of(levels, S, Q)};
  }
};

// A block per head, tile and image.
template <typename Value, typename Geometry>
dim3 grid_of(const Problem<Value, Geometry>& p) {
  return dim3(blocks(int64_t(p.tiles.count) * p.H, 1), unsigned(std::min<int64_t>(p.B, kMostImages)), blocks(p.B, kMostImages));
}

}  // namespace pyvseg::ms_deform_attn
