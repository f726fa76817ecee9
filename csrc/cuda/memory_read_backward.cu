// SPDX-License-Identifier: Apache-2.0
// Gradients of the memory read. Sums over the readers of a memory position go through a stable sort of all entries by
// position, so that they are taken in one order: the result is deterministic.
#include <array>
#include <cmath>
#include <optional>

#include "memory_rows.cuh"

namespace pyvseg::memory_read {
namespace {

constexpr int kScoreThreads = 128;

// score_grad[b, m, j] = gradient of <mk, qk> - |mk|^2 / 2 (or of <mk, qk>), a block per query: that of a weight is the
// product of the readout's gradient with the value row, summed over objects and channels.
template <typename T, int N>
__global__ void __launch_bounds__(kScoreThreads)
    score_gradients(Links links, Rows values, const T* grad, int64_t O, int64_t CV, float scale, float* score_grad) {
  const int64_t b = blockIdx.x / links.M, m = blockIdx.x % links.M, first = blockIdx.x * links.top_k;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int64_t j = warp; j < links.top_k; j += kScoreThreads / kWarp) {
    const int32_t position = links.index[first + j];
    const bool there = uint32_t(position) < uint64_t(values.count);
    float sum = 0;
    for (int64_t o = 0; o < O && there; ++o) {
      const T* value = static_cast<const T*>(values.data) + b * values.batch + o * values.object + position * values.row;
      const T* wanted = grad + ((b * O + o) * links.M + m) * CV;
      for (int64_t c = lane * N; c < CV; c += kWarp * N) {
        float x[N], y[N];
        load_readonly<N>(value + c, x);
        load_readonly<N>(wanted + c, y);
#pragma unroll
        for (int i = 0; i < N; ++i) sum += x[i] * y[i];
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) score_grad[first + j] = sum;
  }
  __syncthreads();
  float mean = 0;
  for (int64_t j = lane; j < links.top_k; j += kWarp) mean += links.coefficient[first + j] * score_grad[first + j];
  mean = warp_sum(mean);
  __syncthreads();
  for (int64_t j = threadIdx.x; j < links.top_k; j += kScoreThreads)
    score_grad[first + j] = links.coefficient[first + j] * (score_grad[first + j] - mean) * scale;
}

// start[b, n] = first of the sorted entries that read position n or a later one.
__global__ void find_starts(const int32_t* sorted, int64_t entries, int64_t N, int64_t items, int64_t* start) {
  const int64_t item = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (item >= items) return;
  const int64_t n = item % (N + 1);
  const int32_t* positions = sorted + item / (N + 1) * entries;
  int64_t low = 0, high = entries;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (positions[middle] < n) low = middle + 1;
    else high = middle;
  }
  start[item] = low;
}

// Sorted along the last dimension, and where each came from; stable.
std::tuple<Tensor, Tensor> sorted(const Tensor& x) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(x), from(std::optional<bool>(true)), from(int64_t(-1)), from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

std::tuple<Tensor, Tensor, Tensor> memory_read_backward(const Tensor& grad, const Tensor& key, const Tensor& value,
                                                        const Tensor& query, const Tensor& index, const Tensor& weight,
                                                        bool dot) {
  STD_TORCH_CHECK(key.dim() == 3 && query.dim() == 3 && value.dim() == 4 && grad.dim() == 4 && index.dim() == 3,
                  "memory_read_backward: wrong number of dimensions");
  const int64_t B = key.size(0), N = key.size(1), CK = key.size(2), M = query.size(1), O = value.size(1), CV = value.size(3);
  const int64_t k = index.size(2), entries = M * k;
  STD_TORCH_CHECK(query.size(0) == B && query.size(2) == CK && value.size(0) == B && value.size(2) == N &&
                      grad.numel() == B * O * M * CV && grad.size(2) == M && index.numel() == B * entries &&
                      weight.numel() == B * entries && entries < INT32_MAX,
                  "memory_read_backward: shapes do not agree");
  STD_TORCH_CHECK(query.scalar_type() == key.scalar_type() && grad.scalar_type() == value.scalar_type() &&
                      index.scalar_type() == ScalarType::Int && weight.scalar_type() == ScalarType::Float,
                  "memory_read_backward: dtypes do not agree");
  const OnDeviceOf device(key);
  const Tensor keys = rows_contiguous(key), queries = rows_contiguous(query), values = rows_contiguous(value);
  const Tensor grads = torch::stable::contiguous(grad), indices = torch::stable::contiguous(index);
  const Tensor weights = torch::stable::contiguous(weight);
  Tensor grad_key = torch::stable::new_empty(key, {B, N, CK});
  Tensor grad_value = torch::stable::new_empty(value, {B, O, N, CV});
  Tensor grad_query = torch::stable::new_empty(query, {B, M, CK});
  Tensor score_grad = torch::stable::new_empty(weights, {B, M, k});
  Tensor start = torch::stable::new_empty(weights, {B, N + 1}, ScalarType::Long);

  const Links by_weight{data<int32_t>(indices), data<float>(weights), k, M};
  const Links by_score{data<int32_t>(indices), data<float>(score_grad), k, M};
  const float scale = dot ? 1.0f : float(2 / std::sqrt(double(CK)));
  for_number(value, [&](auto number) {
    using T = decltype(number);
    const auto kernel = wide(values) && wide(grads) ? score_gradients<T, kPerLoad<T>> : score_gradients<T, 1>;
    launch(kernel, blocks(B * M, 1), kScoreThreads, 0, by_weight, rows_of(values), data<T>(grads), O, CV, scale,
           data<float>(score_grad));
  });
  gather(by_score, keys, grad_query);

  const auto [positions, origins] = sorted(torch::stable::view(indices, {B, entries}));
  launch(find_starts, blocks(B * (N + 1), 128), 128, 0, data<int32_t>(positions), entries, N, B * (N + 1), data<int64_t>(start));
  const Readers readers{data<int64_t>(origins), data<int64_t>(start)};
  scatter(by_weight, readers, grads, nullptr, grad_value);
  scatter(by_score, readers, queries, dot ? nullptr : &keys, grad_key);
  return {grad_key, grad_value, grad_query};
}

}  // namespace

PYVSEG_CUDA_IMPL(m) { m.impl("memory_read_backward", TORCH_BOX(&memory_read_backward)); }

}  // namespace pyvseg::memory_read
