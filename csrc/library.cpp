// Registration of the raw CPU kernels in a private namespace, on torch's stable ABI.
//
// Each csrc/cpu/<op>.cpp adds its schemas with STABLE_TORCH_LIBRARY_FRAGMENT(fastguard_c, m) and its
// kernels with STABLE_TORCH_LIBRARY_IMPL(fastguard_c, CPU, m). Kernels here know nothing of autograd: the
// public ops are defined once, in Python.
#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastguard_c, m) {
  (void)m;
}

// Importing the module is what loads the library; it has no Python content of its own.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
