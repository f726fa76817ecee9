// SPDX-License-Identifier: Apache-2.0
// The compiler and architectures of this library, for `pyvseg info`.
extern "C" __attribute__((visibility("default"))) const char* pyvseg_cuda_facts() { return PYVSEG_CUDA_FACTS; }
