// The inner loops all kernels share: output rows of one tile, accumulators in registers, one broadcast weight per non-zero.
// Included by isa/*.cc inside the ISA's namespace, after `Vec`.

// Where a tile's pixels lie in an output row, if not one behind the other: `count` floats from float `at` of the tile on.
struct Span {
  int32_t at, count;
  int64_t to;  // from the tile's first pixel
};

struct Tile {
  const float* values;
  const uint16_t* offsets;
  const uint32_t* row_ptr;  // of this block: unit u has the columns row_ptr[u] … row_ptr[u + 1]
  const float* x;           // the block's input
  float* acc;               // accumulators of row 0 between blocks, rows acc_stride apart; aligned
  float* y;                 // row 0 of the tile's output
  const float* residual;    // row 0, or null
  const float* bias;        // [rows] or null
  int64_t acc_stride;
  int64_t y_stride;  // floats from row to row, of y and of residual
  int64_t row_begin, row_end;
  const Span* spans;  // null: the tile's pixels are one contiguous piece of y
  int32_t span_count;
  int32_t last_lanes;  // without spans: lanes of the last vector that are inside the output, 1 … Vec::kLanes
  bool first, last;    // first block: start from the bias; last block: add the residual, clip, write y
  float min, max;
};

// The first to write an output row meets it in no cache, a plane apart, where no hardware prefetcher follows.
template <int V>
static inline void prefetch_row(const float* y, const float* residual) {
  TK_UNROLL for (int v = 0; v < V * Vec::kLanes; v += 16) __builtin_prefetch(y + v, 1);
  if (residual) TK_UNROLL for (int v = 0; v < V * Vec::kLanes; v += 16) __builtin_prefetch(residual + v, 0);
}

// Adds the residual, clips and writes one row of output; y and residual are at its first pixel of the tile.
template <int V>
static inline void write_row(const Tile& t, float* y, const float* residual, Vec* acc) {
  const Vec lo = Vec::set(t.min), hi = Vec::set(t.max);
  if (t.spans) {
    float padded[V * Vec::kLanes] = {};
    if (residual) {
      for (int32_t i = 0; i < t.span_count; ++i) copy(residual + t.spans[i].to, t.spans[i].count, padded + t.spans[i].at);
    }
    TK_UNROLL for (int v = 0; v < V; ++v) { clip(acc[v] + Vec::load(padded + v * Vec::kLanes), lo, hi).store(padded + v * Vec::kLanes); }
    for (int32_t i = 0; i < t.span_count; ++i) copy(padded + t.spans[i].at, t.spans[i].count, y + t.spans[i].to);
    return;
  }
  constexpr int kLast = (V - 1) * Vec::kLanes;
  const bool whole = t.last_lanes == Vec::kLanes;
  if (residual) {
    TK_UNROLL for (int v = 0; v < V - 1; ++v) acc[v] = acc[v] + Vec::load(residual + v * Vec::kLanes);
    acc[V - 1] = acc[V - 1] + (whole ? Vec::load(residual + kLast) : Vec::load_first(residual + kLast, t.last_lanes));
  }
  TK_UNROLL for (int v = 0; v < V - 1; ++v) clip(acc[v], lo, hi).store(y + v * Vec::kLanes);
  const Vec end = clip(acc[V - 1], lo, hi);
  if (whole) {
    end.store(y + kLast);
  } else {
    end.store_first(y + kLast, t.last_lanes);
  }
}

// A fused multiply-add takes about 4 cycles and two start per cycle, so narrow tiles run several non-zeros at once.
constexpr int chains(int vectors) { return vectors >= 6 ? 1 : vectors >= 3 ? 2 : 4; }

// acc += the row's non-zeros values[0 … count) times their vectors of x.
template <int V>
static inline void csr_row(const float* values, const uint16_t* offsets, int64_t count, const float* x, Vec* acc) {
  constexpr int kChains = chains(V);
  int64_t e = 0;
  if constexpr (kChains > 1) {
    if (count >= kChains) {
      Vec extra[kChains - 1][V];
      TK_UNROLL for (int c = 0; c < kChains - 1; ++c) TK_UNROLL for (int v = 0; v < V; ++v) extra[c][v] = Vec::set(0.0f);
      for (; count - e >= kChains; e += kChains) {
        TK_UNROLL for (int c = 0; c < kChains; ++c) {
          const Vec w = Vec::set(values[e + c]);
          const float* const from = x + offsets[e + c];
          Vec* const into = c == 0 ? acc : extra[c - 1];
          TK_UNROLL for (int v = 0; v < V; ++v) into[v] = fma(w, Vec::load(from + v * Vec::kLanes), into[v]);
        }
      }
      TK_UNROLL for (int c = 0; c < kChains - 1; ++c) TK_UNROLL for (int v = 0; v < V; ++v) acc[v] = acc[v] + extra[c][v];
    }
  }
  for (; e < count; ++e) {
    const Vec w = Vec::set(values[e]);
    const float* const from = x + offsets[e];
    TK_UNROLL for (int v = 0; v < V; ++v) acc[v] = fma(w, Vec::load(from + v * Vec::kLanes), acc[v]);
  }
}

template <int V, bool First, bool Last>
static void csr_rows_of(const Tile& t) {
  const uint32_t* const row_ptr = t.row_ptr;
  const float *const x = t.x, *const bias = t.bias;
  float *acc_at = t.acc + t.row_begin * t.acc_stride, *y = t.y + t.row_begin * t.y_stride;
  const int64_t y_stride = t.y_stride, acc_stride = t.acc_stride, to_residual = t.residual - t.y;
  const bool residual = t.residual;
  int64_t at = row_ptr[t.row_begin];
  for (int64_t m = t.row_begin, row_end = t.row_end; m < row_end; ++m, acc_at += acc_stride, y += y_stride) {
    const int64_t count = row_ptr[m + 1] - at;
    if (!First && !Last && count == 0) continue;
    Vec acc[V];
    if constexpr (Last) prefetch_row<V>(y + 2 * y_stride, residual ? y + to_residual + 2 * y_stride : nullptr);
    if constexpr (First) {
      const Vec b = Vec::set(bias ? bias[m] : 0.0f);
      TK_UNROLL for (int v = 0; v < V; ++v) acc[v] = b;
    } else {
      TK_UNROLL for (int v = 0; v < V; ++v) acc[v] = Vec::load(acc_at + v * Vec::kLanes);
    }
    csr_row<V>(t.values + at, t.offsets + at, count, x, acc);
    at += count;
    if constexpr (Last) {
      write_row<V>(t, y, residual ? y + to_residual : nullptr, acc);
    } else {
      TK_UNROLL for (int v = 0; v < V; ++v) acc[v].store(acc_at + v * Vec::kLanes);
    }
  }
}

// First and last block or neither: one loop each.
template <int V>
static void csr_rows_of(const Tile& t) {
  if (t.first) {
    t.last ? csr_rows_of<V, true, true>(t) : csr_rows_of<V, true, false>(t);
  } else {
    t.last ? csr_rows_of<V, false, true>(t) : csr_rows_of<V, false, false>(t);
  }
}

using RowsOf = void (*)(const Tile&);

// csr_rows_of<V> for V = 1 … kMaxTileVectors, chosen once per tile.
static inline void csr_rows(int vectors, const Tile& t) {
  static constexpr RowsOf kByVectors[kMaxTileVectors] = {csr_rows_of<1>,  csr_rows_of<2>,  csr_rows_of<3>,  csr_rows_of<4>, csr_rows_of<5>,
                                                         csr_rows_of<6>,  csr_rows_of<7>,  csr_rows_of<8>,  csr_rows_of<9>, csr_rows_of<10>,
                                                         csr_rows_of<11>, csr_rows_of<12>, csr_rows_of<13>, csr_rows_of<14>};
  kByVectors[vectors - 1](t);
}
