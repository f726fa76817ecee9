// SPDX-License-Identifier: Apache-2.0
// Multi-scale deformable attention, backward. A group of 8 lanes with 4 channels each serves one query and head, so that
// one vector atomic of a group adds 32 neighbouring channels. Gradients of locations and weights are sums over channels,
// by shuffle; the lane that owns a sample writes them.
//
// value's gradient is summed in memory, where samples of many queries meet. In float32 by atomics; or, deterministic, in
// 64-bit fixed point, whose sums do not depend on the order. The unit is chosen so that no sum can overflow: n = Q * P
// samples may hit one pixel, each with at most b = max |grad| * max |weight|, and n b < 2^61 units. A contribution is off
// by half a unit at most, and b is 2^61 / n units: for 2^15 samples a relative 2^-47 of b, where float32 has 2^-24.
#include "ms_deform_attn.cuh"

namespace pyvseg::ms_deform_attn {
namespace {

constexpr int kGroup = 8, kChannels = 4;

struct Floats {
  float* at;
  __device__ void add(int64_t i, float x) const { atomicAdd(at + i, x); }
  __device__ void add(int64_t i, const float (&x)[kChannels]) const { atomic_add(at + i, x); }
};

// The largest |grad| and |weight| as bits: of floats without sign the order is that of their bits, NaN above all.
struct Bounds {
  unsigned grad, weight;
};

// Units per 1, a power of two; 0 where some number is not finite, as the whole gradient then is NaN.
__device__ inline float units(const Bounds& bounds, int64_t samples) {
  const float bound = bits_to_float(bounds.grad) * bits_to_float(bounds.weight);
  if (!(bound < INFINITY)) return 0;
  const int spare = 60 - int(ceilf(log2f(float(samples))));
  return ldexpf(1.0f, bound > 0 ? min(spare - ilogbf(bound) - 1, 126) : 126);
}

struct Fixed {
  unsigned long long* at;
  const Bounds* bounds;
  float scale;
  __device__ void add(int64_t i, float x) const {
    atomicAdd(at + i, static_cast<unsigned long long>(scale > 0 ? llrintf(x * scale) : 0));
  }
  __device__ void add(int64_t i, const float (&x)[kChannels]) const {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) add(i + c, x[c]);
  }
};

// What the kernel writes. `shares` are float32: the gradient of each softmax weight, in the fused form only, and
// `references` each head's part of the reference's gradient, (B, Q, H, L, coordinates).
template <typename Geometry, typename Sum>
struct Gradients {
  Sum value;
  Geometry *locations, *weights;
  float *shares, *references;
};

template <typename T>
__device__ inline void store_pair(T* p, int64_t i, float x, float y) {
  const float pair[2] = {x, y};
  store(p + 2 * i, pair);
}

// Derivatives of the weights of an axis' two pixels; where x is a pixel's centre, those of larger x.
__device__ inline float2 slopes_of(const Axis& axis, int size) {
  const float past = axis.past;
  const float near = past >= -1 && past < 0 ? 1 : past >= 0 && past < 1 ? -1 : 0;
  const float far = past >= 0 && past < 1 ? 1 : past >= 1 && past < 2 ? -1 : 0;
  return make_float2(near, size > 1 ? far : 0);
}

// A window's products <grad, value> at its four pixels, over all channels, and its part of value's gradient.
template <bool Whole, typename Value, typename Sum>
__device__ void gather_and_add(const Value* value, const Value* grad, const Sum& sum, int64_t at, const Steps& steps,
                               const Window& window, int D, float (&products)[4]) {
#pragma unroll 1
  for (int channel = threadIdx.x % kGroup * kChannels; channel < D; channel += kGroup * kChannels) {
    float g[kChannels], x[4][kChannels];
    load_channels<Whole>(grad + channel, D - channel, g);
#pragma unroll
    for (int corner = 0; corner < 4; ++corner)
      load_channels<Whole>(value + at + steps.to(corner) + channel, D - channel, x[corner]);
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        products[corner] = fmaf(g[c], x[corner][c], products[corner]);
        x[corner][c] = window.weight[corner] * g[c];
      }
      const int64_t i = at + steps.to(corner) + channel;
      if (window.weight[corner] == 0) continue;
      if constexpr (Whole) {
        sum.add(i, x[corner]);
      } else {
#pragma unroll
        for (int c = 0; c < kChannels; ++c)
          if (channel + c < D) sum.add(i + c, x[corner][c]);
      }
    }
  }
}

// One sample: its axes, its weight (of the softmax in the fused form) and its window.
struct Sample {
  Axis x, y;
  float weight;
  Window window;
};
template <bool Fused, typename Value, typename Geometry>
__device__ inline Sample sample_at(const Problem<Value, Geometry>& p, int64_t query, int level, int64_t s, float peak,
                                   float scale) {
  const float2 at = position_of<Fused>(p, query, level, load_pair(p.locations, s));
  float weight = to_float(p.weights[s]);
  if constexpr (Fused) weight = expf(weight - peak) * scale;
  const Axis x = axis_at(at.x, p.levels.width[level]), y = axis_at(at.y, p.levels.height[level]);
  return {x, y, weight, window_of(p.levels, level, x, y, weight)};
}

// Gradient of the pixel coordinates of a sample and of its weight, from the products at its window.
struct SampleGradient {
  float x, y, weight;
};
__device__ inline SampleGradient gradient_of(const Sample& s, int width, int height, const float (&products)[4]) {
  if (s.window.row < 0) return {0, 0, 0};
  const float2 x = slopes_of(s.x, width), y = slopes_of(s.y, height);
  const float upper = s.x.near * products[0] + s.x.far * products[1], lower = s.x.near * products[2] + s.x.far * products[3];
  const float across = s.y.near * (x.x * products[0] + x.y * products[1]) + s.y.far * (x.x * products[2] + x.y * products[3]);
  return {s.weight * across, s.weight * (y.x * upper + y.y * lower), s.y.near * upper + s.y.far * lower};
}

// The chain from pixel coordinates to what the caller gave: locations, or offsets and (returned) the query's reference.
template <bool Fused, typename Value, typename Geometry, typename Sum>
__device__ float4 put_location(const Problem<Value, Geometry>& p, const Gradients<Geometry, Sum>& to, int64_t query, int level,
                               int64_t s, float x, float y) {
  const float along_x = x * float(p.levels.width[level]), along_y = y * float(p.levels.height[level]);
  if (!Fused || p.coordinates == 2) {
    store_pair(to.locations, s, Fused ? x : along_x, Fused ? y : along_y);
    return make_float4(along_x, along_y, 0, 0);
  }
  const float half = 0.5f / float(p.P);
  const float2 box = load_pair(p.reference, 2 * (query * p.levels.count + level) + 1), offset = load_pair(p.locations, s);
  store_pair(to.locations, s, along_x * box.x * half, along_y * box.y * half);
  return make_float4(along_x, along_y, along_x * offset.x * half, along_y * offset.y * half);
}

// to[0..coordinates) = the group's sum, or += where `more`.
__device__ inline void put_reference(float* to, int coordinates, const float4& share, bool live, bool more) {
  const float shares[4] = {share.x, share.y, share.z, share.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float sum = warp_sum<kGroup>(shares[i]);
    if (live && i < coordinates && threadIdx.x % kGroup == 0) to[i] = more ? to[i] + sum : sum;
  }
}

template <bool Whole, bool Fused, typename Value, typename Geometry, typename Sum>
__device__ void differentiate(const Problem<Value, Geometry>& p, const Value* grad, const Gradients<Geometry, Sum>& to) {
  const auto [head, live, image, query] = place_of(p, kGroup);
  const int lane = threadIdx.x % kGroup, samples = p.levels.count * p.P, pixel = p.H * p.D;
  const int64_t row = query * p.H + head, first = row * samples, base = image * p.S * pixel + head * p.D;
  const Geometry* weights = p.weights + first;
  grad += row * p.D;

  float peak = 0, total = 0, shared = 0;  // shared: sum over samples of softmax weight times its gradient
  if constexpr (Fused) {
    peak = largest<kGroup>(weights, samples, lane, live);
    for (int s = lane; live && s < samples; s += kGroup) total += expf(to_float(weights[s]) - peak);
    total = 1 / warp_sum<kGroup>(total);
  }
  for (int level = 0; level < p.levels.count; ++level) {
    const Steps steps = steps_of(p.levels, level, pixel);
    for (int point = 0; point < p.P; point += kGroup) {
      const bool owns = live && point + lane < p.P;
      const int64_t s = first + level * p.P + point + lane;
      const auto sample = [&, query = query] { return sample_at<Fused>(p, query, level, s, peak, total); };
      const Window own = owns ? sample().window : Window{};
      float mine[4] = {};
#pragma unroll 1
      for (int i = 0, end = min(kGroup, p.P - point); i < end; ++i) {
        const Window window = share<kGroup>(own, i);
        float products[4] = {};
        const int64_t at = base + int64_t(uint64_t(window.row) * unsigned(pixel));
        if (window.row >= 0) gather_and_add<Whole>(p.value, grad, to.value, at, steps, window, p.D, products);
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          const float product = warp_sum<kGroup>(products[corner]);
          if (lane == i) mine[corner] = product;
        }
      }
      float4 reference = make_float4(0, 0, 0, 0);
      if (owns) {
        const Sample again = sample();  // not kept in registers meanwhile
        const SampleGradient gradient = gradient_of(again, p.levels.width[level], p.levels.height[level], mine);
        reference = put_location<Fused>(p, to, query, level, s, gradient.x, gradient.y);
        if constexpr (Fused) {
          to.shares[s] = gradient.weight;
          shared += again.weight * gradient.weight;
        } else {
          to.weights[s] = from_float<Geometry>(gradient.weight);
        }
      }
      if constexpr (Fused)
        put_reference(to.references + (row * p.levels.count + level) * p.coordinates, p.coordinates, reference, live, point > 0);
    }
  }
  if constexpr (Fused) {
    shared = warp_sum<kGroup>(shared);
    for (int level = 0; live && level < p.levels.count; ++level)
      for (int point = lane; point < p.P; point += kGroup) {  // the samples that this lane owned above
        const int64_t s = first + level * p.P + point;
        const float weight = expf(to_float(p.weights[s]) - peak) * total;
        to.weights[s] = from_float<Geometry>(weight * (to.shares[s] - shared));
      }
  }
}

template <bool Whole, bool Fused, typename Value, typename Geometry, typename Sum>
__global__ void __launch_bounds__(kQueries* kGroup, Fused || !Whole ? 2 : 3)
    backward(const __grid_constant__ Problem<Value, Geometry> p, const Value* grad, Gradients<Geometry, Sum> to) {
  if constexpr (std::is_same_v<Sum, Fixed>) to.value.scale = units(*to.value.bounds, p.Q * p.P);
  differentiate<Whole, Fused>(p, grad, to);
}

template <typename T>
__global__ void largest_magnitude(const T* from, int64_t n, unsigned* to) {
  unsigned most = 0;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    const float magnitude = fabsf(to_float(from[i]));
    unsigned bits;
    memcpy(&bits, &magnitude, sizeof bits);
    most = max(most, bits);
  }
  for (unsigned offset = kWarp / 2; offset > 0; offset /= 2) most = max(most, __shfl_xor_sync(kFullWarp, most, offset));
  if (threadIdx.x % kWarp == 0) atomicMax(to, most);
}

__global__ void one_as_largest(unsigned* to) {
  const float one = 1;
  memcpy(to, &one, sizeof one);
}

template <typename T>
__global__ void from_fixed(const int64_t* from, T* to, int64_t n, const Bounds* bounds, int64_t samples) {
  const float scale = units(*bounds, samples);
  const double unit = scale > 0 ? 1 / double(scale) : double(NAN);  // exact, as the scale is a power of two
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x)
    to[i] = from_float<T>(float(double(from[i]) * unit));
}

// (rows, heads, n) -> (rows, n): the sum over heads.
template <typename T>
__global__ void sum_heads(const float* from, T* to, int64_t rows, int heads, int n) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * n; i += int64_t(gridDim.x) * blockDim.x) {
    float sum = 0;
    for (int head = 0; head < heads; ++head) sum += from[(i / n * heads + head) * n + i % n];
    to[i] = from_float<T>(sum);
  }
}

constexpr int kThreads = 256;
inline unsigned blocks_for(int64_t n) { return unsigned(std::min<int64_t>(ceil_div(n, kThreads), 4096)); }

template <typename T>
void measure(const Tensor& t, unsigned* to) {
  launch(largest_magnitude<T>, blocks_for(t.numel()), kThreads, 0, data<const T>(t), t.numel(), to);
}

// Runs the backward kernel with each kind of sum; returns value's gradient.
template <bool Fused, typename Value, typename Geometry>
Tensor run(const Inputs& in, const Problem<Value, Geometry>& p, const Tensor& grad, bool deterministic,
           const Gradients<Geometry, int>& other) {
  const auto start = [&](auto sum) {
    const Gradients<Geometry, decltype(sum)> to{sum, other.locations, other.weights, other.shares, other.references};
    const dim3 block(kQueries * kGroup);
    if (p.D % kChannels)
      launch(backward<false, Fused, Value, Geometry, decltype(sum)>, grid_of(p), block, 0, p, data<const Value>(grad), to);
    else
      launch(backward<true, Fused, Value, Geometry, decltype(sum)>, grid_of(p), block, 0, p, data<const Value>(grad), to);
  };
  const auto sizes = in.value.sizes();
  if (!deterministic) {
    const Tensor sum = torch::stable::new_zeros(in.value, sizes, ScalarType::Float);
    start(Floats{data<float>(sum)});
    return in.value.scalar_type() == ScalarType::Float ? sum : torch::stable::to(sum, in.value.scalar_type());
  }
  const Tensor sum = torch::stable::new_zeros(in.value, sizes, ScalarType::Long);
  const Tensor bounds = torch::stable::new_zeros(in.value, {2}, ScalarType::Int);
  unsigned* most = data<unsigned>(bounds);
  measure<Value>(grad, most);
  if (Fused)
    launch(one_as_largest, 1, 1, 0, most + 1);
  else
    measure<Geometry>(in.geometry[1], most + 1);
  start(Fixed{data<unsigned long long>(sum), data<const Bounds>(bounds), 0});
  Tensor result = torch::stable::empty_like(in.value);
  launch(from_fixed<Value>, blocks_for(sum.numel()), kThreads, 0, data<const int64_t>(sum), data<Value>(result), sum.numel(),
         data<const Bounds>(bounds), p.Q * p.P);
  return result;
}

// Gradients of value and of the geometry, in the order of `in.geometry`.
template <bool Fused>
std::vector<Tensor> run(const Inputs& in, const Tensor& given, bool deterministic) {
  const OnDeviceOf device(in.value);
  STD_TORCH_CHECK(given.dim() == 3 && given.size(0) == in.value.size(0) && given.size(1) == in.geometry[1].size(1) &&
                      given.size(2) == in.value.size(2) * in.value.size(3) && given.scalar_type() == in.value.scalar_type(),
                  "ms_deform_attn: grad must be (B, Q, H * D) of value's dtype");
  const bool empty = given.numel() == 0 || in.geometry[1].numel() == 0;
  std::vector<Tensor> grads{in.value};  // value's is made below
  for (const Tensor& t : in.geometry)
    grads.push_back(empty ? torch::stable::new_zeros(t, t.sizes()) : torch::stable::empty_like(t));
  if (empty) {
    grads[0] = torch::stable::new_zeros(in.value, in.value.sizes());
    return grads;
  }
  const Tensor grad = dense(given);
  in.visit([&](const auto& p) {
    using Geometry = GeometryOf<decltype(p)>;
    Gradients<Geometry, int> to{0, data<Geometry>(grads[1]), data<Geometry>(grads[2]), nullptr, nullptr};
    if constexpr (Fused) {
      const Tensor shares = torch::stable::new_empty(in.value, in.geometry[1].sizes(), ScalarType::Float);
      const std::vector<int64_t> sizes{p.B, p.Q, p.H, p.levels.count, p.coordinates};
      const Tensor references = torch::stable::new_empty(in.value, sizes, ScalarType::Float);
      to.shares = data<float>(shares), to.references = data<float>(references);
      grads[0] = run<Fused>(in, p, grad, deterministic, to);
      launch(sum_heads<Geometry>, blocks_for(grads[3].numel()), kThreads, 0, data<const float>(references),
             data<Geometry>(grads[3]), p.B * p.Q, p.H, p.levels.count * p.coordinates);
    } else {
      grads[0] = run<Fused>(in, p, grad, deterministic, to);
    }
  });
  return grads;
}

Tensor as(const Tensor& grad, const Tensor& input) {
  return grad.scalar_type() == input.scalar_type() ? grad : torch::stable::to(grad, input.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> plain(const Tensor& grad, const Tensor& value, std::vector<int64_t> shapes,
                                         const Tensor& locations, const Tensor& weights, bool deterministic) {
  const auto grads = run<false>({value, {locations, weights}, shapes}, grad, deterministic);
  return {grads[0], as(grads[1], locations), as(grads[2], weights)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fused(const Tensor& grad, const Tensor& value, std::vector<int64_t> shapes,
                                                 const Tensor& reference, const Tensor& offsets, const Tensor& logits,
                                                 bool deterministic) {
  const auto grads = run<true>({value, {offsets, logits, reference}, shapes}, grad, deterministic);
  return {grads[0], as(grads[3], reference), as(grads[1], offsets), as(grads[2], logits)};
}

}  // namespace
}  // namespace pyvseg::ms_deform_attn

PYVSEG_CUDA_IMPL(m) {
  m.impl("ms_deform_attn_backward", TORCH_BOX(&pyvseg::ms_deform_attn::plain));
  m.impl("ms_deform_attn_fused_backward", TORCH_BOX(&pyvseg::ms_deform_attn::fused));
}
