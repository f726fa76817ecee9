// SPDX-License-Identifier: Apache-2.0
// The leading queries of every full-size pixel and their softmax, from coarse mask logits (see pyvseg/ops/mask_winners.py).
// Full-size logits exist for one vector of pixels at a time. A tile looks only at queries that can matter in it: interpolation never
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
  float* window;    // (candidates, rows, pitch) of the tile
  float* line;      // (candidates, pitch)
  float* pixels;    // (candidates, lanes)
  float* weights;   // (columns of a tile / lanes, taps, lanes)
  int32_t* chosen;  // N
  float* highest;   // N
};

// Of a row of cells in scratch memory: whole vectors, and one may begin at any cell.
constexpr int64_t pitch_of(int64_t cells, int64_t lanes) { return (cells + 2 * lanes - 1) / lanes * lanes; }

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

// Adjacent pixels of a row: where the cells that they see begin, and how far from there each pixel's do.
struct Pixels {
  int64_t count, begin;
  vint offset;
  bool near;  // all that they see is one vector of cells

  Pixels(const Axis& columns, int64_t x, int64_t end) : count(end - x < kLanes ? end - x : kLanes), begin(columns.first[x]) {
    int32_t first[kLanes], last = 0;
    for (int64_t j = 0; j < count; ++j) begin = columns.first[x + j] < begin ? columns.first[x + j] : begin;
    for (int64_t j = 0; j < kLanes; ++j) {
      first[j] = columns.first[x + (j < count ? j : count - 1)] - int32_t(begin);
      last = first[j] > last ? first[j] : last;
    }
    offset = load(first);
    near = last + columns.taps <= kLanes;
  }
};

// Logits of the pixels from a query's row of cells; those past `cells` count nothing.
PYVSEG_INLINE vfloat interpolate(const Pixels& at, const float* cell, int64_t cells, const float* weights, int64_t taps) {
  vfloat z{};
  for (int64_t k = 0; k < taps; ++k)
    for (int j = 0; j < kLanes; ++j)
      if (at.offset[j] + k < cells) z[j] += weights[k * kLanes + j] * cell[at.offset[j] + k];
  return z;
}

// The leading queries of some pixels, whose logits of query number i are logits(i).
template <int kBest, typename Logits>
PYVSEG_INLINE void lead(const Problem& p, const Scratch& s, int64_t queries, int64_t count, int64_t out, const Logits& logits) {
  float* const pixels = s.pixels;
  const int32_t* const chosen = s.chosen;
  vfloat top = logits(0), next = splat(2 * kNever);
  vint leader = splat(chosen[0]), follower = splat(chosen[kBest - 1]);
  store(pixels, top);
  for (int64_t i = 1; i < queries; ++i) {
    const vfloat z = logits(i);
    store(pixels + i * kLanes, z);
    const vint query = splat(chosen[i]);
    if (kBest == 2) {
      follower = z > top ? leader : z > next ? query : follower;
      next = z > top ? top : larger(z, next);
    }
    leader = z > top ? query : leader;
    top = larger(z, top);
  }
  vfloat total{};
  for (int64_t i = 0; i < queries; ++i) {
    const vfloat below = load(pixels + i * kLanes) - top;
    if (greater_mask(below, splat(-kFar))) total += exp_of_share(below);
  }
  const vfloat share = 1.0f / total, other = kBest == 2 ? share * exp_nonpositive(next - top) : share;
  for (int64_t j = 0; j < count; ++j) {
    p.index[out + j] = int16_t(leader[j]);
    p.probability[out + j] = share[j];
    if (kBest < 2) continue;
    p.index[p.plane + out + j] = int16_t(follower[j]);
    p.probability[p.plane + out + j] = other[j];
  }
}

template <int kBest>
void row_of_pixels(const Problem& p, const Scratch& s, int64_t queries, Span columns, int64_t pitch, int64_t x0, int64_t x1, int64_t out) {
  const int64_t taps = p.columns.taps;
  for (int64_t x = x0; x < x1; x += kLanes) {
    const Pixels at(p.columns, x, x1);
    const float *weights = s.weights + (x - x0) * taps, *cell = s.line + at.begin - columns.begin;
    if (at.near && taps == 2) {
      const vfloat one = load(weights), other = load(weights + kLanes);
      const vuint from = (vuint)at.offset, after = from + 1;
      lead<kBest>(p, s, queries, at.count, out + x, [&](int64_t i) {
        const vuint v = (vuint)load(cell + i * pitch);
        return one * (vfloat)shuffle(v, v, from) + other * (vfloat)shuffle(v, v, after);
      });
    } else {
      lead<kBest>(p, s, queries, at.count, out + x,
                  [&](int64_t i) { return interpolate(at, cell + i * pitch, columns.end - at.begin, weights, taps); });
    }
  }
}

// The part of the frame that a tile sees, query by query.
void cut_out(const Scratch& s, const float* frame, int64_t h, int64_t w, int64_t count, Span rows, Span columns, int64_t pitch) {
  const int64_t across = columns.end - columns.begin;
  float* to = s.window;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t r = rows.begin; r < rows.end; ++r, to += pitch) {
      __builtin_memcpy(to, frame + (s.chosen[i] * h + r) * w + columns.begin, across * sizeof(float));
      for (int64_t c = across; c < pitch; ++c) to[c] = 0;
    }
}

void tile(const Problem& p, const Scratch& s, int64_t t, int64_t row0, int64_t column0) {
  const int64_t row1 = row0 + p.rows.tile < p.rows.outputs ? row0 + p.rows.tile : p.rows.outputs;
  const int64_t column1 = column0 + p.columns.tile < p.columns.outputs ? column0 + p.columns.tile : p.columns.outputs;
  const Span rows = inputs_of(p.rows, row0, row1), columns = inputs_of(p.columns, column0, column1);
  const int64_t h = p.rows.inputs, w = p.columns.inputs, pitch = pitch_of(columns.end - columns.begin, kLanes);
  const float* frame = p.logits + t * p.N * h * w;
  const int64_t count = candidates(p, s, frame, rows, columns), down = rows.end - rows.begin;
  cut_out(s, frame, h, w, count, rows, columns, pitch);
  for (int64_t x = column0; x < column1; ++x)
    for (int64_t k = 0; k < p.columns.taps; ++k)
      s.weights[((x - column0) / kLanes * p.columns.taps + k) * kLanes + (x - column0) % kLanes] = p.columns.weights[x * p.columns.taps + k];
  for (int64_t y = row0; y < row1; ++y) {
    const float* weights = p.rows.weights + y * p.rows.taps;
    const int64_t first = p.rows.first[y], taps = first + p.rows.taps <= h ? p.rows.taps : h - first;
    for (int64_t i = 0; i < count; ++i) {
      const float* from = s.window + (i * down + first - rows.begin) * pitch;
      for (int64_t c = 0; c < columns.end - columns.begin; c += kLanes) {
        vfloat z = weights[0] * load(from + c);
        for (int64_t k = 1; k < taps; ++k) z += weights[k] * load(from + k * pitch + c);
        store(s.line + i * pitch + c, z);
      }
    }
    const int64_t out = (t * p.rows.outputs + y) * p.columns.outputs;
    if (p.best == 2)
      row_of_pixels<2>(p, s, count, columns, pitch, column0, column1, out);
    else
      row_of_pixels<1>(p, s, count, columns, pitch, column0, column1, out);
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
  const int64_t pitch = pitch_of(widest(columns), kernel.lanes), bands = (rows.outputs + rows.tile - 1) / rows.tile, down = widest(rows);
  const int64_t weights = pitch_of(columns.tile, kernel.lanes) * columns.taps;
  parallel_for(0, T * bands, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> floats(N * ((down + 1) * pitch + kernel.lanes + 1) + weights);
    std::vector<int32_t> chosen(N);
    float *line = floats.data() + N * down * pitch, *pixels = line + N * pitch, *lines_end = pixels + N * kernel.lanes;
    const Scratch scratch{floats.data(), line, pixels, lines_end, chosen.data(), lines_end + weights};
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
