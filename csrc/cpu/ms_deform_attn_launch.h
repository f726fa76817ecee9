// SPDX-License-Identifier: Apache-2.0
// Multi-scale deformable attention, what the launchers of forward and backward share: checks, strides, numbering.
#pragma once
#include "launch.h"
#include "ms_deform_attn.h"

namespace pyvseg::ms_deform_attn {

constexpr int64_t kLongest = 1 << 24;  // pixels in a row or column that float32 tells apart

struct Arguments {
  const char* op;
  const Tensor& value;                // (B, S, H, D)
  const std::vector<int64_t>& shapes;  // height and width of each level
  const Tensor* reference;            // (B, Q, L, 2 or 4) in the fused form, else null
  const Tensor& place;                // (B, Q, H, L, P, 2)
  const Tensor& weight;               // (B, Q, H, L, P)
};

// The dimensions from `first` on lie densely in memory.
inline bool dense_from(const Tensor& t, int64_t first) {
  int64_t expected = 1;
  for (int64_t i = t.dim() - 1; i >= first; expected *= t.size(i--))
    if (t.size(i) > 1 && t.stride(i) != expected) return false;
  return true;
}
inline Tensor with_dense(const Tensor& t, int64_t first) { return dense_from(t, first) ? t : torch::stable::contiguous(t); }

inline Tensor float_copy(const Tensor& t) {
  return torch::stable::contiguous(t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float));
}

// Behind the last element in memory of any.
inline const void* end_of(const Tensor& t, Number number) {
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  return static_cast<const char*>(t.const_data_ptr()) + (t.numel() ? last + 1 : 0) * bytes_of(number);
}

// A Problem with all that its pointers refer to.
struct Layout {
  Problem problem;
  int64_t pixels, padded_pixels;

  Layout(const Arguments& a, int64_t vector)
      : value_(with_dense(a.value, 3)), place_(with_dense(a.place, 2)), weight_(with_dense(a.weight, 2)), shapes_(a.shapes) {
    check(a);
    if (a.reference) reference_.reset(new Tensor(float_copy(*a.reference)));
    Problem& p = problem;
    p.B = value_.size(0), p.H = value_.size(2), p.D = value_.size(3);
    p.Q = weight_.size(1), p.L = weight_.size(3), p.P = weight_.size(4);
    p.lanes = (p.L * p.P + vector - 1) / vector * vector;
    p.block = std::max<int64_t>(1, 256 / std::max<int64_t>(1, p.lanes));
    p.shapes = shapes_.data();
    p.number = number_of(value_), p.geometry = number_of(weight_);
    p.value = value_.const_data_ptr(), p.place = place_.const_data_ptr(), p.weight = weight_.const_data_ptr();
    p.value_batch = value_.stride(0), p.value_pixel = value_.stride(1), p.value_head = value_.stride(2);
    p.place_batch = place_.stride(0), p.place_query = place_.stride(1);
    p.weight_batch = weight_.stride(0), p.weight_query = weight_.stride(1);
    p.reference = reference_ ? reference_->const_data_ptr<float>() : nullptr;
    p.reference_width = reference_ ? reference_->size(3) : 0;
    p.place_end = end_of(place_, p.geometry), p.weight_end = end_of(weight_, p.geometry);
    number_pixels();
  }
  Layout(const Layout&) = delete;

  Map padded() const { return {width_.data(), height_.data(), padded_stride_.data(), padded_origin_.data(), level_.data(), padded_pixels}; }
  Map in_place() const { return {width_.data(), height_.data(), stride_.data(), origin_.data(), level_.data(), pixels}; }

 private:
  static void check(const Arguments& a) {
    const Tensor &v = a.value, &w = a.weight, &x = a.place;
    STD_TORCH_CHECK(v.dim() == 4 && w.dim() == 5 && x.dim() == 6, a.op, ": wrong number of dimensions");
    const int64_t B = v.size(0), H = v.size(2), Q = w.size(1), L = w.size(3), P = w.size(4);
    STD_TORCH_CHECK(w.size(0) == B && w.size(2) == H && x.size(0) == B && x.size(1) == Q && x.size(2) == H &&
                        x.size(3) == L && x.size(4) == P && x.size(5) == 2,
                    a.op, ": shapes do not agree");
    int64_t pixels = 0;
    STD_TORCH_CHECK(int64_t(a.shapes.size()) == 2 * L, a.op, ": shapes must be L heights and widths");
    for (int64_t l = 0; l < L; ++l) {
      const int64_t height = a.shapes[2 * l], width = a.shapes[2 * l + 1];
      STD_TORCH_CHECK(height >= 0 && width >= 0 && height < kLongest && width < kLongest, a.op, ": bad level shape");
      pixels += height * width;
      STD_TORCH_CHECK(pixels <= v.size(1), a.op, ": shapes have more pixels than value");
    }
    STD_TORCH_CHECK(pixels == v.size(1), a.op, ": shapes must have as many pixels as value");
    STD_TORCH_CHECK(w.scalar_type() == x.scalar_type() && (number_of(w) == Number::kFloat || number_of(w) == number_of(v)),
                    a.op, ": locations and weights must both be float32 or have value's dtype");
    if (!a.reference) return;
    const Tensor& r = *a.reference;
    STD_TORCH_CHECK(r.dim() == 4 && r.size(0) == B && r.size(1) == Q && r.size(2) == L && (r.size(3) == 2 || r.size(3) == 4),
                    a.op, ": reference must be (B, Q, L, 2 or 4)");
    number_of(r);
  }

  void number_pixels() {
    const Problem& p = problem;
    for (std::vector<float>* row : {&width_, &height_}) row->assign(p.lanes, -1.0f);  // lanes past L * P never hit
    level_.assign(p.lanes, -1);
    for (std::vector<int32_t>* row : {&stride_, &origin_, &padded_stride_, &padded_origin_}) row->assign(p.lanes, 0);
    pixels = 0;
    padded_pixels = 3;  // the first pixels serve samples outside, which look as far as the longest row is
    for (int64_t l = 0; l < p.L; ++l) padded_pixels = std::max(padded_pixels, p.shapes[2 * l + 1] + 3);
    for (int64_t l = 0; l < p.L; ++l) {
      const int64_t height = p.shapes[2 * l], width = p.shapes[2 * l + 1];
      for (int64_t i = l * p.P; i < (l + 1) * p.P; ++i) {
        width_[i] = float(width), height_[i] = float(height), level_[i] = int32_t(l);
        stride_[i] = int32_t(width), origin_[i] = int32_t(pixels);
        padded_stride_[i] = int32_t(width + 1), padded_origin_[i] = int32_t(padded_pixels + width + 2);
      }
      pixels += height * width;
      padded_pixels += (height + 2) * (width + 1) + 1;
      STD_TORCH_CHECK(padded_pixels < INT32_MAX, "ms_deform_attn: too many pixels");
    }
  }

  Tensor value_, place_, weight_;
  std::unique_ptr<Tensor> reference_;
  std::vector<int64_t> shapes_;
  std::vector<float> width_, height_;
  std::vector<int32_t> level_, stride_, origin_, padded_stride_, padded_origin_;
};

}  // namespace pyvseg::ms_deform_attn
