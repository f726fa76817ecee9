// SPDX-License-Identifier: Apache-2.0
// Matrix products of a few hundred rows: y = x w + bias in float32.
//
// Sixty-four columns of w (AVX-512) are laid out as a panel in cache, in float32 whatever w is; then six rows of x at a
// time are broadcast against it. Libraries lose half of their speed or more at this size. Where the CPU multiplies pairs
// of bfloat16 and w is bfloat16, x is rounded to it and the panel holds pairs.
#pragma once
#include "number.h"
#ifdef PYVSEG_ISA
#include "vec.h"
#else
#include "launch.h"
#endif

namespace pyvseg {

struct Product {
  int64_t rows, depth, columns;
  const float* x;               // element (r, d) at r * x_row + d * x_depth
  int64_t x_row, x_depth;
  const void* w;                // element (d, c) at d * w_depth + c * w_column; one of the two strides is 1
  Number number;                // of w and bias
  int64_t w_depth, w_column;
  const void* bias;             // (columns), or null
  float* y;                     // rows y_row apart
  int64_t y_row;
  bool add;                     // to what y holds, instead of the bias
};

struct ProductKernel {
  int panel, rows;       // columns and rows at a time
  int64_t panel_floats;  // scratch
  void (*multiply)(const Product&, int64_t panel, int64_t begin, int64_t end, float* scratch);
};

#ifdef PYVSEG_ISA
namespace {

constexpr int kTileRows = 6, kTileVectors = kLanes == 16 ? 4 : 2;  // accumulators fill the registers
constexpr int kPanel = kTileVectors * kLanes;                      // columns
constexpr int kDepth = 128;  // of a panel, which L1 then holds; a deeper product adds up several: short sums round less
constexpr int kBlockRows = 192;                                    // at most
constexpr int64_t kPanelFloats = (kDepth + 1) * kPanel + kBlockRows * kDepth / 2;

// panel[d][c] = w[depth + d][column + c], zero past the last column.
template <typename T>
void lay_out(const Product& p, int64_t depth, int64_t count, int64_t column, float* panel) {
  const T* w = (const T*)p.w + depth * p.w_depth + column * p.w_column;
  const int64_t columns = p.columns - column < kPanel ? p.columns - column : kPanel, whole = columns / kLanes * kLanes;
  const int64_t tile = p.w_column == 1 ? 1 : kLanes;
  int64_t d = 0;
  for (; d + tile <= count; d += tile)
    for (int64_t c = 0; c < whole; c += kLanes) {
      if (tile == 1) {
        store(panel + d * kPanel + c, load(w + d * p.w_depth + c));
        continue;
      }
      vuint square[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        const T* from = w + (c + j) * p.w_column + d;
        __builtin_prefetch(from + kDepth, 0, 2);  // of the next panel
        square[j] = (vuint)load(from);
      }
      transpose(square);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) store(panel + (d + j) * kPanel + c, (vfloat)square[j]);
    }
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t c = j < d ? whole : 0; c < columns; ++c) panel[j * kPanel + c] = load1(w + j * p.w_depth + c * p.w_column);
    for (int64_t c = columns; c < kPanel; ++c) panel[j * kPanel + c] = 0;
  }
}

// tile (R, kPanel) += x (R rows, count) panel, in the first V vectors of a row
template <int R, int V>
PYVSEG_INLINE void multiply_tile(const Product& p, const float* x, int64_t count, const float* panel, float* tile) {
  vfloat total[R][V] = {};
  for (int64_t d = 0; d < count; ++d) {
    vfloat w[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) w[v] = load(panel + d * kPanel + v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const vfloat one = splat(x[r * p.x_row + d * p.x_depth]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) total[r][v] += one * w[v];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* to = tile + r * kPanel + v * kLanes;
      store(to, load(to) + total[r][v]);
    }
}

#if defined(__AVX512BF16__)
// panel[d / 2][c] = the pair w[depth + d][column + c], w[depth + d + 1][column + c]
void lay_out_pairs(const Product& p, int64_t depth, int64_t count, int64_t column, uint32_t* panel) {
  const uint16_t* w = (const uint16_t*)p.w + depth + column * p.w_column;
  const int64_t columns = p.columns - column < kPanel ? p.columns - column : kPanel;
  for (int64_t c = 0; c < kPanel; c += kLanes)
    for (int64_t d = 0; d < count; d += 2 * kLanes) {
      vuint square[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        const int64_t left = c + j < columns ? count - d : 0;
        const __mmask32 there = left >= 32 ? ~0u : (1u << left) - 1;
        const uint16_t* from = w + (c + j) * p.w_column + d;
        __builtin_prefetch(from + kDepth, 0, 2);  // of the next panel
        square[j] = (vuint)_mm512_maskz_loadu_epi16(there, from);
      }
      transpose(square);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) store((int32_t*)panel + (d / 2 + j) * kPanel + c, (vint)square[j]);
    }
}

// Row r of x, rounded, as pairs[r][d / 2]; zeros behind an odd depth.
void round_pairs(const Product& p, const float* x, int64_t rows, int64_t count, uint32_t* pairs) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < count; d += kLanes) {
      const __mmask16 there = count - d >= kLanes ? 0xffff : (1u << (count - d)) - 1;
      const __m256bh half = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(there, x + r * p.x_row + d));
      __builtin_memcpy((uint16_t*)(pairs + r * (kDepth / 2)) + d, &half, sizeof half);
    }
}

template <int R>
PYVSEG_INLINE void multiply_pairs(const uint32_t* pairs, int64_t count, const uint32_t* panel, float* tile) {
  __m512 total[R][kTileVectors] = {};
  for (int64_t d = 0; d < count; ++d) {
    __m512bh w[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) w[v] = (__m512bh)_mm512_loadu_si512(panel + d * kPanel + v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m512bh one = (__m512bh)_mm512_set1_epi32(int(pairs[r * (kDepth / 2) + d]));
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) total[r][v] = _mm512_dpbf16_ps(total[r][v], one, w[v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      float* to = tile + r * kPanel + v * kLanes;
      store(to, load(to) + (vfloat)total[r][v]);
    }
}
bool in_pairs(const Product& p) { return p.number == Number::kBfloat16 && p.w_depth == 1 && p.x_depth == 1; }
#else
bool in_pairs(const Product&) { return false; }
void lay_out_pairs(const Product&, int64_t, int64_t, int64_t, uint32_t*) {}
void round_pairs(const Product&, const float*, int64_t, int64_t, uint32_t*) {}
template <int R>
PYVSEG_INLINE void multiply_pairs(const uint32_t*, int64_t, const uint32_t*, float*) {}
#endif

// body(integral_constant of rows): a tile kernel for each number of rows, the one for `rows` runs.
template <int N>
struct Rows {
  static constexpr int value = N;
};
template <typename Body>
PYVSEG_INLINE void with_rows(int64_t rows, const Body& body) {
  switch (rows) {
    case 6: return body(Rows<6>{});
    case 5: return body(Rows<5>{});
    case 4: return body(Rows<4>{});
    case 3: return body(Rows<3>{});
    case 2: return body(Rows<2>{});
    default: return body(Rows<1>{});
  }
}

// Columns kPanel * panel and on, of the rows begin to end, kBlockRows at most.
void multiply(const Product& p, int64_t panel, int64_t begin, int64_t end, float* scratch) {
  const int64_t column = panel * kPanel, columns = p.columns - column < kPanel ? p.columns - column : kPanel;
  float *weights = scratch, *bias = scratch + kDepth * kPanel;
  uint32_t *weight_pairs = (uint32_t*)weights, *x_pairs = (uint32_t*)(bias + kPanel);
  const bool pairs = in_pairs(p);
  for (int64_t c = 0; c < kPanel; ++c)
    bias[c] = c < columns && p.bias ? with_number(p.number, [&](auto number) {
      return load1((const decltype(number)*)p.bias + column + c);
    }) : 0;
  for (int64_t depth = 0; depth == 0 || depth < p.depth; depth += kDepth) {
    const int64_t count = p.depth - depth < kDepth ? p.depth - depth : kDepth;
    const float* x = p.x + begin * p.x_row + depth * p.x_depth;
    if (pairs) {
      lay_out_pairs(p, depth, count, column, weight_pairs);
      round_pairs(p, x, end - begin, count, x_pairs);
    } else {
      with_number(p.number, [&](auto number) { lay_out<decltype(number)>(p, depth, count, column, weights); });
    }
    for (int64_t row = begin; row < end; row += kTileRows) {
      const int64_t rows = end - row < kTileRows ? end - row : kTileRows;
      float tile[kTileRows * kPanel];
      for (int64_t r = 0; r < rows; ++r)
        __builtin_memcpy(tile + r * kPanel, depth || p.add ? p.y + (row + r) * p.y_row + column : bias, columns * 4);
      with_rows(rows, [&](auto tall) {
        constexpr int R = decltype(tall)::value;
        if (pairs)
          multiply_pairs<R>(x_pairs + (row - begin) * (kDepth / 2), (count + 1) / 2, weight_pairs, tile);
        else if (columns <= kLanes)
          multiply_tile<R, 1>(p, x + (row - begin) * p.x_row, count, weights, tile);
        else
          multiply_tile<R, kTileVectors>(p, x + (row - begin) * p.x_row, count, weights, tile);
      });
      for (int64_t r = 0; r < rows; ++r) __builtin_memcpy(p.y + (row + r) * p.y_row + column, tile + r * kPanel, columns * 4);
    }
  }
}

}  // namespace
#else

// Several products at once: panels x blocks of rows of all of them are the tasks.
inline void multiply(const ProductKernel& kernel, const std::vector<Product>& products) {
  struct Task {
    const Product* product;
    int64_t panel, row;
  };
  std::vector<Task> tasks;
  for (const Product& p : products)
    for (int64_t panel = 0; panel * kernel.panel < p.columns; ++panel)
      for (int64_t row = 0; row < p.rows; row += kernel.rows) tasks.push_back({&p, panel, row});
  const Product& first = products.front();
  const int64_t grain = grain_of(first.depth * kernel.panel * std::min<int64_t>(first.rows, kernel.rows) / 10);
  parallel_for(0, tasks.size(), grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[kernel.panel_floats]);
    for (int64_t i = begin; i < end; ++i) {
      const Task& t = tasks[i];
      kernel.multiply(*t.product, t.panel, t.row, std::min(t.row + kernel.rows, t.product->rows), scratch.get());
    }
  });
}
#endif

}  // namespace pyvseg
