// fastmkd_native::centred_gram on the CPU.
#include <atomic>
#include <memory>
#include <vector>

#include "checks.h"
#include "core/dispatch.h"
#include "cpu/dtypes.h"
#include "cpu/scratch.h"

namespace fastmkd {
namespace {

Tensor centred_gram(const std::vector<Tensor>& features) {
  check_centred_gram(features);
  GramArgs args{};
  args.dtype = core_dtype(features[0], "features[0]");
  require(args.dtype != DType::f64,
          "features[0] has dtype Double; the compiled kernel takes float32, bfloat16 and float16.");
  std::vector<GramLayer> layers;
  for (size_t i = 0; i < features.size(); ++i) {
    const Tensor& x = features[i];
    require_cpu(x, ("features[" + std::to_string(i) + "]").c_str());
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
  // Each thread takes the next unit that is left: one that shares its core does not hold up the others, and the result
  // does not depend on who made a unit.
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, plan.units, 1, [&](int64_t, int64_t) {
    float* scratch = thread_scratch(plan.scratch);
    for (int64_t unit = next++; unit < plan.units; unit = next++) table.centred_gram(args, unit, unit + 1, scratch);
  });
  torch::stable::parallel_for(0, plan.reduce_units, 1, [&](int64_t begin, int64_t end) {
    table.centred_gram_reduce(args, begin, end, thread_scratch(plan.scratch));
  });
  return out;
}

}  // namespace
}  // namespace fastmkd

STABLE_TORCH_LIBRARY_IMPL(fastmkd_native, CPU, m) { m.impl("centred_gram", TORCH_BOX(&fastmkd::centred_gram)); }
