// SPDX-License-Identifier: Apache-2.0
// Reads arguments through Python's C interface alone, since torch's own for Python objects has no stable ABI.
#include "signature.h"

#include <cstdint>
#include <cstring>

namespace pyvseg {
namespace {

struct Names {
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* device = PyUnicode_InternFromString("device");
  PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
  PyTypeObject* tensor = type("torch", "Tensor");
  PyTypeObject* parameter = type("torch.nn", "Parameter");

  static PyTypeObject* type(const char* module, const char* name) {
    PyObject* found = PyImport_ImportModule(module);  // both modules and types live as long as the process
    return found ? reinterpret_cast<PyTypeObject*>(PyObject_GetAttrString(found, name)) : nullptr;
  }
};

const Names& names() {
  static const Names* const once = new Names;
  return *once;
}

// An attribute for as long as it is looked at.
class Attribute {
 public:
  Attribute(PyObject* of, PyObject* name) : value_(PyObject_GetAttr(of, name)) {}
  ~Attribute() { Py_XDECREF(value_); }
  Attribute(const Attribute&) = delete;
  Attribute& operator=(const Attribute&) = delete;
  PyObject* get() const { return value_; }

 private:
  PyObject* value_;
};

class Signature {
 public:
  // false, perhaps with a Python error set, where the argument has no signature
  bool add(PyObject* x) {
    PyTypeObject* const type = Py_TYPE(x);
    if (x == Py_None || type == &PyBool_Type) return put('o') && put(x);
    if (type == names().tensor || type == names().parameter) return add_tensor(x);
    if (type == &PyLong_Type) return put('i') && add_int(x);
    if (type == &PyFloat_Type) return put('f') && put(PyFloat_AS_DOUBLE(x));
    if (type == &PyUnicode_Type) return add_string(x);
    if (type == &PyTuple_Type || type == &PyList_Type) return put('t') && add_items(x);
    return false;
  }

  PyObject* bytes() const { return PyBytes_FromStringAndSize(data_, used_); }

 private:
  bool add_tensor(PyObject* x) {
    const Attribute shape(x, names().shape), dtype(x, names().dtype), device(x, names().device), grad(x, names().requires_grad);
    if (!shape.get() || !dtype.get() || !device.get() || !grad.get() || !PyTuple_Check(shape.get())) return false;
    // There is one object per dtype; the hash of a device holds its type and index.
    return put('T') && put(dtype.get()) && put(PyObject_Hash(device.get())) && put(grad.get() == Py_True) && add_items(shape.get());
  }

  bool add_items(PyObject* sequence) {
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(sequence);
    if (!put(count)) return false;
    for (Py_ssize_t i = 0; i < count; ++i)
      if (!add(PySequence_Fast_GET_ITEM(sequence, i))) return false;
    return true;
  }

  bool add_int(PyObject* x) {
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(x, &overflow);
    return !overflow && put(value);
  }

  bool add_string(PyObject* x) {
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(x, &size);
    if (!text || !put('s') || !put(size) || used_ + size > sizeof(data_)) return false;
    std::memcpy(data_ + used_, text, size);
    used_ += size;
    return true;
  }

  template <class T>
  bool put(const T& value) {
    if (used_ + sizeof(T) > sizeof(data_)) return false;
    std::memcpy(data_ + used_, &value, sizeof(T));
    used_ += sizeof(T);
    return true;
  }

  char data_[2048];
  size_t used_ = 0;
};

bool any_requires_grad(PyObject* x) {
  if (PyTuple_CheckExact(x) || PyList_CheckExact(x)) {
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(x); ++i)
      if (any_requires_grad(PySequence_Fast_GET_ITEM(x, i))) return true;
    return false;
  }
  return PyType_IsSubtype(Py_TYPE(x), names().tensor) && Attribute(x, names().requires_grad).get() == Py_True;
}

}  // namespace

PyObject* signature(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Signature signature;
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (signature.add(args[i])) continue;
    if (PyErr_Occurred()) PyErr_Clear();  // the op itself will say what is wrong with the argument
    Py_RETURN_NONE;
  }
  return signature.bytes();
}

PyObject* requires_grad(PyObject*, PyObject* args) {
  const bool any = any_requires_grad(args);
  return PyErr_Occurred() ? nullptr : PyBool_FromLong(any);
}

}  // namespace pyvseg
