// fastmkd_native::stitch_tokens on the CPU.
#include <algorithm>
#include <utility>

#include "checks.h"
#include "core/dispatch.h"
#include "cpu/dtypes.h"

namespace fastmkd {
namespace {

// Elements below which a second thread costs more than it brings.
constexpr int64_t kGrain = 32768;

Tensor stitch_tokens(const Tensor& student, const Tensor& teacher, const Tensor& from_teacher, const Tensor& position) {
  require_dim(student, "student", 3, "(B, N, d)");
  require_dim(teacher, "teacher", 3, "(B, N, d)");
  require_dim(from_teacher, "from_teacher", 2, "(B, N)");
  require_dim(position, "position", 2, "(N, d)");
  StitchArgs args{};
  args.dtype = core_dtype(student, "student");
  require(args.dtype != DType::f64,
          "student has dtype Double; the compiled kernel takes float32, bfloat16 and float16.");
  const int64_t batch = student.size(0), tokens = student.size(1), width = student.size(2);
  require(tokens >= 1 && width >= 1, "student has shape ", shape_text(student), "; expected at least one channel.");
  require(teacher.size(0) == batch && teacher.size(1) == tokens && teacher.size(2) == width, "teacher has shape ",
          shape_text(teacher), "; expected ", shape_text(student), ".");
  require(from_teacher.size(0) == batch && from_teacher.size(1) == tokens, "from_teacher has shape ",
          shape_text(from_teacher), "; expected (", batch, ", ", tokens, ").");
  require(position.size(0) == tokens && position.size(1) == width, "position has shape ", shape_text(position),
          "; expected (", tokens, ", ", width, ").");
  require_dtype(teacher, "teacher", student.scalar_type());
  require_dtype(position, "position", student.scalar_type());
  require_dtype(from_teacher, "from_teacher", ScalarType::Bool);
  for (const auto& [tensor, name] : {std::pair{&student, "student"}, std::pair{&teacher, "teacher"},
                                     std::pair{&from_teacher, "from_teacher"}, std::pair{&position, "position"}}) {
    require_cpu(*tensor, name);
    require_contiguous(*tensor, name);
  }
  args.student = student.const_data_ptr();
  args.teacher = teacher.const_data_ptr();
  args.from_teacher = from_teacher.const_data_ptr<bool>();
  args.position = position.const_data_ptr();
  args.tokens = tokens;
  args.width = width;
  Tensor out = torch::stable::empty({batch, tokens, width}, student.scalar_type(), std::nullopt, student.device());
  args.out = out.mutable_data_ptr();
  const Kernels& table = kernels();
  torch::stable::parallel_for(0, batch * tokens, std::max<int64_t>(1, kGrain / width),
                              [&](int64_t begin, int64_t end) { table.stitch_tokens(args, begin, end); });
  return out;
}

}  // namespace
}  // namespace fastmkd

STABLE_TORCH_LIBRARY_IMPL(fastmkd_native, CPU, m) { m.impl("stitch_tokens", TORCH_BOX(&fastmkd::stitch_tokens)); }
