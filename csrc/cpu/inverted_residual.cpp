// SPDX-License-Identifier: Apache-2.0
// Inverted residual block (MobileNetV2): 1x1 convolution to many channels, depthwise convolution, 1x1 convolution to few, with
// ReLU6 after the first two. The many channels never reach memory: of the expanded map there are only the `kernel` rows that an
// output row needs, in a ring that stays in the core's L2; each task goes down one band of output rows.
//   weights of a 1x1 convolution   [ceil(outputs / 16)] [inputs] [16]
//   depthwise weights              [kernel * kernel] [channels], channels a multiple of 16, as in the ring
#include <cstdint>

#include "../isa.h"
#include "vec.h"

namespace pyvseg::inverted_residual {

constexpr int kChunk = 16, kMostRows = 16;  // of a depthwise kernel

struct Problem {
  const float* x;  // channels are adjacent, the other strides are in floats
  int64_t batch, row, column;
  float* y;  // (batch, out_height, out_width, outputs)
  const float *expand, *expand_bias;  // null: the block begins with its depthwise convolution
  const float *taps, *taps_bias, *project, *project_bias;
  int64_t height, width, inputs, channels, outputs, out_height, out_width, kernel, stride, before;
  bool residual;
};

struct Kernels {
  int64_t rows;
  void (*band)(const Problem&, int64_t image, int64_t begin, int64_t end, float* scratch);
};

#ifdef PYVSEG_ISA

namespace {

// Rows of a register tile, and columns in chunks.
#if defined(__AVX512F__)
constexpr int kRows = 9, kWide = 3;
#elif defined(__AVX2__)
constexpr int kRows = 6, kWide = 1;
#else
constexpr int kRows = 3, kWide = 1;
#endif
constexpr int kVectors = kChunk / kLanes;

PYVSEG_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PYVSEG_INLINE int64_t padded(int64_t n) { return (n + kChunk - 1) / kChunk * kChunk; }
PYVSEG_INLINE vfloat relu6(vfloat x) {
  const vfloat zero{}, six = splat(6.0f);
  x = larger(zero, x);  // a NaN stays one
  return x > six ? six : x;
}

template <int N>
struct Constant {
  static constexpr int value = N;
};

// body(number of rows, first): `count` pixels, a tile of rows at a time; the last tile begins early and does some again.
template <typename Body>
PYVSEG_INLINE void in_tiles(int64_t count, const Body& body) {
  if (count < kRows)
    for (int64_t i = 0; i < count; ++i) body(Constant<1>{}, i);
  else
    for (int64_t i = 0; i < count; i += kRows) body(Constant<kRows>{}, smaller(i, count - kRows));
}

// body(row, column, vector): x (R rows, depth) times C chunks of w, plus bias.
template <int R, int C, typename Body>
PYVSEG_INLINE void tile(const float* x, int64_t step, int64_t depth, const float* w, const float* bias, const Body& body) {
  constexpr int V = C * kVectors;
  vfloat sum[R][V];
  for (int v = 0; v < V; ++v) {
    const vfloat start = load(bias + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum[r][v] = start;
  }
  for (int64_t d = 0; d < depth; ++d) {
    vfloat column[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) column[v] = load(w + (v / kVectors * depth + d) * kChunk + v % kVectors * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const float one = x[r * step + d];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sum[r][v] += one * column[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) body(r, v * kLanes, sum[r][v]);
}

// x (rows, depth) with rows `step` apart times w (depth, chunks * 16): body(row, column, vector).
template <int R, typename Body>
PYVSEG_INLINE void product(const float* x, int64_t step, int64_t depth, const float* w, const float* bias, int64_t chunks, const Body& body) {
  for (int64_t c = 0; c < chunks;) {
    const auto columns = [&](auto wide) {
      constexpr int C = decltype(wide)::value;
      const auto shifted = [&](int r, int64_t v, vfloat sum) { body(r, c * kChunk + v, sum); };
      tile<R, C>(x, step, depth, w + c * depth * kChunk, bias + c * kChunk, shifted);
      c += C;
    };
    if (chunks - c >= kWide)
      columns(Constant<kWide>{});
    else if (kWide > 2 && chunks - c == 2)
      columns(Constant<2>{});
    else
      columns(Constant<1>{});
  }
}

struct Band {
  const Problem& p;
  const float* x;
  float* y;
  int64_t ring_row;  // floats
  float *ring, *nothing, *input, *mixed;

  Band(const Problem& p, int64_t image, float* scratch) : p(p) {
    x = p.x + image * p.batch;
    y = p.y + image * p.out_height * p.out_width * p.outputs;
    ring_row = (p.width + p.kernel) * p.channels;
    nothing = scratch;
    ring = nothing + ring_row;
    input = ring + p.kernel * ring_row;
    mixed = input + p.width * padded(p.inputs);
    __builtin_memset(scratch, 0, (p.kernel + 1) * ring_row * sizeof(float));
  }

  // Row `row` of the expanded map with its padding columns, which are never written.
  float* place(int64_t row) const { return row < 0 || row >= p.height ? nothing : ring + row % p.kernel * ring_row; }

  void expand(int64_t row) const {
    const float* from = x + row * p.row;
    float* to = place(row) + p.before * p.channels;
    float* pixels = p.expand ? input : to;
    const int64_t step = p.expand ? p.inputs : p.channels;
    for (int64_t w = 0; w < p.width; ++w)
      for (int64_t c = 0; c < p.inputs; c += kLanes) store_some(pixels + w * step + c, load_some(from + w * p.column + c, p.inputs - c), p.inputs - c);
    if (!p.expand) return;
    in_tiles(p.width, [&](auto rows, int64_t w) {
      float* out = to + w * p.channels;
      product<decltype(rows)::value>(input + w * step, step, p.inputs, p.expand, p.expand_bias, p.channels / kChunk,
                                     [&](int r, int64_t c, vfloat sum) { store(out + r * p.channels + c, relu6(sum)); });
    });
  }

  // R outputs of a row from column `w` on, before the last convolution, of these rows of the expanded map.
  template <int R>
  void mix(const float* const* rows, int64_t w) const {
    for (int64_t c = 0; c < p.channels; c += kLanes) {
      vfloat sum[R];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sum[r] = load(p.taps_bias + c);
      const float* tap = p.taps + c;
      for (int64_t i = 0; i < p.kernel; ++i) {
        const float* from = rows[i] + w * p.stride * p.channels + c;
        for (int64_t j = 0; j < p.kernel; ++j, tap += p.channels, from += p.channels) {
          const vfloat weight = load(tap);
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) sum[r] += weight * load(from + r * p.stride * p.channels);
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) store(mixed + r * p.channels + c, relu6(sum[r]));
    }
  }

  void output(int64_t row) const {
    const float* rows[kMostRows];
    for (int64_t i = 0; i < p.kernel; ++i) rows[i] = place(row * p.stride - p.before + i);
    in_tiles(p.out_width, [&](auto pixels, int64_t w) {
      constexpr int R = decltype(pixels)::value;
      mix<R>(rows, w);
      float* out = y + (row * p.out_width + w) * p.outputs;
      const float* same = x + row * p.row + w * p.column;
      product<R>(mixed, p.channels, p.channels, p.project, p.project_bias, padded(p.outputs) / kChunk, [&](int r, int64_t c, vfloat sum) {
        const int64_t n = p.outputs - c;
        if (n <= 0) return;
        if (p.residual) sum += load_some(same + r * p.column + c, n);
        store_some(out + r * p.outputs + c, sum, n);
      });
    });
  }

  void run(int64_t begin, int64_t end) const {
    int64_t next = begin * p.stride - p.before;  // the first row of the expanded map that is not there yet
    if (next < 0) next = 0;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t needed = smaller(row * p.stride - p.before + p.kernel, p.height);
      for (; next < needed; ++next) expand(next);
      output(row);
    }
  }
};

void band(const Problem& p, int64_t image, int64_t begin, int64_t end, float* scratch) {
  Band(p, image, scratch).run(begin, end);
}

}  // namespace

PYVSEG_KERNELS = {kRows, band};
#else
}  // namespace pyvseg::inverted_residual

#include "launch.h"
#include "scratch.h"

namespace pyvseg::inverted_residual {

PYVSEG_KERNEL_TABLE

namespace {

constexpr int64_t kBandRows = 24;  // at least, unless a thread would have nothing to do: each band expands kernel - stride rows again

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

void run(const Problem& p, int64_t images) {
  const Kernels& k = kernels();
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t each = threads == 1 ? p.out_height : std::max(std::min(kBandRows, divide_up(images * p.out_height, threads)), int64_t(1));
  const int64_t bands = divide_up(p.out_height, each);
  const int64_t floats = (p.kernel + 1) * (p.width + p.kernel) * p.channels + p.width * divide_up(p.inputs, kChunk) * kChunk + k.rows * p.channels;
  parallel_for(0, images * bands, 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    float* data = scratch.at_least(sizeof(float) * floats);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % bands * each;
      k.band(p, i / bands, first, std::min(first + each, p.out_height), data);
    }
  });
}

const float* weight(const Tensor& t, std::initializer_list<int64_t> shape) {
  bool fits = t.dim() == int64_t(shape.size()) && t.is_contiguous() && t.scalar_type() == ScalarType::Float;
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = t.size(i) == shape.begin()[i];
  STD_TORCH_CHECK(fits, "inverted_residual: weights do not fit");
  return t.const_data_ptr<float>();
}

// x (N, I, H, W), expand (C / 16, I, 16) and its bias (C) or none, taps (k, k, C) and bias (C), project (ceil(O / 16), C, 16) and bias
// (the same times 16) -> (N, O, ceil(H / stride), ceil(W / stride)) channels last
Tensor inverted_residual(const Tensor& x, const std::optional<Tensor>& expand, const std::optional<Tensor>& expand_bias, const Tensor& taps,
                         const Tensor& taps_bias, const Tensor& project, const Tensor& project_bias, int64_t outputs, int64_t stride, bool residual) {
  STD_TORCH_CHECK(x.dim() == 4 && taps.dim() == 3 && project.dim() == 3 && stride >= 1 && outputs >= 1, "inverted_residual: wrong arguments");
  const int64_t N = x.size(0), I = x.size(1), H = x.size(2), W = x.size(3), C = taps.size(2), kernel = taps.size(0);
  const int64_t chunks = divide_up(outputs, kChunk);
  STD_TORCH_CHECK(I >= 1 && C >= 1 && C % kChunk == 0 && kernel >= stride && kernel <= kMostRows && (expand || divide_up(I, kChunk) * kChunk == C), "inverted_residual: channels do not fit");
  STD_TORCH_CHECK(bool(expand) == bool(expand_bias) && (!residual || (stride == 1 && outputs == I)), "inverted_residual: wrong arguments");
  const Tensor input = x.stride(1) == 1 || I == 1 ? x : torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
  Problem p{};
  if (expand) p.expand = weight(*expand, {C / kChunk, I, kChunk}), p.expand_bias = weight(*expand_bias, {C});
  p.taps = weight(taps, {kernel, kernel, C}), p.taps_bias = weight(taps_bias, {C});
  p.project = weight(project, {chunks, C, kChunk}), p.project_bias = weight(project_bias, {chunks * kChunk});
  p.batch = input.stride(0), p.row = input.stride(2), p.column = input.stride(3);
  p.height = H, p.width = W, p.inputs = I, p.channels = C, p.outputs = outputs;
  p.out_height = divide_up(H, stride), p.out_width = divide_up(W, stride);
  p.kernel = kernel, p.stride = stride, p.before = (kernel - stride) / 2;
  p.residual = residual;
  Tensor y = torch::stable::empty({N, outputs, p.out_height, p.out_width}, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                                  torch::headeronly::MemoryFormat::ChannelsLast);
  if (y.numel() == 0) return y;
  p.x = input.const_data_ptr<float>(), p.y = y.mutable_data_ptr<float>();
  run(p, N);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvseg, m) {
  m.def("inverted_residual(Tensor x, Tensor? expand, Tensor? expand_bias, Tensor taps, Tensor taps_bias, Tensor project, Tensor project_bias, "
        "int outputs, int stride, bool residual) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(pyvseg, CPU, m) { m.impl("inverted_residual", TORCH_BOX(&inverted_residual)); }
#endif

}  // namespace pyvseg::inverted_residual
