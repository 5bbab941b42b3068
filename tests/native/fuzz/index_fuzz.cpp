// Fuzz target of the index code: bytes become arguments that pass every check of the operators, then each kernel must
// agree with its definition and touch nothing outside its buffers, which are allocated to the byte.
//
// Built by -DFASTMKD_FUZZ=ON with libFuzzer where the compiler is clang, else with tests/native/fuzz/driver.cpp.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/dispatch.h"
#include "core/reference.h"

namespace {

using namespace fastmkd;

class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), left_(size) {}

  // From low to high, both possible; low when there is nothing left.
  int64_t number(int64_t low, int64_t high) {
    uint32_t value = 0;
    for (int i = 0; i < (high - low > 255 ? 2 : 1) && left_ > 0; ++i, --left_) value = value << 8 | *data_++;
    return low + value % (high - low + 1);
  }

 private:
  const uint8_t* data_;
  size_t left_;
};

void expect(const check::Outcome& outcome, const char* name) {
  if (outcome.ok) return;
  std::fprintf(stderr, "%s: %s\n", name, outcome.detail.c_str());
  std::abort();
}

DType any_dtype(Bytes& bytes) { return static_cast<DType>(bytes.number(0, 2)); }

size_t as_size(int64_t n) { return static_cast<size_t>(n); }

// Cells in any order, twice or not at all, and positions that contradict them: all of it passes the checks.
void fuzz_tap_table(const Kernels& kernels, Bytes& bytes) {
  TapTableArgs args{};
  args.grid_h = bytes.number(1, 7);
  args.grid_w = bytes.number(1, 7);
  const int64_t batch = bytes.number(1, 3), count = batch * args.grid_h * args.grid_w;
  const bool transposed = bytes.number(0, 1) == 1;
  for (TapAxis* axis : {&args.vertical, &args.horizontal}) {
    const auto out_side = static_cast<int32_t>(bytes.number(1, 4)), stride = static_cast<int32_t>(bytes.number(1, 4));
    const int32_t in_side = out_side * stride;
    *axis = {transposed ? in_side : out_side,
             transposed ? out_side : in_side,
             static_cast<int32_t>(bytes.number(1, 9)),
             stride,
             static_cast<int32_t>(bytes.number(0, 300)),
             static_cast<int32_t>(bytes.number(1, 300)),
             transposed};
  }
  args.num_cells = bytes.number(1, 40);
  std::vector<int64_t> cells(as_size(args.num_cells)), rank(as_size(count));
  for (int64_t& cell : cells) cell = bytes.number(0, count - 1);
  for (int64_t& position : rank) position = bytes.number(-1, args.num_cells - 1);
  args.cells = cells.data();
  args.rank = rank.data();
  const int64_t rows = args.num_cells * tap_table_pixels(args);
  std::vector<int32_t> table(as_size(rows * tap_table_taps(args)), -7);
  std::vector<int64_t> pattern(as_size(rows), -7);
  args.table = table.data();
  args.pattern = pattern.data();
  const int64_t split = bytes.number(0, args.num_cells);
  // The scratch holds 4-byte words; its first part is read as 8-byte ones.
  std::vector<int64_t> scratch(as_size((tap_table_scratch(args) + 1) / 2), -7);
  kernels.tap_table(args, 0, split, scratch.data());
  kernels.tap_table(args, split, args.num_cells, scratch.data());
  expect({table == reference::tap_table(args), "the table differs"}, "tap_table");
  for (size_t row = 0; row < pattern.size(); ++row) {
    int64_t bits = 0;
    const int64_t taps = tap_table_taps(args);
    for (int64_t tap = 0; tap < std::min<int64_t>(taps, kPatternTaps); ++tap) {
      if (table[row * as_size(taps) + as_size(tap)] >= 0) bits |= int64_t{1} << tap;
    }
    expect({pattern[row] == bits, "the pattern of row " + std::to_string(row)}, "tap_table");
  }
}

void fuzz_select_tokens(const Kernels& kernels, Bytes& bytes) {
  SelectTokensArgs args{};
  args.grid_h = bytes.number(1, 20);
  args.grid_w = bytes.number(1, 20);
  const bool resized = bytes.number(0, 1) == 1;
  args.target_h = resized ? bytes.number(1, 24) : args.grid_h;
  args.target_w = resized ? bytes.number(1, 24) : args.grid_w;
  args.k = bytes.number(1, args.target_h * args.target_w);
  args.ratio_h = static_cast<float>(static_cast<double>(args.grid_h) / static_cast<double>(args.target_h));
  args.ratio_w = static_cast<float>(static_cast<double>(args.grid_w) / static_cast<double>(args.target_w));
  const int64_t batch = bytes.number(1, 3);
  std::vector<float> saliency(as_size(batch * args.grid_h * args.grid_w));
  constexpr float kScores[] = {0.0f, -0.0f, 1.0f, -1.0f, 0.3f, 3e38f, -3e38f, 1e-45f};  // ties, extremes, denormals
  for (float& score : saliency) score = kScores[bytes.number(0, 7)];
  std::vector<int64_t> out(as_size(batch * args.k), -1);
  args.saliency = saliency.data();
  args.out = out.data();
  std::vector<int32_t> scratch(as_size(select_tokens_scratch(args)), -7);
  if (kernels.select_tokens(args, 0, batch, scratch.data()) != -1) expect({false, "refused"}, "select_tokens");
  expect({out == reference::select_tokens(args, batch), "the tokens differ"}, "select_tokens");
}

// Rows of tokens in any order and any of them again and again.
void fuzz_unshuffle_tokens(const Kernels& kernels, Bytes& bytes) {
  UnshuffleArgs args{};
  args.dtype = any_dtype(bytes);
  args.out_dtype = bytes.number(0, 1) == 1 ? DType::f32 : args.dtype;
  args.places = bytes.number(1, 20);
  args.width = bytes.number(1, 70);
  const int64_t batch = bytes.number(1, 3), rows = bytes.number(1, 30);
  const auto values = [&](DType dtype, int64_t count) {
    std::vector<std::byte> data(as_size(count) * reference::size_of(dtype));
    for (int64_t i = 0; i < count; ++i) reference::encode(dtype, static_cast<double>(i % 61) / 8, data.data(), i);
    return data;
  };
  const auto tokens = values(args.dtype, rows * args.width), mask_token = values(args.out_dtype, args.width);
  const auto positions = values(args.out_dtype, args.places * args.width);
  std::vector<int64_t> source(as_size(batch * args.places));
  for (int64_t& row : source) row = bytes.number(-1, rows - 1);
  std::vector<std::byte> out(as_size(batch) * positions.size());
  args.tokens = tokens.data();
  args.source = source.data();
  args.mask_token = mask_token.data();
  args.positions = positions.data();
  args.out = out.data();
  kernels.unshuffle_tokens(args, 0, batch * args.places);
  const std::vector<double> want = reference::unshuffle_tokens(args, batch);
  for (size_t i = 0; i < want.size(); ++i) {  // the sums are exact in every type
    const double got = reference::decode(args.out_dtype, out.data(), static_cast<int64_t>(i));
    expect({got == want[i], "element " + std::to_string(i)}, "unshuffle_tokens");
  }
}

// Shapes alone; the indices come from the checks' own generator.
void fuzz_shapes(const Kernels& kernels, int64_t which, Bytes& bytes) {
  const DType dtype = any_dtype(bytes);
  if (which == 3) {
    check::PatchShape shape{};
    shape.batch = bytes.number(1, 3);
    shape.channels = bytes.number(1, 4);
    shape.patch = bytes.number(1, 9);
    shape.stride = bytes.number(1, 9);
    shape.height = bytes.number(shape.patch, 30);
    shape.width = bytes.number(shape.patch, 40);
    const int64_t across = (shape.width - shape.patch) / shape.stride + 1;
    shape.kept = bytes.number(1, ((shape.height - shape.patch) / shape.stride + 1) * across);
    return expect(check::gather_patches(kernels, dtype, shape), "gather_patches");
  }
  if (which == 4) {
    std::vector<int64_t> lengths(as_size(bytes.number(1, 5)));
    for (int64_t& length : lengths) length = bytes.number(0, 40);
    lengths.push_back(1);  // not all of them empty
    const int64_t heads = bytes.number(1, 3), head_dim = bytes.number(1, 80);
    return expect(check::packed_attention(kernels, dtype, lengths, heads, head_dim), "packed_attention");
  }
  if (which == 5) {
    check::PatchLossShape shape{};
    shape.batch = bytes.number(1, 3);
    shape.channels = bytes.number(1, 5);
    shape.grid_h = bytes.number(1, 4);
    shape.grid_w = bytes.number(1, 4);
    shape.patch_h = bytes.number(1, 17);
    shape.patch_w = bytes.number(2, 17);
    shape.hidden = bytes.number(1, shape.grid_h * shape.grid_w);
    return expect(check::masked_patch_loss(kernels, dtype, dtype, shape, bytes.number(0, 1) == 1), "masked_patch_loss");
  }
  if (which == 6) {
    check::CellShape shape{};
    shape.batch = bytes.number(1, 3);
    shape.channels = bytes.number(1, 40);
    shape.grid_h = bytes.number(1, 4);
    shape.grid_w = bytes.number(1, 9);
    shape.patch = bytes.number(1, 6);
    shape.hidden = bytes.number(0, 10);
    return expect(check::cell_rows(kernels, dtype, shape, bytes.number(0, 1) == 1), "cell_rows");
  }
  if (which == 7) {
    check::StitchShape shape{};
    shape.batch = bytes.number(1, 5);
    shape.tokens = bytes.number(1, 20);
    shape.width = bytes.number(1, 70);
    return expect(check::stitch_tokens(kernels, dtype, shape), "stitch_tokens");
  }
  if (which == 8) {
    check::SaliencyShape shape{};
    shape.batch = bytes.number(1, 3);
    shape.heads = bytes.number(1, 4);
    shape.prefix = bytes.number(1, 5);
    shape.patches = bytes.number(1, 90);
    shape.head_dim = bytes.number(1, 80);
    return expect(check::cls_saliency(kernels, dtype, shape, bytes.number(0, 1) == 1), "cls_saliency");
  }
  if (which == 9) {
    check::GramShape shape{};
    shape.batch = bytes.number(4, 40);
    shape.width = bytes.number(1, 70);
    shape.padding = bytes.number(0, 9);
    return expect(check::centred_gram(kernels, dtype, shape), "centred_gram");
  }
  if (which == 10) {
    check::RecoveredShape shape{};
    shape.batch = bytes.number(1, 3);
    shape.channels = bytes.number(2, 70);
    shape.grid_h = bytes.number(1, 4);
    shape.grid_w = bytes.number(1, 9);
    shape.patch = bytes.number(1, 6);
    return expect(check::recovered_loss(kernels, dtype, dtype, shape, bytes.number(0, 1) == 1), "recovered_loss");
  }
  check::ConvShape shape{};
  shape.n_in = bytes.number(1, 60);
  shape.n_out = bytes.number(1, 60);
  shape.groups = bytes.number(1, 20);
  const bool depthwise = bytes.number(0, 1) == 1;
  shape.cin = shape.groups * (depthwise ? 1 : bytes.number(1, 20));
  shape.cout = shape.groups * (depthwise ? 1 : bytes.number(1, 20));
  shape.taps = bytes.number(1, 16);
  const DType stored = dtype == DType::f16 ? DType::f32 : dtype;
  expect(check::masked_conv2d(kernels, stored, shape, check::WeightLayout::contiguous), "masked_conv2d");
  expect(check::masked_conv2d_weight(kernels, stored, shape), "masked_conv2d_weight");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::vector<Isa> isas = available_isas();
  Bytes bytes(data, size);
  const Kernels& table = kernels(isas[as_size(bytes.number(0, static_cast<int64_t>(isas.size()) - 1))]);
  const int64_t which = bytes.number(0, 11);
  if (which == 0) {
    fuzz_tap_table(table, bytes);
  } else if (which == 1) {
    fuzz_select_tokens(table, bytes);
  } else if (which == 2) {
    fuzz_unshuffle_tokens(table, bytes);
  } else {
    fuzz_shapes(table, which, bytes);
  }
  return 0;
}
