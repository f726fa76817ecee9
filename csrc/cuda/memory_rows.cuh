// SPDX-License-Identifier: Apache-2.0
// Weighted sums of rows: the readout of the memory read and all of its gradients.
#pragma once
#include "launch.cuh"

namespace pyvseg::memory_read {

// Entry e = m * top_k + rank of a batch says that query m reads memory position index[e] with coefficient[e].
struct Links {
  const int32_t* index;      // (B, M top_k)
  const float* coefficient;  // (B, M top_k)
  int64_t top_k, M;
};

// The same entries in order of memory position, for sums over the readers of a position.
struct Readers {
  const int64_t* entry;      // (B, M top_k) ascending for each position
  const int64_t* start;      // (B, N + 1)
};

// Rows of C numbers, last dimension contiguous.
struct Rows {
  const void* data;          // (B, O, rows, C)
  int64_t batch, object, row;  // strides
  int64_t count;
};
inline Rows rows_of(const Tensor& t) {  // (B, rows, C) or (B, O, rows, C)
  const bool objects = t.dim() == 4;
  return {t.const_data_ptr(), t.stride(0), objects ? t.stride(1) : 0, t.stride(-2), t.size(-2)};
}

// Whether all rows, and out's, can be read 16 bytes at a time.
inline bool wide(const Tensor& t) {
  const int64_t each = 16 / int64_t(t.element_size());
  bool fits = aligned(t.const_data_ptr(), 16) && t.size(-1) % each == 0;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) fits = fits && (t.size(d) == 1 || t.stride(d) % each == 0);
  return fits;
}

// out[b, o, r] = sum over the entries of query r of coefficient * from[b, o, index].
template <typename T, int N>
__global__ void __launch_bounds__(256) gather_rows(Links links, Rows from, T* out, int64_t O, int64_t C, int64_t items) {
  const int64_t item = blockIdx.x * int64_t(blockDim.x) + threadIdx.x, each = C / N;
  if (item >= items) return;
  const int64_t r = item / each, c = item % each * N, m = r % links.M, bo = r / links.M, b = bo / O;
  const T* rows = static_cast<const T*>(from.data) + b * from.batch + bo % O * from.object + c;
  const int64_t first = (b * links.M + m) * links.top_k;
  float sum[N] = {};
#pragma unroll 4
  for (int64_t e = first; e < first + links.top_k; ++e) {
    const int32_t position = __ldg(links.index + e);
    const float coefficient = __ldg(links.coefficient + e);
    if (uint32_t(position) >= uint64_t(from.count)) continue;  // of a caller's own making
    float x[N];
    load_readonly<N>(rows + position * from.row, x);
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] += coefficient * x[i];
  }
  store<N>(out + r * C + c, sum);
}

// out[b, o, n] = sum over the readers of position n of coefficient * from[b, o, query], less the coefficients' sum times
// `own` [b, n] where that is given.
template <typename T, int N>
__global__ void __launch_bounds__(256)
    scatter_rows(Links links, Readers readers, Rows from, Rows own, T* out, int64_t O, int64_t C, int64_t memory, int64_t items) {
  const int64_t item = blockIdx.x * int64_t(blockDim.x) + threadIdx.x, each = C / N;
  if (item >= items) return;
  const int64_t r = item / each, c = item % each * N, n = r % memory, bo = r / memory, b = bo / O;
  const T* rows = static_cast<const T*>(from.data) + b * from.batch + bo % O * from.object + c;
  const int64_t entries = links.M * links.top_k;
  const int64_t* entry = readers.entry + b * entries;
  const int64_t first = readers.start[b * (memory + 1) + n], last = readers.start[b * (memory + 1) + n + 1];
  const float* coefficients = links.coefficient + b * entries;
  float sum[N] = {}, total = 0;
#pragma unroll 4
  for (int64_t i = first; i < last; ++i) {
    const unsigned e = unsigned(__ldg(entry + i));
    const float coefficient = __ldg(coefficients + e);
    float x[N];
    load_readonly<N>(rows + e / unsigned(links.top_k) * from.row, x);
#pragma unroll
    for (int j = 0; j < N; ++j) sum[j] += coefficient * x[j];
    total += coefficient;
  }
  if (own.data && first < last) {
    float x[N];
    load_readonly<N>(static_cast<const T*>(own.data) + b * own.batch + n * own.row + c, x);
#pragma unroll
    for (int j = 0; j < N; ++j) sum[j] -= total * x[j];
  }
  store<N>(out + r * C + c, sum);
}

constexpr unsigned kRowThreads = 128;

// `from` and `out` are (B, rows, C) or (B, O, rows, C); out is contiguous.
inline void gather(const Links& links, const Tensor& from, const Tensor& out) {
  const int64_t O = out.dim() == 4 ? out.size(1) : 1, C = out.size(-1);
  for_number(out, [&](auto number) {
    using T = decltype(number);
    const auto run = [&](auto kernel, int64_t numbers) {
      const int64_t items = out.numel() / numbers;
      launch(kernel, blocks(items, kRowThreads), kRowThreads, 0, links, rows_of(from), data<T>(out), O, C, items);
    };
    if (wide(from) && wide(out)) run(gather_rows<T, kPerLoad<T>>, kPerLoad<T>);
    else run(gather_rows<T, 1>, 1);
  });
}

inline void scatter(const Links& links, const Readers& readers, const Tensor& from, const Tensor* own, const Tensor& out) {
  const int64_t O = out.dim() == 4 ? out.size(1) : 1, C = out.size(-1);
  for_number(out, [&](auto number) {
    using T = decltype(number);
    const auto run = [&](auto kernel, int64_t numbers) {
      const int64_t items = out.numel() / numbers;
      launch(kernel, blocks(items, kRowThreads), kRowThreads, 0, links, readers, rows_of(from), own ? rows_of(*own) : Rows{},
             data<T>(out), O, C, out.size(-2), items);
    };
    if (wide(from) && wide(out) && (!own || wide(*own))) run(scatter_rows<T, kPerLoad<T>>, kPerLoad<T>);
    else run(scatter_rows<T, 1>, 1);
  });
}

inline Tensor rows_contiguous(const Tensor& t) { return t.stride(-1) == 1 || t.size(-1) <= 1 ? t : torch::stable::contiguous(t); }

}  // namespace pyvseg::memory_read
