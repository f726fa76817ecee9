// SPDX-License-Identifier: Apache-2.0
// The leading queries of every full-size pixel and their softmax, from coarse mask logits (see pyvseg/ops/mask_winners.py).
// Full-size logits exist for one pixel at a time. A tile looks only at queries that can matter in it: interpolation never
// leaves the range of its window, so a query far below another one everywhere neither leads nor shows in a sum.
#include <cstdint>

#include "../isa.h"
#include "vec.h"

namespace pyvseg::mask_winners {

struct Axis {
  const int32_t* first;
  const float* weights;  // (outputs, taps)
  int64_t inputs, outputs, taps, tile;  // outputs in a tile
};

struct Problem {
  const float* logits;  // (T, N, h, w)
  int64_t N;
  Axis rows, columns;
  int64_t best;          // 1 or 2
  int16_t* index;        // (best, T, H, W)
  float* probability;
  int64_t plane;         // T * H * W
};

struct Scratch {
  float* window;    // (rows, columns, candidates) of the tile
  float* line;      // (columns, candidates)
  float* pixel;     // candidates
  int32_t* chosen;  // N
  float* highest;   // N
};

struct Kernels {
  int64_t lanes;
  void (*tile)(const Problem&, const Scratch&, int64_t frame, int64_t row, int64_t column);
};

#ifdef PYVSEG_ISA
namespace {

constexpr float kNever = -3.4e38f;
constexpr float kFar = 25.0f;  // exp(-25) = 1.4e-11: hundreds of these are less than the last bit of a sum that is 1 or more

struct Span {
  int64_t begin, end;
};

// The inputs that some outputs of an axis see.
PYVSEG_INLINE Span inputs_of(const Axis& axis, int64_t begin, int64_t end) {
  int64_t low = axis.first[begin], high = low;
  for (int64_t i = begin; i < end; ++i) {
    low = axis.first[i] < low ? axis.first[i] : low;
    high = axis.first[i] > high ? axis.first[i] : high;
  }
  const int64_t stop = high + axis.taps;
  return {low, stop < axis.inputs ? stop : axis.inputs};
}

PYVSEG_INLINE float least(float a, float b) { return b < a ? b : a; }
PYVSEG_INLINE float most(float a, float b) { return b > a ? b : a; }

// Queries of the window that come within kFar of one that leads at least by its lowest value.
int64_t candidates(const Problem& p, const Scratch& s, const float* frame, Span rows, Span columns) {
  float lead = kNever;
  const int64_t w = p.columns.inputs, size = p.rows.inputs * w;
  for (int64_t q = 0; q < p.N; ++q) {
    vfloat low = splat(-kNever), high = splat(kNever);
    float low1 = -kNever, high1 = kNever;
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const float* from = frame + q * size + r * w;
      int64_t c = columns.begin;
      for (; c + kLanes <= columns.end; c += kLanes) {
        const vfloat x = load(from + c);
        low = x < low ? x : low;
        high = x > high ? x : high;
      }
      for (; c < columns.end; ++c) low1 = least(low1, from[c]), high1 = most(high1, from[c]);
    }
    for (int i = 0; i < kLanes; ++i) low1 = least(low1, low[i]), high1 = most(high1, high[i]);
    s.highest[q] = high1;
    if (low1 <= high1) lead = most(lead, low1);  // else there is nothing but NaN
  }
  int64_t count = 0;
  for (int64_t q = 0; q < p.N; ++q)
    if (!(s.highest[q] < lead - kFar)) s.chosen[count++] = int32_t(q);
  if (!count) s.chosen[count++] = 0;
  // Two are asked for, but one has it all: any other will do for the second.
  for (int64_t q = 0; count < p.best; ++q)
    if (s.chosen[0] != q) s.chosen[count++] = int32_t(q);
  if (count == 2 && s.chosen[0] > s.chosen[1]) {
    const int32_t q = s.chosen[0];
    s.chosen[0] = s.chosen[1];
    s.chosen[1] = q;
  }
  return count;
}

PYVSEG_INLINE float largest(vfloat v) {
  for (int step = kLanes / 2; step; step /= 2) {
    const vfloat other = (vfloat)shuffle((vuint)v, (vuint)v, (vuint)lane_index() ^ step);
    v = other > v ? other : v;
  }
  return v[0];
}
PYVSEG_INLINE int32_t smallest(vint v) {
  for (int step = kLanes / 2; step; step /= 2) {
    const vint other = (vint)shuffle((vuint)v, (vuint)v, (vuint)lane_index() ^ step);
    v = other < v ? other : v;
  }
  return v[0];
}

struct Best {
  float logit;
  int32_t place;
};

// The first of the largest.
PYVSEG_INLINE Best best_of(const float* pixel, int64_t width) {
  vfloat high = load(pixel);
  for (int64_t i = kLanes; i < width; i += kLanes) {
    const vfloat x = load(pixel + i);
    high = x > high ? x : high;
  }
  const float top = largest(high);
  for (int64_t i = 0; i < width; i += kLanes) {
    const int32_t place = smallest(load(pixel + i) == top ? lane_index() + int32_t(i) : splat(INT32_MAX));
    if (place != INT32_MAX) return {top, place};
  }
  return {top, 0};  // NaN only
}

void tile(const Problem& p, const Scratch& s, int64_t t, int64_t row0, int64_t column0) {
  const int64_t row1 = row0 + p.rows.tile < p.rows.outputs ? row0 + p.rows.tile : p.rows.outputs;
  const int64_t column1 = column0 + p.columns.tile < p.columns.outputs ? column0 + p.columns.tile : p.columns.outputs;
  const Span rows = inputs_of(p.rows, row0, row1), columns = inputs_of(p.columns, column0, column1);
  const int64_t h = p.rows.inputs, w = p.columns.inputs, W = p.columns.outputs;
  const float* frame = p.logits + t * p.N * h * w;
  const int64_t count = candidates(p, s, frame, rows, columns), width = (count + kLanes - 1) / kLanes * kLanes;
  const int64_t across = columns.end - columns.begin;
  for (int64_t i = 0; i < width; ++i) {
    const float* from = frame + (i < count ? s.chosen[i] : 0) * h * w;
    for (int64_t r = rows.begin; r < rows.end; ++r)
      for (int64_t c = 0; c < across; ++c)
        s.window[((r - rows.begin) * across + c) * width + i] = i < count ? from[r * w + columns.begin + c] : kNever;
  }
  for (int64_t y = row0; y < row1; ++y) {
    for (int64_t k = 0; k < p.rows.taps; ++k) {
      const float weight = p.rows.weights[y * p.rows.taps + k];
      const int64_t r = p.rows.first[y] + k < h ? p.rows.first[y] + k : h - 1;
      const float* from = s.window + (r - rows.begin) * across * width;
      for (int64_t i = 0; i < across * width; i += kLanes)
        store(s.line + i, k ? load(s.line + i) + weight * load(from + i) : weight * load(from + i));
    }
    for (int64_t x = column0; x < column1; ++x) {
      const float* weights = p.columns.weights + x * p.columns.taps;
      const float* from = s.line + (p.columns.first[x] - columns.begin) * width;
      const int64_t taps = p.columns.first[x] + p.columns.taps <= w ? p.columns.taps : w - p.columns.first[x];
      for (int64_t i = 0; i < width; i += kLanes) {
        vfloat z = weights[0] * load(from + i);
        for (int64_t k = 1; k < taps; ++k) z += weights[k] * load(from + k * width + i);
        store(s.pixel + i, z);
      }
      const Best lead = best_of(s.pixel, width);
      vfloat total{};
      for (int64_t i = 0; i < width; i += kLanes) total += exp_nonpositive(load(s.pixel + i) - lead.logit);
      const float share = 1.0f / sum(total);
      int64_t at = (t * p.rows.outputs + y) * W + x;
      p.index[at] = int16_t(s.chosen[lead.place]);
      p.probability[at] = share;
      if (p.best == 2) {
        s.pixel[lead.place] = 2 * kNever;
        const Best second = best_of(s.pixel, width);
        p.index[at + p.plane] = int16_t(s.chosen[second.place]);
        p.probability[at + p.plane] = share * exp_nonpositive(splat(second.logit - lead.logit))[0];
      }
    }
  }
}

}  // namespace

PYVSEG_KERNELS = {kLanes, tile};
#else
}  // namespace pyvseg::mask_winners

#include "launch.h"

namespace pyvseg::mask_winners {

PYVSEG_KERNEL_TABLE

namespace {

constexpr int64_t kRows = 32, kColumns = 64, kInputs = 24;  // outputs of a tile, and inputs that it should not see many more of

// first (M,) int32, weights (M, K) float32
Axis axis_of(const Tensor& first, const Tensor& weights, int64_t inputs, int64_t tile) {
  STD_TORCH_CHECK(first.dim() == 1 && weights.dim() == 2 && weights.size(0) == first.size(0) && weights.size(1) > 0, "mask_winners: taps");
  STD_TORCH_CHECK(first.scalar_type() == ScalarType::Int && weights.scalar_type() == ScalarType::Float, "mask_winners: dtypes of taps");
  STD_TORCH_CHECK(first.is_contiguous() && weights.is_contiguous(), "mask_winners: contiguous taps");
  const int64_t outputs = first.size(0);
  const int32_t* index = first.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < outputs; ++i) STD_TORCH_CHECK(index[i] >= 0 && index[i] < inputs, "mask_winners: a tap outside the input");
  const int64_t seen = std::max<int64_t>(1, kInputs * outputs / std::max<int64_t>(inputs, 1));
  return {index, weights.const_data_ptr<float>(), inputs, outputs, weights.size(1), std::min(tile, seen)};
}

// Inputs that a tile of the axis sees at most.
int64_t widest(const Axis& axis) {
  int64_t most = 0;
  for (int64_t begin = 0; begin < axis.outputs; begin += axis.tile) {
    const int64_t end = std::min(begin + axis.tile, axis.outputs);
    const auto [low, high] = std::minmax_element(axis.first + begin, axis.first + end);
    most = std::max(most, std::min(*high + axis.taps, axis.inputs) - *low);
  }
  return most;
}

// logits (T, N, h, w) float32 -> index int16 and probability float32, both (best, T, H, W)
std::tuple<Tensor, Tensor> mask_winners(const Tensor& logits, const Tensor& row_first, const Tensor& row_weights, const Tensor& column_first,
                                        const Tensor& column_weights, int64_t best) {
  STD_TORCH_CHECK(logits.dim() == 4 && logits.scalar_type() == ScalarType::Float, "mask_winners: logits must be (T, N, h, w) float32");
  const Tensor planes = torch::stable::contiguous(logits);
  const int64_t T = planes.size(0), N = planes.size(1);
  STD_TORCH_CHECK(best >= 1 && best <= 2 && N >= best && N <= INT16_MAX, "mask_winners: 1 or 2 of at most 32767 queries");
  const Axis rows = axis_of(row_first, row_weights, planes.size(2), kRows), columns = axis_of(column_first, column_weights, planes.size(3), kColumns);
  Tensor index = torch::stable::new_empty(logits, {best, T, rows.outputs, columns.outputs}, ScalarType::Short);
  Tensor probability = torch::stable::new_empty(logits, {best, T, rows.outputs, columns.outputs});
  const Problem problem{planes.const_data_ptr<float>(), N, rows, columns, best, index.mutable_data_ptr<int16_t>(),
                        probability.mutable_data_ptr<float>(), T * rows.outputs * columns.outputs};
  if (problem.plane == 0) return {index, probability};
  const Kernels& kernel = kernels();
  const int64_t width = (N + kernel.lanes - 1) / kernel.lanes * kernel.lanes, across = widest(columns);
  const int64_t bands = (rows.outputs + rows.tile - 1) / rows.tile, down = widest(rows);
  parallel_for(0, T * bands, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> floats((down + 1) * across * width + width + N);
    std::vector<int32_t> chosen(N);
    float* line = floats.data() + down * across * width;
    const Scratch scratch{floats.data(), line, line + across * width, chosen.data(), line + (across + 1) * width};
    for (int64_t i = begin; i < end; ++i)
      for (int64_t column = 0; column < columns.outputs; column += columns.tile)
        kernel.tile(problem, scratch, i / bands, i % bands * rows.tile, column);
  });
  return {index, probability};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvseg, m) {
  m.def("mask_winners(Tensor logits, Tensor row_first, Tensor row_weights, Tensor column_first, Tensor column_weights, int best) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(pyvseg, CPU, m) {
  m.impl("mask_winners", TORCH_BOX(&mask_winners));
}
#endif

}  // namespace pyvseg::mask_winners
