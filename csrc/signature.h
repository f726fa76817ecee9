// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <Python.h>

namespace pyvseg {

// signature(*args) -> bytes | None: equal for calls whose tensors agree in dtype, device, shape and requires_grad and whose
// other arguments are equal; None where an argument is neither a plain tensor nor None, a bool, number, string or a tuple or
// list of them, or where a size is symbolic.
PyObject* signature(PyObject* module, PyObject* const* args, Py_ssize_t count);

// requires_grad(args) -> bool: of any tensor among them, also within lists.
PyObject* requires_grad(PyObject* module, PyObject* args);

}  // namespace pyvseg
