// SPDX-License-Identifier: Apache-2.0
// Scores of embeddings against a memory of tracks, softmax in both directions at once, and the greedy assignment
// (see pyvseg/ops/memory_match.py).
#include "../isa.h"
#include "number.h"
#include "vec.h"

namespace pyvseg::memory_match {

struct Match {
  const void *embeddings, *memory;  // (N, C), (M, C) of one problem
  int64_t N, M, C;
  int64_t e_row, e_channel, m_row, m_channel;  // strides of both in elements
  const int64_t *labels, *memory_labels;  // (N), (M), or null
  float* scores;            // (N, M), the result
  float *products, *by_row; // (N, stride): of embeddings and memory, their softmax over the memory
  int64_t stride;           // M rounded up to kMostLanes; what stands behind M counts for nothing
  float* panels;  // the memory as floats, transposed: blocks of kLanes tracks, (blocks, C, kLanes), zeros past the last
  Number number;
};
constexpr int64_t kMostLanes = 16;  // so many at most

struct Greedy {
  const float* scores;   // (N, M) of one problem
  const float* weights;  // (M) or null
  const bool* claims;    // (N, M) or null
  int64_t N, M;
  float threshold;
  bool* taken;           // (M), false at first
  int64_t* match;        // (N)
};

struct Kernels {
  void (*panels)(const Match&, int64_t begin, int64_t end);   // rows of the memory, kMostLanes at a time
  void (*rows)(const Match&, int64_t begin, int64_t end);     // groups of kRows: the products and their softmax
  void (*columns)(const Match&, int64_t begin, int64_t end);  // blocks of kColumns: softmax over the embeddings, the result
  void (*greedy)(const Greedy&);
};

constexpr int64_t kColumns = 64, kRows = 4;

#ifdef PYVSEG_ISA
namespace {

constexpr int64_t kChannels = 32;  // summed one after the other; longer chains would lose digits
#if defined(__AVX512F__)
constexpr int kTile = 4;  // panels that share one reading of the embeddings
#else
constexpr int kTile = 2;
#endif

template <typename T>
void panel_of(const Match& m, int64_t block) {
  const T* from = (const T*)m.memory + block * kLanes * m.m_row;
  const int64_t count = m.M - block * kLanes < kLanes ? m.M - block * kLanes : kLanes;
  float* to = m.panels + block * kLanes * m.C;
  int64_t c = 0;
  for (; m.m_row == 1 && c < m.C; ++c) store(to + c * kLanes, load_some(from + c * m.m_channel, count));
  for (; m.m_channel == 1 && count == kLanes && c + kLanes <= m.C; c += kLanes) {
    vuint square[kLanes];
    for (int j = 0; j < kLanes; ++j) square[j] = (vuint)load(from + j * m.m_row + c);
    transpose(square);
    for (int i = 0; i < kLanes; ++i) store(to + (c + i) * kLanes, (vfloat)square[i]);
  }
  for (; c < m.C; ++c)
    for (int64_t j = 0; j < kLanes; ++j) to[c * kLanes + j] = j < count ? load1(from + j * m.m_row + c * m.m_channel) : 0.0f;
}
void panels(const Match& m, int64_t begin, int64_t end) {
  const int64_t stop = end * kMostLanes < m.M ? end * kMostLanes : m.M;
  for (int64_t block = begin * (kMostLanes / kLanes); block * kLanes < stop; ++block) {
    if (m.number == Number::kFloat) panel_of<float>(m, block);
    if (m.number == Number::kBfloat16) panel_of<bfloat16>(m, block);
    if (m.number == Number::kHalf) panel_of<float16>(m, block);
  }
}

// R embeddings against V panels of tracks, over the channels from `first` to `end`, added to what earlier ones gave.
template <int R, int V, typename T>
PYVSEG_INLINE void tile(const Match& m, const T* embeddings, int64_t row, int64_t block, int64_t first, int64_t end) {
  vfloat total[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) total[r][v] = vfloat{};
  const float* panel = m.panels + block * kLanes * m.C;
  for (int64_t c = first; c < end; ++c) {
    vfloat tracks[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) tracks[v] = load(panel + (v * m.C + c) * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const vfloat e = splat(load1(embeddings + r * m.e_row + c * m.e_channel));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) total[r][v] += e * tracks[v];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* to = m.products + (row + r) * m.stride + (block + v) * kLanes;
      store(to, first ? load(to) + total[r][v] : total[r][v]);
    }
}
template <int R, typename T>
void products(const Match& m, int64_t row) {
  const T* embeddings = (const T*)m.embeddings + row * m.e_row;
  const int64_t blocks = (m.M + kLanes - 1) / kLanes;
  for (int64_t first = 0; first == 0 || first < m.C; first += kChannels) {
    const int64_t end = first + kChannels < m.C ? first + kChannels : m.C;
    int64_t block = 0;
    for (; block + kTile <= blocks; block += kTile) tile<R, kTile>(m, embeddings, row, block, first, end);
    for (; block < blocks; ++block) tile<R, 1>(m, embeddings, row, block, first, end);
  }
}

PYVSEG_INLINE vfloat maximum(vfloat a, vfloat b) { return a > b ? a : b; }

// The first n < kLanes lanes, minus infinity in the others.
PYVSEG_INLINE vfloat first_lanes(vfloat v, int64_t n) {
  return lane_index() < int32_t(n) ? v : splat(-__builtin_inff());
}

// n numbers; x and out have room up to a whole vector.
PYVSEG_INLINE void softmax(float* x, int64_t n, float* out) {
  const int64_t whole = n / kLanes * kLanes, end = (n + kLanes - 1) / kLanes * kLanes;
  if (whole < n) store(x + whole, first_lanes(load(x + whole), n - whole));
  vfloat highest = splat(-__builtin_inff()), total{};
  for (int64_t i = 0; i < end; i += kLanes) highest = maximum(load(x + i), highest);
  float most = highest[0];
  for (int i = 1; i < kLanes; ++i) most = highest[i] > most ? highest[i] : most;
  for (int64_t i = 0; i < end; i += kLanes) {
    const vfloat term = exp_nonpositive(load(x + i) - most);
    store(out + i, term);
    total += term;
  }
  const float share = 1.0f / sum(total);
  for (int64_t i = 0; i < end; i += kLanes) store(out + i, load(out + i) * share);
}

template <typename T>
void rows_of(const Match& m, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kRows) {
    const int64_t count = end - i < kRows ? end - i : kRows;
    if (count == kRows)
      products<kRows, T>(m, i);
    else
      for (int64_t r = 0; r < count; ++r) products<1, T>(m, i + r);
    for (int64_t r = i; r < i + count; ++r) softmax(m.products + r * m.stride, m.M, m.by_row + r * m.stride);
  }
}
void rows(const Match& m, int64_t begin, int64_t end) {
  begin *= kRows;
  end = end * kRows < m.N ? end * kRows : m.N;
  if (m.number == Number::kFloat) rows_of<float>(m, begin, end);
  if (m.number == Number::kBfloat16) rows_of<bfloat16>(m, begin, end);
  if (m.number == Number::kHalf) rows_of<float16>(m, begin, end);
}

// kLanes columns from `column`, of which the first n are there.
PYVSEG_INLINE void column_softmax(const Match& m, int64_t column, int64_t n) {
  float *product = m.products + column, *score = m.scores + column;
  const float* by_row = m.by_row + column;
  vfloat highest = splat(-__builtin_inff()), total{};
  for (int64_t i = 0; i < m.N; ++i) highest = maximum(load(product + i * m.stride), highest);
  for (int64_t i = 0; i < m.N; ++i) {
    const vfloat term = exp_nonpositive(load(product + i * m.stride) - highest);
    store(product + i * m.stride, term);
    total += term;
  }
  const vfloat share = 1.0f / total;
  for (int64_t i = 0; i < m.N; ++i, score += m.M) {
    const vfloat both = (load(by_row + i * m.stride) + load(product + i * m.stride) * share) * 0.5f;
    if (n == kLanes)
      store(score, both);
    else
      __builtin_memcpy(score, &both, n * sizeof(float));
    for (int64_t l = 0; m.labels && l < n; ++l) score[l] *= m.labels[i] == m.memory_labels[column + l] ? 1.0f : 0.0f;
  }
}
void columns(const Match& m, int64_t begin, int64_t end) {
  const int64_t stop = end * kColumns < m.M ? end * kColumns : m.M;
  for (int64_t column = begin * kColumns; column < stop; column += kLanes)
    column_softmax(m, column, stop - column < kLanes ? stop - column : kLanes);
}

void greedy(const Greedy& g) {
  for (int64_t i = 0; i < g.N; ++i) {
    const float* row = g.scores + i * g.M;
    int64_t best = -1;
    float most = 0;
    for (int64_t j = 0; j < g.M; ++j) {
      if (g.taken[j] || !(row[j] > g.threshold)) continue;
      const float score = g.weights ? row[j] * g.weights[j] : row[j];
      if (best < 0 || score > most) {
        best = j;
        most = score;
      }
    }
    g.match[i] = best;
    if (best >= 0 && (!g.claims || g.claims[i * g.M + best])) g.taken[best] = true;
  }
}

}  // namespace

PYVSEG_KERNELS = {panels, rows, columns, greedy};
#else
}  // namespace pyvseg::memory_match

#include "launch.h"

namespace pyvseg::memory_match {

PYVSEG_KERNEL_TABLE

namespace {

const char* at(const Tensor& t, int64_t elements) {
  return static_cast<const char*>(t.const_data_ptr()) + elements * bytes_of(number_of(t));
}

// One problem is read with any strides.
Tensor readable(const Tensor& t) { return t.dim() == 2 ? t : dense(t); }

// embeddings (*B, N, C) and memory (*B, M, C) of one dtype; labels (*B, N) and (*B, M) int64, or neither -> (*B, N, M) float32
Tensor memory_match(const Tensor& embeddings, const Tensor& memory, const std::optional<Tensor>& labels,
                    const std::optional<Tensor>& memory_labels) {
  const int64_t dims = embeddings.dim();
  bool fit = dims >= 2 && memory.dim() == dims && embeddings.size(-1) == memory.size(-1);
  int64_t B = 1;
  for (int64_t d = 0; fit && d < dims - 2; B *= embeddings.size(d++)) fit = embeddings.size(d) == memory.size(d);
  STD_TORCH_CHECK(fit, "memory_match: need (*B, N, C) and (*B, M, C)");
  const Tensor e = readable(embeddings), m = readable(memory);
  const int64_t N = e.size(-2), M = m.size(-2), C = e.size(-1);
  std::vector<int64_t> shape(e.sizes().begin(), e.sizes().end());
  shape.back() = M;
  Tensor scores = torch::stable::new_empty(e, shape, ScalarType::Float);
  const Number number = number_of(e);
  STD_TORCH_CHECK(number == number_of(m) && labels.has_value() == memory_labels.has_value(), "memory_match: dtypes or labels differ");
  Tensor own, theirs;
  if (labels.has_value()) {
    own = dense(*labels);
    theirs = dense(*memory_labels);
    STD_TORCH_CHECK(own.numel() == B * N && theirs.numel() == B * M, "memory_match: labels do not fit");
  }
  const int64_t blocks = (M + kMostLanes - 1) / kMostLanes;
  const int64_t stride = blocks * kMostLanes, rows = 2 * N * stride;
  const std::unique_ptr<float[]> room(new float[rows + stride * C + 16]);
  float* aligned = room.get() + (-reinterpret_cast<uintptr_t>(room.get()) % 64) / sizeof(float);  // vectors within cache lines
  const Kernels& kernel = kernels();
  for (int64_t b = 0; b < B; ++b) {
    const Match match{at(e, b * N * C), at(m, b * M * C), N, M, C, e.stride(-2), e.stride(-1), m.stride(-2), m.stride(-1),
                      labels.has_value() ? own.const_data_ptr<int64_t>() + b * N : nullptr,
                      labels.has_value() ? theirs.const_data_ptr<int64_t>() + b * M : nullptr,
                      scores.mutable_data_ptr<float>() + b * N * M, aligned, aligned + N * stride, stride, aligned + rows, number};
    parallel_for(0, blocks, std::max<int64_t>(1, 40000 / (kMostLanes * C + 1)), [&](int64_t begin, int64_t end) { kernel.panels(match, begin, end); });
    parallel_for(0, (N + kRows - 1) / kRows, std::max<int64_t>(1, 400000 / (kRows * M * (C + 50) + 1)),
                 [&](int64_t begin, int64_t end) { kernel.rows(match, begin, end); });
    parallel_for(0, (M + kColumns - 1) / kColumns, std::max<int64_t>(1, 20000 / (N * kColumns + 1)),
                 [&](int64_t begin, int64_t end) { kernel.columns(match, begin, end); });
  }
  return scores;
}

// scores (B, N, M) float32; weights (B, M) float32 or none; claims (B, N, M) bool or none -> (B, N) int64, -1 without a match
Tensor greedy_assignment(const Tensor& scores, double threshold, const std::optional<Tensor>& weights, const std::optional<Tensor>& claims) {
  STD_TORCH_CHECK(scores.dim() == 3 && scores.scalar_type() == ScalarType::Float, "greedy_assignment: scores must be (B, N, M) float32");
  const Tensor s = dense(scores);
  const int64_t B = s.size(0), N = s.size(1), M = s.size(2);
  Tensor w, c;
  if (weights.has_value()) w = dense(*weights);
  if (claims.has_value()) c = dense(*claims);
  STD_TORCH_CHECK((!weights.has_value() || w.numel() == B * M) && (!claims.has_value() || c.numel() == s.numel()),
                  "greedy_assignment: weights or claims do not fit");
  Tensor match = torch::stable::new_empty(s, {B, N}, ScalarType::Long);
  const Kernels& kernel = kernels();
  for (int64_t b = 0; b < B; ++b) {
    const std::unique_ptr<bool[]> taken(new bool[M]());
    kernel.greedy({s.const_data_ptr<float>() + b * N * M, weights.has_value() ? w.const_data_ptr<float>() + b * M : nullptr,
                   claims.has_value() ? c.const_data_ptr<bool>() + b * N * M : nullptr, N, M, float(threshold), taken.get(),
                   match.mutable_data_ptr<int64_t>() + b * N});
  }
  return match;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvseg, m) {
  m.def("memory_match(Tensor embeddings, Tensor memory, Tensor? labels, Tensor? memory_labels) -> Tensor");
  m.def("greedy_assignment(Tensor scores, float threshold, Tensor? weights, Tensor? claims) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(pyvseg, CPU, m) {
  m.impl("memory_match", TORCH_BOX(&memory_match));
  m.impl("greedy_assignment", TORCH_BOX(&greedy_assignment));
}
#endif

}  // namespace pyvseg::memory_match
