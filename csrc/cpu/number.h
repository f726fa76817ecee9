// SPDX-License-Identifier: Apache-2.0
// Number types, known to launcher and kernel parts alike.
#pragma once
#include <cstdint>

namespace pyvseg {

// What a kernel reads and writes; it accumulates in float32 whatever this is.
enum class Number : int32_t { kFloat, kBfloat16, kHalf };

constexpr int64_t bytes_of(Number number) { return number == Number::kFloat ? 4 : 2; }

}  // namespace pyvseg
