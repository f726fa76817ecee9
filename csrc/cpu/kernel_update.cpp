// SPDX-License-Identifier: Apache-2.0
// The gated dynamic update of K-Net's kernels in one call (see pyvseg/ops/kernel_update.py): five linears, with what
// stands between them done in one pass over the rows each.
#include "kernel_update.h"

#include <cstdint>

#include "../isa.h"

namespace pyvseg::kernel_update {

struct Forward {
  Update update;
  float* mixed;  // (rows, C) what the next linear reads
  void* out;     // (rows, C)
  Number out_number;
};

struct Kernels {
  ProductKernel product;
  void (*features)(const Forward&, int64_t begin, int64_t end);  // mixed = product of the two `in` halves
  void (*combine)(const Forward&, int64_t begin, int64_t end);   // mixed = gated sum of the two `out` halves
  void (*finish)(const Forward&, int64_t begin, int64_t end);    // out = relu(norm(last))
};

#ifdef PYVSEG_ISA
namespace {

void features(const Forward& f, int64_t begin, int64_t end) {
  const Update& u = f.update;
  for (int64_t r = begin; r < end; ++r) {
    const float* row = u.state + r * kParts * u.C;
    for (int64_t c = 0; c < u.C; c += kLanes)
      store_some(f.mixed + r * u.C + c, load_some(row + kPooledIn * u.C + c, u.C - c) * load_some(row + kKernelIn * u.C + c, u.C - c), u.C - c);
  }
}

void combine(const Forward& f, int64_t begin, int64_t end) {
  const Update& u = f.update;
  with_number(u.number, [&](auto number) {
    for (int64_t r = begin; r < end; ++r) {
      const float* row = u.state + r * kParts * u.C;
      Moments m[4];
      for (int i = 0; i < 4; ++i) m[i] = moments(row + kGated[i] * u.C, u.C, u.eps);
      for (int64_t c = 0; c < u.C; c += kLanes) {
        vfloat x[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          x[i] = normed<decltype(number)>(u, Norm(i), load_some(row + kGated[i] * u.C + c, u.C - c), m[i], c);
        store_some(f.mixed + r * u.C + c, mix(x), u.C - c);
      }
    }
  });
}

void finish(const Forward& f, int64_t begin, int64_t end) {
  const Update& u = f.update;
  with_number(u.number, [&](auto number) {
    with_number(f.out_number, [&](auto out_number) {
      for (int64_t r = begin; r < end; ++r) {
        const float* row = u.state + (r * kParts + kLast) * u.C;
        const Moments m = moments(row, u.C, u.eps);
        for (int64_t c = 0; c < u.C; c += kLanes) {
          const vfloat x = normed<decltype(number)>(u, kFcNorm, load_some(row + c, u.C - c), m, c);
          store_some((decltype(out_number)*)f.out + r * u.C + c, x < 0 ? vfloat{} : x, u.C - c);
        }
      }
    });
  });
}

}  // namespace

PYVSEG_KERNELS = {{kPanel, kBlockRows, kPanelFloats, multiply}, features, combine, finish};
#else

PYVSEG_KERNEL_TABLE

namespace {

template <typename Body>
void each_row(int64_t rows, const Body& body) {
  parallel_for(0, rows, 16, body);
}

// pooled (R, C) float32, kernels (R, C), parameters as enumerated -> updated kernels (R, C) in their dtype, and the state
// (R, 7 C) float32 for the backward
std::tuple<Tensor, Tensor> kernel_update(const Tensor& pooled, const Tensor& kernel, const std::vector<Tensor>& given, double eps) {
  check(pooled, kernel, given);
  const std::vector<Tensor> parameters = dense(given);
  const int64_t R = kernel.size(0), C = kernel.size(1);
  Tensor out = torch::stable::new_empty(kernel, {R, C});
  Tensor state = torch::stable::new_empty(kernel, {R, kParts * C}, ScalarType::Float);
  const Tensor pooled_rows = dense(pooled), kernel_rows = as_float(kernel);
  const std::unique_ptr<float[]> mixed(new float[R * C]);
  const Forward f{update_of(R, C, state.mutable_data_ptr<float>(), parameters, eps), mixed.get(), out.mutable_data_ptr(), number_of(out)};

  const auto linear = [&](Linear i, const float* x, Part to) -> Product {
    const Tensor &w = parameters[2 * i], &bias = parameters[2 * i + 1];
    return {R, C, w.size(0), x, C, 1, w.const_data_ptr(), number_of(w), 1, C, bias.const_data_ptr(), f.update.state + to * C, kParts * C, false};
  };
  const Kernels& k = kernels();
  multiply(k.product, {linear(kDynamicLayer, pooled_rows.const_data_ptr<float>(), kPooledIn),
                       linear(kInputLayer, kernel_rows.const_data_ptr<float>(), kKernelIn)});
  each_row(R, [&](int64_t begin, int64_t end) { k.features(f, begin, end); });
  multiply(k.product, {linear(kInputGateLayer, f.mixed, kInputGate), linear(kUpdateGateLayer, f.mixed, kUpdateGate)});
  each_row(R, [&](int64_t begin, int64_t end) { k.combine(f, begin, end); });
  multiply(k.product, {linear(kFcLayer, f.mixed, kLast)});
  each_row(R, [&](int64_t begin, int64_t end) { k.finish(f, begin, end); });
  return {out, state};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvseg, m) {
  m.def("kernel_update(Tensor pooled, Tensor kernels, Tensor[] parameters, float eps) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(pyvseg, CPU, m) { m.impl("kernel_update", TORCH_BOX(&kernel_update)); }
#endif

}  // namespace pyvseg::kernel_update
