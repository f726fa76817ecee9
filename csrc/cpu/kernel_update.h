// SPDX-License-Identifier: Apache-2.0
// What the gated update of kernels and its gradient share.
#pragma once
#include "product.h"

namespace pyvseg {

// The parts of a row of `state`, C floats each: halves of the linears of the pooled features and of the kernels, the two
// gates before their norms, and the last linear.
enum Part { kPooledIn, kPooledOut, kKernelIn, kKernelOut, kInputGate, kUpdateGate, kLast, kParts };
// The order of the parameters, weight before bias: linears, then norms.
enum Linear { kDynamicLayer, kInputLayer, kInputGateLayer, kUpdateGateLayer, kFcLayer, kLinears };
enum Norm { kNormIn, kNormOut, kInputNormIn, kInputNormOut, kFcNorm, kNorms };
constexpr int kParameters = 2 * (kLinears + kNorms);

struct Update {
  int64_t rows, C;
  float* state;              // (rows, kParts, C)
  const void* gain[kNorms];  // (C) weight of a norm
  const void* bias[kNorms];
  Number number;             // of gain and bias
  float eps;
};

#ifdef PYVSEG_ISA
namespace {

constexpr Part kGated[] = {kUpdateGate, kPooledOut, kInputGate, kKernelOut};  // in the order of their norms

PYVSEG_INLINE vfloat sigmoid(vfloat x) {
  const vfloat e = exp_nonpositive(x < 0 ? x : -x);
  return (x < 0 ? e : splat(1.0f)) / (1.0f + e);
}

struct Moments {
  float mean, scale;  // scale: one over the standard deviation
};
Moments moments(const float* row, int64_t C, float eps) {
  vfloat total{};
  for (int64_t c = 0; c < C; c += kLanes) total += load_some(row + c, C - c);
  const float mean = sum(total) / C;
  vfloat squares{};
  for (int64_t c = 0; c < C; c += kLanes) {
    const vfloat d = load_some(row + c, C - c) - mean;
    squares += d * d * (lane_index() < splat(int32_t(C - c)) ? splat(1.0f) : vfloat{});
  }
  return {mean, 1.0f / __builtin_sqrtf(sum(squares) / C + eps)};
}

template <typename T>
PYVSEG_INLINE vfloat normed(const Update& u, Norm norm, vfloat x, Moments m, int64_t c) {
  return (x - m.mean) * m.scale * load_some((const T*)u.gain[norm] + c, u.C - c) + load_some((const T*)u.bias[norm] + c, u.C - c);
}

// The gated sum, from the four normed parts in the order of their norms.
PYVSEG_INLINE vfloat mix(const vfloat* normed) {
  return sigmoid(normed[kNormIn]) * normed[kNormOut] + sigmoid(normed[kInputNormIn]) * normed[kInputNormOut];
}

}  // namespace
#else

inline void check(const Tensor& pooled, const Tensor& kernels, const std::vector<Tensor>& parameters) {
  STD_TORCH_CHECK(pooled.dim() == 2 && kernels.dim() == 2 && pooled.size(0) == kernels.size(0) && pooled.size(1) == kernels.size(1),
                  "kernel_update: pooled and kernels must have one shape (R, C)");
  STD_TORCH_CHECK(pooled.scalar_type() == ScalarType::Float, "kernel_update: pooled must be float32");
  STD_TORCH_CHECK(parameters.size() == kParameters, "kernel_update: wrong number of parameters");
  const int64_t C = kernels.size(1);
  for (int i = 0; i < kParameters; ++i) {
    const Tensor& p = parameters[i];
    const int64_t outputs = i < 4 ? 2 * C : C;
    const bool weight = i < 2 * kLinears && i % 2 == 0;
    STD_TORCH_CHECK(p.dim() == (weight ? 2 : 1) && p.size(0) == outputs && (!weight || p.size(1) == C) &&
                        p.scalar_type() == parameters[0].scalar_type(),
                    "kernel_update: a parameter has the wrong shape or dtype");
  }
}

// Twenty parameters: asking first is quicker than a call that returns the same tensor.
inline std::vector<Tensor> dense(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> result;
  for (const Tensor& t : tensors) result.push_back(dense(t));
  return result;
}

inline Tensor as_float(const Tensor& t) { return torch::stable::to(dense(t), ScalarType::Float); }

inline Update update_of(int64_t rows, int64_t C, float* state, const std::vector<Tensor>& parameters, double eps) {
  Update u{rows, C, state, {}, {}, number_of(parameters[0]), float(eps)};
  for (int i = 0; i < kNorms; ++i) {
    u.gain[i] = parameters[2 * (kLinears + i)].const_data_ptr();
    u.bias[i] = parameters[2 * (kLinears + i) + 1].const_data_ptr();
  }
  return u;
}
#endif

}  // namespace pyvseg
