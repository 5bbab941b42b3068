#include "core/check.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "core/check_tools.h"

namespace fastmkd::check {

Outcome cls_saliency(const Kernels& kernels, DType dtype, const SaliencyShape& shape, bool include_prefix) {
  const int64_t tokens = shape.prefix + shape.patches;
  // As in a ViT: q and k are views into one (batch, tokens, 3, heads, head_dim) tensor.
  const int64_t token_stride = 3 * shape.heads * shape.head_dim;
  const Bytes qkv = random_values(dtype, shape.batch * tokens * token_stride, 1);
  std::vector<float> out(as_size(shape.batch * shape.patches), kNaN);
  ClsSaliencyArgs args{};
  args.dtype = dtype;
  args.q = qkv.data();
  args.k = qkv.data() + as_size(shape.heads * shape.head_dim) * reference::size_of(dtype);
  args.q_strides[0] = args.k_strides[0] = tokens * token_stride;
  args.q_strides[1] = args.k_strides[1] = shape.head_dim;
  args.k_strides[2] = token_stride;
  args.batch = shape.batch;
  args.heads = shape.heads;
  args.prefix = shape.prefix;
  args.patches = shape.patches;
  args.head_dim = shape.head_dim;
  args.scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
  args.include_prefix = include_prefix;
  const int64_t keys = softmax_keys(args);
  std::vector<float> logits(as_size(shape.batch * shape.heads * keys), kNaN);
  std::vector<float> scratch(as_size(cls_logits_scratch(args)), kNaN);
  args.logits = logits.data();
  args.out = out.data();
  const int64_t split = shape.batch * keys / 3;
  kernels.cls_logits(args, 0, split, scratch.data());
  kernels.cls_logits(args, split, shape.batch * keys, scratch.data());
  kernels.cls_softmax(args, 0, 1);
  kernels.cls_softmax(args, 1, shape.batch);

  const std::vector<double> want = reference::cls_saliency(args);
  double worst = 0;
  for (size_t i = 0; i < want.size(); ++i) worst = std::max(worst, std::fabs(out[i] - want[i]) / want[i]);
  for (float value : out) {
    if (std::isnan(value)) return {false, "an output element was not written"};
  }
  return {worst < 4e-6, text("largest relative error ", worst)};
}

Outcome select_tokens(const Kernels& kernels, const SelectShape& shape) {
  const int64_t patches = shape.grid_h * shape.grid_w;
  std::mt19937 engine(2);
  std::uniform_int_distribution<int> few(-6, 6);
  std::vector<float> saliency(as_size(shape.batch * patches));
  for (float& value : saliency) {
    const int draw = few(engine);
    value = draw == 6 ? -0.0f : static_cast<float>(draw) * 0.37f;
  }
  std::vector<int64_t> out(as_size(shape.batch * shape.k), -1);
  SelectTokensArgs args{};
  args.saliency = saliency.data();
  args.k = shape.k;
  args.grid_h = shape.grid_h;
  args.grid_w = shape.grid_w;
  args.target_h = shape.target_h;
  args.target_w = shape.target_w;
  args.ratio_h = static_cast<float>(static_cast<double>(shape.grid_h) / static_cast<double>(shape.target_h));
  args.ratio_w = static_cast<float>(static_cast<double>(shape.grid_w) / static_cast<double>(shape.target_w));
  args.out = out.data();
  Bytes scratch(as_size(select_tokens_scratch(args)) * 4, std::byte{0xff});
  for (int64_t b = 0; b < shape.batch; ++b) {
    if (kernels.select_tokens(args, b, b + 1, scratch.data()) != -1) return {false, "finite values were refused"};
  }
  const std::vector<int64_t> want = reference::select_tokens(args, shape.batch);
  const auto difference = std::mismatch(out.begin(), out.end(), want.begin());
  if (difference.first != out.end()) {
    return {false, text("element ", difference.first - out.begin(), " is ", *difference.first, ", expected ",
                        *difference.second)};
  }
  for (float bad : {kNaN, std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()}) {
    saliency.back() = bad;
    if (kernels.select_tokens(args, 0, shape.batch, scratch.data()) != shape.batch - 1) {
      return {false, text("the value ", bad, " was not refused")};
    }
  }
  return {true, "equal"};
}

Outcome gather_patches(const Kernels& kernels, DType dtype, const PatchShape& shape) {
  PatchArgs args{};
  args.dtype = dtype;
  args.channels = shape.channels;
  args.height = shape.height;
  args.width = shape.width;
  args.patch_h = args.patch_w = shape.patch;
  args.stride_h = args.stride_w = shape.stride;
  args.grid_w = (shape.width - shape.patch) / shape.stride + 1;
  args.kept = shape.kept;
  const int64_t patches = ((shape.height - shape.patch) / shape.stride + 1) * args.grid_w;
  const Bytes images = random_values(dtype, shape.batch * shape.channels * shape.height * shape.width, 3);
  const std::vector<int64_t> keep = random_keep(shape.batch, patches, shape.kept, 4);
  args.images = images.data();
  args.keep = keep.data();
  const std::vector<double> want = reference::gather_patches(args, shape.batch);
  for (DType row_dtype : {dtype, dtype == DType::f64 ? DType::f64 : DType::f32}) {
    Bytes rows(want.size() * reference::size_of(row_dtype), std::byte{0xff});
    args.row_dtype = row_dtype;
    args.rows = rows.data();
    kernels.gather_patches(args, 0, 1);
    kernels.gather_patches(args, 1, shape.batch * shape.kept);
    for (size_t i = 0; i < want.size(); ++i) {
      const double got = reference::decode(row_dtype, rows.data(), static_cast<int64_t>(i));
      if (!close(got, want[i], 0)) return {false, text("element ", i, " is ", got, ", expected ", want[i])};
    }
  }
  return {true, "equal"};
}

Outcome conversions(const Kernels& kernels) {
  constexpr int64_t kPatterns = 1 << 16;
  std::vector<uint16_t> patterns(kPatterns);
  for (size_t i = 0; i < patterns.size(); ++i) patterns[i] = static_cast<uint16_t>(i);
  for (DType dtype : {DType::bf16, DType::f16}) {
    std::vector<float> wide(kPatterns);
    kernels.widen(dtype, patterns.data(), wide.data(), 0, kPatterns);
    for (int64_t i = 0; i < kPatterns; ++i) {
      const double want = reference::decode(dtype, patterns.data(), i);
      if (!close(wide[as_size(i)], want, 0)) return {false, text("pattern ", i, " widens to ", wide[as_size(i)])};
    }
    // Every representable number, the halfway points to its neighbours, and just beside those.
    std::vector<float> inputs;
    for (float value : wide) {
      const float next = value * (1.0f + (dtype == DType::bf16 ? 0x1p-8f : 0x1p-11f));
      for (float x : {value, next, std::nextafter(next, 0.0f), std::nextafter(next, 2 * next)}) inputs.push_back(x);
    }
    inputs.insert(inputs.end(), {65519.0f, 65520.0f, 1e30f, -1e30f, 0x1p-25f, 0x1.8p-25f, 0x1p-26f, kNaN});
    const int64_t count = static_cast<int64_t>(inputs.size());
    std::vector<uint16_t> got(inputs.size()), want(inputs.size());
    kernels.narrow(dtype, inputs.data(), got.data(), 0, count);
    for (int64_t i = 0; i < count; ++i) {
      reference::encode(dtype, inputs[as_size(i)], want.data(), i);
      const bool both_nan = std::isnan(reference::decode(dtype, got.data(), i)) && std::isnan(inputs[as_size(i)]);
      if (got[as_size(i)] != want[as_size(i)] && !both_nan) {
        return {false,
                text(inputs[as_size(i)], " narrows to pattern ", got[as_size(i)], ", expected ", want[as_size(i)])};
      }
    }
  }
  return {true, "equal"};
}

Outcome prefill(const Kernels& kernels) {
  constexpr int64_t kWidth = 37, kRows = 9, kPositions = 12;
  const std::vector<int64_t> keep = random_keep(1, kPositions, kRows, 5);
  for (DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
    for (DType pos_dtype : {dtype, DType::f32}) {
      const Bytes bias = random_values(dtype, kWidth, 6);
      const Bytes pos = random_values(pos_dtype, kPositions * kWidth, 7);
      for (int present = 0; present < 4; ++present) {
        EpilogueArgs args{};
        args.bias_dtype = dtype;
        args.pos_dtype = pos_dtype;
        args.bias = present & 1 ? bias.data() : nullptr;
        args.pos = present & 2 ? pos.data() : nullptr;
        args.keep = keep.data();
        args.width = kWidth;
        args.out_dtype = dtype == DType::f64 ? DType::f64 : DType::f32;
        Bytes out(kRows * kWidth * reference::size_of(args.out_dtype), std::byte{0xff});
        args.out = out.data();
        kernels.prefill(args, 0, 4);
        kernels.prefill(args, 4, kRows);
        for (int64_t i = 0; i < kRows * kWidth; ++i) {
          double want = 0;
          if (present & 1) want += reference::decode(dtype, bias.data(), i % kWidth);
          if (present & 2) {
            want += reference::decode(pos_dtype, pos.data(), keep[as_size(i / kWidth)] * kWidth + i % kWidth);
          }
          const double got = reference::decode(args.out_dtype, out.data(), i);
          if (!close(got, want, 1e-6)) return {false, text("element ", i, " is ", got, ", expected ", want)};
        }
      }
    }
  }
  return {true, "equal"};
}

Outcome stitch_tokens(const Kernels& kernels, DType dtype, const StitchShape& shape) {
  const int64_t rows = shape.batch * shape.tokens;
  const Bytes student = random_values(dtype, rows * shape.width, 15);
  const Bytes teacher = random_values(dtype, rows * shape.width, 16);
  const Bytes position = random_values(dtype, shape.tokens * shape.width, 17);
  const std::unique_ptr<bool[]> from_teacher(new bool[as_size(rows)]);
  for (int64_t r = 0; r < rows; ++r) from_teacher[as_size(r)] = r % 3 == 1;
  Bytes out(student.size(), std::byte{0xff});
  StitchArgs args{dtype,           student.data(), teacher.data(), from_teacher.get(),
                  position.data(), shape.tokens,   shape.width,    out.data()};
  kernels.stitch_tokens(args, rows / 2, rows);
  kernels.stitch_tokens(args, 0, rows / 2);
  return equals_rounded(dtype, out, reference::stitch_tokens(args, shape.batch));
}

namespace {

std::vector<int32_t> random_taps(const ConvShape& shape) {
  std::mt19937 engine(8);
  std::uniform_int_distribution<int32_t> row(0, static_cast<int32_t>(shape.n_in) - 1), third(0, 2);
  std::vector<int32_t> taps(as_size(shape.n_out * shape.taps));
  for (size_t i = 0; i < taps.size(); ++i) {
    taps[i] = i < as_size(shape.taps) || third(engine) == 0 ? -1 : row(engine);
  }
  // Windows of a square kernel that slide over the rows of a map, to the right and to the left in turn.
  const auto kernel = static_cast<int64_t>(std::lround(std::sqrt(static_cast<double>(shape.taps))));
  constexpr int64_t kWidth = 13;
  for (int64_t o = shape.n_out / 2; o < shape.n_out && kernel * kernel == shape.taps; ++o) {
    const int64_t line = o / kWidth, left = line % 2 == 0 ? o % kWidth : kWidth - 1 - o % kWidth;
    for (int64_t t = 0; t < shape.taps; ++t) {
      const int64_t y = line + t / kernel, x = left + t % kernel;
      const bool absent = y % 4 == 0 || x % 6 == 0;
      taps[as_size(o * shape.taps + t)] = absent ? -1 : static_cast<int32_t>((y * kWidth + x) % shape.n_in);
    }
  }
  return taps;
}

std::vector<float> random_floats(int64_t count, unsigned seed) {
  const Bytes bytes = random_values(DType::f32, count, seed);
  std::vector<float> values(as_size(count));
  std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

// Error relative to the largest element, or to `largest`; sums of products of normal variates in float32.
Outcome judge(const std::vector<float>& got, const std::vector<double>& want, double largest = 1,
              double tolerance = 2e-6) {
  double worst = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    if (std::isnan(got[i])) return {false, text("element ", i, " was not written")};
    worst = std::max(worst, std::fabs(got[i] - want[i]));
    largest = std::max(largest, std::fabs(want[i]));
  }
  return {worst < tolerance * largest, text("largest error ", worst, ", largest element ", largest)};
}

// Runs the units in two calls, the later ones first, each with poisoned scratch.
template <class Args, class Plan>
void run_units(void (*run)(const Args&, int64_t, int64_t, float*), const Args& args, const Plan& plan) {
  const int64_t split = plan.units / 3;
  for (auto [begin, end] : {std::pair{split, plan.units}, std::pair{int64_t{0}, split}}) {
    std::vector<float> scratch(as_size(plan.scratch), kNaN);
    if (begin < end) run(args, begin, end, scratch.data());
  }
}

// Rows of random numbers as the plan of `args` wants them; those of bf16 are exact in float32 too.
template <class Args>
Bytes random_rows(ConvPlan (*plan)(const Args&), Args& args, DType dtype, int64_t count, unsigned seed) {
  args.dtype = dtype;
  const Bytes rows = random_values(dtype, count, seed);
  args.dtype = plan(args).dtype;
  if (args.dtype == dtype) return rows;
  Bytes wide = random_values(args.dtype, count, seed);
  for (int64_t i = 0; i < count; ++i) {
    reference::encode(args.dtype, reference::decode(dtype, rows.data(), i), wide.data(), i);
  }
  return wide;
}

bool is_depthwise(const ConvShape& shape) { return shape.groups == shape.cin && shape.groups == shape.cout; }

}  // namespace

Outcome masked_conv2d(const Kernels& kernels, DType dtype, const ConvShape& shape, WeightLayout layout) {
  const int64_t group_in = shape.cin / shape.groups;
  const std::vector<float> bias = random_floats(shape.cout, 10);
  const Bytes weight = random_values(dtype, shape.cout * group_in * shape.taps, 11);
  const std::vector<int32_t> taps = random_taps(shape);
  MaskedConvArgs args{};
  args.weight_dtype = dtype;
  args.weight = weight.data();
  const int64_t strides[3][3] = {{group_in * shape.taps, shape.taps, 1},
                                 {group_in * shape.taps, 1, group_in},
                                 {shape.taps, shape.cout * shape.taps, 1}};
  std::copy_n(strides[static_cast<int>(layout)], 3, args.weight_strides);
  args.taps = taps.data();
  args.n_out = shape.n_out;
  args.cin = shape.cin;
  args.cout = shape.cout;
  args.groups = shape.groups;
  args.num_taps = shape.taps;
  const auto plan = is_depthwise(shape) ? kernels.masked_depthwise_plan : kernels.masked_conv2d_plan;
  const Bytes values = random_rows(plan, args, dtype, shape.n_in * shape.cin, 9);
  args.values = values.data();
  Outcome outcome{};
  for (const float* maybe_bias : {bias.data(), static_cast<const float*>(nullptr)}) {
    args.bias = maybe_bias;
    std::vector<float> out(as_size(shape.n_out * shape.cout), kNaN);
    args.out = out.data();
    run_units(is_depthwise(shape) ? kernels.masked_depthwise : kernels.masked_conv2d, args, plan(args));
    outcome = judge(out, reference::masked_conv2d(args));
    if (!outcome.ok) return outcome;
  }
  return outcome;
}

Outcome masked_conv2d_weight(const Kernels& kernels, DType dtype, const ConvShape& shape) {
  const std::vector<int32_t> taps = random_taps(shape);
  std::vector<float> out(as_size(shape.cout * (shape.cin / shape.groups) * shape.taps), kNaN);
  MaskedConvWeightArgs args{};
  args.taps = taps.data();
  args.n_out = shape.n_out;
  args.cin = shape.cin;
  args.cout = shape.cout;
  args.groups = shape.groups;
  args.num_taps = shape.taps;
  args.out = out.data();
  const bool depthwise = is_depthwise(shape);
  const auto make_plan = depthwise ? kernels.masked_depthwise_weight_plan : kernels.masked_conv2d_weight_plan;
  const Bytes values = random_rows(make_plan, args, dtype, shape.n_in * shape.cin, 12);
  const Bytes grad = random_rows(make_plan, args, dtype, shape.n_out * shape.cout, 13);
  args.values = values.data();
  args.grad = grad.data();
  const ConvPlan plan = make_plan(args);
  std::vector<float> sums(as_size(plan.sums), kNaN);
  args.sums = sums.data();
  run_units(depthwise ? kernels.masked_depthwise_weight : kernels.masked_conv2d_weight, args, plan);
  if (plan.reduce_units > 0) {
    (depthwise ? kernels.masked_depthwise_weight_reduce : kernels.masked_conv2d_weight_reduce)(args, 0,
                                                                                               plan.reduce_units);
  }
  return judge(out, reference::masked_conv2d_weight(args));
}

Outcome centred_gram(const Kernels& kernels, DType dtype, const GramShape& shape) {
  std::vector<Bytes> features;
  std::vector<GramLayer> layers;
  for (int64_t width : {shape.width, 3 * shape.width}) {
    const int64_t stride = width + shape.padding;
    Bytes values = random_values(dtype, shape.batch * stride, 14);
    for (int64_t i = 0; i < shape.batch * stride; ++i) {
      reference::encode(dtype, reference::decode(dtype, values.data(), i) + 8, values.data(), i);
    }
    features.push_back(std::move(values));
    layers.push_back({features.back().data(), stride, width});
  }
  GramArgs args{};
  args.dtype = dtype;
  args.layers = layers.data();
  args.num_layers = static_cast<int64_t>(layers.size());
  args.batch = shape.batch;
  std::vector<float> out(as_size(args.num_layers * shape.batch * shape.batch), kNaN);
  args.out = out.data();
  const ConvPlan plan = kernels.centred_gram_plan(args);
  std::vector<float> sums(as_size(plan.sums), kNaN), scratch(as_size(plan.scratch), kNaN);
  args.sums = sums.data();
  run_units(kernels.centred_gram, args, plan);
  for (int64_t i = plan.reduce_units; i-- > 0;) kernels.centred_gram_reduce(args, i, i + 1, scratch.data());
  // Centring takes off what all images share: errors are relative to what was summed, not to what is left.
  return judge(out, reference::centred_gram(args), 4.0 * static_cast<double>(shape.width));
}

Outcome packed_attention(const Kernels& kernels, DType dtype, const std::vector<int64_t>& lengths, int64_t heads,
                         int64_t head_dim) {
  std::vector<int32_t> starts{0};
  for (int64_t length : lengths) starts.push_back(starts.back() + static_cast<int32_t>(length));
  const int64_t count = starts.back() * heads * head_dim;
  const Bytes qkv = random_values(dtype, 3 * count, 14);
  Bytes out(as_size(count) * reference::size_of(dtype));
  for (int64_t i = 0; i < count; ++i) reference::encode(dtype, kNaN, out.data(), i);
  PackedAttentionArgs args{};
  args.dtype = dtype;
  args.qkv = qkv.data();
  args.starts = starts.data();
  args.images = static_cast<int64_t>(lengths.size());
  args.heads = heads;
  args.head_dim = head_dim;
  args.scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  args.out = out.data();
  run_units(kernels.packed_attention, args, kernels.packed_attention_plan(args));
  std::vector<float> got(as_size(count));
  for (int64_t i = 0; i < count; ++i) got[as_size(i)] = static_cast<float>(reference::decode(dtype, out.data(), i));
  return judge(got, reference::packed_attention(args), 1,
               dtype == DType::f32   ? 2e-6
               : dtype == DType::f16 ? 1e-3
                                     : 8e-3);
}

}  // namespace fastmkd::check
