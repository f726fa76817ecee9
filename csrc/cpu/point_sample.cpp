// SPDX-License-Identifier: Apache-2.0
// Bilinear samples of masks at points, and their gradient (see pyvseg/ops/point_sample.py). The four corners and weights of
// a point are computed once for all the planes that are sampled there.
#include <cstdint>

#include "../isa.h"
#include "vec.h"

namespace pyvseg::point_sample {

enum class Element : int32_t { kFloat, kBfloat16, kHalf, kByte };  // the first three as Number of launch.h

struct Corners {
  int32_t index[4];  // into a plane; of corners outside any index of the plane, with weight 0
  float weight[4];
  int64_t point;  // whose corners these are: they may stand in another order
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

constexpr int64_t kAhead = 64;  // points

struct Kernels {
  void (*corners)(const float* points, int64_t n, int64_t height, int64_t width, Corners* out);
  void (*sample)(const Planes&, int64_t plane);
  void (*backward)(const Gradients&, int64_t plane);
};

#ifdef PYVSEG_ISA
namespace {

struct Axis {
  int32_t index[2];
  float weight[2];
};

// The pixels beside `at` in [0, 1] of an axis; pixel centres at +0.5, zeros outside. NaN is outside.
PYVSEG_INLINE Axis axis_of(float at, int64_t size) {
  const float x = at * float(size) - 0.5f;
  if (!(x > -1.0f && x < float(size))) return {{0, 0}, {0, 0}};
  const int32_t right = int32_t(x + 1.0f), left = right - 1;
  const float fraction = x - float(left);
  if (left < 0) return {{0, 0}, {0, fraction}};
  if (right >= size) return {{int32_t(size - 1), int32_t(size - 1)}, {left < size ? 1.0f - fraction : 0.0f, 0}};
  return {{left, right}, {1.0f - fraction, fraction}};
}

void corners(const float* points, int64_t n, int64_t height, int64_t width, Corners* out) {
  for (int64_t i = 0; i < n; ++i) {
    const Axis x = axis_of(points[2 * i], width), y = axis_of(points[2 * i + 1], height);
    for (int c = 0; c < 4; ++c) {
      out[i].index[c] = y.index[c / 2] * int32_t(width) + x.index[c % 2];
      out[i].weight[c] = y.weight[c / 2] * x.weight[c % 2];
    }
    out[i].point = i;
  }
}

PYVSEG_INLINE float number(const uint8_t* p) { return *p ? 1.0f : 0.0f; }
template <typename T>
PYVSEG_INLINE float number(const T* p) {
  return load1(p);
}

typedef float quad __attribute__((vector_size(16)));
typedef double pair __attribute__((vector_size(16)));

// The four corners of a point times their weights.
template <typename T>
PYVSEG_INLINE float blend(const T* from, const Corners& c) {
  const float top = c.weight[0] * number(from + c.index[0]) + c.weight[1] * number(from + c.index[1]);
  const float bottom = c.weight[2] * number(from + c.index[2]) + c.weight[3] * number(from + c.index[3]);
  return top + bottom;
}
PYVSEG_INLINE float blend(const float* from, const Corners& c) {
  quad value, weight;
  if (__builtin_expect(c.index[1] == c.index[0], 0)) {  // at the border
    value = quad{from[c.index[0]], from[c.index[1]], from[c.index[2]], from[c.index[3]]};
  } else {
    double top, bottom;  // two floats each
    __builtin_memcpy(&top, from + c.index[0], 8);
    __builtin_memcpy(&bottom, from + c.index[2], 8);
    value = (quad)pair{top, bottom};
  }
  __builtin_memcpy(&weight, c.weight, sizeof weight);
  value *= weight;
  return (value[0] + value[1]) + (value[2] + value[3]);
}

template <typename T, typename Out>
void sample_of(const Planes& p, int64_t plane) {
  const T* from = (const T*)p.masks + plane * p.size;
  Out* to = (Out*)p.samples + plane * p.points;
  for (int64_t i = 0; i < p.points; ++i) {
    const Corners& c = p.corners[i];
    __builtin_prefetch(from + p.corners[i + kAhead < p.points ? i + kAhead : i].index[2]);
    store1(to + c.point, blend(from, c));
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
    const Corners& at = g.corners[i];
    const float grad = load1(from + at.point);
    for (int c = 0; c < 4; ++c) sums[at.index[c]] += at.weight[c] * grad;
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

// The same corners from top to bottom, so that neighbours in the table share cache lines of the plane.
void sort_by_row(Corners* corners, int64_t n, int64_t height, int64_t width) {
  std::vector<int64_t> start(height + 1);
  for (int64_t i = 0; i < n; ++i) ++start[corners[i].index[0] / width + 1];
  for (int64_t row = 0; row < height; ++row) start[row + 1] += start[row];
  const std::vector<Corners> unsorted(corners, corners + n);
  for (const Corners& c : unsorted) corners[start[c.index[0] / width]++] = c;
}

// Corners of points (G, K, 2) float32 in planes of the given size, one row per set of points.
std::vector<Corners> corners_of(const Tensor& points, int64_t height, int64_t width, int64_t planes) {
  STD_TORCH_CHECK(points.dim() == 3 && points.size(2) == 2 && points.scalar_type() == ScalarType::Float, "point_sample: points");
  STD_TORCH_CHECK(height * width <= INT32_MAX, "point_sample: planes of 2^31 elements or more");
  const Tensor rows = dense(points);
  const int64_t sets = points.size(0), n = points.size(1);
  std::vector<Corners> corners(sets * n);
  const float* from = rows.const_data_ptr<float>();
  const Kernels& kernel = kernels();
  parallel_for(0, sets, grain_of(n), [&](int64_t begin, int64_t end) {
    for (int64_t set = begin; set < end; ++set) {
      kernel.corners(from + 2 * set * n, n, height, width, corners.data() + set * n);
      if (planes >= 8 * sets) sort_by_row(corners.data() + set * n, n, height, width);  // costs about as much as one plane
    }
  });
  return corners;
}

// The row of corners of a plane: each mask its own, or all the same.
const Corners* corners_at(const std::vector<Corners>& corners, const Tensor& points, int64_t mask) {
  return corners.data() + (points.size(0) == 1 ? 0 : mask * points.size(1));
}

// masks (N, T, H, W) float32, bfloat16, float16 or bool; points (N or 1, K, 2) float32 -> (N, T, K) of the masks' dtype, float32 for bool
Tensor point_sample(const Tensor& masks, const Tensor& points) {
  STD_TORCH_CHECK(masks.dim() == 4, "point_sample: masks must have four dimensions");
  const Tensor planes = dense(masks);
  const int64_t N = planes.size(0), T = planes.size(1), H = planes.size(2), W = planes.size(3), K = points.size(1);
  STD_TORCH_CHECK(points.size(0) == N || points.size(0) == 1, "point_sample: need one set of points, or one per mask");
  const Element element = element_of(planes);
  Tensor samples = torch::stable::new_empty(masks, {N, T, K}, element == Element::kByte ? ScalarType::Float : masks.scalar_type());
  if (H * W == 0) return torch::stable::fill_(samples, 0.0);
  const std::vector<Corners> corners = corners_of(points, H, W, N * T);
  const void* from = planes.const_data_ptr();
  void* to = samples.mutable_data_ptr();
  const Kernels& kernel = kernels();
  parallel_for(0, N * T, grain_of(K), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernel.sample({from, to, corners_at(corners, points, i / T), H * W, K, element}, i);
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
  const std::vector<Corners> corners = corners_of(points, height, width, N * T);
  const Element element = element_of(samples);
  const void* from = samples.const_data_ptr();
  void* to = masks.mutable_data_ptr();
  const Kernels& kernel = kernels();
  parallel_for(0, N * T, grain_of(K + size), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(element == Element::kFloat ? 0 : size);
    for (int64_t i = begin; i < end; ++i)
      kernel.backward({from, to, corners_at(corners, points, i / T), size, K, element, scratch.data()}, i);
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
