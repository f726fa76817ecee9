// SPDX-License-Identifier: Apache-2.0
// 3x3 convolution, stride 1, zero padding 1, by Winograd's F(4x4, 3x3) on the points 0, +-3/4, +-3/2 and infinity: a 4x4
// tile of outputs takes 36 multiplications per pair of channels instead of 144. The rounding error is half of that on the
// usual points 0, +-1, +-2.
//
// Tiles are taken in blocks whose transformed inputs V stay in the last-level cache. Each task then multiplies one block
// by one panel of output channels, at all 36 frequencies, into M, which stays in its core's L2, and transforms M back.
// With few channels weights and V have room in L2 too: then a task is all of a small block, and nobody waits for others.
//   V  [36] [groups] [inputs / 16] [group rows] [16]   a group is as many tiles as the register tile has rows
//   U  [panels] [36] [inputs] [32]                     the weights, from pyvseg.ops.conv3x3_weight
//   M  [tiles] [36] [32]
#include <cstdint>

#include "../isa.h"
#include "vec.h"

namespace pyvseg::conv3x3 {

constexpr int kTile = 4, kPatch = 6, kFrequencies = 36, kChunk = 16, kPanel = 32, kRun = 64;

// Channels are adjacent, the other strides are in elements.
struct Image {
  const void* data;
  int64_t batch, row, column;
};

struct Problem {
  Image x, residual;  // residual.data may be null
  const float *weight, *bias;
  void* y;  // (batch, height, width, outputs)
  int64_t height, width, inputs, outputs, tile_rows, tile_columns;
  bool relu_input;
  Number number;  // of x, residual and y; all between them is float
};

// `count` tiles of a block from tile number `first` on, with frequency f of V at v + f * stride.
struct Block {
  int64_t first, count;
  float* v;
  int64_t stride;
};

struct Kernels {
  int64_t group;
  void (*transform_inputs)(const Problem&, const Block&, int64_t begin, int64_t end);
  void (*multiply_panel)(const Problem&, const Block&, int64_t panel, float* m);
};

#ifdef PYVSEG_ISA

namespace {

#if defined(__AVX512F__)
constexpr int kGroup = 14;  // 28 of 32 registers accumulate
#else
constexpr int kGroup = 6;  // 12 of 16
#endif

PYVSEG_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr float kA = 0.75f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB;  // all exact

PYVSEG_INLINE void forward(const vfloat d[kPatch], vfloat out[kPatch]) {
  const vfloat even_a = d[4] - kB2 * d[2], odd_a = kA * (d[3] - kB2 * d[1]);
  const vfloat even_b = d[4] - kA2 * d[2], odd_b = kB * (d[3] - kA2 * d[1]);
  out[0] = d[4] - (kA2 + kB2) * d[2] + kA2 * kB2 * d[0];
  out[1] = even_a + odd_a;
  out[2] = even_a - odd_a;
  out[3] = even_b + odd_b;
  out[4] = even_b - odd_b;
  out[5] = d[5] - (kA2 + kB2) * d[3] + kA2 * kB2 * d[1];
}

PYVSEG_INLINE void backward(const vfloat m[kPatch], vfloat out[kTile]) {
  const vfloat even_a = m[1] + m[2], odd_a = m[1] - m[2];
  const vfloat even_b = m[3] + m[4], odd_b = m[3] - m[4];
  out[0] = m[0] + even_a + even_b;
  out[1] = kA * odd_a + kB * odd_b;
  out[2] = kA2 * even_a + kB2 * even_b;
  out[3] = kA2 * kA * odd_a + kB2 * kB * odd_b + m[5];
}

struct Place {
  int64_t image, y, x;  // of the tile's first output
};

PYVSEG_INLINE Place place(const Problem& p, int64_t tile) {
  const int64_t in_image = tile % (p.tile_rows * p.tile_columns);
  return {tile / (p.tile_rows * p.tile_columns), in_image / p.tile_columns * kTile, in_image % p.tile_columns * kTile};
}

PYVSEG_INLINE int64_t padded(int64_t channels) { return (channels + kChunk - 1) / kChunk * kChunk; }

// One vector of channels of a tile; `at(i, j)` are the patch's pixels, nothing below `least` counts.
template <typename At>
PYVSEG_INLINE void transform_patch(const At& at, vfloat least, float* v, int64_t stride) {
  vfloat rows[kPatch][kPatch], d[kPatch], r[kPatch];
#pragma GCC unroll 6
  for (int j = 0; j < kPatch; ++j) {
#pragma GCC unroll 6
    for (int i = 0; i < kPatch; ++i) d[i] = larger(least, at(i, j));  // a NaN stays one
    forward(d, r);
#pragma GCC unroll 6
    for (int i = 0; i < kPatch; ++i) rows[i][j] = r[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < kPatch; ++i) {
    forward(rows[i], r);
#pragma GCC unroll 6
    for (int j = 0; j < kPatch; ++j) store(v + (i * kPatch + j) * stride, r[j]);
  }
}

// Tiles begin..end of the block, relative to its first.
template <typename T>
void transform_tiles(const Problem& p, const Block& block, int64_t begin, int64_t end) {
  const vfloat least = splat(p.relu_input ? 0.0f : -__builtin_inff());
  for (int64_t t = begin; t < end; ++t) {
    const Place at = place(p, block.first + t);
    const T* corner = (const T*)p.x.data + at.image * p.x.batch + (at.y - 1) * p.x.row + (at.x - 1) * p.x.column;
    const auto inside = [&](int64_t i, int64_t j) { return at.y + i >= 1 && at.y + i <= p.height && at.x + j >= 1 && at.x + j <= p.width; };
    const bool whole = inside(0, 0) && inside(kPatch - 1, kPatch - 1);
    float* out = block.v + t / kGroup * kGroup * padded(p.inputs) + t % kGroup * kChunk;
    for (int64_t c = 0; c < padded(p.inputs); c += kLanes) {
      float* v = out + c / kChunk * kChunk * kGroup + c % kChunk;
      if (whole && c + kLanes <= p.inputs)
        transform_patch(
            [&](int i, int j) {
              const T* from = corner + i * p.x.row + j * p.x.column + c;
              if (j >= kPatch - kTile) __builtin_prefetch(from + kTile * p.x.column);  // of the next tile
              return load(from);
            },
            least, v, block.stride);
      else
        transform_patch(
            [&](int i, int j) { return inside(i, j) ? load_some(corner + i * p.x.row + j * p.x.column + c, p.inputs - c) : vfloat{}; },
            least, v, block.stride);
    }
  }
}

void transform_inputs(const Problem& p, const Block& block, int64_t begin, int64_t end) {
  p.number == Number::kFloat ? transform_tiles<float>(p, block, begin, end) : transform_tiles<bfloat16>(p, block, begin, end);
}

template <int N>
PYVSEG_INLINE void step(vfloat acc[kGroup][N], const float* v, const float* u) {
  vfloat columns[N];
  for (int n = 0; n < N; ++n) columns[n] = load(u + n * kLanes);
#pragma GCC unroll 16
  for (int r = 0; r < kGroup; ++r) {
    const float x = v[r * kChunk];
    for (int n = 0; n < N; ++n) acc[r][n] += x * columns[n];
  }
}

// The group's rows of V times N vectors of columns of U; meanwhile it fetches `lines` cache lines per chunk of `next`.
// Sums of kRun products are added up in M: one long sum would double the rounding error at 512 channels.
template <int N>
void multiply(const float* v, const float* u, int64_t inputs, float* m, const char* next, int64_t lines) {
  for (int64_t first = 0; first < inputs; first += kRun) {
    const int64_t end = smaller(first + kRun, inputs);
    vfloat acc[kGroup][N] = {};
    int64_t c = first;
    for (; c + kChunk <= end; c += kChunk, v += kGroup * kChunk) {
      for (int64_t i = 0; i < lines; ++i, next += 64) __builtin_prefetch(next, 0, 2);
#pragma GCC unroll 4
      for (int i = 0; i < kChunk; ++i, u += kPanel) step<N>(acc, v + i, u);
    }
    for (; c < end; ++c, ++v, u += kPanel) step<N>(acc, v, u);
#pragma GCC unroll 16
    for (int r = 0; r < kGroup; ++r) {
      float* row = m + r * kFrequencies * kPanel;
      for (int n = 0; n < N; ++n) store(row + n * kLanes, first ? load(row + n * kLanes) + acc[r][n] : acc[r][n]);
    }
  }
}

// `channels` outputs from channel `first` on, of one tile.
template <typename T>
void transform_outputs(const Problem& p, const Place& at, const float* m, int64_t first, int64_t channels) {
  const int64_t rows = smaller(kTile, p.height - at.y), columns = smaller(kTile, p.width - at.x);
  for (int64_t c = 0; c < channels; c += kLanes) {
    vfloat half[kTile][kPatch], d[kPatch], r[kTile];
    for (int j = 0; j < kPatch; ++j) {
      for (int i = 0; i < kPatch; ++i) d[i] = load(m + (i * kPatch + j) * kPanel + c);
      backward(d, r);
      for (int i = 0; i < kTile; ++i) half[i][j] = r[i];
    }
    const int64_t n = channels - c;
    const vfloat bias = p.bias ? load_some(p.bias + first + c, n) : vfloat{};
    for (int64_t i = 0; i < rows; ++i) {
      backward(half[i], r);
      const int64_t y = at.y + i;
      T* out = (T*)p.y + ((at.image * p.height + y) * p.width + at.x) * p.outputs + first + c;
      const T* residual = (const T*)p.residual.data + at.image * p.residual.batch + y * p.residual.row +
                              at.x * p.residual.column + first + c;
      for (int64_t j = 0; j < columns; ++j, out += p.outputs, residual += p.residual.column) {
        vfloat result = r[j] + bias;
        if (p.residual.data) result += load_some(residual, n);
        store_some(out, result, n);
      }
    }
  }
}

void multiply_panel(const Problem& p, const Block& block, int64_t panel, float* m) {
  const int64_t groups = (block.count + kGroup - 1) / kGroup, size = p.inputs * kPanel;
  const int64_t first = panel * kPanel, channels = smaller(kPanel, p.outputs - first);
  // The next frequency's weights come from memory or the last-level cache while this one's are used.
  const int64_t lines = (kChunk * kPanel / 16 + groups - 1) / groups, share = p.inputs / kChunk * lines * 64;
  for (int f = 0; f < kFrequencies; ++f) {
    const float* u = p.weight + (panel * kFrequencies + f) * size;
    for (int64_t g = 0; g < groups; ++g) {
      const float* v = block.v + f * block.stride + g * kGroup * padded(p.inputs);
      const char* next = (const char*)(u + size) + g * share;
      for (int64_t j = 0; j < channels; j += 2 * kLanes) {
        float* to = m + (g * kGroup * kFrequencies + f) * kPanel + j;
        const auto kernel = channels - j > kLanes ? multiply<2> : multiply<1>;
        kernel(v, u + j, p.inputs, to, next, j == 0 ? lines : 0);
      }
    }
  }
  const auto transform = p.number == Number::kFloat ? transform_outputs<float> : transform_outputs<bfloat16>;
  for (int64_t t = 0; t < block.count; ++t)
    transform(p, place(p, block.first + t), m + t * kFrequencies * kPanel, first, channels);
}

}  // namespace

PYVSEG_KERNELS = {kGroup, transform_inputs, multiply_panel};
#else
}  // namespace pyvseg::conv3x3

#include <atomic>
#include <optional>
#include <thread>

#include "launch.h"
#include "scratch.h"

namespace pyvseg::conv3x3 {

PYVSEG_KERNEL_TABLE

namespace {

constexpr int64_t kBlockTiles = 112;       // 0.5 MiB of M
constexpr int64_t kBlockFloats = 2200000;  // 8.4 MiB of V
constexpr int64_t kBlocksAtOnce = 16;      // at most, which bounds the scratch memory
constexpr int64_t kOwnPairs = 8192;        // pairs of channels up to which the weights, V and M of kOwnTiles go with one core's caches
constexpr int64_t kOwnTiles = 28;

// One step of the work, which all threads do together. Whoever is free takes the next task, since tasks differ in length
// and cores in what else they do; nobody goes on before all are finished. Threads wait only for tasks that a running
// thread has taken, so any number of them, one after the other too, gets everything done.
struct Step {
  std::atomic<int64_t> taken{0}, finished{0};

  template <typename F>
  void share(int64_t tasks, const F& task) {
    for (int64_t i; (i = taken++) < tasks; ++finished) task(i);
    while (finished < tasks) std::this_thread::yield();
  }
};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rounds of `at_once` blocks of `size` tiles, which all threads share; or, `apart`, blocks that each belong to one of them.
struct Plan {
  bool apart;
  int64_t threads, panels, tiles, size, at_once, rounds;
  int64_t v_stride, v_floats, m_floats;  // of a frequency, a block, a thread
};

Plan make_plan(const Problem& p, int64_t batch, int64_t group) {
  const int64_t inputs = divide_up(p.inputs, kChunk) * kChunk;
  Plan plan{};
  plan.threads = torch::stable::get_num_threads();
  plan.panels = divide_up(p.outputs, kPanel);
  plan.tiles = batch * p.tile_rows * p.tile_columns;
  plan.apart = plan.panels * kPanel * inputs <= kOwnPairs && plan.tiles >= 8 * plan.threads * kOwnTiles;
  const int64_t most = plan.apart ? kOwnTiles : std::clamp(kBlockFloats / (kFrequencies * inputs), group, kBlockTiles);
  const int64_t blocks = divide_up(plan.tiles, most);
  plan.size = divide_up(divide_up(plan.tiles, blocks), group) * group;
  plan.at_once = plan.apart ? plan.threads : std::min({divide_up(2 * plan.threads, plan.panels), blocks, kBlocksAtOnce});
  plan.rounds = divide_up(plan.tiles, plan.at_once * plan.size);
  // A few lines more than needed, so that equal places of V's frequencies do not fall into one set of the caches.
  plan.v_stride = plan.size * inputs + 5 * 16;
  plan.v_floats = kFrequencies * plan.v_stride;
  plan.m_floats = plan.size * kFrequencies * kPanel + 5 * 16;
  return plan;
}

// Every task is a block from its inputs to its outputs.
void run_apart(const Problem& p, const Plan& plan, const Kernels& k, float* v, float* m) {
  Step blocks;
  parallel_for(0, plan.threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      blocks.share(divide_up(plan.tiles, plan.size), [&](int64_t task) {
        const int64_t first = task * plan.size;
        const Block block{first, std::min(plan.size, plan.tiles - first), v + thread * plan.v_floats, plan.v_stride};
        k.transform_inputs(p, block, 0, block.count);
        for (int64_t panel = 0; panel < plan.panels; ++panel) k.multiply_panel(p, block, panel, m + thread * plan.m_floats);
      });
  });
}

void run(const Problem& p, int64_t batch) {
  static thread_local Scratch scratch;
  const Kernels& k = kernels();
  const Plan plan = make_plan(p, batch, k.group);
  float* v = scratch.at_least(sizeof(float) * (plan.at_once * plan.v_floats + plan.threads * plan.m_floats));
  float* m = v + plan.at_once * plan.v_floats;
  if (plan.apart) return run_apart(p, plan, k, v, m);

  std::vector<Step> steps(2 * plan.rounds);
  const auto work = [&](int64_t thread) {
    for (int64_t round = 0; round < plan.rounds; ++round) {
      const int64_t start = round * plan.at_once * plan.size, groups = plan.size / k.group;
      const int64_t blocks = std::min(plan.at_once, divide_up(plan.tiles - start, plan.size));
      const auto block = [&](int64_t i) {
        const int64_t first = start + i * plan.size;
        return Block{first, std::min(plan.size, plan.tiles - first), v + i * plan.v_floats, plan.v_stride};
      };
      steps[2 * round].share(blocks * groups, [&](int64_t task) {
        const Block b = block(task / groups);
        const int64_t begin = task % groups * k.group;
        k.transform_inputs(p, b, begin, std::min(begin + k.group, b.count));
      });
      steps[2 * round + 1].share(blocks * plan.panels, [&](int64_t task) {
        k.multiply_panel(p, block(task / plan.panels), task % plan.panels, m + thread * plan.m_floats);
      });
    }
  };
  // One parallel region for it all: on a busy machine the end of each one waits for a thread that does not run.
  parallel_for(0, plan.threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) work(thread);
  });
}

Tensor channels_adjacent(const Tensor& t) {
  return t.stride(1) == 1 || t.size(1) <= 1 ? t : torch::stable::contiguous(t, torch::headeronly::MemoryFormat::ChannelsLast);
}

Image image(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(2), t.stride(3)}; }

// x (N, I, H, W), tiles (ceil(O / 32), 36, I, 32), bias (O), residual (N, O, H, W) -> (N, O, H, W) channels last
Tensor conv3x3(const Tensor& x, const Tensor& tiles, int64_t outputs, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& residual, bool relu_input) {
  STD_TORCH_CHECK(x.dim() == 4 && tiles.dim() == 4, "conv3x3: wrong number of dimensions");
  const int64_t N = x.size(0), I = x.size(1), H = x.size(2), W = x.size(3);
  STD_TORCH_CHECK(I > 0 && outputs > 0 && tiles.size(0) == divide_up(outputs, kPanel) && tiles.size(1) == kFrequencies &&
                      tiles.size(2) == I && tiles.size(3) == kPanel && tiles.is_contiguous(),
                  "conv3x3: tiles do not fit");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == outputs), "conv3x3: bias does not fit");
  STD_TORCH_CHECK(tiles.scalar_type() == ScalarType::Float && (!bias || bias->scalar_type() == ScalarType::Float) &&
                      (!residual || residual->scalar_type() == x.scalar_type()),
                  "conv3x3: dtypes do not fit");
  STD_TORCH_CHECK(!residual || (residual->dim() == 4 && residual->size(0) == N && residual->size(1) == outputs &&
                                residual->size(2) == H && residual->size(3) == W),
                  "conv3x3: residual does not fit");
  Tensor y = torch::stable::empty({N, outputs, H, W}, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                                  torch::headeronly::MemoryFormat::ChannelsLast);
  if (y.numel() == 0) return y;
  const Tensor input = channels_adjacent(x), added = residual ? channels_adjacent(*residual) : y;
  const Tensor offset = bias ? dense(*bias) : y;
  Problem p{};
  p.x = image(input);
  if (residual) p.residual = image(added);
  p.weight = tiles.const_data_ptr<float>();
  p.bias = bias ? offset.const_data_ptr<float>() : nullptr;
  p.y = y.mutable_data_ptr();
  p.number = is_bf16(x) ? Number::kBfloat16 : Number::kFloat;
  p.height = H, p.width = W, p.inputs = I, p.outputs = outputs;
  p.tile_rows = divide_up(H, kTile), p.tile_columns = divide_up(W, kTile);
  p.relu_input = relu_input;
  prefer_huge_pages(p.y, (is_bf16(x) ? 2 : 4) * y.numel());
  run(p, N);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvseg, m) {
  m.def("conv3x3(Tensor x, Tensor tiles, int outputs, Tensor? bias, Tensor? residual, bool relu_input) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(pyvseg, CPU, m) { m.impl("conv3x3", TORCH_BOX(&conv3x3)); }
#endif

}  // namespace pyvseg::conv3x3
