// How the depthwise kernels see a table: runs of output rows whose windows slide over the same inputs.
//
// The rows of a packed map lie cell by cell, so most neighbours in memory are neighbours along an image row, and a
// window is the one before it moved by one input. Whether that holds is read from the table itself: any table is right,
// one that slides is fast. An input that several windows share is then loaded once for all of them.
#pragma once

#include "core/conv_tile.h"

namespace {

constexpr int64_t kBlockRows = 64;  // rows whose inputs stay in the first-level cache, a panel of channels at a time

// Windows 0 to rows - 1 are those of the output rows first, first + step, ...; each is the one before, moved by one.
struct Run {
  int64_t first, step;
  int32_t rows;      // 1, 4 or 8
  int32_t count;     // inputs
  uint32_t present;  // windows: bit y is set where one of them has a tap in kernel row y
};

// The runs of a block and their inputs, one run after the other: of a row by itself those of its present taps, of
// windows rows + kernel - 1 inputs for each kernel row that is present.
struct Runs {
  Run* runs;
  const float** inputs;
  int32_t* taps;  // beside the inputs, of rows by themselves
  int64_t count;
};

constexpr int64_t kRunFloats = sizeof(Run) / sizeof(float);

inline int64_t runs_scratch(int64_t num_taps) { return kBlockRows * (3 * num_taps + kRunFloats); }

inline Runs runs_in(float* scratch, int64_t num_taps) {
  float* inputs = scratch + kBlockRows * kRunFloats;
  return {reinterpret_cast<Run*>(scratch), reinterpret_cast<const float**>(inputs),
          reinterpret_cast<int32_t*>(inputs + 2 * kBlockRows * num_taps), 0};
}

struct Rows {
  const int32_t* taps;
  int64_t num_taps;
  const float *values, *zeros;  // `zeros` stands for an absent row
  int64_t stride;

  const int32_t* operator[](int64_t row) const { return taps + row * num_taps; }
  const float* input(int32_t n) const { return n < 0 ? zeros : values + n * stride; }
};

// All bits set where a tap has a right neighbour in its kernel row.
template <int kKernel>
struct Inner {
  int32_t mask[kKernel * kKernel - 1];
  constexpr Inner() : mask() {
    for (int t = 0; t < kKernel * kKernel - 1; ++t) mask[t] = (t + 1) % kKernel ? -1 : 0;
  }
};

template <int kKernel>
inline bool slides(const int32_t* from, const int32_t* to) {
  static constexpr Inner<kKernel> inner;
  int32_t differ = 0;
  for (int t = 0; t < kKernel * kKernel - 1; ++t) differ |= (from[t + 1] ^ to[t]) & inner.mask[t];
  return differ == 0;
}

// The longest run of 8, 4 or 1 rows that starts at row `begin`.
template <int kKernel>
inline Run run_at(const Rows& rows, int64_t begin, int64_t end) {
  const int64_t most = smaller(end - begin, 8);
  int64_t length = 1, step = 1;
  if (most >= 4) {
    step = slides<kKernel>(rows[begin], rows[begin + 1]) ? 1 : -1;
    while (length < most) {
      const int32_t *last = rows[begin + length - 1], *next = rows[begin + length];
      if (!(step > 0 ? slides<kKernel>(last, next) : slides<kKernel>(next, last))) break;
      ++length;
    }
  }
  Run run{};
  run.rows = length == 8 ? 8 : length >= 4 ? 4 : 1;
  run.step = run.rows == 1 ? 1 : step;
  run.first = run.step > 0 ? begin : begin + run.rows - 1;
  return run;
}

template <int kKernel>
inline void list_windows(const Rows& rows, Run& run, const float** to) {
  const int64_t span = run.rows + kKernel - 1;
  const float** const start = to;
  for (int y = 0; y < kKernel; ++y) {
    int32_t all = -1;
    for (int64_t j = 0; j < span; ++j) {
      const int64_t window = larger(j - (kKernel - 1), 0);
      const int32_t n = rows[run.first + window * run.step][y * kKernel + j - window];
      all &= n;
      to[j] = rows.input(n);
      if constexpr (kKernel == 3) {  // few products for each input: they would wait for it
        __builtin_prefetch(to[j]);
        __builtin_prefetch(to[j] + kLanes);
      }
    }
    if (all < 0) continue;
    run.present |= 1u << y;
    to += span;
  }
  run.count = static_cast<int32_t>(to - start);
}

inline void list_taps(const Rows& rows, Run& run, const float** to, int32_t* taps) {
  const int32_t* row = rows[run.first];
  int64_t count = 0;
  for (int64_t t = 0; t < rows.num_taps; ++t) {
    to[count] = rows.values + (row[t] < 0 ? 0 : row[t]) * rows.stride;
    taps[count] = static_cast<int32_t>(t);
    count += row[t] >= 0;
  }
  run.count = static_cast<int32_t>(count);
}

// kKernel 0: every row by itself.
template <int kKernel>
inline void list_runs(const Rows& rows, int64_t begin, int64_t end, Runs& to) {
  to.count = 0;
  for (int64_t row = begin, at = 0; row < end;) {
    Run run{row, 1, 1, 0, 0};
    if constexpr (kKernel > 0) run = run_at<kKernel>(rows, row, end);
    if (run.rows == 1) list_taps(rows, run, to.inputs + at, to.taps + at);
    if constexpr (kKernel > 0) {
      if (run.rows > 1) list_windows<kKernel>(rows, run, to.inputs + at);
    }
    to.runs[to.count++] = run;
    at += run.count;
    row += run.rows;
  }
}

// Channels are taken in vectors. A last vector that is not full starts earlier and repeats some channels.
inline int64_t vectors(int64_t channels) { return ceil_div(channels, kLanes); }
inline int64_t start_of(int64_t vector, int64_t channels) {
  return larger(smaller(vector * kLanes, channels - kLanes), 0);
}

// Slides kRows windows over the inputs of one kernel row, loading each input once: multiply(window, tap, vector, input).
template <int kKernel, int kRows, int kVectors, class Multiply>
inline void slide(const float* const* inputs, int64_t channel, Multiply multiply) {
#pragma GCC unroll 14
  for (int j = 0; j < kRows + kKernel - 1; ++j) {
    Floats x[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) x[v] = load(inputs[j] + channel + v * kLanes);
#pragma GCC unroll 7
    for (int k = 0; k < kKernel; ++k) {
      if (j < k || j - k >= kRows) continue;
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) multiply(j - k, k, v, x[v]);
    }
  }
}

template <int kKernel, int kRows, class Work>
inline void visit_windows(const Work& work, const Run& run, const float* const* inputs, int64_t first, int64_t last,
                          int64_t channels) {
  // Eight windows of a wide kernel leave no registers for a second vector.
  constexpr int64_t kMost = kKernel > 3 && kRows == 8 ? 1 : 2;
  for (int64_t v = first; v < last;) {
    const int64_t next = v + kMost;
    if (next <= last && next * kLanes <= channels) {
      work.template windows<kKernel, kRows, kMost>(v, run, inputs);
      v = next;
    } else {
      work.template windows<kKernel, kRows, 1>(v++, run, inputs);
    }
  }
}

template <class Work>
inline void visit_row(const Work& work, const Run& run, const float* const* inputs, const int32_t* taps, int64_t first,
                      int64_t last, int64_t channels) {
  for (int64_t v = first; v < last;) {
    const int64_t whole = smaller(last, channels / kLanes) - v;
    if (whole >= 4) {
      work.template row<4, true>(v, run, inputs, taps);
      v += 4;
    } else if (whole >= 2) {
      work.template row<2, true>(v, run, inputs, taps);
      v += 2;
    } else if (channels >= kLanes) {
      work.template row<1, true>(v++, run, inputs, taps);
    } else {
      work.template row<1, false>(v++, run, inputs, taps);
    }
  }
}

// Visits all runs of output rows [begin, end) for vectors [from, to) of channels, a panel of vectors at a time: narrow
// where windows come back to the same inputs, else as wide as the first-level cache holds weights for all taps.
template <int kKernel, class Work>
void visit(const Work& work, const Rows& rows, int64_t begin, int64_t end, int64_t from, int64_t to, Runs runs) {
  const int64_t widest = clamp(200 / rows.num_taps, 4, 16);
  for (int64_t first = begin; first < end; first += kBlockRows) {
    const int64_t block = smaller(kBlockRows, end - first);
    list_runs<kKernel>(rows, first, first + block, runs);
    const int64_t panel = 2 * runs.count < block ? 4 : widest;
    for (int64_t v = from; v < to; v += panel) {
      const int64_t last = smaller(v + panel, to);
      const float* const* inputs = runs.inputs;
      const int32_t* taps = runs.taps;
      for (const Run* run = runs.runs; run < runs.runs + runs.count; ++run) {
        if constexpr (kKernel > 0) {
          if (run->rows == 8) visit_windows<kKernel, 8>(work, *run, inputs, v, last, rows.stride);
          if (run->rows == 4) visit_windows<kKernel, 4>(work, *run, inputs, v, last, rows.stride);
        }
        if (run->rows == 1) visit_row(work, *run, inputs, taps, v, last, rows.stride);
        inputs += run->count;
        taps += run->count;
      }
    }
  }
}

// Square kernels slide; narrow maps are not worth it.
template <class Work>
void visit(const Work& work, const Rows& rows, int64_t begin, int64_t end, int64_t from, int64_t to, Runs runs) {
  const int64_t taps = rows.stride < kLanes ? 0 : rows.num_taps;
  if (taps == 9) {
    visit<3>(work, rows, begin, end, from, to, runs);
  } else if (taps == 25) {
    visit<5>(work, rows, begin, end, from, to, runs);
  } else if (taps == 49) {
    visit<7>(work, rows, begin, end, from, to, runs);
  } else {
    visit<0>(work, rows, begin, end, from, to, runs);
  }
}

}  // namespace
