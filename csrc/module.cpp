// SPDX-License-Identifier: Apache-2.0
// The module pyvseg._C: importing it registers the ops; by itself it only tells how the kernels were built and run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "isa.h"

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
  m.def("set_isa", &set_isa, pybind11::arg("name"), "Use this instruction set from now on; ValueError if the CPU lacks it.");
}
