// SPDX-License-Identifier: Apache-2.0
// Gradient of the sums of mask_cost.cpp with respect to the logits: two products with the targets, kept in registers, and
// sigmoid and its derivative in the same pass.
#include "../isa.h"
#include "mask_cost.h"

namespace pyvseg::mask_cost_backward {

using mask_cost::Element;
using mask_cost::kChunk;
using mask_cost::kStride;
using mask_cost::Rows;

struct Backward {
  Rows logits, targets;
  const float *overlap, *entropy;  // gradients (N, M)
  const float *prob, *total;       // (N): gradient of the sum of sigmoids; `entropy` summed over the targets
  int64_t begin, end, pixels;      // slice of the pixels, and all of them
  void* grad;                      // (N, pixels), in the logits' dtype
  float* scratch;                  // M * kStride
};

struct Kernels {
  void (*backward)(const Backward&);
};

#ifdef PYVSEG_ISA
namespace {

using namespace mask_cost;

#if defined(__AVX512F__)
constexpr int kTileRows = 4, kTileVectors = 3;
#else
constexpr int kTileRows = 2, kTileVectors = 2;
#endif

// s (1 - s) (overlap + prob) + total s - entropy, s the sigmoid of x
PYVSEG_INLINE vfloat gradient(vfloat x, vfloat overlap, vfloat entropy, float prob, float total) {
  const vfloat e = exp_minus_size(x), inverse = 1.0f / (1.0f + e);
  const vfloat sigmoid = x < 0.0f ? e * inverse : inverse;
  return e * inverse * inverse * (overlap + prob) + (total * sigmoid - entropy);
}

// R rows from `row` and V vectors of pixels from `at`; n < kLanes pixels where that is not 0. Targets point at those pixels.
template <int R, int V, typename T>
PYVSEG_INLINE void tile(const Backward& b, int64_t row, int64_t at, const float* targets, int64_t n = 0) {
  vfloat o[R][V], e[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) o[r][v] = e[r][v] = vfloat{};
  const int64_t M = b.targets.count;
  const float *overlap = b.overlap + row * M, *entropy = b.entropy + row * M;
  for (int64_t m = 0; m < M; ++m) {
    vfloat t[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) t[v] = load(targets + m * kStride + v * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        o[r][v] += overlap[r * M + m] * t[v];
        e[r][v] += entropy[r * M + m] * t[v];
      }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const T* from = (const T*)b.logits.data + (row + r) * b.logits.stride + at;
    T* to = (T*)b.grad + (row + r) * b.pixels + at;
    const float prob = b.prob[row + r], total = b.total[row + r];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      if (V == 1 && n)
        store_part(to, gradient(load_part(from, n), o[r][v], e[r][v], prob, total), n);
      else
        store(to + v * kLanes, gradient(load(from + v * kLanes), o[r][v], e[r][v], prob, total));
    }
  }
}

template <int R, typename T>
void rows(const Backward& b, int64_t row, int64_t begin, int64_t n) {
  int64_t i = 0;
  for (; i + kTileVectors * kLanes <= n; i += kTileVectors * kLanes)
    tile<R, kTileVectors, T>(b, row, begin + i, b.scratch + i);
  for (; i + kLanes <= n; i += kLanes) tile<R, 1, T>(b, row, begin + i, b.scratch + i);
  if (i < n) tile<R, 1, T>(b, row, begin + i, b.scratch + i, n - i);
}

template <typename T>
void chunks(const Backward& b) {
  for (int64_t begin = b.begin; begin < b.end; begin += kChunk) {
    const int64_t n = b.end - begin < kChunk ? b.end - begin : kChunk;
    for (int64_t m = 0; m < b.targets.count; ++m) widen_row(b.targets, m, begin, n, b.scratch + m * kStride);
    int64_t row = 0;
    for (; row + kTileRows <= b.logits.count; row += kTileRows) rows<kTileRows, T>(b, row, begin, n);
    for (; row < b.logits.count; ++row) rows<1, T>(b, row, begin, n);
  }
}

void backward(const Backward& b) {
  if (b.logits.element == Element::kFloat) chunks<float>(b);
  if (b.logits.element == Element::kBfloat16) chunks<bfloat16>(b);
  if (b.logits.element == Element::kHalf) chunks<float16>(b);
}

}  // namespace

PYVSEG_KERNELS = {backward};
#else

PYVSEG_KERNEL_TABLE

namespace {

using mask_cost::rows_of;

// Gradients of the four sums' first three, float32 -> gradient of the logits (N, P) in their dtype.
Tensor mask_cost_backward(const Tensor& overlap, const Tensor& entropy, const Tensor& prob, const Tensor& logits, const Tensor& targets) {
  STD_TORCH_CHECK(logits.dim() == 2 && targets.dim() == 2 && logits.size(1) == targets.size(1),
                  "mask_cost_backward: need (N, P) and (M, P)");
  number_of(logits);  // not bytes, as targets may be
  const Tensor x = rows_contiguous(logits), t = rows_contiguous(targets);
  const Tensor go = dense(overlap), ge = dense(entropy), gp = dense(prob);
  const int64_t N = x.size(0), M = t.size(0), P = x.size(1);
  STD_TORCH_CHECK(go.numel() == N * M && ge.numel() == N * M && gp.numel() == N, "mask_cost_backward: gradients do not fit the masks");
  std::vector<float> total(N);
  const float* entropies = ge.const_data_ptr<float>();
  for (int64_t n = 0; n < N; ++n)
    for (int64_t m = 0; m < M; ++m) total[n] += entropies[n * M + m];
  Tensor grad = torch::stable::new_empty(logits, {N, P});
  const Rows logit_rows = rows_of(x), target_rows = rows_of(t);
  const Kernels& kernel = kernels();
  parallel_for(0, (P + kChunk - 1) / kChunk, grain_of(N * kChunk), [&](int64_t begin, int64_t end) {
    mask_cost::Scratch scratch(M * kStride);
    kernel.backward({logit_rows, target_rows, go.const_data_ptr<float>(), entropies, gp.const_data_ptr<float>(), total.data(),
                     begin * kChunk, std::min(P, end * kChunk), P, grad.mutable_data_ptr(), scratch.data()});
  });
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvseg, m) {
  m.def("mask_cost_backward(Tensor overlap, Tensor entropy, Tensor prob, Tensor logits, Tensor targets) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(pyvseg, CPU, m) { m.impl("mask_cost_backward", TORCH_BOX(&mask_cost_backward)); }
#endif

}  // namespace pyvseg::mask_cost_backward
