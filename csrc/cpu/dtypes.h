// torch's scalar types as the core's.
#pragma once

#include "checks.h"

namespace fastmkd {

inline DType core_dtype(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::Double:
      return DType::f64;
    default:
      require(false, name, " has dtype ", torch::headeronly::toString(tensor.scalar_type()),
              "; expected float32, bfloat16, float16 or float64.");
      return DType::f32;
  }
}

}  // namespace fastmkd
