// SPDX-License-Identifier: Apache-2.0
// Gradients of multi-scale deformable attention (see pyvseg/ops/ms_deform_attn.py).
//
// Two passes, each with one padded map of a head in L2: `place_grad` reads values and gives the gradients of places,
// weights and reference, which are a query's own; `value_grad` adds to pixels. One task takes the queries of a head in
// order, for all or for some of its channels: the result is deterministic whatever the number of threads.
#include "../isa.h"
#include "ms_deform_attn.h"

namespace pyvseg::ms_deform_attn_backward {

using namespace ms_deform_attn;

struct Gradients {     // contiguous
  const void* out;     // (B, Q, H, D): the gradient of the result
  void* value;         // (B, S, H, D)
  void* place;         // (B, Q, H, L, P, 2)
  void* weight;        // (B, Q, H, L, P)
  float* by_head;      // fused form: (B, H, Q, L, reference_width), what each head adds to the reference's gradient
  float* reference;    // (B, Q, L, reference_width)
};

struct Task {
  int64_t b, h, begin, end;  // queries of a head, or channels
  float* rows;               // padded map, zero where `pack` leaves it
  void* scratch;
};

struct Kernels {
  int64_t lanes;  // of a vector
  int64_t (*scratch_bytes)(const Problem&);
  void (*place_grad)(const Problem&, const Map&, const Gradients&, const Task&);
  void (*value_grad)(const Problem&, const Map&, const Gradients&, const Task&);
  void (*reference_grad)(const Problem&, const Gradients&, int64_t begin, int64_t end);
};

#ifdef PYVSEG_ISA
namespace {

// Behind the samples: a query's gradient, and the products of its samples.
PYVSEG_INLINE int64_t grad_floats(const Problem& p) { return padded(p.D) + kLanes; }
int64_t scratch_bytes(const Problem& p) { return samples_bytes(p) + (grad_floats(p) + 9 * p.lanes) * 4; }

// Of two vectors made of blocks of 2 * half lanes, the sums of each block's halves: first a's, then b's, in the whole
// vector where halves are 128 bits or more, in each 128 bits where they are less. The sums that come so cheaply are
// those without a general permutation.
PYVSEG_INLINE vfloat half_sums(vfloat a, vfloat b, int half) {
  const int group = half < 4 ? 4 : kLanes;
  vuint low;
  for (int i = 0; i < kLanes; ++i) {
    const int inside = i % group, j = inside % (group / 2);
    low[i] = i - inside + j / half * 2 * half + j % half + (inside < group / 2 ? 0 : kLanes);
  }
  return (vfloat)shuffle((vuint)a, (vuint)b, low) + (vfloat)shuffle((vuint)a, (vuint)b, low + half);
}

// The products of a query's gradient with the pixels under its samples. T vectors of channels; 0: any number.
template <int T>
struct Products {
  const float *rows, *grad;
  const int32_t *pixel, *stride;
  int64_t step;

  // Its lanes, summed up, are the product with one corner of a sample.
  static inline __attribute__((always_inline)) vfloat spread(const Products& p, int64_t sample, int corner) {
    const float* row = p.rows + (p.pixel[sample] + (corner & 1) + (corner & 2 ? p.stride[sample] : 0)) * p.step;
    if (T == 0) {
      vfloat total{};
      for (int64_t c = 0; c < p.step; c += kLanes) total += load(p.grad + c) * load(row + c);
      return total;
    }
    vfloat total = load(p.grad) * load(row);
#pragma GCC unroll 4
    for (int t = 1; t < T; ++t) total += load(p.grad + t * kLanes) * load(row + t * kLanes);
    return total;
  }
  // The same for one corner of several samples, kLanes / samples lanes each.
  template <int samples>
  static inline __attribute__((always_inline)) vfloat spread_all(const Products& p, int64_t first, int corner) {
    if constexpr (samples == 1) {
      return spread(p, first, corner);
    } else {
      const vfloat a = spread_all<samples / 2>(p, first, corner), b = spread_all<samples / 2>(p, first + samples / 2, corner);
      return half_sums(a, b, kLanes / samples);
    }
  }
  // The four products of each of kLanes / 4 samples.
  static inline __attribute__((always_inline)) vfloat of_samples(const Products& p, int64_t first) {
    constexpr int samples = kLanes / 4;
    const vfloat upper = half_sums(spread_all<samples>(p, first, 0), spread_all<samples>(p, first, 1), 2);
    const vfloat lower = half_sums(spread_all<samples>(p, first, 2), spread_all<samples>(p, first, 3), 2);
    return half_sums(upper, lower, 1);
  }
};

PYVSEG_INLINE void interleave(vfloat even, vfloat odd, vfloat& a, vfloat& b) {
  vuint lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i / 2 + (i % 2 ? kLanes : 0);
  a = (vfloat)shuffle((vuint)even, (vuint)odd, lane);
  b = (vfloat)shuffle((vuint)even, (vuint)odd, lane + kLanes / 2);
}

// Gradients of a query's samples in units of pixels and attention, from their four products each.
PYVSEG_INLINE void sample_grads(const Problem& p, const Samples& s, int64_t at, const float* products, float* grad_x, float* grad_y, float* grad_attention) {
  for (int64_t i = 0; i < p.lanes; i += kLanes) {
    vfloat even[2], odd[2], corner[4];
    deinterleave(load(products + 4 * i), load(products + 4 * i + kLanes), even[0], odd[0]);
    deinterleave(load(products + 4 * i + 2 * kLanes), load(products + 4 * i + 3 * kLanes), even[1], odd[1]);
    deinterleave(even[0], even[1], corner[0], corner[2]);
    deinterleave(odd[0], odd[1], corner[1], corner[3]);
    const vfloat x = load(s.x + at + i), y = load(s.y + at + i), attention = load(s.attention + at + i);
    const vfloat across_upper = corner[1] - corner[0], across_lower = corner[3] - corner[2];
    const vfloat upper = corner[0] + x * across_upper, lower = corner[2] + x * across_lower;
    const vint hit = load(s.pixel + at + i) != 0;  // pixel 0 stands for all outside
    store(grad_attention + i, upper + y * (lower - upper));
    store(grad_x + i, hit ? attention * (across_upper + y * (across_lower - across_upper)) : vfloat{});
    store(grad_y + i, hit ? attention * (lower - upper) : vfloat{});
  }
}

// Gradient of logits from that of their softmax.
PYVSEG_INLINE void softmax_grad(const float* attention, float* grad, int64_t lanes) {
  vfloat mean{};
  for (int64_t i = 0; i < lanes; i += kLanes) mean += load(attention + i) * load(grad + i);
  mean = fold(mean, [](vfloat a, vfloat b) { return a + b; });
  for (int64_t i = 0; i < lanes; i += kLanes) store(grad + i, load(attention + i) * (load(grad + i) - mean));
}

// What the query's samples add to its reference points or boxes.
template <typename G>
PYVSEG_INLINE void add_up_reference(const Problem& p, const Map& map, const G* place, const float* grad_x, const float* grad_y, float* out) {
  for (int64_t l = 0; l < p.L; ++l, out += p.reference_width) {
    float x = 0, y = 0, across = 0, down = 0;
    for (int64_t i = l * p.P; i < (l + 1) * p.P; ++i) {
      x += grad_x[i], y += grad_y[i];
      if (p.reference_width == 4) across += grad_x[i] * load1(place + 2 * i), down += grad_y[i] * load1(place + 2 * i + 1);
    }
    const float width = map.width[l * p.P], height = map.height[l * p.P], half = 0.5f / float(p.P);
    out[0] = x * width, out[1] = y * height;
    if (p.reference_width == 4) out[2] = across * width * half, out[3] = down * height * half;
  }
}

template <int T, typename V, typename G>
void place_grad_head(const Problem& p, const Map& map, const Gradients& g, const Task& task) {
  const Samples s = samples_in(task.scratch, p);
  const int64_t n = p.L * p.P, step = T ? T * kLanes : padded(p.D), h = task.h;
  float* grad = (float*)((char*)task.scratch + samples_bytes(p));
  float *products = grad + grad_floats(p), *grad_x = products + 4 * p.lanes, *grad_y = grad_x + p.lanes;
  float *grad_weight = grad_y + p.lanes, *grad_place = grad_weight + p.lanes;
  for (int64_t c = p.D; c < step; ++c) grad[c] = 0;
  for (int64_t i = 4 * n; i < 4 * p.lanes; ++i) products[i] = 0;  // of lanes without a sample
  for (int64_t q = task.begin; q < task.end; ++q) {
    const int64_t row = (q - task.begin) % p.block, at = row * p.lanes, head = (task.b * p.Q + q) * p.H + h;
    if (row == 0) locate_block<false>(p, map, task.b, h, s, q, q + p.block < task.end ? q + p.block : task.end);
    copy_row(grad, (const V*)g.out + head * p.D, p.D);
    const Products<T> dot{task.rows, grad, s.pixel + at, map.stride, step};
    for (int64_t i = 0; i < n; i += kLanes / 4) store(products + 4 * i, Products<T>::of_samples(dot, i));
    sample_grads(p, s, at, products, grad_x, grad_y, grad_weight);
    if (p.reference) {
      const G* place = (const G*)p.place + task.b * p.place_batch + q * p.place_query + h * n * 2;
      add_up_reference(p, map, place, grad_x, grad_y, g.by_head + ((task.b * p.H + h) * p.Q + q) * p.L * p.reference_width);
      softmax_grad(s.attention + at, grad_weight, p.lanes);
    }
    for (int64_t i = 0; i < p.lanes; i += kLanes) {
      const Frame f = frame_of(p, map, task.b, q, i);
      vfloat a, b;
      interleave(load(grad_x + i) * f.scale_x, load(grad_y + i) * f.scale_y, a, b);
      store(grad_place + 2 * i, a), store(grad_place + 2 * i + kLanes, b);
    }
    copy_row((G*)g.place + head * n * 2, grad_place, 2 * n);
    copy_row((G*)g.weight + head * n, grad_weight, n);
  }
}
void place_grad(const Problem& p, const Map& map, const Gradients& g, const Task& task) {
  with_number(p.number, [&](auto v) {
    using V = decltype(v);
    pack_head<V>(p, map, task.b, task.h, task.rows);
    with_number(p.geometry, [&](auto w) {
      using G = decltype(w);
      padded(p.D) == 2 * kLanes ? place_grad_head<2, V, G>(p, map, g, task) : place_grad_head<0, V, G>(p, map, g, task);
    });
  });
}

// Adds a query's gradient to the pixels under its samples.
template <int T>
PYVSEG_INLINE void scatter(const Problem& p, const Map& map, const Samples& s, int64_t at, const float* grad, float* rows, int64_t step) {
  vfloat g[T];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) g[t] = load(grad + t * kLanes);
  for (int64_t i = 0; i < p.L * p.P; ++i) {
    float* above = rows + s.pixel[at + i] * step;
    float* pixels[4] = {above, above + step, above + map.stride[i] * step, above + map.stride[i] * step + step};
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c)
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t)
        store(pixels[c] + t * kLanes, load(pixels[c] + t * kLanes) + s.corner[c][at + i] * g[t]);
  }
}

template <typename V>
void unpack_head(const Problem& p, const Map& map, const Task& task, int64_t step, V* to, int64_t pixels) {
  to += (task.b * pixels * p.H + task.h) * p.D + task.begin;
  for (int64_t l = 0; l < p.L; ++l)
    for (int64_t y = 0; y < p.shapes[2 * l]; ++y) {
      const float* from = task.rows + (map.origin[l * p.P] + y * map.stride[l * p.P]) * step;
      for (int64_t x = 0; x < p.shapes[2 * l + 1]; ++x, from += step, to += p.H * p.D) copy_row(to, from, task.end - task.begin);
    }
}

// The channels from task.begin to task.end of a head.
template <typename V>
void value_grad_head(const Problem& p, const Map& map, const Gradients& g, const Task& task) {
  const Samples s = samples_in(task.scratch, p);
  const int64_t channels = task.end - task.begin, step = padded(channels);
  float* grad = (float*)((char*)task.scratch + samples_bytes(p));
  for (int64_t c = channels; c < step; ++c) grad[c] = 0;
  int64_t pixels = 0;
  for (int64_t l = 0; l < p.L; ++l) pixels += p.shapes[2 * l] * p.shapes[2 * l + 1];
  __builtin_memset(task.rows, 0, size_t(map.pixels * step) * 4);
  for (int64_t q = 0; q < p.Q; ++q) {
    const int64_t row = q % p.block, at = row * p.lanes;
    if (row == 0) locate_block<false>(p, map, task.b, task.h, s, q, q + p.block < p.Q ? q + p.block : p.Q);
    copy_row(grad, (const V*)g.out + ((task.b * p.Q + q) * p.H + task.h) * p.D + task.begin, channels);
    if (step == 2 * kLanes) {
      scatter<2>(p, map, s, at, grad, task.rows, 2 * kLanes);
      continue;
    }
    int64_t c = 0;
    for (; c + 4 * kLanes <= step; c += 4 * kLanes) scatter<4>(p, map, s, at, grad + c, task.rows + c, step);
    for (; c < step; c += kLanes) scatter<1>(p, map, s, at, grad + c, task.rows + c, step);
  }
  unpack_head(p, map, task, step, (V*)g.value, pixels);
}
void value_grad(const Problem& p, const Map& map, const Gradients& g, const Task& task) {
  with_number(p.number, [&](auto v) { value_grad_head<decltype(v)>(p, map, g, task); });
}

// Sums over heads, for rows (b, q) of the reference.
void reference_grad(const Problem& p, const Gradients& g, int64_t begin, int64_t end) {
  const int64_t width = p.L * p.reference_width;
  for (int64_t i = begin; i < end; ++i) {
    float* total = g.reference + i * width;
    __builtin_memset(total, 0, size_t(width) * 4);
    for (int64_t h = 0; h < p.H; ++h) axpy(total, 1.0f, g.by_head + ((i / p.Q * p.H + h) * p.Q + i % p.Q) * width, width);
  }
}

}  // namespace

PYVSEG_KERNELS = {kLanes, scratch_bytes, place_grad, value_grad, reference_grad};
#else
}  // namespace pyvseg::ms_deform_attn_backward

#include "ms_deform_attn_launch.h"

namespace pyvseg::ms_deform_attn_backward {

PYVSEG_KERNEL_TABLE

namespace {

// body(task) for B * H heads cut into parts of 0..size, with rows of a padded map for each thread.
template <typename Body>
void for_heads(const Problem& p, int64_t parts, int64_t size, int64_t grain, int64_t row_floats, int64_t scratch_bytes, const Body& body) {
  parallel_for(0, p.B * p.H * parts, grain_of(p.Q / parts * p.L * p.P * p.D + row_floats), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> rows(new float[row_floats]());
    const std::unique_ptr<char[]> scratch(new char[scratch_bytes]);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / parts, first = i % parts * grain;
      body(Task{head / p.H, head % p.H, first, std::min(size, first + grain), rows.get(), scratch.get()});
    }
  });
}

// The gradients of value, place, weight and, in the fused form, reference.
std::vector<Tensor> run(const Tensor& grad, const Arguments& arguments) {
  const Kernels& kernel = kernels();
  const Layout layout(arguments, kernel.lanes);
  const Problem& p = layout.problem;
  STD_TORCH_CHECK(grad.numel() == p.B * p.Q * p.H * p.D && grad.size(1) == p.Q && number_of(grad) == p.number, arguments.op,
                  ": grad must be (B, Q, H * D) of value's dtype");
  const Tensor grads = dense(grad);
  const auto like = [](const Tensor& t) { return torch::stable::new_empty(t, t.sizes()); };
  Tensor value = like(arguments.value), place = like(arguments.place), weight = like(arguments.weight);
  std::vector<Tensor> result{value, place, weight};
  std::vector<float> by_head(p.reference ? p.B * p.H * p.Q * p.L * p.reference_width : 0);
  Tensor reference = torch::stable::new_empty(arguments.value, {p.B, p.Q, p.L, p.reference_width}, ScalarType::Float);
  if (p.L * p.P == 0 || p.Q == 0 || arguments.value.numel() == 0) {
    for (Tensor* t : {&value, &place, &weight, &reference}) torch::stable::zero_(*t);
  } else {
    const Gradients g{grads.const_data_ptr(), value.mutable_data_ptr(), place.mutable_data_ptr(), weight.mutable_data_ptr(),
                      by_head.data(), static_cast<float*>(reference.mutable_data_ptr())};
    const Map map = layout.padded();
    const int64_t threads = torch::stable::get_num_threads(), wanted = (threads + p.B * p.H - 1) / (p.B * p.H);
    const int64_t width = (p.D + kernel.lanes - 1) / kernel.lanes * kernel.lanes, floats = layout.padded_pixels * width;
    const int64_t queries = (p.Q + wanted - 1) / wanted, channels = (width / kernel.lanes + wanted - 1) / wanted * kernel.lanes;
    for_heads(p, (p.Q + queries - 1) / queries, p.Q, queries, floats, kernel.scratch_bytes(p), [&](const Task& task) { kernel.place_grad(p, map, g, task); });
    for_heads(p, (p.D + channels - 1) / channels, p.D, channels, floats, kernel.scratch_bytes(p), [&](const Task& task) { kernel.value_grad(p, map, g, task); });
    if (p.reference) parallel_for(0, p.B * p.Q, 256, [&](int64_t begin, int64_t end) { kernel.reference_grad(p, g, begin, end); });
  }
  if (arguments.reference) result.push_back(torch::stable::to(reference, arguments.reference->scalar_type()));
  return result;
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(const Tensor& grad, const Tensor& value, const std::vector<int64_t>& shapes,
                                                           const Tensor& locations, const Tensor& weights, bool) {
  const std::vector<Tensor> grads = run(grad, {"ms_deform_attn_backward", value, shapes, nullptr, locations, weights});
  return {grads[0], grads[1], grads[2]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ms_deform_attn_fused_backward(const Tensor& grad, const Tensor& value, const std::vector<int64_t>& shapes,
                                                                         const Tensor& reference, const Tensor& offsets, const Tensor& logits, bool) {
  const std::vector<Tensor> grads = run(grad, {"ms_deform_attn_fused_backward", value, shapes, &reference, offsets, logits});
  return {grads[0], grads[3], grads[1], grads[2]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyvseg, CPU, m) {
  m.impl("ms_deform_attn_backward", TORCH_BOX(&ms_deform_attn_backward));
  m.impl("ms_deform_attn_fused_backward", TORCH_BOX(&ms_deform_attn_fused_backward));
}
#endif

}  // namespace pyvseg::ms_deform_attn_backward
