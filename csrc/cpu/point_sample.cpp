// SPDX-License-Identifier: Apache-2.0
// Bilinear samples of masks at points, and their gradient (see pyvseg/ops/point_sample.py). The corners
// and weights of points are computed once for all the planes that are sampled there, and a vector of points is sampled at once.
#include <cstdint>

#include "../isa.h"
#include "vec.h"

namespace pyvseg::point_sample {

enum class Element : int32_t { kFloat, kBfloat16, kHalf, kByte };  // the first three as Number of launch.h

constexpr int kBlock = 16;             // points
constexpr int64_t kFetched = 1 << 19;  // bytes that fit the second cache

struct Layout {
  int64_t height, width, row, column;  // of a plane; the last two are strides in elements
  int64_t size() const { return height * width; }
  bool dense() const { return column == 1 && row == width; }
  bool fits() const { return (height - 1) * row + (width - 1) * column < INT32_MAX; }  // corners
};

// Where a block of points lies in a plane: the left corners of the upper and of the lower row, and the weights of top left,
// top right, bottom left and bottom right. The right corners are those one column further, in a plane of one column the
// same. Of corners outside, the weight is 0 and the place any in the plane; what lies there does not count.
struct Corners {
  int32_t top[kBlock], bottom[kBlock];
  float weight[4][kBlock];
};

struct Samples {
  const void* plane;
  void* samples;  // (points), in the plane's dtype, float32 for bytes
  const Corners* corners;
  Layout layout;
  int64_t points;
  Element element;
};

// The other way round: gradient of the samples to gradient of the plane, which is dense.
struct Gradients {
  const void* samples;
  void* plane;
  const Corners* corners;
  Layout layout;
  int64_t points;
  Element element;
  float* scratch;  // of the plane's size; for float32 nothing
};

struct Kernels {
  void (*corners)(const float* points, int64_t n, const Layout&, Corners* out);
  void (*sample)(const Samples&);
  void (*backward)(const Gradients&);
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

// The same with `high` beside `low` at the borders too, where only one of the two counts.
PYVSEG_INLINE Axis neighbours(const Axis& a, int32_t size) {
  if (size == 1) return a;
  const vint only_high = a.high == 0, only_low = a.low == size - 1;
  return {only_low != 0 ? a.low - 1 : a.low, only_high != 0 ? a.high + 1 : a.high,
          only_high != 0 ? a.high_weight : only_low != 0 ? vfloat{} : a.low_weight,
          only_low != 0 ? a.low_weight : only_high != 0 ? vfloat{} : a.high_weight};
}

void corners(const float* points, int64_t n, const Layout& layout, Corners* out) {
  const int32_t height = int32_t(layout.height), width = int32_t(layout.width), row = int32_t(layout.row), column = int32_t(layout.column);
  const vuint even = 2 * (vuint)lane_index();
  for (int64_t i = 0; i < n; i += kBlock, ++out) {
    float rest[2 * kBlock];
    const float* from = points + 2 * i;
    if (n - i < kBlock) {
      for (int j = 0; j < 2 * kBlock; ++j) rest[j] = j < 2 * (n - i) ? from[j] : -1.0f;
      from = rest;
    }
    for (int j = 0; j < kBlock; j += kLanes) {
      const vuint a = (vuint)load(from + 2 * j), b = (vuint)load(from + 2 * j + kLanes);
      const Axis x = neighbours(axis_of((vfloat)shuffle(a, b, even), width), width), y = axis_of((vfloat)shuffle(a, b, even + 1), height);
      store(out->top + j, y.low * row + x.low * column);
      store(out->bottom + j, y.high * row + x.low * column);
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

// 0, 1, ... n - 1 as a pack: a vector of separate elements is quickest to make by naming them all at once.
template <int...>
struct Indices {};
template <int n, int... i>
struct UpTo : UpTo<n - 1, n - 1, i...> {};
template <int... i>
struct UpTo<0, i...> {
  typedef Indices<i...> type;
};
template <int n>
using Up = typename UpTo<n>::type;

struct Pair {
  vfloat left, right;
};

// Elements at `index` of a plane and `step` further.
template <typename T, int... i>
PYVSEG_INLINE Pair apart(const T* plane, const int32_t* index, int64_t step, Indices<i...>) {
  return {vfloat{number(plane + index[i])...}, vfloat{number(plane + index[i] + step)...}};
}

// The same of neighbours, each two as one word, which is quicker than a gather.
template <typename Word, typename T>
PYVSEG_INLINE Word word_at(const T* plane) {
  Word word;
  __builtin_memcpy(&word, plane, sizeof word);
  return word;
}
template <typename Word, typename Words, typename T, int... i>
PYVSEG_INLINE vuint words_at(const T* plane, const int32_t* index, Indices<i...>) {
  return (vuint)Words{word_at<Word>(plane + index[i])...};
}
PYVSEG_INLINE Pair beside(const float* plane, const int32_t* index) {
  typedef uint64_t vlong __attribute__((vector_size(PYVSEG_VECTOR_BYTES)));
  typedef Up<kLanes / 2> Half;
  const vuint a = words_at<uint64_t, vlong>(plane, index, Half{}), b = words_at<uint64_t, vlong>(plane, index + kLanes / 2, Half{});
  const vuint even = 2 * (vuint)lane_index();
  return {(vfloat)shuffle(a, b, even), (vfloat)shuffle(a, b, even + 1)};
}
PYVSEG_INLINE Pair beside(const bfloat16* plane, const int32_t* index) {
  const vuint both = words_at<uint32_t, vuint>(plane, index, Up<kLanes>{});
  return {(vfloat)(both << 16), (vfloat)(both & 0xffff0000)};
}
PYVSEG_INLINE vfloat widened(vuint halves) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)halves));
#else
  return widen(halves);
#endif
}
PYVSEG_INLINE Pair beside(const float16* plane, const int32_t* index) {
  const vuint both = words_at<uint32_t, vuint>(plane, index, Up<kLanes>{});
  return {widened(both & 0xffff), widened(both >> 16)};
}
PYVSEG_INLINE Pair beside(const uint8_t* plane, const int32_t* index) {
  const vuint both = words_at<uint16_t, vuint>(plane, index, Up<kLanes>{});
  return {(both & 0xff) != 0 ? splat(1.0f) : vfloat{}, both > 0xff ? splat(1.0f) : vfloat{}};
}

PYVSEG_INLINE vfloat share(const float* weight, vfloat value) {
  const vfloat w = load(weight);
  return w != 0 ? w * value : vfloat{};
}

template <typename T, typename Out>
void sample_of(const Samples& s) {
  const T* from = (const T*)s.plane;
  Out* to = (Out*)s.samples;
  const bool pairs = s.layout.column == 1 && s.layout.width > 1;
  const int64_t step = s.layout.width > 1 ? s.layout.column : 0, line = 64 / int64_t(sizeof(T));
  // Of most lines something is read, in no order: fetch them in order.
  if (s.layout.dense() && s.layout.size() <= kFetched / int64_t(sizeof(T)) && s.layout.size() <= line * s.points)
    for (int64_t i = 0; i < s.layout.size(); i += line) __builtin_prefetch(from + i, 0, 2);
  for (int64_t i = 0; i < s.points; i += kLanes) {
    const Corners& c = s.corners[i / kBlock];
    const int64_t at = i % kBlock;
    const Pair top = pairs ? beside(from, c.top + at) : apart(from, c.top + at, step, Up<kLanes>{});
    const Pair bottom = pairs ? beside(from, c.bottom + at) : apart(from, c.bottom + at, step, Up<kLanes>{});
    const vfloat above = share(c.weight[0] + at, top.left) + share(c.weight[1] + at, top.right);
    const vfloat below = share(c.weight[2] + at, bottom.left) + share(c.weight[3] + at, bottom.right);
    store_some(to + i, above + below, s.points - i);
  }
}
void sample(const Samples& s) {
  if (s.element == Element::kFloat) sample_of<float, float>(s);
  if (s.element == Element::kBfloat16) sample_of<bfloat16, bfloat16>(s);
  if (s.element == Element::kHalf) sample_of<float16, float16>(s);
  if (s.element == Element::kByte) sample_of<uint8_t, float>(s);
}

PYVSEG_INLINE void add_share(float* to, float weight, float grad) { *to += weight != 0 ? weight * grad : 0; }

template <typename T>
void backward_of(const Gradients& g, float* sums) {
  const T* from = (const T*)g.samples;
  const int64_t step = g.layout.width > 1 ? 1 : 0;
  __builtin_memset(sums, 0, g.layout.size() * sizeof(float));
  for (int64_t i = 0; i < g.points; ++i) {
    const Corners& c = g.corners[i / kBlock];
    const int64_t at = i % kBlock;
    const float grad = load1(from + i);
    float *top = sums + c.top[at], *bottom = sums + c.bottom[at];
    add_share(top, c.weight[0][at], grad);
    add_share(top + step, c.weight[1][at], grad);
    add_share(bottom, c.weight[2][at], grad);
    add_share(bottom + step, c.weight[3][at], grad);
  }
}
template <typename T>
void rounded_backward_of(const Gradients& g) {
  backward_of<T>(g, g.scratch);
  copy_rounded((T*)g.plane, g.scratch, g.layout.size());
}
void backward(const Gradients& g) {
  if (g.element == Element::kFloat) backward_of<float>(g, (float*)g.plane);
  if (g.element == Element::kBfloat16) rounded_backward_of<bfloat16>(g);
  if (g.element == Element::kHalf) rounded_backward_of<float16>(g);
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

// Points (G, K, 2), one set for all masks or one for each, and their corners in planes of one layout.
class Sets {
 public:
  Sets(const Tensor& points, const Layout& layout) : rows_(dense(points)), layout_(layout) {
    STD_TORCH_CHECK(points.dim() == 3 && points.size(2) == 2 && points.scalar_type() == ScalarType::Float, "point_sample: points");
    STD_TORCH_CHECK(layout.fits(), "point_sample: planes of 2^31 elements or more");
    points_ = rows_.size(1);
    if (rows_.size(0) != 1) return;
    shared_.resize(blocks_of(points_));
    parallel_for(0, shared_.size(), grain_of(kBlock / 2), [&](int64_t begin, int64_t end) {
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
    kernels().corners(from, end - begin, layout_, out);
  }

  Tensor rows_;
  Layout layout_;
  int64_t points_;
  std::vector<Corners> shared_;
};

Layout layout_of(const Tensor& planes) { return {planes.size(2), planes.size(3), planes.stride(2), planes.stride(3)}; }

// Few points are read from where they lie, whatever the strides.
Tensor readable(const Tensor& masks, int64_t points) {
  const Layout layout = layout_of(masks);
  return 4 * points < layout.size() && layout.fits() ? masks : dense(masks);
}

// masks (N, T, H, W) float32, bfloat16, float16 or bool; points (N or 1, K, 2) float32 -> (N, T, K) of the masks' dtype, float32 for bool
Tensor point_sample(const Tensor& masks, const Tensor& points) {
  STD_TORCH_CHECK(masks.dim() == 4, "point_sample: masks must have four dimensions");
  const int64_t N = masks.size(0), T = masks.size(1), K = points.size(1);
  STD_TORCH_CHECK(points.size(0) == N || points.size(0) == 1, "point_sample: need one set of points, or one per mask");
  const Element element = element_of(masks);
  const bool bytes = element == Element::kByte;
  Tensor samples = torch::stable::new_empty(masks, {N, T, K}, bytes ? ScalarType::Float : masks.scalar_type());
  const Tensor planes = readable(masks, K);
  const Layout layout = layout_of(planes);
  if (layout.size() == 0) return torch::stable::fill_(samples, 0.0);
  const Sets sets(points, layout);
  const int64_t in = bytes ? 1 : bytes_of(Number(element)), out = bytes ? 4 : in;
  const int64_t mask_stride = planes.stride(0), frame_stride = planes.stride(1);
  const char* from = static_cast<const char*>(planes.const_data_ptr());
  char* to = static_cast<char*>(samples.mutable_data_ptr());
  const Kernels& kernel = kernels();
  parallel_for(0, N * T, grain_of(K / 2), [&](int64_t begin, int64_t end) {
    Sets::Own own;
    for (int64_t i = begin; i < end; ++i)
      kernel.sample({from + (i / T * mask_stride + i % T * frame_stride) * in, to + i * K * out, sets.corners(i / T, own), layout, K, element});
  });
  return samples;
}

// grad (N, T, K), in the masks' dtype -> (N, T, H, W)
Tensor point_sample_backward(const Tensor& grad, const Tensor& points, int64_t height, int64_t width) {
  STD_TORCH_CHECK(grad.dim() == 3, "point_sample_backward: grad must have three dimensions");
  const Tensor samples = dense(grad);
  const int64_t N = samples.size(0), T = samples.size(1), K = samples.size(2);
  const Layout layout{height, width, width, 1};
  STD_TORCH_CHECK(points.size(1) == K && (points.size(0) == N || points.size(0) == 1), "point_sample_backward: points do not fit");
  Tensor masks = torch::stable::new_empty(grad, {N, T, height, width});
  if (layout.size() == 0) return masks;
  const Sets sets(points, layout);
  const Number number = number_of(samples);
  const int64_t bytes = bytes_of(number);
  const char* from = static_cast<const char*>(samples.const_data_ptr());
  char* to = static_cast<char*>(masks.mutable_data_ptr());
  const Kernels& kernel = kernels();
  parallel_for(0, N * T, grain_of(K + layout.size()), [&](int64_t begin, int64_t end) {
    Sets::Own own;
    std::vector<float> scratch(number == Number::kFloat ? 0 : layout.size());
    for (int64_t i = begin; i < end; ++i)
      kernel.backward({from + i * K * bytes, to + i * layout.size() * bytes, sets.corners(i / T, own), layout, K, Element(number), scratch.data()});
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
