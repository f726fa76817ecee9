// SPDX-License-Identifier: Apache-2.0
// The module pyvseg._C: importing it registers the ops; by itself it tells how the kernels were built and run, and what a
// call of an op looks like.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "isa.h"
#include "signature.h"

namespace {

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#else
  return std::string("gcc ") + __VERSION__;
#endif
}

std::vector<std::string> isas(bool supported_only) {
  std::vector<std::string> names;
  for (int i = 0; i < pyvseg::isa_count(); ++i)
    if (!supported_only || pyvseg::isa_supported(i)) names.emplace_back(pyvseg::isa_name(i));
  return names;
}

void set_isa(const std::string& name) {
  for (int i = 0; i < pyvseg::isa_count(); ++i) {
    if (name != pyvseg::isa_name(i)) continue;
    if (!pyvseg::isa_supported(i)) throw pybind11::value_error("this CPU does not support " + name);
    return pyvseg::set_isa(i);
  }
  throw pybind11::value_error("unknown instruction set '" + name + "'");
}

// As plain functions of Python: they run on every call of an op, and pybind11's take longer than what they do.
PyMethodDef methods[] = {
    {"signature", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&pyvseg::signature)), METH_FASTCALL,
     "What tells calls apart but for the values of tensors, as bytes; None for arguments that it does not know."},
    {"requires_grad", &pyvseg::requires_grad, METH_O, "Whether any tensor among the arguments requires a gradient."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_facts", [] {
    pybind11::dict facts;
    facts["compiler"] = compiler();
    facts["torch"] = PYVSEG_TORCH_VERSION;
    facts["cuda"] = PYVSEG_CUDA_FACTS;  // empty: built without CUDA
    facts["isas"] = isas(false);
    return facts;
  });
  m.def("isas", [] { return isas(true); }, "Instruction sets that were compiled and that this CPU has, ascending.");
  m.def("isa", [] { return std::string(pyvseg::isa_name(pyvseg::isa())); }, "The instruction set in use.");
  if (PyModule_AddFunctions(m.ptr(), methods)) throw pybind11::error_already_set();
  m.def("set_isa", &set_isa, pybind11::arg("name"), "Use this instruction set from now on; ValueError if the CPU lacks it.");
}
