// What a kernel source needs besides CUDA itself, so that tests/native can run that very source on a CPU.
#pragma once

#ifdef __CUDACC__
#define FASTMKD_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#else
#include "cuda_shim.h"
#endif
