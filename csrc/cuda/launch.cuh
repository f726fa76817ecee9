// SPDX-License-Identifier: Apache-2.0
// What CUDA files share: launching on torch's stream, registration, number types and wide memory accesses.
//
//   template <typename T> __global__ void scale(const T* from, T* to, float factor, int64_t n) { ... }
//   Tensor scale(const Tensor& x, double factor) {
//     const OnDeviceOf device(x);
//     Tensor out = torch::stable::empty_like(x);
//     for_number(x, [&](auto number) {
//       using T = decltype(number);
//       launch(scale<T>, blocks(x.numel(), 256), 256, 0, data<T>(x), data<T>(out), float(factor), x.numel());
//     });
//     return out;
//   }
//   PYVSEG_CUDA_IMPL(m) { m.impl("scale", TORCH_BOX(&scale)); }
//
// Kernels keep to plain CUDA C++: what stands under PYVSEG_EMULATE runs them on the CPU (tests/cuda/emulate.h).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <vector>

#ifdef PYVSEG_EMULATE
#include "emulate.h"
#endif

namespace pyvseg {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using bfloat16 = __nv_bfloat16;
using float16 = __half;

constexpr unsigned kWarp = 32, kFullWarp = 0xffffffffu;

#ifdef PYVSEG_EMULATE
#define PYVSEG_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(pyvseg_emulated, CPU, m)
struct OnDeviceOf {
  explicit OnDeviceOf(const Tensor&) {}
};
template <typename T>
T* shared_memory() {
  return static_cast<T*>(emulate::shared_memory());
}
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Arguments... arguments) {
  emulate::run(grid, block, shared_bytes, [&] { kernel(static_cast<Parameters>(arguments)...); });
}
#else
#define PYVSEG_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(pyvseg, CUDA, m)

// Makes the tensor's GPU the current one until the end of the scope; the first line of every op.
struct OnDeviceOf {
  explicit OnDeviceOf(const Tensor& t) : guard(t.get_device_index()) {}
  torch::stable::accelerator::DeviceGuard guard;
};

// The dynamic shared memory of the block, aligned to 16 bytes.
template <typename T>
__device__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char pyvseg_shared_memory[];
  return reinterpret_cast<T*>(pyvseg_shared_memory);
}

inline void check_cuda(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "pyvseg: CUDA kernel launch failed: ", cudaGetErrorString(error));
}

// Starts the kernel on torch's current stream of the current device; nothing for an empty grid.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Arguments... arguments) {
  if (!grid.x || !grid.y || !grid.z) return;
  void* stream = nullptr;
  const auto device = torch::stable::accelerator::getCurrentDeviceIndex();
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  if (shared_bytes > 48 << 10)
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(static_cast<Parameters>(arguments)...);
  check_cuda(cudaGetLastError());
}
#endif

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks of `each` that cover `work`: the x of a grid.
inline unsigned blocks(int64_t work, int64_t each) {
  const int64_t n = ceil_div(work, each);
  STD_TORCH_CHECK(n >= 0 && n <= INT32_MAX, "pyvseg: input too large for one kernel launch");
  return unsigned(n);
}

// The same pointer, which the compiler no longer takes for the sum that it came from: without it a base that stays the
// same in a loop is computed anew together with every offset.
template <typename T>
__device__ inline T* opaque(T* p) {
#ifdef __CUDA_ARCH__
  asm("" : "+l"(p));
#endif
  return p;
}

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}
inline bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Calls f(T{}) with the tensor's number type T.
template <typename F>
void for_number(const Tensor& t, F&& f) {
  const ScalarType type = t.scalar_type();
  if (type == ScalarType::Float) return f(float{});
  if (type == ScalarType::BFloat16) return f(bfloat16{});
  STD_TORCH_CHECK(type == ScalarType::Half, "pyvseg: need float32, bfloat16 or float16");
  f(float16{});
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(float16 x) { return __half2float(x); }

__device__ inline float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

template <typename T>
__device__ inline T from_float(float x) {
  if constexpr (std::is_same_v<T, bfloat16>) return __float2bfloat16(x);
  if constexpr (std::is_same_v<T, float16>) return __float2half(x);
  if constexpr (std::is_same_v<T, float>) return x;
}

// Wide accesses. N numbers at an address that is a multiple of their size, or of 16 bytes where they are more than that.
template <typename T>
constexpr int kPerLoad = int(16 / sizeof(T));  // numbers in the widest access

template <int Bytes>
using Word = std::conditional_t<Bytes == 16, uint4,
                                std::conditional_t<Bytes == 8, uint2, std::conditional_t<Bytes == 4, uint32_t, uint16_t>>>;

template <int N, typename T, bool ReadOnly = false>
__device__ inline void load(const T* p, float (&x)[N]) {
  constexpr int kEach = N < kPerLoad<T> ? N : kPerLoad<T>;
  static_assert(N % kEach == 0 && (kEach & (kEach - 1)) == 0, "N must be a power of two or a multiple of 16 bytes");
  using W = Word<kEach * sizeof(T)>;
#pragma unroll
  for (int i = 0; i < N; i += kEach) {
    T numbers[kEach];
    W word;
    if constexpr (ReadOnly) {
      word = __ldg(reinterpret_cast<const W*>(p + i));
    } else {
      word = *reinterpret_cast<const W*>(p + i);
    }
    if constexpr (std::is_same_v<T, bfloat16> && kEach > 1) {  // one instruction a number, where the conversion takes two for odd ones
      uint32_t pairs[kEach / 2];
      memcpy(pairs, &word, sizeof word);
#pragma unroll
      for (int j = 0; j < kEach; ++j) x[i + j] = bits_to_float(j % 2 ? pairs[j / 2] & 0xffff0000u : pairs[j / 2] << 16);
    } else {
      memcpy(numbers, &word, sizeof word);
#pragma unroll
      for (int j = 0; j < kEach; ++j) x[i + j] = to_float(numbers[j]);
    }
  }
}

// As `load`, through the read-only cache: for memory that nothing writes while the kernel runs.
template <int N, typename T>
__device__ inline void load_readonly(const T* p, float (&x)[N]) {
  load<N, T, true>(p, x);
}

template <int N, typename T>
__device__ inline void store(T* p, const float (&x)[N]) {
  constexpr int kEach = N < kPerLoad<T> ? N : kPerLoad<T>;
  static_assert(N % kEach == 0 && (kEach & (kEach - 1)) == 0, "N must be a power of two or a multiple of 16 bytes");
  using W = Word<kEach * sizeof(T)>;
#pragma unroll
  for (int i = 0; i < N; i += kEach) {
    T numbers[kEach];
    W word;
#pragma unroll
    for (int j = 0; j < kEach; ++j) numbers[j] = from_float<T>(x[i + j]);
    memcpy(&word, numbers, sizeof word);
    *reinterpret_cast<W*>(p + i) = word;
  }
}

// p[i] += x[i]; one instruction per four where the GPU has it. Address as for `load`.
template <int N>
__device__ inline void atomic_add(float* p, const float (&x)[N]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr int kEach = N % 4 == 0 ? 4 : 1;
#else
  constexpr int kEach = 1;
#endif
#pragma unroll
  for (int i = 0; i < N; i += kEach) {
    if constexpr (kEach == 4) {
      atomicAdd(reinterpret_cast<float4*>(p + i), make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]));
    } else {
      atomicAdd(p + i, x[i]);
    }
  }
}

// Over the `Width` neighbouring lanes of a warp (a power of two); every lane gets the result.
template <unsigned Width = kWarp, typename T>
__device__ inline T warp_sum(T x) {
#pragma unroll
  for (unsigned offset = Width / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}
template <unsigned Width = kWarp>
__device__ inline float warp_max(float x) {
#pragma unroll
  for (unsigned offset = Width / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, offset));
  return x;
}

}  // namespace pyvseg
