// SPDX-License-Identifier: Apache-2.0
// Small kernels that hold the emulator to CUDA's rules; wrong ones too.
#include "launch.cuh"

namespace pyvseg::probe {
namespace {

// Block sums of squares, in every way that the emulator knows: static and dynamic shared memory, shuffles, atomics.
template <typename T>
__global__ void square_sum(const T* x, float* sums, float* copy, int* positive, int64_t n) {
  __shared__ float part[8];
  float* reversed = shared_memory<float>();
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  const float mine = i < n ? to_float(__ldg(x + i)) : 0.0f;
  reversed[blockDim.x - 1 - threadIdx.x] = mine;
  const float total = warp_sum(mine * mine);
  const unsigned above = __ballot_sync(kFullWarp, mine > 0);
  if (threadIdx.x % kWarp == 0) {
    part[threadIdx.x / kWarp] = total;
    atomicAdd(positive, __popc(above));
  }
  __syncthreads();
  if (i < n) copy[i] = reversed[blockDim.x - 1 - threadIdx.x];
  if (threadIdx.x != 0) return;
  float sum = 0;
  for (unsigned w = 0; w < blockDim.x / kWarp; ++w) sum += part[w];
  sums[blockIdx.x] = sum;
}

std::tuple<Tensor, Tensor, Tensor> square_sums(const Tensor& x) {
  const OnDeviceOf device(x);
  Tensor sums = torch::stable::new_empty(x, {ceil_div(x.numel(), 256)}, ScalarType::Float);
  Tensor copy = torch::stable::new_empty(x, {x.numel()}, ScalarType::Float);
  Tensor positive = torch::stable::new_zeros(x, {1}, ScalarType::Int);
  for_number(x, [&](auto number) {
    using T = decltype(number);
    launch(square_sum<T>, blocks(x.numel(), 256), 256, 256 * sizeof(float), data<T>(x), data<float>(sums), data<float>(copy),
           data<int>(positive), x.numel());
  });
  return {sums, copy, positive};
}

// Twice x, 16 bytes at a time.
template <typename T>
__global__ void twice_kernel(const T* x, T* out) {
  constexpr int N = kPerLoad<T>;
  float numbers[N];
  load_readonly<N>(x + threadIdx.x * N, numbers);
  for (float& number : numbers) number *= 2;
  store<N>(out + threadIdx.x * N, numbers);
}

Tensor twice(const Tensor& x) {
  const OnDeviceOf device(x);
  Tensor out = torch::stable::empty_like(x);
  for_number(x, [&](auto number) {
    using T = decltype(number);
    launch(twice_kernel<T>, 1, unsigned(x.numel() / kPerLoad<T>), 0, data<T>(x), data<T>(out));
  });
  return out;
}

__global__ void divergent_barrier(int* out) {
  if (threadIdx.x < 7) {
    __syncthreads();
    out[0] = 1;
  } else {
    __syncthreads();
  }
}
__global__ void missing_lane(int* out) {
  if (threadIdx.x < 7) out[0] = __shfl_sync(0xff, 1, 0);
  else __syncthreads();
}
__global__ void lane_not_in_mask(int* out) { out[0] = __any_sync(0xf, threadIdx.x); }

// Each thread reads its neighbour's number with no barrier between: wrong in one of the two orders.
__global__ void missing_barrier(int* out) {
  __shared__ int numbers[64];
  if (blockIdx.x == 0) numbers[threadIdx.x] = 0;
  __syncthreads();
  numbers[threadIdx.x] = 1;
  atomicAdd(out, numbers[(threadIdx.x + 1) % 64] + numbers[(threadIdx.x + 63) % 64]);
}

void misuse(const Tensor& out, int64_t which) {
  const OnDeviceOf device(out);
  int* to = data<int>(out);
  if (which == 0) launch(divergent_barrier, 1, 64, 0, to);
  if (which == 1) launch(missing_lane, 1, 64, 0, to);
  if (which == 2) launch(lane_not_in_mask, 1, 64, 0, to);
  if (which == 3) launch(missing_barrier, 1, 64, 0, to);
  if (which == 4) launch(missing_barrier, 1, 2048, 0, to);
  if (which == 5) launch(missing_barrier, 1, 64, 200000, to);
}

// Every warp intrinsic of segments of eight lanes and of diverged halves.
__global__ void warp_words_kernel(int* out) {
  const int lane = int(threadIdx.x);
  int* row = out + lane * 8;
  row[0] = __shfl_up_sync(kFullWarp, lane, 3, 8);
  row[1] = __shfl_down_sync(kFullWarp, lane, 3, 8);
  row[2] = __shfl_xor_sync(kFullWarp, lane, 5, 8);
  row[3] = __shfl_sync(kFullWarp, lane, 9, 8);
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  if (lane < 16) row[4] = __any_sync(half, lane == 3);
  else row[4] = __all_sync(half, lane != 20);
  row[5] = int(__match_any_sync(kFullWarp, lane % 3));
  row[6] = int(__reduce_max_sync(half, unsigned(lane)));
  row[7] = __syncthreads_count(lane > 4);
}
Tensor warp_words(const Tensor& like) {
  const OnDeviceOf device(like);
  Tensor out = torch::stable::new_zeros(like, {32, 8}, ScalarType::Int);
  launch(warp_words_kernel, 1, 32, 0, data<int>(out));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvseg_probe, m) {
  m.def("square_sums(Tensor x) -> (Tensor, Tensor, Tensor)");
  m.def("twice(Tensor x) -> Tensor");
  m.def("misuse(Tensor(a!) out, int which) -> ()");
  m.def("warp_words(Tensor like) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(pyvseg_probe, CPU, m) {
  m.impl("square_sums", TORCH_BOX(&square_sums));
  m.impl("twice", TORCH_BOX(&twice));
  m.impl("misuse", TORCH_BOX(&misuse));
  m.impl("warp_words", TORCH_BOX(&warp_words));
}

}  // namespace pyvseg::probe
