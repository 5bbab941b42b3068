// fastmkd_native::centred_gram on the CPU.
#include <memory>
#include <vector>

#include "checks.h"
#include "core/dispatch.h"
#include "cpu/dtypes.h"
#include "cpu/scratch.h"

namespace fastmkd {
namespace {

Tensor centred_gram(const std::vector<Tensor>& features) {
  require(!features.empty(), "features is empty; expected at least one layer, a list of (n, d) tensors.");
  GramArgs args{};
  args.dtype = core_dtype(features[0], "features[0]");
  require(args.dtype != DType::f64,
          "features[0] has dtype Double; the compiled kernel takes float32, bfloat16 and float16.");
  std::vector<GramLayer> layers;
  for (size_t i = 0; i < features.size(); ++i) {
    const Tensor& x = features[i];
    const std::string name = "features[" + std::to_string(i) + "]";
    require_dim(x, name.c_str(), 2, "(n, d)");
    require_cpu(x, name.c_str());
    require_dtype(x, name.c_str(), features[0].scalar_type());
    require(x.size(0) >= 4 && x.size(0) == features[0].size(0), name, " has shape ", shape_text(x),
            "; expected the same n for every layer, at least 4.");
    require(x.size(1) >= 1, name, " has shape ", shape_text(x), "; expected at least one feature.");
    require(x.size(1) == 1 || x.stride(1) == 1, name, "'s last dimension has stride ", x.stride(1), "; expected 1.");
    layers.push_back({x.const_data_ptr(), x.stride(0), x.size(1)});
  }
  args.layers = layers.data();
  args.num_layers = static_cast<int64_t>(layers.size());
  args.batch = features[0].size(0);
  Tensor out = torch::stable::empty({args.num_layers, args.batch, args.batch}, ScalarType::Float, std::nullopt,
                                    features[0].device());
  args.out = out.mutable_data_ptr<float>();

  const Kernels& table = kernels();
  const ConvPlan plan = table.centred_gram_plan(args);
  const std::unique_ptr<float[]> sums(new float[static_cast<size_t>(plan.sums)]);
  args.sums = sums.get();
  torch::stable::parallel_for(0, plan.units, 1, [&](int64_t begin, int64_t end) {
    table.centred_gram(args, begin, end, thread_scratch(plan.scratch));
  });
  torch::stable::parallel_for(0, plan.reduce_units, 1, [&](int64_t begin, int64_t end) {
    table.centred_gram_reduce(args, begin, end, thread_scratch(plan.scratch));
  });
  return out;
}

}  // namespace
}  // namespace fastmkd

STABLE_TORCH_LIBRARY_IMPL(fastmkd_native, CPU, m) { m.impl("centred_gram", TORCH_BOX(&fastmkd::centred_gram)); }
