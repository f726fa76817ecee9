// SPDX-License-Identifier: Apache-2.0
// Gradients of the gated update of kernels. Sums over rows are taken in blocks of fixed size, then over the blocks in
// order, so that they do not depend on the threads.
#include "kernel_update.h"

#include <cstdint>

#include "../isa.h"

namespace pyvseg::kernel_update_backward {

constexpr int64_t kBlock = 16;                  // rows
constexpr int kSums = 2 * kNorms + kParts;      // gradients of each norm's gain and bias, then of the linears' biases

struct Backward {
  Update update;
  const void* grad;    // (rows, C) of the result
  Number grad_number;
  float* grads;        // (rows, kParts, C) of the state
  float* features;     // (rows, C) the product of the `in` halves, and
  float* mixed;        // (rows, C) the gated sum, both computed again
  float* grad_mixed;   // (rows, C)
  float* grad_features;
  float* sums;         // (blocks of rows, kSums, C)
};

struct Kernels {
  ProductKernel product;
  void (*start)(const Backward&, int64_t block);  // features, mixed, gradient of the last linear
  void (*gates)(const Backward&, int64_t block);  // gradients of what was gated, from that of mixed
  void (*finish)(const Backward&, int64_t block); // gradients of the `in` halves, from that of features, and of the biases
};

#ifdef PYVSEG_ISA
namespace {

// Turns dx, which holds the gradient of a norm's result, into that of its input x, and adds to those of gain and bias.
template <typename T>
void norm_backward(const Update& u, Norm norm, const float* x, Moments m, float* dx, float* sums) {
  float *gain_sum = sums + 2 * norm * u.C, *bias_sum = gain_sum + u.C;
  vfloat total{}, along{};
  for (int64_t c = 0; c < u.C; c += kLanes) {
    const int64_t count = u.C - c;
    const vfloat grad = load_some(dx + c, count), normal = (load_some(x + c, count) - m.mean) * m.scale;
    const vfloat scaled = grad * load_some((const T*)u.gain[norm] + c, count);
    store_some(gain_sum + c, load_some(gain_sum + c, count) + grad * normal, count);
    store_some(bias_sum + c, load_some(bias_sum + c, count) + grad, count);
    store_some(dx + c, scaled, count);
    total += scaled;
    along += scaled * normal;
  }
  const float mean = sum(total) / u.C, slope = sum(along) / u.C;
  for (int64_t c = 0; c < u.C; c += kLanes) {
    const vfloat normal = (load_some(x + c, u.C - c) - m.mean) * m.scale;
    store_some(dx + c, m.scale * (load_some(dx + c, u.C - c) - mean - normal * slope), u.C - c);
  }
}

template <typename Body>
PYVSEG_INLINE void each_row(const Backward& b, int64_t block, const Body& body) {
  const int64_t end = (block + 1) * kBlock < b.update.rows ? (block + 1) * kBlock : b.update.rows, width = kParts * b.update.C;
  for (int64_t r = block * kBlock; r < end; ++r) body(r * b.update.C, b.update.state + r * width, b.grads + r * width);
}

// The four normed parts of a row at column c, and their moments.
struct Gated {
  Moments moments[4];
  vfloat normed[4];
};
template <typename T>
PYVSEG_INLINE void gated_at(const Update& u, const float* state, int64_t c, Gated& g) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) g.normed[i] = normed<T>(u, Norm(i), load_some(state + kGated[i] * u.C + c, u.C - c), g.moments[i], c);
}
PYVSEG_INLINE void moments_of(const Update& u, const float* state, Gated& g) {
  for (int i = 0; i < 4; ++i) g.moments[i] = moments(state + kGated[i] * u.C, u.C, u.eps);
}

template <typename T, typename G>
void start_rows(const Backward& b, int64_t block) {
  const Update& u = b.update;
  float* sums = b.sums + block * kSums * u.C;
  __builtin_memset(sums, 0, kSums * u.C * 4);
  each_row(b, block, [&](int64_t at, const float* state, float* grads) {
    Gated g;
    moments_of(u, state, g);
    const float* last = state + kLast * u.C;
    const Moments m = moments(last, u.C, u.eps);
    for (int64_t c = 0; c < u.C; c += kLanes) {
      const int64_t count = u.C - c;
      gated_at<T>(u, state, c, g);
      store_some(b.mixed + at + c, mix(g.normed), count);
      store_some(b.features + at + c, load_some(state + kPooledIn * u.C + c, count) * load_some(state + kKernelIn * u.C + c, count), count);
      const vfloat result = normed<T>(u, kFcNorm, load_some(last + c, count), m, c);
      store_some(grads + kLast * u.C + c, result <= 0 ? vfloat{} : load_some((const G*)b.grad + at + c, count), count);
    }
    norm_backward<T>(u, kFcNorm, last, m, grads + kLast * u.C, sums);
  });
}
void start(const Backward& b, int64_t block) {
  with_number(b.update.number, [&](auto number) {
    with_number(b.grad_number, [&](auto grad) { start_rows<decltype(number), decltype(grad)>(b, block); });
  });
}

template <typename T>
void gates_rows(const Backward& b, int64_t block) {
  const Update& u = b.update;
  each_row(b, block, [&](int64_t at, const float* state, float* grads) {
    Gated g;
    moments_of(u, state, g);
    for (int64_t c = 0; c < u.C; c += kLanes) {
      gated_at<T>(u, state, c, g);
      const vfloat grad = load_some(b.grad_mixed + at + c, u.C - c);
#pragma GCC unroll 2
      for (int i = 0; i < 4; i += 2) {  // a gate and what it scales
        const vfloat gate = sigmoid(g.normed[i]);
        store_some(grads + kGated[i] * u.C + c, grad * g.normed[i + 1] * gate * (1.0f - gate), u.C - c);
        store_some(grads + kGated[i + 1] * u.C + c, grad * gate, u.C - c);
      }
    }
    for (int i = 0; i < 4; ++i)
      norm_backward<T>(u, Norm(i), state + kGated[i] * u.C, g.moments[i], grads + kGated[i] * u.C, b.sums + block * kSums * u.C);
  });
}
void gates(const Backward& b, int64_t block) {
  with_number(b.update.number, [&](auto number) { gates_rows<decltype(number)>(b, block); });
}

void finish(const Backward& b, int64_t block) {
  const int64_t C = b.update.C;
  float* sums = b.sums + (block * kSums + 2 * kNorms) * C;
  each_row(b, block, [&](int64_t at, const float* state, float* grads) {
    for (int64_t c = 0; c < C; c += kLanes) {
      const vfloat grad = load_some(b.grad_features + at + c, C - c);
      store_some(grads + kPooledIn * C + c, grad * load_some(state + kKernelIn * C + c, C - c), C - c);
      store_some(grads + kKernelIn * C + c, grad * load_some(state + kPooledIn * C + c, C - c), C - c);
    }
    axpy(sums, 1.0f, grads, kParts * C);
  });
}

}  // namespace

PYVSEG_KERNELS = {{kPanel, kBlockRows, kPanelFloats, multiply}, start, gates, finish};
#else

PYVSEG_KERNEL_TABLE

namespace {

Tensor like(const Tensor& shape, std::vector<int64_t> size) { return torch::stable::new_empty(shape, size, ScalarType::Float); }

// The gradients of pooled, of kernels and, if wanted, of every parameter, each in its tensor's dtype.
std::vector<Tensor> kernel_update_backward(const Tensor& grad, const Tensor& pooled, const Tensor& kernel,
                                           const std::vector<Tensor>& given, const Tensor& state, double eps,
                                           bool of_parameters) {
  check(pooled, kernel, given);
  const int64_t R = kernel.size(0), C = kernel.size(1), width = kParts * C, blocks = (R + kBlock - 1) / kBlock;
  STD_TORCH_CHECK(grad.numel() == R * C && state.numel() == R * width && state.scalar_type() == ScalarType::Float,
                  "kernel_update_backward: grad or state has the wrong shape or dtype");
  const std::vector<Tensor> parameters = dense(given);
  const Tensor grad_rows = dense(grad), state_rows = dense(state);
  const Tensor pooled_rows = dense(pooled), kernel_rows = as_float(kernel);
  std::vector<Tensor> result{like(pooled, {R, C}), like(pooled, {R, C})};
  if (of_parameters)
    for (const Tensor& p : parameters) result.push_back(p.dim() == 2 ? like(pooled, {p.size(0), C}) : like(pooled, {p.size(0)}));

  const std::unique_ptr<float[]> scratch(new float[R * width + 4 * R * C + blocks * kSums * C]);
  float *grads = scratch.get(), *rows = grads + R * width, *sums = rows + 4 * R * C;
  const Backward b{update_of(R, C, const_cast<float*>(state_rows.const_data_ptr<float>()), parameters, eps),
                   grad_rows.const_data_ptr(), number_of(grad), grads, rows, rows + R * C, rows + 2 * R * C, rows + 3 * R * C, sums};

  // Of y = x w^T: the gradient of x from that of y, and that of w.
  const auto of_input = [&](Linear i, Part y, float* to, bool add = false) -> Product {
    const Tensor& w = parameters[2 * i];
    return {R, w.size(0), C, grads + y * C, width, 1, w.const_data_ptr(), number_of(w), C, 1, nullptr, to, C, add};
  };
  struct OfWeight {
    Linear linear;
    Part y;
    const float* x;
  };
  const auto of_weight = [&](const OfWeight& w) -> Product {
    float* to = result[2 + 2 * w.linear].mutable_data_ptr<float>();
    return {parameters[2 * w.linear].size(0), R, C, grads + w.y * C, 1, width, w.x, Number::kFloat, C, 1, nullptr, to, C, false};
  };
  const Kernels& k = kernels();
  const auto run = [&](std::vector<Product> products, std::initializer_list<OfWeight> weights) {
    if (of_parameters)
      for (const OfWeight& w : weights) products.push_back(of_weight(w));
    multiply(k.product, products);
  };
  const auto each_block = [&](void (*pass)(const Backward&, int64_t)) {
    parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) pass(b, i);
    });
  };
  each_block(k.start);
  run({of_input(kFcLayer, kLast, b.grad_mixed)}, {{kFcLayer, kLast, b.mixed}});
  each_block(k.gates);
  run({of_input(kInputGateLayer, kInputGate, b.grad_features)}, {{kInputGateLayer, kInputGate, b.features}});
  run({of_input(kUpdateGateLayer, kUpdateGate, b.grad_features, true)}, {{kUpdateGateLayer, kUpdateGate, b.features}});
  each_block(k.finish);
  run({of_input(kDynamicLayer, kPooledIn, result[0].mutable_data_ptr<float>()), of_input(kInputLayer, kKernelIn, result[1].mutable_data_ptr<float>())},
      {{kDynamicLayer, kPooledIn, pooled_rows.const_data_ptr<float>()}, {kInputLayer, kKernelIn, kernel_rows.const_data_ptr<float>()}});
  result[1] = torch::stable::to(result[1], kernel.scalar_type());
  if (!of_parameters) return result;

  const auto add_blocks = [&](int first, Tensor& to) {  // the sums from `first` on, as many as fill the tensor
    float* total = to.mutable_data_ptr<float>();
    std::fill(total, total + to.numel(), 0.0f);
    for (int64_t i = 0; i < blocks; ++i)
      for (int64_t c = 0; c < to.numel(); ++c) total[c] += sums[(i * kSums + first) * C + c];
  };
  constexpr Part outputs[] = {kPooledIn, kKernelIn, kInputGate, kUpdateGate, kLast};
  for (int i = 0; i < kLinears; ++i) add_blocks(2 * kNorms + outputs[i], result[2 + 2 * i + 1]);
  for (int i = 0; i < 2 * kNorms; ++i) add_blocks(i, result[2 + 2 * kLinears + i]);
  for (int i = 0; i < kParameters; ++i) result[2 + i] = torch::stable::to(result[2 + i], given[i].scalar_type());
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvseg, m) {
  m.def(
      "kernel_update_backward(Tensor grad, Tensor pooled, Tensor kernels, Tensor[] parameters, Tensor state, float eps,"
      " bool of_parameters=True) -> Tensor[]");
}
STABLE_TORCH_LIBRARY_IMPL(pyvseg, CPU, m) { m.impl("kernel_update_backward", TORCH_BOX(&kernel_update_backward)); }
#endif

}  // namespace pyvseg::kernel_update_backward
