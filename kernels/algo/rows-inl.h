// What the inner loops of all formats share: the tile, the end of an output row, the choice of the loop. Included by isa/*.cc inside the
// ISA's namespace, after strips-inl.h.

// Where pixels of a tile go, if not one behind the other: `count` floats from float `at` of the tile on, in output row m to y + to + m * stride.
struct Span {
  int32_t at, count;
  int64_t to, stride;
};

// Where the input of an offset is: a fixed number of floats for each, or one known when a tile runs.
template <int64_t kFloats>
struct FixedStep {
  FixedStep() = default;
  explicit FixedStep(int64_t) {}
  template <class Value>
  const Value* of(const Value* x, uint16_t offset) const {
    return x + int64_t{offset} * kFloats;
  }
};

struct FreeStep {
  uint32_t bytes;
  explicit FreeStep(int64_t floats) : bytes(static_cast<uint32_t>(4 * floats)) {}
  const float* of(const float* x, uint16_t offset) const {
    return reinterpret_cast<const float*>(reinterpret_cast<const char*>(x) + uint64_t{offset} * bytes);
  }
};

template <bool kFree>
struct StepOf {
  using Type = FixedStep<1>;
};
template <>
struct StepOf<true> {
  using Type = FreeStep;
};
using TileStep = StepOf<Vec::kReadsPlanes>::Type;

// Formats whose inner loops read the strips as they are filled.
struct FloatRows {
  static constexpr int kValueBytes = 4;
  static const float* fill(const Packed& p, const Fill& f) {
    fill_strips(p, f);
    return f.to;
  }
  static const float* at(const float* x, int64_t n) { return x + n; }
};

struct Tile {
  const float* values;
  const uint16_t* offsets;
  const uint32_t* row_ptr;  // of this block: unit u has the columns row_ptr[u] … row_ptr[u + 1]
  const float* x;           // the block's input
  int64_t x_step;           // floats from offset to offset; 1 where Vec::kReadsPlanes is false
  float* acc;               // accumulators of row 0 between blocks, rows acc_stride apart; aligned
  float* y;                 // row 0 of the tile's output
  const float* residual;    // row 0, or null
  const float* bias;        // [rows] or null
  int64_t acc_stride;
  int64_t y_stride;  // floats from row to row, of y and of residual
  int64_t row_begin, row_end;
  const Span* spans;  // null: the tile's pixels are one contiguous piece of y; else y and y_stride are the first span's
  int32_t span_count;
  int32_t last_lanes;  // without spans: lanes of the last vector that are inside the output, 1 … Vec::kLanes
  bool first, last;    // first block: start from the bias; last block: add the residual, clip, write y, activate
  bool plain;          // nothing but clipping, and whole vectors in one piece
  float min, max;
  int32_t activation;
  float slope;
};

// The first to write an output row meets it in no cache, a plane apart, where no hardware prefetcher follows.
template <int V>
static inline void prefetch_row(const float* y, const float* residual) {
  TK_UNROLL for (int v = 0; v < V * Vec::kLanes; v += 16) __builtin_prefetch(y + v, 1);
  if (residual) TK_UNROLL for (int v = 0; v < V * Vec::kLanes; v += 16) __builtin_prefetch(residual + v, 0);
}

// Adds the residual, clips, writes and activates row m of the output; y and residual are at its first pixel of the tile.
template <int V>
static inline void write_row(const Tile& t, int64_t m, float* y, const float* residual, Vec* acc) {
  const Vec lo = Vec::set(t.min), hi = Vec::set(t.max);
  if (t.plain) {
    TK_UNROLL for (int v = 0; v < V; ++v) acc[v] = clip(acc[v], lo, hi);
    TK_UNROLL for (int v = 0; v < V; ++v) acc[v].store(y + v * Vec::kLanes);
    return;
  }
  if (t.spans) {
    float padded[V * Vec::kLanes] = {};
    if (residual) {
      for (const Span *s = t.spans, *end = s + t.span_count; s < end; ++s) {
        copy(t.residual + s->to + m * s->stride, s->count, padded + s->at);
      }
    }
    TK_UNROLL for (int v = 0; v < V; ++v) { clip(acc[v] + Vec::load(padded + v * Vec::kLanes), lo, hi).store(padded + v * Vec::kLanes); }
    activate(t.activation, t.slope, padded, V * Vec::kLanes);
    for (const Span *s = t.spans, *end = s + t.span_count; s < end; ++s) copy(padded + s->at, s->count, t.y + s->to + m * s->stride);
    return;
  }
  constexpr int kLast = (V - 1) * Vec::kLanes;
  const bool whole = t.last_lanes == Vec::kLanes;
  if (residual) {
    TK_UNROLL for (int v = 0; v < V - 1; ++v) acc[v] = acc[v] + Vec::load(residual + v * Vec::kLanes);
    acc[V - 1] = acc[V - 1] + (whole ? Vec::load(residual + kLast) : Vec::load_first(residual + kLast, t.last_lanes));
  }
  TK_UNROLL for (int v = 0; v < V; ++v) acc[v] = clip(acc[v], lo, hi);
  TK_UNROLL for (int v = 0; v < V - 1; ++v) acc[v].store(y + v * Vec::kLanes);
  const Vec end = acc[V - 1];
  if (whole) {
    end.store(y + kLast);
  } else {
    end.store_first(y + kLast, t.last_lanes);
  }
  activate(t.activation, t.slope, y, kLast + t.last_lanes);
}

// First and last block or neither: one loop each. `Rows::of<V, First, Last>` is a format's loop.
template <class Rows, int V>
static void rows_of(const Tile& t) {
  if (t.first) {
    t.last ? Rows::template of<V, true, true>(t) : Rows::template of<V, true, false>(t);
  } else {
    t.last ? Rows::template of<V, false, true>(t) : Rows::template of<V, false, false>(t);
  }
}

using RowsOf = void (*)(const Tile&);

template <class Rows, int... I>
struct ByVectors {
  static constexpr RowsOf kTable[] = {rows_of<Rows, I + 1>...};
};

// The loop for `vectors` of 1 … Rows::kMaxVectors, chosen once per tile.
template <class Rows, int N = Rows::kMaxVectors, int... I>
static inline void run_rows(int vectors, const Tile& t) {
  if constexpr (N > 0) {
    run_rows<Rows, N - 1, N - 1, I...>(vectors, t);
  } else {
    ByVectors<Rows, I...>::kTable[vectors - 1](t);
  }
}
