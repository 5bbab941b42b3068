// The row under each tap of each visible pixel. Which neighbour cell a tap needs, and which pixel of it, is the same
// for every cell: it is found once, and a cell then costs one small look-up and one addition an entry.
#include "core/kernels.h"

namespace fastmkd::FASTMKD_ISA {
namespace {

constexpr int32_t kHidden = -(1 << 30);  // plus any pixel of a cell it stays negative

// Scratch of a thread. Neighbours are the cells at the offsets of both spans; one more stands for taps without a pixel.
struct Local {
  int64_t* bits;     // (neighbours, pixels): which taps of a pixel lie in a neighbour
  int32_t* first;    // (neighbours + 1): first row of each neighbour of the cell at hand
  int32_t* needs;    // (pixels * taps): the neighbour that holds a tap
  int32_t* pixel;    // (pixels * taps): where in it
  TapPlace* across;  // (row_side * kernel): horizontal places
};

void locate(const TapTableArgs& args, TapSpan down, TapSpan across, const Local& local) {
  const TapAxis &v = args.vertical, &h = args.horizontal;
  const int32_t pixels = v.row_side * h.row_side, neighbours = down.count * across.count;
  for (int64_t i = 0; i < int64_t{neighbours} * pixels; ++i) local.bits[i] = 0;
  for (int32_t x = 0; x < h.row_side; ++x) {
    for (int32_t tap = 0; tap < h.kernel; ++tap) local.across[x * h.kernel + tap] = tap_place(h, x, tap);
  }
  int64_t i = 0;
  for (int32_t p = 0; p < pixels; ++p) {
    for (int32_t tap = 0; tap < v.kernel * h.kernel; ++tap, ++i) {
      const TapPlace y = tap_place(v, p / h.row_side, tap / h.kernel);
      const TapPlace x = local.across[p % h.row_side * h.kernel + tap % h.kernel];
      const int32_t row = y.offset - down.low, column = x.offset - across.low;
      const bool exists =
          y.pixel >= 0 && x.pixel >= 0 && row >= 0 && row < down.count && column >= 0 && column < across.count;
      local.needs[i] = exists ? row * across.count + column : neighbours;
      local.pixel[i] = exists ? y.pixel * h.source_side + x.pixel : 0;
      if (exists && tap < kPatternTaps) local.bits[int64_t{local.needs[i]} * pixels + p] |= int64_t{1} << tap;
    }
  }
}

// First rows of the cells around `cell`.
void look_around(const TapTableArgs& args, TapSpan down, TapSpan across, int64_t cell, int32_t* first) {
  const int64_t y = cell / args.grid_w % args.grid_h, x = cell % args.grid_w;
  const int32_t source_pixels = args.vertical.source_side * args.horizontal.source_side;
  for (int32_t dy = down.low; dy < down.low + down.count; ++dy) {
    for (int32_t dx = across.low; dx < across.low + across.count; ++dx) {
      const bool inside = y + dy >= 0 && y + dy < args.grid_h && x + dx >= 0 && x + dx < args.grid_w;
      const int64_t owner = inside ? args.rank[cell + dy * args.grid_w + dx] : -1;
      *first++ = owner < 0 ? kHidden : static_cast<int32_t>(owner) * source_pixels;
    }
  }
  *first = kHidden;
}

}  // namespace

void tap_table(const TapTableArgs& args, int64_t begin, int64_t end, void* scratch) {
  const TapSpan down = tap_span(args.vertical, args.grid_h), across = tap_span(args.horizontal, args.grid_w);
  const int64_t neighbours = int64_t{down.count} * across.count;
  const int64_t pixels = tap_table_pixels(args), entries = pixels * tap_table_taps(args);
  Local local{};
  local.bits = static_cast<int64_t*>(scratch);
  local.first = reinterpret_cast<int32_t*>(local.bits + neighbours * pixels);
  local.needs = local.first + neighbours + 1;
  local.pixel = local.needs + entries;
  local.across = reinterpret_cast<TapPlace*>(local.pixel + entries);
  locate(args, down, across, local);
  const int32_t* __restrict needs = local.needs, * __restrict pixel = local.pixel, * __restrict first = local.first;
  for (int64_t v = begin; v < end; ++v) {
    look_around(args, down, across, args.cells[v], local.first);
    int32_t* __restrict table = args.table + v * entries;
    for (int64_t i = 0; i < entries; ++i) {
      const int32_t row = first[needs[i]] + pixel[i];
      table[i] = row < 0 ? -1 : row;
    }
    int64_t* __restrict pattern = args.pattern + v * pixels;
    for (int64_t p = 0; p < pixels; ++p) pattern[p] = 0;
    for (int64_t n = 0; n < neighbours; ++n) {
      const int64_t* __restrict bits = local.bits + n * pixels;
      for (int64_t p = 0; first[n] >= 0 && p < pixels; ++p) pattern[p] |= bits[p];
    }
  }
}

}  // namespace fastmkd::FASTMKD_ISA
