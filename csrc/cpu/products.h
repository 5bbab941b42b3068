// Matrix products by torch's library, and half precisions widened for them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <array>
#include <cstdlib>
#include <string_view>

#include "checks.h"
#include "core/dispatch.h"
#include "cpu/dtypes.h"

namespace fastmkd {

// Elements below which a second thread costs more than it brings.
constexpr int64_t kGrain = 16384;

inline Tensor empty_beside(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::empty(shape, dtype, std::nullopt, like.device());
}

// (rows, columns) view of dense memory, transposed on request; it carries no gradient, whatever its owner does.
inline Tensor matrix_view(const Tensor& owner, int64_t rows, int64_t columns, bool transposed) {
  const std::array<int64_t, 2> sizes{rows, columns};
  const std::array<int64_t, 2> strides =
      transposed ? std::array<int64_t, 2>{1, rows} : std::array<int64_t, 2>{columns, 1};
  return torch::stable::from_blob(owner.data_ptr(), sizes, strides, owner.device(), owner.scalar_type());
}

// Whether bf16 is multiplied as bf16. Processors without bf16 instructions emulate them at a quarter of the float32
// rate, so there the operands are widened first. FASTMKD_BF16_MATMUL=native or float32 overrides.
inline bool multiplies_bf16() {
  static const std::string_view wanted = [] {
    const char* value = std::getenv("FASTMKD_BF16_MATMUL");
    return std::string_view(value == nullptr ? "" : value);
  }();
  if (wanted == "native") return true;
  if (wanted == "float32") return false;
  return active_isa() == Isa::avx512_bf16;
}

inline Tensor widened(const Tensor& tensor, DType dtype, std::initializer_list<int64_t> shape) {
  Tensor wide = empty_beside(tensor, shape, ScalarType::Float);
  const void* from = tensor.const_data_ptr();
  float* to = wide.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, tensor.numel(), kGrain, [&, table = &kernels()](int64_t begin, int64_t end) {
    table->widen(dtype, from, to, begin, end);
  });
  return wide;
}

inline void narrow_into(const Tensor& wide, DType dtype, Tensor& out) {
  const float* from = wide.const_data_ptr<float>();
  void* to = out.mutable_data_ptr();
  torch::stable::parallel_for(0, wide.numel(), kGrain, [&, table = &kernels()](int64_t begin, int64_t end) {
    table->narrow(dtype, from, to, begin, end);
  });
}

// out = beta * out + left @ right, in the dtype of all three.
inline void add_product(const Tensor& out, const Tensor& left, const Tensor& right, double beta) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), left.get(), right.get(), beta, 1.0));
}

}  // namespace fastmkd
