// SPDX-License-Identifier: Apache-2.0
// Gradients of the memory read. The scatter to memory positions goes through a list of each position's readers in order
// of query, so that sums are taken in one order whatever the number of threads: the result is deterministic.
#include <cstdint>

#include "../isa.h"
#include "vec.h"

namespace pyvseg::memory_read_backward {

struct Keys {
  const void* memory;        // N rows of CK keys
  const void* query;         // M rows of CK keys
  int64_t memory_stride, query_stride, CK, top_k;
  Number type;
  bool dot;                  // score <mk, qk> instead of (2 <mk, qk> - |mk|^2) / sqrt(CK)
  void* grad_memory;         // (N, CK) contiguous
  void* grad_query;          // (M, CK) contiguous
};

struct Values {
  const void* value;         // of one object: N rows of CV
  const void* grad;          // of one object: M rows of CV, contiguous
  void* grad_value;          // of one object: N rows of CV, contiguous
  int64_t value_stride, CV, top_k;
  Number type;
};

struct Links {
  const int32_t* index;      // (M, top_k)
  const float* weight;       // (M, top_k)
  float* score_grad;         // (M, top_k)
  const int64_t* start;      // (N + 1) bounds of each memory position's entries
  const int32_t* entry;      // query * top_k + rank, ascending for each position
};

struct Kernels {
  void (*add_weight_grad)(const Values&, const Links&, int64_t begin, int64_t end);
  void (*query_grad)(const Keys&, const Links&, float* row, int64_t begin, int64_t end);
  void (*memory_grad)(const Keys&, const Links&, float* row, int64_t begin, int64_t end);
  void (*value_grad)(const Values&, const Links&, float* row, int64_t begin, int64_t end);
};

#ifdef PYVSEG_ISA
namespace {

template <typename Value>
void weight_grad_rows(const Values& v, const Links& l, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m)
    for (int64_t j = m * v.top_k; j < (m + 1) * v.top_k; ++j)
      l.score_grad[j] += dot((const Value*)v.grad + m * v.CV, (const Value*)v.value + l.index[j] * v.value_stride, v.CV);
}
void add_weight_grad(const Values& v, const Links& l, int64_t begin, int64_t end) {
  with_number(v.type, [&](auto number) { weight_grad_rows<decltype(number)>(v, l, begin, end); });
}

// Turns score_grad from gradients of the weights into those of <mk, qk> - |mk|^2 / 2, then sums them for the query keys.
template <typename Key>
void query_grad_rows(const Keys& s, const Links& l, float* row, int64_t begin, int64_t end) {
  const float scale = s.dot ? 1.0f : 2.0f / __builtin_sqrtf(float(s.CK));
  for (int64_t m = begin; m < end; ++m) {
    const float mean = dot(l.weight + m * s.top_k, l.score_grad + m * s.top_k, s.top_k);
    __builtin_memset(row, 0, size_t(s.CK) * 4);
    for (int64_t j = m * s.top_k; j < (m + 1) * s.top_k; ++j) {
      l.score_grad[j] = l.weight[j] * (l.score_grad[j] - mean) * scale;
      axpy(row, l.score_grad[j], (const Key*)s.memory + l.index[j] * s.memory_stride, s.CK);
    }
    copy_rounded((Key*)s.grad_query + m * s.CK, row, s.CK);
  }
}
void query_grad(const Keys& s, const Links& l, float* row, int64_t begin, int64_t end) {
  with_number(s.type, [&](auto number) { query_grad_rows<decltype(number)>(s, l, row, begin, end); });
}

template <typename Key>
void memory_grad_rows(const Keys& s, const Links& l, float* row, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    __builtin_memset(row, 0, size_t(s.CK) * 4);
    float total = 0;
    for (int64_t e = l.start[n]; e < l.start[n + 1]; ++e) {
      const float grad = l.score_grad[l.entry[e]];
      axpy(row, grad, (const Key*)s.query + l.entry[e] / s.top_k * s.query_stride, s.CK);
      total += grad;
    }
    if (!s.dot && l.start[n] < l.start[n + 1]) axpy(row, -total, (const Key*)s.memory + n * s.memory_stride, s.CK);
    copy_rounded((Key*)s.grad_memory + n * s.CK, row, s.CK);
  }
}
void memory_grad(const Keys& s, const Links& l, float* row, int64_t begin, int64_t end) {
  with_number(s.type, [&](auto number) { memory_grad_rows<decltype(number)>(s, l, row, begin, end); });
}

template <typename Value>
void value_grad_rows(const Values& v, const Links& l, float* row, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    __builtin_memset(row, 0, size_t(v.CV) * 4);
    for (int64_t e = l.start[n]; e < l.start[n + 1]; ++e)
      axpy(row, l.weight[l.entry[e]], (const Value*)v.grad + l.entry[e] / v.top_k * v.CV, v.CV);
    copy_rounded((Value*)v.grad_value + n * v.CV, row, v.CV);
  }
}
void value_grad(const Values& v, const Links& l, float* row, int64_t begin, int64_t end) {
  with_number(v.type, [&](auto number) { value_grad_rows<decltype(number)>(v, l, row, begin, end); });
}

}  // namespace

PYVSEG_KERNELS = {add_weight_grad, query_grad, memory_grad, value_grad};
#else
}  // namespace pyvseg::memory_read_backward

#include "launch.h"

namespace pyvseg::memory_read_backward {

PYVSEG_KERNEL_TABLE

namespace {

// Counting sort of the (query, rank) entries by the memory position that they read.
void sort_by_position(const int32_t* index, int64_t entries, int64_t N, std::vector<int64_t>& start, std::vector<int32_t>& entry) {
  start.assign(N + 1, 0);
  entry.resize(entries);
  for (int64_t e = 0; e < entries; ++e) {
    STD_TORCH_CHECK(index[e] >= 0 && index[e] < N, "memory_read_backward: index out of range");
    ++start[index[e] + 1];
  }
  for (int64_t n = 0; n < N; ++n) start[n + 1] += start[n];
  std::vector<int64_t> next(start.begin(), start.end() - 1);
  for (int64_t e = 0; e < entries; ++e) entry[next[index[e]]++] = static_cast<int32_t>(e);
}

template <typename Body>
void parallel_rows(int64_t rows, int64_t width, const Body& body) {
  parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> row(width);
    body(row.data(), begin, end);
  });
}

std::tuple<Tensor, Tensor, Tensor> memory_read_backward(const Tensor& grad, const Tensor& key, const Tensor& value,
                                                        const Tensor& query, const Tensor& index, const Tensor& weight,
                                                        bool dot) {
  STD_TORCH_CHECK(key.dim() == 3 && query.dim() == 3 && value.dim() == 4 && grad.dim() == 4 && index.dim() == 3,
                  "memory_read_backward: wrong number of dimensions");
  const int64_t B = key.size(0), N = key.size(1), CK = key.size(2), M = query.size(1), O = value.size(1), CV = value.size(3);
  const int64_t k = index.size(2), entries = M * k;
  const Number type = number_of(key), value_type = number_of(value);
  STD_TORCH_CHECK(query.size(0) == B && query.size(2) == CK && value.size(0) == B && value.size(2) == N &&
                      grad.numel() == B * O * M * CV && grad.size(2) == M && index.numel() == B * entries &&
                      weight.numel() == B * entries && entries < INT32_MAX,
                  "memory_read_backward: shapes do not agree");
  STD_TORCH_CHECK(number_of(query) == type && number_of(grad) == value_type && index.scalar_type() == ScalarType::Int &&
                      weight.scalar_type() == ScalarType::Float,
                  "memory_read_backward: dtypes do not agree");
  const Tensor keys = rows_contiguous(key), queries = rows_contiguous(query), values = rows_contiguous(value);
  const Tensor grads = dense(grad), indices = dense(index);
  const Tensor weights = dense(weight);
  Tensor grad_key = torch::stable::new_empty(key, {B, N, CK});
  Tensor grad_value = torch::stable::new_empty(value, {B, O, N, CV});
  Tensor grad_query = torch::stable::new_empty(query, {B, M, CK});

  const Kernels& kernel = kernels();
  const int64_t key_bytes = bytes_of(type), value_bytes = bytes_of(value_type);
  const auto in = [](const Tensor& t, int64_t offset) { return static_cast<const char*>(t.const_data_ptr()) + offset; };
  const auto out = [](const Tensor& t, int64_t offset) { return static_cast<char*>(t.mutable_data_ptr()) + offset; };
  std::vector<int64_t> start;
  std::vector<int32_t> entry;
  std::vector<float> score_grad;
  for (int64_t b = 0; b < B; ++b) {
    const int32_t* index_b = indices.const_data_ptr<int32_t>() + b * entries;
    sort_by_position(index_b, entries, N, start, entry);
    score_grad.assign(entries, 0.0f);
    const Links links{index_b, weights.const_data_ptr<float>() + b * entries, score_grad.data(), start.data(), entry.data()};
    for (int64_t o = 0; o < O; ++o) {
      const Values v{in(values, (b * values.stride(0) + o * values.stride(1)) * value_bytes),
                     in(grads, (b * O + o) * M * CV * value_bytes), out(grad_value, (b * O + o) * N * CV * value_bytes),
                     values.stride(2), CV, k, value_type};
      parallel_rows(M, 0, [&](float*, int64_t i, int64_t j) { kernel.add_weight_grad(v, links, i, j); });
      parallel_rows(N, CV, [&](float* row, int64_t i, int64_t j) { kernel.value_grad(v, links, row, i, j); });
    }
    const Keys s{in(keys, b * keys.stride(0) * key_bytes), in(queries, b * queries.stride(0) * key_bytes), keys.stride(1),
                 queries.stride(1), CK, k, type, dot, out(grad_key, b * N * CK * key_bytes),
                 out(grad_query, b * M * CK * key_bytes)};
    parallel_rows(M, CK, [&](float* row, int64_t i, int64_t j) { kernel.query_grad(s, links, row, i, j); });
    parallel_rows(N, CK, [&](float* row, int64_t i, int64_t j) { kernel.memory_grad(s, links, row, i, j); });
  }
  return {grad_key, grad_value, grad_query};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvseg, m) {
  m.def(
      "memory_read_backward(Tensor grad, Tensor memory_key, Tensor memory_value, Tensor query_key, Tensor index, Tensor weight,"
      " bool dot=False) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(pyvseg, CPU, m) { m.impl("memory_read_backward", TORCH_BOX(&memory_read_backward)); }
#endif

}  // namespace pyvseg::memory_read_backward
