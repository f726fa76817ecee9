// SPDX-License-Identifier: Apache-2.0
// Multi-scale deformable attention (see pyvseg/ops/ms_deform_attn.py).
#include "../isa.h"

#ifndef PYVSEG_ISA
#include "launch.h"

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
#endif
