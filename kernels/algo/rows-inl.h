// The inner loop all CSR kernels share: output rows of one tile, accumulators in registers, one broadcast weight per non-zero.
// Included by isa/*.cc inside the ISA's namespace, after `Vec`.

struct Tile {
  const Entry* entries;
  const uint32_t* row_ptr;  // of this block: row m is entries[row_ptr[m] … row_ptr[m + 1])
  const float* x;           // the block's input
  float* y;                 // row 0 of the tile's output
  const float* residual;    // row 0, or null
  const float* bias;        // [rows] or null
  int64_t y_stride;         // floats from row to row, of y and of residual
  int64_t row_begin, row_end;
  int32_t last_lanes;  // lanes of the last vector that are inside the output, 1 … Vec::kLanes
  bool first, last;    // first block: start from bias + residual; last block: clip
  float min, max;
};

// Stores all lanes of every vector but the last one, of which only last_lanes.
template <int V>
static inline void store_row(float* y, const Vec* acc, int32_t last_lanes) {
  for (int v = 0; v < V - 1; ++v) acc[v].store(y + v * Vec::kLanes);
  if (last_lanes == Vec::kLanes) {
    acc[V - 1].store(y + (V - 1) * Vec::kLanes);
  } else {
    acc[V - 1].store_first(y + (V - 1) * Vec::kLanes, last_lanes);
  }
}

template <int V>
static inline void load_row(const float* y, Vec* acc, int32_t last_lanes) {
  for (int v = 0; v < V - 1; ++v) acc[v] = Vec::load(y + v * Vec::kLanes);
  const float* end = y + (V - 1) * Vec::kLanes;
  acc[V - 1] = last_lanes == Vec::kLanes ? Vec::load(end) : Vec::load_first(end, last_lanes);
}

// A fused multiply-add takes about 4 cycles and two start per cycle, so narrow tiles run several non-zeros at once.
constexpr int chains(int vectors) { return vectors >= 6 ? 1 : vectors >= 3 ? 2 : 4; }

// The first block meets output (and residual) rows that are in no cache yet, a plane apart, where no hardware prefetcher follows.
template <int V>
static inline void prefetch_row(const Tile& t, int64_t m) {
  const float* const y = t.y + m * t.y_stride;
  TK_UNROLL for (int v = 0; v < V * Vec::kLanes; v += 16) __builtin_prefetch(y + v, 1);
  if (t.residual) {
    const float* const residual = t.residual + m * t.y_stride;
    TK_UNROLL for (int v = 0; v < V * Vec::kLanes; v += 16) __builtin_prefetch(residual + v, 0);
  }
}

template <int V>
static void rows_of(const Tile& t) {
  constexpr int kChains = chains(V);
  for (int64_t m = t.row_begin; m < t.row_end; ++m) {
    const Entry* e = t.entries + t.row_ptr[m];
    const Entry* const end = t.entries + t.row_ptr[m + 1];
    if (e == end && !t.first && !t.last) continue;
    float* const y = t.y + m * t.y_stride;
    Vec acc[V];
    if (t.first) {
      prefetch_row<V>(t, m + 2);
      const Vec b = Vec::set(t.bias ? t.bias[m] : 0.0f);
      if (t.residual) {
        load_row<V>(t.residual + m * t.y_stride, acc, t.last_lanes);
        TK_UNROLL for (int v = 0; v < V; ++v) acc[v] = acc[v] + b;
      } else {
        TK_UNROLL for (int v = 0; v < V; ++v) acc[v] = b;
      }
    } else {
      load_row<V>(y, acc, t.last_lanes);
    }
    if constexpr (kChains > 1) {
      if (end - e >= kChains) {
        Vec extra[kChains - 1][V];
        TK_UNROLL for (int c = 0; c < kChains - 1; ++c) TK_UNROLL for (int v = 0; v < V; ++v) extra[c][v] = Vec::set(0.0f);
        for (; end - e >= kChains; e += kChains) {
          TK_UNROLL for (int c = 0; c < kChains; ++c) {
            const Vec w = Vec::set(e[c].value);
            const float* const x = shift_bytes(t.x, e[c].offset_bytes);
            Vec* const into = c == 0 ? acc : extra[c - 1];
            TK_UNROLL for (int v = 0; v < V; ++v) into[v] = fma(w, Vec::load(x + v * Vec::kLanes), into[v]);
          }
        }
        TK_UNROLL for (int c = 0; c < kChains - 1; ++c) TK_UNROLL for (int v = 0; v < V; ++v) acc[v] = acc[v] + extra[c][v];
      }
    }
    for (; e < end; ++e) {
      const Vec w = Vec::set(e->value);
      const float* const x = shift_bytes(t.x, e->offset_bytes);
      TK_UNROLL for (int v = 0; v < V; ++v) acc[v] = fma(w, Vec::load(x + v * Vec::kLanes), acc[v]);
    }
    if (t.last) {
      const Vec lo = Vec::set(t.min), hi = Vec::set(t.max);
      TK_UNROLL for (int v = 0; v < V; ++v) acc[v] = clip(acc[v], lo, hi);
    }
    store_row<V>(y, acc, t.last_lanes);
  }
}

// rows_of<V> for V = 1 … kMaxTileVectors, chosen once per tile.
static inline void rows(int vectors, const Tile& t) {
  using Fn = void (*)(const Tile&);
  static constexpr Fn kByVectors[kMaxTileVectors] = {rows_of<1>,  rows_of<2>,  rows_of<3>,  rows_of<4>, rows_of<5>,
                                                     rows_of<6>,  rows_of<7>,  rows_of<8>,  rows_of<9>, rows_of<10>,
                                                     rows_of<11>, rows_of<12>, rows_of<13>, rows_of<14>};
  kByVectors[vectors - 1](t);
}
