// SPDX-License-Identifier: Apache-2.0
// The parts of k-means attention on their own: the assignment from given logits, the sums from a given assignment, and
// the gradient of the sums, which hands every position the row of its cluster (see pyvseg/ops/kmeans_attn.py).
#include <cstdint>

#include "../isa.h"
#include "kmeans_sums.h"

namespace pyvseg::kmeans_pool {

using kmeans::Map;

// One image.
struct Gather {
  const void* rows;       // (clusters, channels), contiguous
  const int32_t* assign;  // (positions)
  void* out;              // (channels, positions), contiguous
  int64_t clusters, channels, positions;
  Number number;
};

struct Kernels {
  void (*assign)(const Map& logits, int64_t begin, int64_t end, int32_t* assign);
  void (*add_run)(const Map& value, int64_t begin, int64_t end, const int32_t* assign, int64_t clusters, float* bins);
  void (*add_up)(const kmeans::Totals&, int64_t begin, int64_t end);
  void (*gather)(const Gather&, int64_t begin, int64_t end);
};

#ifdef PYVSEG_ISA
namespace {

using namespace kmeans;

// The channels of `logits` are the clusters, its positions are adjacent.
void assign(const Map& logits, int64_t begin, int64_t end, int32_t* assign) {
  with_number(logits.number, [&](auto number) {
    using T = decltype(number);
    for (int64_t m = begin; m < end; m += kLanes) {
      const T* from = (const T*)logits.data + m;
      Best best;
      for (int64_t n = 0; n < logits.channels; ++n)
        consider(best, load_some(from + n * logits.channel_stride, end - m), int32_t(n));
      store_some(assign + m, best.cluster, end - m);
    }
  });
}

// kLanes channels at kLanes positions; positions of no cluster get zeros.
template <bool kWhole, typename T>
PYVSEG_INLINE void gather_square(const Gather& g, int64_t c, int64_t m, int64_t end) {
  const int64_t channels = g.channels - c, positions = end - m;
  vuint v[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    const int64_t cluster = kWhole || i < positions ? g.assign[m + i] : -1;
    const bool is = cluster >= 0 && cluster < g.clusters;
    const T* row = (const T*)g.rows + cluster * g.channels + c;
    v[i] = !is ? vuint{} : (vuint)(kWhole ? load(row) : load_some(row, channels));
  }
  transpose(v);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    T* to = (T*)g.out + (c + i) * g.positions + m;
    if (kWhole)
      store(to, (vfloat)v[i]);
    else if (i < channels)
      store_some(to, (vfloat)v[i], positions);
  }
}
template <typename T>
void gather_rows(const Gather& g, int64_t begin, int64_t end) {
  for (int64_t c = 0; c < g.channels; c += kLanes)
    for (int64_t m = begin; m < end; m += kLanes) {
      if (c + kLanes <= g.channels && m + kLanes <= end)
        gather_square<true, T>(g, c, m, end);
      else
        gather_square<false, T>(g, c, m, end);
    }
}

// Positions of one cluster.
template <typename T>
void spread_row(const Gather& g, int64_t begin, int64_t end) {
  const T* row = (const T*)g.rows + g.assign[begin] * g.channels;
  for (int64_t c = 0; c < g.channels; ++c)
    for (int64_t m = begin; m < end; m += kLanes) store_some((T*)g.out + c * g.positions + m, splat(load1(row + c)), end - m);
}

void gather(const Gather& g, int64_t begin, int64_t end) {
  const int32_t cluster = g.assign[begin];
  bool one = cluster >= 0 && cluster < g.clusters;
  for (int64_t m = begin; one && m < end; ++m) one = g.assign[m] == cluster;
  with_number(g.number, [&](auto number) { one ? spread_row<decltype(number)>(g, begin, end) : gather_rows<decltype(number)>(g, begin, end); });
}

}  // namespace

PYVSEG_KERNELS = {assign, add_run, add_up, gather};
#else

PYVSEG_KERNEL_TABLE

namespace {

using kmeans::kRun;

// body(image, begin, end) for runs of the positions of all images, each of `width` numbers
template <typename Body>
void parallel_runs(int64_t images, int64_t positions, int64_t width, const Body& body) {
  const int64_t runs = kmeans::divide_up(positions, kRun);
  parallel_for(0, images * runs, grain_of(std::min(positions, kRun) * width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      body(i / runs, i % runs * kRun, std::min((i % runs + 1) * kRun, positions));
  });
}

// logits (B, N, M) -> (B, M) int32
Tensor kmeans_assign(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 3 && logits.size(1) > 0 && logits.size(1) < INT32_MAX, "kmeans_assign: need (B, N, M), N > 0");
  const Tensor rows = rows_contiguous(logits);
  const int64_t B = rows.size(0), M = rows.size(2);
  Tensor assign = torch::stable::new_empty(logits, {B, M}, ScalarType::Int);
  const Kernels& kernel = kernels();
  parallel_runs(B, M, logits.size(1), [&](int64_t b, int64_t begin, int64_t end) {
    kernel.assign(kmeans::map_of(rows, b), begin, end, assign.mutable_data_ptr<int32_t>() + b * M);
  });
  return assign;
}

void check_assign(const Tensor& assign, const Tensor& other, int64_t M) {
  STD_TORCH_CHECK(assign.dim() == 2 && assign.scalar_type() == ScalarType::Int && other.dim() == 3 &&
                      assign.size(0) == other.size(0) && assign.size(1) == M,
                  "kmeans_pool: assign must be int32 (B, M) to go with the other tensor");
}

// assign (B, M) int32, value (B, D, M) -> update (B, N, D), count (B, N) float32
std::tuple<Tensor, Tensor> kmeans_pool(const Tensor& assign, const Tensor& value, int64_t clusters) {
  check_assign(assign, value, value.size(-1));
  STD_TORCH_CHECK(clusters >= 0 && clusters < INT32_MAX, "kmeans_pool: clusters out of range");
  const Tensor values = kmeans::adjacent(value), own = dense(assign);
  const Kernels& kernel = kernels();
  return kmeans::sum_chunks(values, clusters, kernel.add_up, [&] {
    return [&](int64_t b, int64_t begin, int64_t end, float* bins) {
      const Map map = kmeans::map_of(values, b);
      for (int64_t m = begin; m < end; m += kRun)
        kernel.add_run(map, m, std::min(m + kRun, end), own.const_data_ptr<int32_t>() + b * map.positions, clusters, bins);
    };
  });
}

// grad_update (B, N, D), assign (B, M) int32 -> (B, D, M) in grad_update's dtype
Tensor kmeans_gather(const Tensor& grad_update, const Tensor& assign) {
  check_assign(assign, grad_update, assign.size(-1));
  const Tensor rows = dense(grad_update), own = dense(assign);
  const int64_t B = rows.size(0), N = rows.size(1), D = rows.size(2), M = own.size(1);
  const Number number = number_of(rows);
  Tensor out = torch::stable::new_empty(grad_update, {B, D, M});
  const Kernels& kernel = kernels();
  parallel_runs(B, M, D, [&](int64_t b, int64_t begin, int64_t end) {
    const int64_t bytes = bytes_of(number);
    kernel.gather({static_cast<const char*>(rows.const_data_ptr()) + b * N * D * bytes, own.const_data_ptr<int32_t>() + b * M,
                   static_cast<char*>(out.mutable_data_ptr()) + b * D * M * bytes, N, D, M, number},
                  begin, end);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvseg, m) {
  m.def("kmeans_assign(Tensor logits) -> Tensor");
  m.def("kmeans_pool(Tensor assign, Tensor value, int clusters) -> (Tensor, Tensor)");
  m.def("kmeans_gather(Tensor grad_update, Tensor assign) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(pyvseg, CPU, m) {
  m.impl("kmeans_assign", TORCH_BOX(&kmeans_assign));
  m.impl("kmeans_pool", TORCH_BOX(&kmeans_pool));
  m.impl("kmeans_gather", TORCH_BOX(&kmeans_gather));
}
#endif

}  // namespace pyvseg::kmeans_pool
