// SPDX-License-Identifier: Apache-2.0
// What launcher parts share. Kernel parts must not include it.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "number.h"

namespace pyvseg {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

inline bool is_bf16(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, "pyvseg: need float32 or bfloat16");
  return type == ScalarType::BFloat16;
}

inline Number number_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "pyvseg: need float32, bfloat16 or float16");
  return type == ScalarType::Float ? Number::kFloat : type == ScalarType::BFloat16 ? Number::kBfloat16 : Number::kHalf;
}

// Tasks that are worth waking a thread for, where each goes through so many numbers or multiplies ten times as many.
inline int64_t grain_of(int64_t each) { return 8192 / (each + 1) + 1; }

// Asked first: the dispatcher takes longer to find nothing to do.
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Kernels take any strides but want the last dimension contiguous.
inline Tensor rows_contiguous(const Tensor& t) {
  return t.stride(-1) == 1 || t.size(-1) <= 1 ? t : torch::stable::contiguous(t);
}

}  // namespace pyvseg
