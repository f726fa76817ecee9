// SPDX-License-Identifier: Apache-2.0
// Sums behind the matching costs of N mask logits against M targets (see pyvseg/ops/mask_cost.py). One pass over the
// logits: of a few rows and a chunk of pixels, sigmoid and softplus are computed together, then both products with the
// targets are taken from cache. sum BCE(x, t) = sum softplus(x) - x.t needs no product with softplus or 1 - t.
// Targets of bools need no product at all: with the rows in lanes, a target adds the pixels that it has on.
#include "../isa.h"
#include "mask_cost.h"

namespace pyvseg::mask_cost {

// A slice of the pixels against a group of logit rows. Every sum has one writer, so that no result depends on threads.
struct Forward {
  Rows logits, targets;
  int64_t begin, end;   // pixels of the slice
  int64_t first, last;  // rows of the group
  double *overlap, *entropy, *prob, *softplus;  // (N, M), (N, M), (N), (N) of the slice; the last two zero at first
  double* area;   // (M) of the slice, zero at first; null where another group sums it
  float* scratch; // scratch_floats(last - first, M)
};

constexpr int64_t kBits = 64;      // pixels whose rows are added bit by bit: their floats stay in L1
constexpr int64_t kBitRows = 64;   // at most, at a time

constexpr int64_t scratch_floats(int64_t rows, int64_t M) {
  const int64_t products = (M + 2 * kRows) * kStride + rows * M * 2 * 16, sums = (kBits + M + 1) * 2 * kBitRows;
  return products > sums ? products : sums;
}

struct Kernels {
  void (*forward)(const Forward&);
};

#ifdef PYVSEG_ISA
namespace {

#if defined(__AVX512F__)
constexpr int kTargets = 3;  // of a tile: its sums, two per pair, stay in registers
#else
constexpr int kTargets = 1;
#endif

struct Activation {
  vfloat sigmoid, softplus;
};

// Both from one exponential.
PYVSEG_INLINE Activation activate(vfloat x) {
  const vfloat e = exp_minus_size(x), inverse = 1.0f / (1.0f + e);
  // log(1 + e) / e on [0, 1], relative error 3e-8
  const vfloat ee = e * e, eeee = ee * ee;
  const vfloat low = (-2.4842981994e-1f * e + 3.3319097757e-1f) * ee + (-4.9999493361e-1f * e + 1.0f);
  const vfloat high = (-2.9505213723e-2f * e + 7.8225910664e-2f) * ee + (-1.3663242757e-1f * e + 1.9106005132e-1f);
  const vfloat q = (5.2326880395e-3f * eeee + high) * eeee + low;
  return {x < 0.0f ? e * inverse : inverse, (x < 0.0f ? vfloat{} : x) + e * q};
}

PYVSEG_INLINE vfloat first_lanes(vfloat v, int64_t n) {
  return lane_index() < int32_t(n) ? v : vfloat{};
}

struct RowSums {
  float sigmoid, softplus;
};

// n logits as floats and their sigmoids, zeros up to a whole vector.
template <typename T>
RowSums activate_row(const T* from, int64_t n, float* logits, float* sigmoids) {
  vfloat sigmoid{}, softplus{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const vfloat x = load(from + i);
    const Activation a = activate(x);
    store(logits + i, x);
    store(sigmoids + i, a.sigmoid);
    sigmoid += a.sigmoid;
    softplus += a.softplus;
  }
  if (i < n) {
    const vfloat x = load_part(from + i, n - i);
    const Activation a = activate(x);
    const vfloat s = first_lanes(a.sigmoid, n - i);
    store(logits + i, x);
    store(sigmoids + i, s);
    sigmoid += s;
    softplus += first_lanes(a.softplus, n - i);
  }
  return {sum(sigmoid), sum(softplus)};
}
RowSums activate_row(const Rows& rows, int64_t row, int64_t begin, int64_t n, float* logits, float* sigmoids) {
  const int64_t offset = row * rows.stride + begin;
  switch (rows.element) {
    case Element::kFloat: return activate_row((const float*)rows.data + offset, n, logits, sigmoids);
    case Element::kBfloat16: return activate_row((const bfloat16*)rows.data + offset, n, logits, sigmoids);
    default: return activate_row((const float16*)rows.data + offset, n, logits, sigmoids);
  }
}

// Lanes of sums kept over the chunks of a slice: (rows, M, overlap and logit.t)
struct Sums {
  float* lanes;
  int64_t M;
  float* at(int64_t row, int64_t m) const { return lanes + (row * M + m) * 2 * kLanes; }
};

// R rows of logits against C targets
template <int R, int C>
void tile(const float* logits, const float* sigmoids, const float* targets, int64_t n, const Sums& sums, int64_t row, int64_t m) {
  vfloat s[R][C], x[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      s[r][c] = load(sums.at(row + r, m + c));
      x[r][c] = load(sums.at(row + r, m + c) + kLanes);
    }
  for (int64_t i = 0; i < n; i += kLanes) {
    vfloat t[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) t[c] = load(targets + c * kStride + i);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const vfloat sigmoid = load(sigmoids + r * kStride + i), logit = load(logits + r * kStride + i);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        s[r][c] += sigmoid * t[c];
        x[r][c] += logit * t[c];
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      store(sums.at(row + r, m + c), s[r][c]);
      store(sums.at(row + r, m + c) + kLanes, x[r][c]);
    }
}

template <int R>
void products(const float* logits, const float* sigmoids, const float* targets, int64_t n, const Sums& sums, int64_t row) {
  int64_t m = 0;
  for (; m + kTargets <= sums.M; m += kTargets) tile<R, kTargets>(logits, sigmoids, targets + m * kStride, n, sums, row, m);
  for (; m < sums.M; ++m) tile<R, 1>(logits, sigmoids, targets + m * kStride, n, sums, row, m);
}

PYVSEG_INLINE uint64_t bits_of(const uint8_t* from, int64_t n) {
  uint64_t bits = 0;
  if (n == kBits)
    for (int i = 0; i < kBits; i += kLanes) bits |= uint64_t(greater_mask(load(from + i), vfloat{})) << i;
  else
    for (int64_t i = 0; i < n; ++i) bits |= uint64_t(from[i] != 0) << i;
  return bits;
}

// V vectors of sigmoids, then of logits, for each of n pixels, lanes are rows; adds all sigmoids and all softplus to `sums`.
template <int V, typename T>
PYVSEG_INLINE void activate_pixels(const T* from, int64_t stride, int64_t rows, int64_t n, float* pixels, float* sums) {
  for (int v = 0; v < V; ++v) {
    const int64_t filled = rows - v * kLanes < kLanes ? rows - v * kLanes : kLanes;
    vfloat sigmoid{}, softplus{};
    for (int64_t i = 0; i < n; i += kLanes) {
      const int64_t left = n - i < kLanes ? n - i : kLanes;
      vuint square[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) {
        const T* row = from + (v * kLanes + (r < filled ? r : 0)) * stride + i;
        __builtin_prefetch(row + kBits);
        square[r] = (vuint)(left == kLanes ? load(row) : load_part(row, left));
      }
      transpose(square);
      for (int64_t j = 0; j < left; ++j) {
        const Activation a = activate((vfloat)square[j]);
        float* pixel = pixels + ((i + j) * 2 * V + v) * kLanes;
        store(pixel, a.sigmoid);
        store(pixel + V * kLanes, (vfloat)square[j]);
        sigmoid += a.sigmoid;
        softplus += a.softplus;
      }
    }
    store(sums + v * kLanes, load(sums + v * kLanes) + sigmoid);
    store(sums + (V + v) * kLanes, load(sums + (V + v) * kLanes) + softplus);
  }
}

// sums += the pixels that are on
template <int V>
PYVSEG_INLINE void add_bits(uint64_t bits, const float* pixels, float* sums) {
  vfloat total[2 * V] = {};
  for (; bits; bits &= bits - 1) {
    const float* pixel = pixels + __builtin_ctzll(bits) * (2 * V * kLanes);
#pragma GCC unroll 8
    for (int v = 0; v < 2 * V; ++v) total[v] += load(pixel + v * kLanes);
  }
#pragma GCC unroll 8
  for (int v = 0; v < 2 * V; ++v) store(sums + v * kLanes, load(sums + v * kLanes) + total[v]);
}

// Rows first to first + rows, at most V vectors of them, against bools.
template <int V, typename T>
void forward_bits(const Forward& f, int64_t first, int64_t rows) {
  constexpr int64_t kWidth = 2 * V * kLanes;
  const int64_t M = f.targets.count;
  const uint8_t* targets = (const uint8_t*)f.targets.data;
  float *pixels = f.scratch, *all = pixels + kBits * kWidth, *sums = all + kWidth;
  for (int64_t i = 0; i < (M + 1) * kWidth; ++i) all[i] = 0;
  for (int64_t begin = f.begin; begin < f.end; begin += kBits) {
    const int64_t n = f.end - begin < kBits ? f.end - begin : kBits;
    activate_pixels<V>((const T*)f.logits.data + first * f.logits.stride + begin, f.logits.stride, rows, n, pixels, all);
    for (int64_t m = 0; m < M; ++m) {
      const uint64_t bits = bits_of(targets + m * f.targets.stride + begin, n);
      if (f.area && first == f.first) f.area[m] += __builtin_popcountll(bits);
      if (bits) add_bits<V>(bits, pixels, sums + m * kWidth);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const double softplus = all[V * kLanes + r];
    f.prob[first + r] = all[r];
    f.softplus[first + r] = softplus;
    for (int64_t m = 0; m < M; ++m) {
      f.overlap[(first + r) * M + m] = sums[m * kWidth + r];
      f.entropy[(first + r) * M + m] = softplus - sums[m * kWidth + V * kLanes + r];
    }
  }
}
template <typename T>
void forward_bits(const Forward& f) {
  constexpr int64_t kMost = 4 * kLanes;
  static_assert(kMost <= kBitRows, "fits the scratch");
  for (int64_t row = f.first; row < f.last; row += kMost) {
    const int64_t rows = f.last - row < kMost ? f.last - row : kMost;
    switch ((rows + kLanes - 1) / kLanes) {
      case 4: forward_bits<4, T>(f, row, rows); break;
      case 3: forward_bits<3, T>(f, row, rows); break;
      case 2: forward_bits<2, T>(f, row, rows); break;
      default: forward_bits<1, T>(f, row, rows);
    }
  }
}

void forward(const Forward& f) {
  if (f.targets.element == Element::kByte && f.last - f.first >= kLanes / 2) {
    if (f.logits.element == Element::kFloat) return forward_bits<float>(f);
    if (f.logits.element == Element::kBfloat16) return forward_bits<bfloat16>(f);
    return forward_bits<float16>(f);
  }
  const int64_t M = f.targets.count, N = f.last - f.first;
  float *targets = f.scratch, *logits = targets + M * kStride, *sigmoids = logits + kRows * kStride;
  const Sums sums{sigmoids + kRows * kStride, M};
  for (int64_t i = 0; i < N * M * 2 * kLanes; ++i) sums.lanes[i] = 0;
  double* softplus = f.softplus + f.first;
  for (int64_t begin = f.begin; begin < f.end; begin += kChunk) {
    const int64_t n = f.end - begin < kChunk ? f.end - begin : kChunk, whole = padded(n);
    for (int64_t m = 0; m < M; ++m) {
      const float area = widen_row(f.targets, m, begin, n, targets + m * kStride);
      if (f.area) f.area[m] += area;
    }
    for (int64_t row = 0; row < N; row += kRows) {
      const int64_t rows = N - row < kRows ? N - row : kRows;
      for (int64_t r = 0; r < rows; ++r) {
        const RowSums one = activate_row(f.logits, f.first + row + r, begin, n, logits + r * kStride, sigmoids + r * kStride);
        f.prob[f.first + row + r] += one.sigmoid;
        softplus[row + r] += one.softplus;
      }
      if (rows == kRows)
        products<kRows>(logits, sigmoids, targets, whole, sums, row);
      else
        for (int64_t r = 0; r < rows; ++r) products<1>(logits + r * kStride, sigmoids + r * kStride, targets, whole, sums, row + r);
    }
  }
  for (int64_t row = 0; row < N; ++row)
    for (int64_t m = 0; m < M; ++m) {
      f.overlap[(f.first + row) * M + m] = sum(load(sums.at(row, m)));
      f.entropy[(f.first + row) * M + m] = softplus[row] - sum(load(sums.at(row, m) + kLanes));
    }
}

}  // namespace

PYVSEG_KERNELS = {forward};
#else

PYVSEG_KERNEL_TABLE

namespace {

// Logit rows of a task: so many that their sums stay in the second cache, fewer where the slices alone are too few tasks.
int64_t group_of(int64_t rows, int64_t targets, int64_t slices, bool bits) {
  const int64_t cached = std::max<int64_t>(bits ? kBitRows : kRows, 2048 / std::max<int64_t>(targets, 1) / kRows * kRows);
  return std::min(cached, slices >= 8 ? std::max<int64_t>(rows, 1) : 32);
}

// Sum over the slices, as float32. parts (slices, n)
void add_slices(const double* parts, int64_t slices, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    double total = 0;
    for (int64_t s = 0; s < slices; ++s) total += parts[s * n + i];
    out[i] = float(total);
  }
}

// logits (N, P) float32, bfloat16 or float16; targets (M, P) of any of these or bool -> all float32:
// sum sigmoid.t (N, M), sum BCE with logits (N, M), sum sigmoid (N), sum t (M)
std::tuple<Tensor, Tensor, Tensor, Tensor> mask_cost(const Tensor& logits, const Tensor& targets) {
  STD_TORCH_CHECK(logits.dim() == 2 && targets.dim() == 2 && logits.size(1) == targets.size(1), "mask_cost: need (N, P) and (M, P)");
  number_of(logits);  // not bytes, as targets may be
  const Tensor x = rows_contiguous(logits), t = rows_contiguous(targets);
  const int64_t N = x.size(0), M = t.size(0), P = x.size(1), slice = slice_of(P), slices = (P + slice - 1) / slice;
  const Rows logit_rows = rows_of(x), target_rows = rows_of(t);
  const int64_t group = group_of(N, M, slices, target_rows.element == Element::kByte);
  const int64_t groups = std::max<int64_t>(1, (N + group - 1) / group);
  const auto empty = [&](std::vector<int64_t> shape) { return torch::stable::new_empty(logits, shape, ScalarType::Float); };
  Tensor overlap = empty({N, M}), entropy = empty({N, M}), prob = empty({N}), area = empty({M});
  std::vector<double> overlaps(slices * N * M), entropies(slices * N * M), probs(slices * N), softplus(slices * N), areas(slices * M);
  const Kernels& kernel = kernels();
  parallel_for(0, slices * groups, grain_of(std::min(group, N) * std::min(slice, P)), [&](int64_t begin, int64_t end) {
    Scratch scratch(scratch_floats(group, M));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t s = task / groups, g = task % groups;
      kernel.forward({logit_rows, target_rows, s * slice, std::min(P, (s + 1) * slice), g * group, std::min(N, (g + 1) * group),
                      overlaps.data() + s * N * M, entropies.data() + s * N * M, probs.data() + s * N,
                      softplus.data() + s * N, g ? nullptr : areas.data() + s * M, scratch.data()});
    }
  });
  add_slices(overlaps.data(), slices, N * M, overlap.mutable_data_ptr<float>());
  add_slices(entropies.data(), slices, N * M, entropy.mutable_data_ptr<float>());
  add_slices(probs.data(), slices, N, prob.mutable_data_ptr<float>());
  add_slices(areas.data(), slices, M, area.mutable_data_ptr<float>());
  return {overlap, entropy, prob, area};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvseg, m) { m.def("mask_cost(Tensor logits, Tensor targets) -> (Tensor, Tensor, Tensor, Tensor)"); }
STABLE_TORCH_LIBRARY_IMPL(pyvseg, CPU, m) { m.impl("mask_cost", TORCH_BOX(&mask_cost)); }
#endif

}  // namespace pyvseg::mask_cost
