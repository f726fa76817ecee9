// SPDX-License-Identifier: Apache-2.0
// Scores of embeddings against a memory of tracks, softmax in both directions at once, and the greedy assignment
// (see pyvseg/ops/memory_match.py).
#include "../isa.h"
#include "number.h"
#include "vec.h"

namespace pyvseg::memory_match {

struct Match {
  const void *embeddings, *memory;  // (N, C), (M, C), contiguous, of one problem
  int64_t N, M, C;
  const int64_t *labels, *memory_labels;  // (N), (M), or null
  float* scores;   // (N, M)
  float* by_row;   // (N, M): softmax over the memory
  Number number;
};

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
  void (*rows)(const Match&, int64_t begin, int64_t end);     // products into `scores`, their softmax into `by_row`
  void (*columns)(const Match&, int64_t begin, int64_t end);  // blocks of kColumns: softmax over the embeddings, the result
  void (*greedy)(const Greedy&);
};

constexpr int64_t kColumns = 64;

#ifdef PYVSEG_ISA
namespace {

constexpr int kTile = kLanes == 4 ? 2 : 4;  // rows of the memory that share one reading of an embedding

// out[j] = embedding . rows[j], j < T
template <int T, typename From>
PYVSEG_INLINE void dots(const From* embedding, const From* rows, int64_t C, float* out) {
  vfloat total[T];
#pragma GCC unroll 4
  for (int j = 0; j < T; ++j) total[j] = vfloat{};
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes) {
    const vfloat e = load(embedding + c);
#pragma GCC unroll 4
    for (int j = 0; j < T; ++j) total[j] += e * load(rows + j * C + c);
  }
#pragma GCC unroll 4
  for (int j = 0; j < T; ++j) out[j] = sum(total[j]);
  for (; c < C; ++c)
    for (int j = 0; j < T; ++j) out[j] += load1(embedding + c) * load1(rows + j * C + c);
}

PYVSEG_INLINE vfloat maximum(vfloat a, vfloat b) { return a > b ? a : b; }

// Exponentials of x - max, of which the largest is exactly 1; returns their sum.
PYVSEG_INLINE float softmax_terms(const float* x, int64_t n, float* out) {
  float highest = -__builtin_inff();
  for (int64_t i = 0; i < n; ++i) highest = x[i] > highest ? x[i] : highest;
  vfloat total{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const vfloat term = exp_nonpositive(load(x + i) - highest);
    store(out + i, term);
    total += term;
  }
  float rest = 0;
  for (; i < n; ++i) rest += out[i] = exp_nonpositive(splat(x[i] - highest))[0];
  return sum(total) + rest;
}

template <typename T>
void rows_of(const Match& m, int64_t begin, int64_t end) {
  const T *embeddings = (const T*)m.embeddings, *memory = (const T*)m.memory;
  for (int64_t i = begin; i < end; ++i) {
    float *scores = m.scores + i * m.M, *by_row = m.by_row + i * m.M;
    int64_t j = 0;
    for (; j + kTile <= m.M; j += kTile) dots<kTile>(embeddings + i * m.C, memory + j * m.C, m.C, scores + j);
    for (; j < m.M; ++j) dots<1>(embeddings + i * m.C, memory + j * m.C, m.C, scores + j);
    const float total = softmax_terms(scores, m.M, by_row);
    for (j = 0; j < m.M; ++j) by_row[j] /= total;
  }
}
void rows(const Match& m, int64_t begin, int64_t end) {
  if (m.number == Number::kFloat) rows_of<float>(m, begin, end);
  if (m.number == Number::kBfloat16) rows_of<bfloat16>(m, begin, end);
  if (m.number == Number::kHalf) rows_of<float16>(m, begin, end);
}

// kLanes columns from `column`, or the last n of them.
PYVSEG_INLINE void column_softmax(const Match& m, int64_t column, int64_t n) {
  const auto read = [&](const float* p) {
    if (n == kLanes) return load(p);
    float part[kLanes] = {};
    for (int64_t l = 0; l < n; ++l) part[l] = p[l];
    return load(part);
  };
  const auto write = [&](float* p, vfloat v) {
    if (n == kLanes) return store(p, v);
    for (int64_t l = 0; l < n; ++l) p[l] = v[l];
  };
  vfloat highest = splat(-__builtin_inff()), total{};
  for (int64_t i = 0; i < m.N; ++i) highest = maximum(read(m.scores + i * m.M + column), highest);
  for (int64_t i = 0; i < m.N; ++i) {
    float* score = m.scores + i * m.M + column;
    const vfloat term = exp_nonpositive(read(score) - highest);
    write(score, term);
    total += term;
  }
  for (int64_t i = 0; i < m.N; ++i) {
    float* score = m.scores + i * m.M + column;
    write(score, (read(m.by_row + i * m.M + column) + read(score) / total) * 0.5f);
    for (int64_t l = 0; m.labels && l < n; ++l) score[l] *= m.labels[i] == m.memory_labels[column + l] ? 1.0f : 0.0f;
  }
}
void columns(const Match& m, int64_t begin, int64_t end) {
  const int64_t stop = end * kColumns < m.M ? end * kColumns : m.M;
  int64_t column = begin * kColumns;
  for (; column + kLanes <= stop; column += kLanes) column_softmax(m, column, kLanes);
  if (column < stop) column_softmax(m, column, stop - column);
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

PYVSEG_KERNELS = {rows, columns, greedy};
#else
}  // namespace pyvseg::memory_match

#include <optional>

#include "launch.h"

namespace pyvseg::memory_match {

PYVSEG_KERNEL_TABLE

namespace {

const char* at(const Tensor& t, int64_t elements) {
  return static_cast<const char*>(t.const_data_ptr()) + elements * bytes_of(number_of(t));
}

// embeddings (B, N, C) and memory (B, M, C) of one dtype; labels (B, N) and (B, M) int64, or neither -> (B, N, M) float32
Tensor memory_match(const Tensor& embeddings, const Tensor& memory, const std::optional<Tensor>& labels,
                    const std::optional<Tensor>& memory_labels) {
  STD_TORCH_CHECK(embeddings.dim() == 3 && memory.dim() == 3 && embeddings.size(2) == memory.size(2) && embeddings.size(0) == memory.size(0),
                  "memory_match: need (B, N, C) and (B, M, C)");
  const Tensor e = torch::stable::contiguous(embeddings), m = torch::stable::contiguous(memory);
  const int64_t B = e.size(0), N = e.size(1), M = m.size(1), C = e.size(2);
  Tensor scores = torch::stable::new_empty(e, {B, N, M}, ScalarType::Float);
  const Number number = number_of(e);
  STD_TORCH_CHECK(number == number_of(m) && labels.has_value() == memory_labels.has_value(), "memory_match: dtypes or labels differ");
  Tensor own, theirs;
  if (labels.has_value()) {
    own = torch::stable::contiguous(*labels);
    theirs = torch::stable::contiguous(*memory_labels);
    STD_TORCH_CHECK(own.numel() == B * N && theirs.numel() == B * M, "memory_match: labels do not fit");
  }
  std::vector<float> by_row(N * M);
  const Kernels& kernel = kernels();
  for (int64_t b = 0; b < B; ++b) {
    const Match match{at(e, b * N * C), at(m, b * M * C), N, M, C,
                      labels.has_value() ? own.const_data_ptr<int64_t>() + b * N : nullptr,
                      labels.has_value() ? theirs.const_data_ptr<int64_t>() + b * M : nullptr,
                      scores.mutable_data_ptr<float>() + b * N * M, by_row.data(), number};
    parallel_for(0, N, std::max<int64_t>(1, 400000 / (M * C + 1)), [&](int64_t begin, int64_t end) { kernel.rows(match, begin, end); });
    parallel_for(0, (M + kColumns - 1) / kColumns, std::max<int64_t>(1, 20000 / (N * kColumns + 1)),
                 [&](int64_t begin, int64_t end) { kernel.columns(match, begin, end); });
  }
  return scores;
}

// scores (B, N, M) float32; weights (B, M) float32 or none; claims (B, N, M) bool or none -> (B, N) int64, -1 without a match
Tensor greedy_assignment(const Tensor& scores, double threshold, const std::optional<Tensor>& weights, const std::optional<Tensor>& claims) {
  STD_TORCH_CHECK(scores.dim() == 3 && scores.scalar_type() == ScalarType::Float, "greedy_assignment: scores must be (B, N, M) float32");
  const Tensor s = torch::stable::contiguous(scores);
  const int64_t B = s.size(0), N = s.size(1), M = s.size(2);
  Tensor w, c;
  if (weights.has_value()) w = torch::stable::contiguous(*weights);
  if (claims.has_value()) c = torch::stable::contiguous(*claims);
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
