// SPDX-License-Identifier: Apache-2.0
// Bilinear samples of masks at points, and their gradient (see pyvseg/ops/point_sample.py). The corners
// and weights of points are computed once for all the planes that are sampled there, and a vector of points is sampled at once.
#include <cstdint>

#include "../isa.h"
#include "vec.h"

namespace pyvseg::point_sample {

enum class Element : int32_t { kFloat, kBfloat16, kHalf, kByte };  // the first three as Number of launch.h

constexpr int kBlock = 16;  // points

// Where a block of points lies in a plane: the left corners, how far right of them (0 or 1) the right ones are, and the
// weights of top left, top right, bottom left and bottom right. Of corners outside, any index of the plane with weight 0.
struct Corners {
  int32_t top[kBlock], bottom[kBlock], step[kBlock];
  float weight[4][kBlock];
};

struct Planes {
  const void* masks;  // planes of `size` elements
  void* samples;      // rows of `points`, in the masks' dtype, float32 for bytes
  const Corners* corners;
  int64_t size, points;
  Element element;
};

// The other way round: gradient of the samples to gradient of the planes.
struct Gradients {
  const void* samples;
  void* masks;
  const Corners* corners;
  int64_t size, points;
  Element element;
  float* scratch;  // size floats; for float32 masks nothing
};

struct Kernels {
  void (*corners)(const float* points, int64_t n, int64_t height, int64_t width, Corners* out);
  void (*sample)(const Planes&, int64_t plane);
  void (*backward)(const Gradients&, int64_t plane);
};

#ifdef PYVSEG_ISA
namespace {

struct Axis {
  vint low, high;
  vfloat low_weight, high_weight;
};

// The pixels beside `at` in [0, 1] of an axis; pixel centres at +0.5, zeros outside. NaN is outside.
PYVSEG_INLINE Axis axis_of(vfloat at, int32_t size) {
  const vfloat wanted = at * float(size) - 0.5f;
  const vint inside = (wanted > -1.0f) & (wanted < float(size));
  const vfloat x = inside ? wanted : vfloat{};
  const vint right = __builtin_convertvector(x + 1.0f, vint), left = right - 1;
  const vfloat fraction = x - __builtin_convertvector(left, vfloat);
  const vint last = splat(size - 1), low = left < 0 ? vint{} : left;
  return {low > last ? last : low, right > last ? last : right, (inside & (left >= 0) & (left <= last)) != 0 ? 1.0f - fraction : vfloat{},
          (inside & (right <= last)) != 0 ? fraction : vfloat{}};
}

void corners(const float* points, int64_t n, int64_t height, int64_t width, Corners* out) {
  vuint even;
  for (int i = 0; i < kLanes; ++i) even[i] = 2 * i;
  for (int64_t i = 0; i < n; i += kBlock, ++out) {
    float rest[2 * kBlock];
    const float* from = points + 2 * i;
    if (n - i < kBlock) {
      for (int j = 0; j < 2 * kBlock; ++j) rest[j] = j < 2 * (n - i) ? from[j] : -1.0f;
      from = rest;
    }
    for (int j = 0; j < kBlock; j += kLanes) {
      const vuint a = (vuint)load(from + 2 * j), b = (vuint)load(from + 2 * j + kLanes);
      const Axis x = axis_of((vfloat)shuffle(a, b, even), int32_t(width)), y = axis_of((vfloat)shuffle(a, b, even + 1), int32_t(height));
      store(out->top + j, y.low * int32_t(width) + x.low);
      store(out->bottom + j, y.high * int32_t(width) + x.low);
      store(out->step + j, x.high - x.low);
      store(out->weight[0] + j, y.low_weight * x.low_weight);
      store(out->weight[1] + j, y.low_weight * x.high_weight);
      store(out->weight[2] + j, y.high_weight * x.low_weight);
      store(out->weight[3] + j, y.high_weight * x.high_weight);
    }
  }
}

PYVSEG_INLINE float number(const uint8_t* p) { return *p ? 1.0f : 0.0f; }
template <typename T>
PYVSEG_INLINE float number(const T* p) {
  return load1(p);
}

struct Pair {
  vfloat left, right;
};

// Elements at `index` of a plane and `step` further.
template <typename T>
PYVSEG_INLINE Pair pair_one_by_one(const T* plane, vint index, vint step) {
  Pair pair;
  for (int i = 0; i < kLanes; ++i) {
    pair.left[i] = number(plane + index[i]);
    pair.right[i] = number(plane + index[i] + step[i]);
  }
  return pair;
}

#if defined(__AVX512F__)
// Neighbours are read together.
PYVSEG_INLINE bool all_neighbours(vint step) { return _mm512_test_epi32_mask((__m512i)step, (__m512i)step) == 0xffff; }
PYVSEG_INLINE Pair pair_at(const float* plane, int64_t, vint index, vint step) {
  if (__builtin_expect(!all_neighbours(step), 0)) return pair_one_by_one(plane, index, step);
  const vuint a = (vuint)_mm512_i32gather_pd(_mm512_castsi512_si256((__m512i)index), plane, 4);
  const vuint b = (vuint)_mm512_i32gather_pd(_mm512_extracti64x4_epi64((__m512i)index, 1), plane, 4);
  vuint even;
  for (int i = 0; i < kLanes; ++i) even[i] = 2 * i;
  return {(vfloat)shuffle(a, b, even), (vfloat)shuffle(a, b, even + 1)};
}
PYVSEG_INLINE vfloat widened(bfloat16, vuint halves) { return (vfloat)(halves << 16); }
PYVSEG_INLINE vfloat widened(float16, vuint halves) { return (vfloat)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)halves)); }
template <typename T>
PYVSEG_INLINE Pair pair_at(const T* plane, int64_t, vint index, vint step) {
  if (__builtin_expect(!all_neighbours(step), 0)) return pair_one_by_one(plane, index, step);
  const vuint both = (vuint)_mm512_i32gather_epi32((__m512i)index, plane, 2);
  return {widened(T{}, both & 0xffff), widened(T{}, both >> 16)};
}
PYVSEG_INLINE Pair pair_at(const uint8_t* plane, int64_t size, vint index, vint step) {
  if (__builtin_expect(size < 4, 0)) return pair_one_by_one(plane, index, step);
  const vint last = splat(int32_t(size - 4)), from = index > last ? last : index;  // four bytes from here lie in the plane
  const vuint bytes = (vuint)_mm512_i32gather_epi32((__m512i)from, plane, 1) >> (vuint)((index - from) * 8);
  const vuint left = bytes & 0xff, right = step != 0 ? bytes & 0xff00 : left;
  return {left != 0 ? splat(1.0f) : vfloat{}, right != 0 ? splat(1.0f) : vfloat{}};
}
#else
template <typename T>
PYVSEG_INLINE Pair pair_at(const T* plane, int64_t, vint index, vint step) {
  return pair_one_by_one(plane, index, step);
}
#endif

template <typename T, typename Out>
void sample_of(const Planes& p, int64_t plane) {
  const T* from = (const T*)p.masks + plane * p.size;
  Out* to = (Out*)p.samples + plane * p.points;
  for (int64_t i = 0; i < p.points; i += kLanes) {
    const Corners& c = p.corners[i / kBlock];
    const int64_t at = i % kBlock;
    const vint step = load(c.step + at);
    const Pair top = pair_at(from, p.size, load(c.top + at), step), bottom = pair_at(from, p.size, load(c.bottom + at), step);
    const vfloat above = load(c.weight[0] + at) * top.left + load(c.weight[1] + at) * top.right;
    const vfloat below = load(c.weight[2] + at) * bottom.left + load(c.weight[3] + at) * bottom.right;
    if (p.points - i >= kLanes) {
      store(to + i, above + below);
      continue;
    }
    Out rest[kLanes];
    store(rest, above + below);
    for (int64_t j = 0; j < p.points - i; ++j) to[i + j] = rest[j];
  }
}
void sample(const Planes& p, int64_t plane) {
  if (p.element == Element::kFloat) sample_of<float, float>(p, plane);
  if (p.element == Element::kBfloat16) sample_of<bfloat16, bfloat16>(p, plane);
  if (p.element == Element::kHalf) sample_of<float16, float16>(p, plane);
  if (p.element == Element::kByte) sample_of<uint8_t, float>(p, plane);
}

template <typename T>
void backward_of(const Gradients& g, int64_t plane, float* sums) {
  const T* from = (const T*)g.samples + plane * g.points;
  __builtin_memset(sums, 0, g.size * sizeof(float));
  for (int64_t i = 0; i < g.points; ++i) {
    const Corners& c = g.corners[i / kBlock];
    const int64_t at = i % kBlock;
    const float grad = load1(from + i);
    float *top = sums + c.top[at], *bottom = sums + c.bottom[at];
    const int32_t step = c.step[at];
    top[0] += c.weight[0][at] * grad;
    top[step] += c.weight[1][at] * grad;
    bottom[0] += c.weight[2][at] * grad;
    bottom[step] += c.weight[3][at] * grad;
  }
}
template <typename T>
void rounded_backward_of(const Gradients& g, int64_t plane) {
  backward_of<T>(g, plane, g.scratch);
  copy_rounded((T*)g.masks + plane * g.size, g.scratch, g.size);
}
void backward(const Gradients& g, int64_t plane) {
  if (g.element == Element::kFloat) backward_of<float>(g, plane, (float*)g.masks + plane * g.size);
  if (g.element == Element::kBfloat16) rounded_backward_of<bfloat16>(g, plane);
  if (g.element == Element::kHalf) rounded_backward_of<float16>(g, plane);
}

}  // namespace

PYVSEG_KERNELS = {corners, sample, backward};
#else
}  // namespace pyvseg::point_sample

#include "launch.h"

namespace pyvseg::point_sample {

PYVSEG_KERNEL_TABLE

namespace {

static_assert(int(Element::kHalf) == int(Number::kHalf) && int(Element::kBfloat16) == int(Number::kBfloat16));

Element element_of(const Tensor& t) {
  return t.scalar_type() == ScalarType::Bool ? Element::kByte : Element(number_of(t));
}

int64_t blocks_of(int64_t points) { return (points + kBlock - 1) / kBlock; }

// Points (G, K, 2), one set for all masks or one for each, and their corners in planes of one size.
class Sets {
 public:
  Sets(const Tensor& points, int64_t height, int64_t width) : rows_(dense(points)), height_(height), width_(width) {
    STD_TORCH_CHECK(points.dim() == 3 && points.size(2) == 2 && points.scalar_type() == ScalarType::Float, "point_sample: points");
    STD_TORCH_CHECK(height * width <= INT32_MAX, "point_sample: planes of 2^31 elements or more");
    points_ = rows_.size(1);
    if (rows_.size(0) != 1) return;
    shared_.resize(blocks_of(points_));
    parallel_for(0, shared_.size(), grain_of(8 * kBlock), [&](int64_t begin, int64_t end) {
      fill(0, begin * kBlock, std::min(end * kBlock, points_), shared_.data() + begin);
    });
  }

  // A thread's last set of its own.
  struct Own {
    std::vector<Corners> corners;
    int64_t mask = -1;
  };

  const Corners* corners(int64_t mask, Own& own) const {
    if (rows_.size(0) == 1) return shared_.data();
    own.corners.resize(blocks_of(points_));
    if (own.mask != mask) fill(mask, 0, points_, own.corners.data());
    own.mask = mask;
    return own.corners.data();
  }

 private:
  void fill(int64_t set, int64_t begin, int64_t end, Corners* out) const {
    const float* from = rows_.const_data_ptr<float>() + 2 * (set * points_ + begin);
    kernels().corners(from, end - begin, height_, width_, out);
  }

  Tensor rows_;
  int64_t points_, height_, width_;
  std::vector<Corners> shared_;
};

// masks (N, T, H, W) float32, bfloat16, float16 or bool; points (N or 1, K, 2) float32 -> (N, T, K) of the masks' dtype, float32 for bool
Tensor point_sample(const Tensor& masks, const Tensor& points) {
  STD_TORCH_CHECK(masks.dim() == 4, "point_sample: masks must have four dimensions");
  const Tensor planes = dense(masks);
  const int64_t N = planes.size(0), T = planes.size(1), H = planes.size(2), W = planes.size(3), K = points.size(1);
  STD_TORCH_CHECK(points.size(0) == N || points.size(0) == 1, "point_sample: need one set of points, or one per mask");
  const Element element = element_of(planes);
  Tensor samples = torch::stable::new_empty(masks, {N, T, K}, element == Element::kByte ? ScalarType::Float : masks.scalar_type());
  if (H * W == 0) return torch::stable::fill_(samples, 0.0);
  const Sets sets(points, H, W);
  const void* from = planes.const_data_ptr();
  void* to = samples.mutable_data_ptr();
  const Kernels& kernel = kernels();
  parallel_for(0, N * T, grain_of(K), [&](int64_t begin, int64_t end) {
    Sets::Own own;
    for (int64_t i = begin; i < end; ++i) kernel.sample({from, to, sets.corners(i / T, own), H * W, K, element}, i);
  });
  return samples;
}

// grad (N, T, K), in the masks' dtype -> (N, T, H, W)
Tensor point_sample_backward(const Tensor& grad, const Tensor& points, int64_t height, int64_t width) {
  STD_TORCH_CHECK(grad.dim() == 3, "point_sample_backward: grad must have three dimensions");
  const Tensor samples = dense(grad);
  const int64_t N = samples.size(0), T = samples.size(1), K = samples.size(2), size = height * width;
  STD_TORCH_CHECK(points.size(1) == K && (points.size(0) == N || points.size(0) == 1), "point_sample_backward: points do not fit");
  Tensor masks = torch::stable::new_empty(grad, {N, T, height, width});
  if (size == 0) return masks;
  const Sets sets(points, height, width);
  const Element element = element_of(samples);
  const void* from = samples.const_data_ptr();
  void* to = masks.mutable_data_ptr();
  const Kernels& kernel = kernels();
  parallel_for(0, N * T, grain_of(K + size), [&](int64_t begin, int64_t end) {
    Sets::Own own;
    std::vector<float> scratch(element == Element::kFloat ? 0 : size);
    for (int64_t i = begin; i < end; ++i)
      kernel.backward({from, to, sets.corners(i / T, own), size, K, element, scratch.data()}, i);
  });
  return masks;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvseg, m) {
  m.def("point_sample(Tensor masks, Tensor points) -> Tensor");
  m.def("point_sample_backward(Tensor grad, Tensor points, int height, int width) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(pyvseg, CPU, m) {
  m.impl("point_sample", TORCH_BOX(&point_sample));
  m.impl("point_sample_backward", TORCH_BOX(&point_sample_backward));
}
#endif

}  // namespace pyvseg::point_sample
