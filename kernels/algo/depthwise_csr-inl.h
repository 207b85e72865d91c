// Depthwise convolution on NCHW images: each channel has a few weights of its own. A tile is as many rows as keep the strips of one channel
// in L1; what is read and written where is the same for every channel and listed once. Included by isa/*.cc after strips-inl.h.

// A vector of output: its place in the strips and in its plane, and how many lanes are written.
struct VectorPlace {
  int32_t from, to, count;
};

// What all channels share.
struct DepthwiseTile {
  const Packed& p;
  float* strips;
  Vec* masks;         // of one strip after the other
  VectorCopy* reads;  // the vectors of the strips
  VectorPlace* places;
  int64_t read_count = 0, place_count = 0;
  int64_t low = 0, high = 0;                         // the range of a plane that is read
  int64_t row = 0, rows = 0, column = 0, width = 0;  // of the output
};

struct DepthwiseChannel {
  const float* values;
  const uint16_t* offsets;
  int64_t count;
  float bias;
  float* y;               // the plane
  const float* residual;  // the plane, or null
  float min, max;
};

static void list_reads(int64_t row, int64_t column, DepthwiseTile* t) {
  const Packed& p = t->p;
  for (int32_t i = 0; i < p.strip_count; ++i) {
    const int64_t length = p.tile_floats() + p.strips()[i].halo;
    VectorCopies strip(p, p.strips()[i], row * p.pitch, length, column);
    VectorCopy* const to = t->reads + t->read_count;
    const int n = strip.next(to, static_cast<int>(length / Vec::kLanes));
    for (int k = 0; k < n; ++k) to[k].mask += i * kStripMasks;
    for (int k = 0; k < kStripMasks; ++k) t->masks[i * kStripMasks + k] = strip.masks[k];
    t->read_count += n;
    t->low = smaller(t->low, strip.low);
    t->high = larger(t->high, strip.high);
  }
}

// The last vector of a row overlaps the one before, or runs on into the next row, which comes later: cheaper than to write part of it.
// Not so where y may be the residual, still to be read.
static void list_places(int64_t row, int64_t column, bool residual, DepthwiseTile* t) {
  const Packed& p = t->p;
  const int64_t width = smaller(p.tile_w, p.out_w - column);
  t->row = row;
  t->rows = smaller(p.tile_floats() / p.pitch, p.out_h - row);
  t->column = column;
  t->width = width;
  for (int64_t r = 0; r < t->rows; ++r) {
    for (int64_t at = 0; at < width; at += Vec::kLanes) {
      const int64_t from = residual || width < Vec::kLanes ? at : smaller(at, width - Vec::kLanes),
                    to = (row + r) * p.out_w + column + from;
      const bool into_next = !residual && p.tile_w == p.out_w && to + Vec::kLanes <= p.out_h * p.out_w;
      t->places[t->place_count++] = {static_cast<int32_t>(r * p.pitch + from), static_cast<int32_t>(to),
                                     static_cast<int32_t>(into_next ? Vec::kLanes : smaller(width - from, Vec::kLanes))};
    }
  }
  for (int k = 0; k < kDepthwiseVectors; ++k) t->places[t->place_count + k] = {0, 0, 0};
}

static DepthwiseTile depthwise_tile(const Packed& p, int64_t tile, bool residual, float* workspace) {
  float *const masks = workspace + p.strips_floats(), *const reads = masks + p.masks_floats(), *const places = reads + p.reads_floats();
  DepthwiseTile t{p, workspace, reinterpret_cast<Vec*>(masks), reinterpret_cast<VectorCopy*>(reads),
                  reinterpret_cast<VectorPlace*>(places)};
  const int64_t across = ceil_div(p.out_w, p.tile_w), row = tile / across * (p.tile_floats() / p.pitch), column = tile % across * p.tile_w;
  list_reads(row, column, &t);
  list_places(row, column, residual, &t);
  return t;
}

// N weights, kept in registers, or more of them.
template <int N, bool More = false>
static void depthwise_channel(const DepthwiseTile& t, const DepthwiseChannel& c) {
  constexpr int V = kDepthwiseVectors;
  const Vec bias = Vec::set(c.bias), lo = Vec::set(c.min), hi = Vec::set(c.max);
  Vec w[N + 1];
  TK_UNROLL for (int e = 0; e < N; ++e) w[e] = Vec::set(c.values[e]);
  for (const VectorPlace *at = t.places, *end = at + t.place_count; at < end; at += V) {
    const float* from[V];
    Vec acc[V];
    TK_UNROLL for (int v = 0; v < V; ++v) {
      from[v] = t.strips + at[v].from;
      acc[v] = bias;
    }
    TK_UNROLL for (int e = 0; e < N; ++e) {
      TK_UNROLL for (int v = 0; v < V; ++v) acc[v] = fma(w[e], Vec::load(from[v] + c.offsets[e]), acc[v]);
    }
    for (int64_t e = N; More && e < c.count; ++e) {
      const Vec more = Vec::set(c.values[e]);
      TK_UNROLL for (int v = 0; v < V; ++v) acc[v] = fma(more, Vec::load(from[v] + c.offsets[e]), acc[v]);
    }
    if (c.residual) {
      TK_UNROLL for (int v = 0; v < V; ++v) acc[v] = acc[v] + Vec::load_first(c.residual + at[v].to, at[v].count);
    }
    TK_UNROLL for (int v = 0; v < V; ++v) {
      const Vec y = clip(acc[v], lo, hi);
      if (at[v].count == Vec::kLanes) {
        y.store(c.y + at[v].to);
      } else {
        y.store_first(c.y + at[v].to, at[v].count);
      }
    }
  }
}

// The tile of one plane of y, once it is written: before that its vectors overlap.
static void activate_tile(const DepthwiseTile& t, const tk_args& a, float* y) {
  const int64_t out_w = t.p.out_w, at = t.row * out_w + t.column;
  if (t.width == out_w) return activate(a.activation, a.slope, y + at, t.rows * out_w);
  for (int64_t r = 0; r < t.rows; ++r) activate(a.activation, a.slope, y + at + r * out_w, t.width);
}

template <int N = 0>
static inline void depthwise_by_count(const DepthwiseTile& t, const DepthwiseChannel& c) {
  if constexpr (N == kDepthwiseWeights) {
    c.count == N ? depthwise_channel<N>(t, c) : depthwise_channel<N, true>(t, c);
  } else {
    c.count == N ? depthwise_channel<N>(t, c) : depthwise_by_count<N + 1>(t, c);
  }
}

static void depthwise_csr_f32(const Packed& p, const tk_args& a, int64_t part_begin, int64_t part_end, float* workspace) {
  const int64_t pixels = p.shape.in_h * p.shape.in_w, y_pixels = p.out_h * p.out_w;
  const uint32_t* const row_ptr = p.row_ptr(0);
  const Fill fill{a.x, a.x + a.batch * p.rows * pixels, a.x, 0, 1, 0, 1, workspace};
  for (int64_t part = part_begin; part < part_end;) {  // one part: one channel of one image
    const int64_t image_end = smaller(part_end, (part / p.rows + 1) * p.rows);
    for (int64_t tile = 0; tile < p.tiles; ++tile) {
      const DepthwiseTile t = depthwise_tile(p, tile, a.residual, workspace);
      for (int64_t plane = part; plane < image_end; ++plane) {
        const int64_t m = plane % p.rows, at = row_ptr[m], to = plane * y_pixels;
        copy_plane(fill, p.shape.stride_w, a.x + plane * pixels, t.reads, static_cast<int>(t.read_count), t.masks, t.low, t.high, t.strips);
        depthwise_by_count(t, {p.values() + at, p.offsets() + at, row_ptr[m + 1] - at, a.bias ? a.bias[m] : 0.0f, a.y + to,
                               a.residual ? a.residual + to : nullptr, a.min, a.max});
        activate_tile(t, a, a.y + to);
      }
    }
    part = image_end;
  }
}
