// SPDX-License-Identifier: Apache-2.0
// Multi-scale deformable attention, forward (see pyvseg/ops/ms_deform_attn.py).
//
// With many queries each head of each image is first copied, padded with zeros and widened to float32: a head then fits
// L2, both pixels of a row are neighbours in memory and the inner loop has no branch. Few queries read in place.
#include "../isa.h"
#include "ms_deform_attn.h"

namespace pyvseg::ms_deform_attn {

struct Kernels {
  int64_t lanes;  // of a vector
  int64_t (*scratch_bytes)(const Problem&);
  void (*pack)(const Problem&, const Map&, int64_t b, int64_t h, float* rows);
  void (*forward)(const Problem&, const Map&, int64_t b, int64_t h, const float* rows, void* scratch, void* out, int64_t begin, int64_t end);
  void (*in_place)(const Problem&, const Map&, int64_t b, int64_t h, void* scratch, void* out, int64_t begin, int64_t end);
};

#ifdef PYVSEG_ISA
namespace {

int64_t scratch_bytes(const Problem& p) { return samples_bytes(p) + padded(p.D) * 4; }

void pack(const Problem& p, const Map& map, int64_t b, int64_t h, float* rows) {
  with_number(p.number, [&](auto v) { pack_head<decltype(v)>(p, map, b, h, rows); });
}

// out[0 : T vectors] = sum over the samples of a query, channels from `rows` on
template <int T>
PYVSEG_INLINE void gather(const Problem& p, const Map& map, const Samples& s, int64_t at, const float* rows, int64_t step, float* out) {
  vfloat upper[T] = {}, lower[T] = {};
  const int64_t n = p.L * p.P;
  for (int64_t i = 0; i < n; ++i) {
    const float* above = rows + s.pixel[at + i] * step;
    const float* below = above + map.stride[i] * step;
    const float a = s.corner[0][at + i], b = s.corner[1][at + i], c = s.corner[2][at + i], d = s.corner[3][at + i];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      upper[t] += a * load(above + t * kLanes);
      upper[t] += b * load(above + step + t * kLanes);
      lower[t] += c * load(below + t * kLanes);
      lower[t] += d * load(below + step + t * kLanes);
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) store(out + t * kLanes, upper[t] + lower[t]);
}

template <typename V>
void forward_head(const Problem& p, const Map& map, int64_t b, int64_t h, const float* rows, void* scratch, void* result, int64_t begin, int64_t end) {
  const Samples s = samples_in(scratch, p);
  float* sum = (float*)((char*)scratch + samples_bytes(p));
  const int64_t step = padded(p.D);
  for (; begin < end; begin += p.block) {
    const int64_t stop = begin + p.block < end ? begin + p.block : end;
    locate_block<false>(p, map, b, h, s, begin, stop);
    for (int64_t q = begin; q < stop; ++q) {
      const int64_t at = (q - begin) * p.lanes;
      V* out = (V*)result + ((b * p.Q + q) * p.H + h) * p.D;
      if (step == 2 * kLanes) {
        gather<2>(p, map, s, at, rows, 2 * kLanes, sum);
      } else {
        int64_t c = 0;
        for (; c + 4 * kLanes <= step; c += 4 * kLanes) gather<4>(p, map, s, at, rows + c, step, sum + c);
        for (; c < step; c += kLanes) gather<1>(p, map, s, at, rows + c, step, sum + c);
      }
      copy_row(out, sum, p.D);
    }
  }
}
void forward(const Problem& p, const Map& map, int64_t b, int64_t h, const float* rows, void* scratch, void* out, int64_t begin, int64_t end) {
  with_number(p.number, [&](auto v) { forward_head<decltype(v)>(p, map, b, h, rows, scratch, out, begin, end); });
}

template <typename V>
void in_place_head(const Problem& p, const Map& map, int64_t b, int64_t h, void* scratch, void* result, int64_t begin, int64_t end) {
  const Samples s = samples_in(scratch, p);
  float* sum = (float*)((char*)scratch + samples_bytes(p));
  const V* value = (const V*)p.value + b * p.value_batch + h * p.value_head;
  for (; begin < end; begin += p.block) {
    const int64_t stop = begin + p.block < end ? begin + p.block : end;
    locate_block<true>(p, map, b, h, s, begin, stop);
    for (int64_t q = begin; q < stop; ++q) {
      __builtin_memset(sum, 0, size_t(p.D) * 4);
      for (int64_t i = 0; i < p.L * p.P; ++i) {
        const int64_t at = (q - begin) * p.lanes + i;
        const int32_t corner[4] = {0, 1, map.stride[i], map.stride[i] + 1};
        for (int c = 0; c < 4; ++c)
          if (s.inside[at] >> c & 1) axpy(sum, s.corner[c][at], value + (s.pixel[at] + corner[c]) * p.value_pixel, p.D);
      }
      copy_row((V*)result + ((b * p.Q + q) * p.H + h) * p.D, sum, p.D);
    }
  }
}
void in_place(const Problem& p, const Map& map, int64_t b, int64_t h, void* scratch, void* out, int64_t begin, int64_t end) {
  with_number(p.number, [&](auto v) { in_place_head<decltype(v)>(p, map, b, h, scratch, out, begin, end); });
}

}  // namespace

PYVSEG_KERNELS = {kLanes, scratch_bytes, pack, forward, in_place};
#else
}  // namespace pyvseg::ms_deform_attn

#include "ms_deform_attn_launch.h"

namespace pyvseg::ms_deform_attn {

PYVSEG_KERNEL_TABLE

namespace {

Tensor run(const Arguments& arguments) {
  const Kernels& kernel = kernels();
  Layout layout(arguments, kernel.lanes);
  const Problem& p = layout.problem;
  Tensor out = torch::stable::new_empty(arguments.value, {p.B, p.Q, p.H * p.D});
  if (p.L * p.P == 0 || arguments.value.numel() == 0) return torch::stable::zero_(out);
  char* result = static_cast<char*>(out.mutable_data_ptr());
  const int64_t heads = p.B * p.H;
  // The padded copy pays where it is read several times over.
  const bool copies = p.Q * p.L * p.P > 2 * layout.pixels;
  const int64_t parts = copies ? 1 : std::max<int64_t>(1, (p.Q + 63) / 64);
  const Map map = copies ? layout.padded() : layout.in_place();
  const int64_t width = (p.D + kernel.lanes - 1) / kernel.lanes * kernel.lanes;
  const int64_t grain = grain_of((p.Q / parts * p.L * p.P + (copies ? layout.pixels : 0)) * p.D / 4);
  parallel_for(0, heads * parts, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char[]> scratch(new char[kernel.scratch_bytes(p)]);
    const std::unique_ptr<float[]> rows(copies ? new float[layout.padded_pixels * width]() : nullptr);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / parts, part = task % parts, b = head / p.H, h = head % p.H;
      const int64_t first = p.Q * part / parts, last = p.Q * (part + 1) / parts;
      if (copies) {
        kernel.pack(p, map, b, h, rows.get());
        kernel.forward(p, map, b, h, rows.get(), scratch.get(), result, first, last);
      } else {
        kernel.in_place(p, map, b, h, scratch.get(), result, first, last);
      }
    }
  });
  return out;
}

Tensor ms_deform_attn(const Tensor& value, const std::vector<int64_t>& shapes, const Tensor& locations, const Tensor& weights) {
  return run({"ms_deform_attn", value, shapes, nullptr, locations, weights});
}

Tensor ms_deform_attn_fused(const Tensor& value, const std::vector<int64_t>& shapes, const Tensor& reference, const Tensor& offsets, const Tensor& logits) {
  return run({"ms_deform_attn_fused", value, shapes, &reference, offsets, logits});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvseg, m) {
  m.def("ms_deform_attn(Tensor value, int[] shapes, Tensor locations, Tensor weights) -> Tensor");
  m.def("ms_deform_attn_fused(Tensor value, int[] shapes, Tensor reference, Tensor offsets, Tensor logits) -> Tensor");
  m.def(
      "ms_deform_attn_backward(Tensor grad, Tensor value, int[] shapes, Tensor locations, Tensor weights, bool deterministic)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "ms_deform_attn_fused_backward(Tensor grad, Tensor value, int[] shapes, Tensor reference, Tensor offsets,"
      " Tensor logits, bool deterministic) -> (Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(pyvseg, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&ms_deform_attn));
  m.impl("ms_deform_attn_fused", TORCH_BOX(&ms_deform_attn_fused));
}
#endif

}  // namespace pyvseg::ms_deform_attn
