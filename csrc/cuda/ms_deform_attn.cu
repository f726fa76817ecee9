// SPDX-License-Identifier: Apache-2.0
// Multi-scale deformable attention, forward. A lane holds 16 bytes of channels: 4 lanes a query and head for 32 channels
// of bfloat16, 8 for float32.
#include "ms_deform_attn.cuh"

namespace pyvseg::ms_deform_attn {
namespace {

// Channels [channel, channel + V) of one query and head.
template <int Group, bool Whole, bool Fused, typename Value, typename Geometry>
__device__ void attend(const Problem<Value, Geometry>& p, const Place& place, int channel, Value* out) {
  constexpr int V = kPerLoad<Value>;
  const auto [head, live, image, query] = place;
  const int lane = threadIdx.x % Group, samples = p.levels.count * p.P, pixel = p.H * p.D, n = p.D - channel;
  const Value* value = opaque(p.value + image * p.S * pixel + head * p.D + channel);
  const Geometry* locations = p.locations + 2 * (query * p.H + head) * samples;
  const Geometry* weights = p.weights + (query * p.H + head) * samples;

  float peak = 0, total = 0, sum[V] = {};
  if constexpr (Fused) peak = largest<Group>(weights, samples, lane, live);
  for (int level = 0; level < p.levels.count; ++level) {
    const Steps steps = steps_of(p.levels, level, pixel);
    for (int point = 0; point < p.P; point += Group) {
      Window own;
      if (live && point + lane < p.P) {
        const int s = level * p.P + point + lane;
        const float2 at = position_of<Fused>(p, query, level, load_pair(locations, s));
        float weight = to_float(weights[s]);
        if constexpr (Fused) total += weight = expf(weight - peak);
        own = window_of(p.levels, level, axis_at(at.x, p.levels.width[level]), axis_at(at.y, p.levels.height[level]), weight);
      }
#pragma unroll
      for (int i = 0; i < Group; ++i) {
        if (point + i >= p.P) break;
        const Window window = share<Group>(own, i);
        if (window.row < 0 || n <= 0) continue;
        const Value* from = value + uint64_t(window.row) * unsigned(pixel);
        float x[4][V];
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) load_channels<Whole>(from + steps.to(corner), n, x[corner]);
#pragma unroll
        for (int corner = 0; corner < 4; ++corner)
#pragma unroll
          for (int c = 0; c < V; ++c) sum[c] = fmaf(window.weight[corner], x[corner][c], sum[c]);
      }
    }
  }
  if constexpr (Fused) {
    const float scale = 1 / warp_sum<Group>(total);
#pragma unroll
    for (int c = 0; c < V; ++c) sum[c] *= scale;
  }
  if (!live || n <= 0) return;
  Value* to = out + query * pixel + head * p.D + channel;
  if constexpr (Whole) {
    store(to, sum);
  } else {
#pragma unroll
    for (int c = 0; c < V; ++c)
      if (c < n) to[c] = from_float<Value>(sum[c]);
  }
}

// 56 registers let 9 blocks of 4 lanes a query share a multiprocessor, with the four loads of a sample under way at once;
// fewer registers would make the compiler wait for one before it asks for the next.
template <int Group, bool Whole, bool Fused, typename Value, typename Geometry>
__global__ void __launch_bounds__(kQueries* Group, (Whole ? 1152 : 512) / (kQueries * Group))
    forward(const __grid_constant__ Problem<Value, Geometry> p, Value* out) {
  constexpr int V = kPerLoad<Value>;
  const Place place = place_of(p, Group);
  for (int channel = threadIdx.x % Group * V, first = 0; first < p.D; first += Group * V)
    attend<Group, Whole, Fused>(p, place, first + channel, out);
}

template <int Group, bool Whole, bool Fused, typename Value, typename Geometry>
void start(const Problem<Value, Geometry>& p, Value* out) {
  launch(forward<Group, Whole, Fused, Value, Geometry>, grid_of(p), kQueries * Group, 0, p, out);
}

template <bool Fused, typename Value, typename Geometry>
void choose(const Problem<Value, Geometry>& p, Value* out) {
  constexpr int V = kPerLoad<Value>;
  if (p.D % V)
    start<8, false, Fused>(p, out);
  else if (p.D <= 4 * V)
    start<4, true, Fused>(p, out);
  else
    start<8, true, Fused>(p, out);
}

template <bool Fused>
Tensor run(const Inputs& in) {
  const OnDeviceOf device(in.value);
  const int64_t B = in.value.size(0), H = in.value.size(2), D = in.value.size(3);
  Tensor out = torch::stable::new_empty(in.value, {B, in.geometry[1].size(1), H * D});
  if (out.numel()) in.visit([&](const auto& p) { choose<Fused>(p, data<ValueOf<decltype(p)>>(out)); });
  return out;
}

Tensor plain(const Tensor& value, std::vector<int64_t> shapes, const Tensor& locations, const Tensor& weights) {
  return run<false>({value, {locations, weights}, shapes});
}

Tensor fused(const Tensor& value, std::vector<int64_t> shapes, const Tensor& reference, const Tensor& offsets,
             const Tensor& logits) {
  return run<true>({value, {offsets, logits, reference}, shapes});
}

}  // namespace
}  // namespace pyvseg::ms_deform_attn

PYVSEG_CUDA_IMPL(m) {
  m.impl("ms_deform_attn", TORCH_BOX(&pyvseg::ms_deform_attn::plain));
  m.impl("ms_deform_attn_fused", TORCH_BOX(&pyvseg::ms_deform_attn::fused));
}
