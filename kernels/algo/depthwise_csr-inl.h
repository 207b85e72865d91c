// Depthwise convolution on NCHW images: each channel its own few weights. One strip-filled tile (packed.h) of one channel after the other;
// where vectors are read and written is the same for every channel, so it is listed once. Included by isa/*.cc after strips-inl.h.

// Where a vector of output goes in its plane, and how many of its lanes.
struct VectorWrite {
  int32_t to, count;
};

// What the channels of a tile share, and the buffers of one of them.
struct DepthwiseTile {
  const Packed& p;
  float* strips;
  int64_t vectors;  // of output
  VectorWrite* writes = nullptr;
  VectorCopy* reads = nullptr;  // null where vectors cannot fill strips
  Vec* masks = nullptr;         // of one strip after the other
  int64_t low = 0, high = 0;    // the range of a plane that is read
};

// One channel of one tile.
struct DepthwiseChannel {
  const DepthwiseTile& tile;
  const float* values;
  const uint16_t* offsets;
  int64_t count;
  float bias;
  float* y;               // the plane
  const float* residual;  // the plane, or null
  float min, max;
};

// Lists the reads and writes of the tile that starts at pixel `first` (pitched: whole vectors a row).
static DepthwiseTile depthwise_tile(const Packed& p, int64_t first, bool residual, float* workspace) {
  float* const masks = workspace + p.strips_floats();
  float *const reads = masks + p.masks_floats(), *const writes = reads + p.reads_floats();
  DepthwiseTile t{p, workspace, smaller(p.tile_floats(), p.out_h * p.pitch - first) / Vec::kLanes};
  t.writes = reinterpret_cast<VectorWrite*>(writes);
  t.masks = reinterpret_cast<Vec*>(masks);
  int64_t row = first / p.pitch, column = first % p.pitch;
  for (int64_t i = 0; i < p.tile_vectors; ++i) {
    const int64_t to = row * p.out_w + column, inside = i < t.vectors ? smaller(p.out_w - column, Vec::kLanes) : 0;
    // Lanes behind the end of a row may be written: the next row overwrites them. Unless they are the residual, still to be read.
    const bool whole = inside > 0 && !residual && to + Vec::kLanes <= p.out_h * p.out_w;
    t.writes[i] = {static_cast<int32_t>(inside > 0 ? to : 0), static_cast<int32_t>(whole ? Vec::kLanes : inside)};
    column += Vec::kLanes;
    if (column == p.pitch) {
      column = 0;
      ++row;
    }
  }
  if (!VectorCopies::possible(p)) return t;
  t.reads = reinterpret_cast<VectorCopy*>(reads);
  VectorCopy* to = t.reads;
  for (int32_t i = 0; i < p.strip_count; ++i) {
    const int64_t length = p.tile_floats() + p.strips()[i].halo;
    VectorCopies strip(p, p.strips()[i], first, length);
    const int n = strip.next(to, static_cast<int>(length / Vec::kLanes));
    for (int k = 0; k < n; ++k) to[k].mask += i * kStripMasks;
    for (int k = 0; k < kStripMasks; ++k) t.masks[i * kStripMasks + k] = strip.masks[k];
    to += n;
    t.low = smaller(t.low, strip.low);
    t.high = larger(t.high, strip.high);
  }
  return t;
}

// Fills the strips of the channel whose plane `f.image` is.
static void depthwise_fill(const DepthwiseTile& t, const Fill& f) {
  if (t.reads) {
    copy_plane(f, t.p.shape.stride_w, f.image, t.reads, static_cast<int>(t.p.channel_floats / Vec::kLanes), t.masks, t.low, t.high, f.to);
  } else {
    fill_strips(t.p, f);
  }
}

// Vectors [at, at + V) of the tile, added up by `add(x, acc)`.
template <int V, class Add>
static inline void depthwise_vectors(const DepthwiseChannel& c, int64_t at, Add add) {
  const Vec lo = Vec::set(c.min), hi = Vec::set(c.max);
  Vec acc[V];
  TK_UNROLL for (int v = 0; v < V; ++v) acc[v] = Vec::set(c.bias);
  add(c.tile.strips + at * Vec::kLanes, acc);
  const VectorWrite* const writes = c.tile.writes + at;
  if (c.residual) {
    TK_UNROLL for (int v = 0; v < V; ++v) acc[v] = acc[v] + Vec::load_first(c.residual + writes[v].to, writes[v].count);
  }
  TK_UNROLL for (int v = 0; v < V; ++v) {
    const Vec y = clip(acc[v], lo, hi);
    if (writes[v].count == Vec::kLanes) {
      y.store(c.y + writes[v].to);
    } else {
      y.store_first(c.y + writes[v].to, writes[v].count);
    }
  }
}

// N weights, kept in registers.
template <int N>
static void depthwise_few(const DepthwiseChannel& c) {
  constexpr int V = kDepthwiseVectors;
  Vec w[N + 1];
  int64_t offsets[N + 1];
  TK_UNROLL for (int e = 0; e < N; ++e) {
    w[e] = Vec::set(c.values[e]);
    offsets[e] = c.offsets[e];
  }
  for (int64_t at = 0; at < c.tile.vectors; at += V) {
    depthwise_vectors<V>(c, at, [&](const float* x, Vec* acc) {
      TK_UNROLL for (int e = 0; e < N; ++e) {
        TK_UNROLL for (int v = 0; v < V; ++v) acc[v] = fma(w[e], Vec::load(x + offsets[e] + v * Vec::kLanes), acc[v]);
      }
    });
  }
}

static void depthwise_many(const DepthwiseChannel& c) {
  constexpr int V = kDepthwiseVectors;
  int64_t at = 0;
  for (; at + V < c.tile.vectors; at += 2 * V) {
    depthwise_vectors<2 * V>(c, at, [&](const float* x, Vec* acc) { csr_row<2 * V>(c.values, c.offsets, c.count, x, acc); });
  }
  if (at < c.tile.vectors) {
    depthwise_vectors<V>(c, at, [&](const float* x, Vec* acc) { csr_row<V>(c.values, c.offsets, c.count, x, acc); });
  }
}

template <int N = 0>
static inline void depthwise_channel(const DepthwiseChannel& c) {
  if constexpr (N > 9) {
    depthwise_many(c);
  } else {
    c.count == N ? depthwise_few<N>(c) : depthwise_channel<N + 1>(c);
  }
}

static void depthwise_csr_f32(const Packed& p, const tk_args& a, int64_t part_begin, int64_t part_end, float* workspace) {
  const int64_t pixels = p.shape.in_h * p.shape.in_w, y_pixels = p.out_h * p.out_w;
  const uint32_t* const row_ptr = p.row_ptr(0);
  for (int64_t part = part_begin; part < part_end;) {  // one part: one channel of one image
    const int64_t channel = part % p.rows, channels = smaller(p.rows - channel, part_end - part);
    for (int64_t tile = 0; tile < p.tiles; ++tile) {
      const int64_t first = tile * p.tile_floats();
      const DepthwiseTile t = depthwise_tile(p, first, a.residual, workspace);
      for (int64_t i = 0; i < channels; ++i) {
        const int64_t m = channel + i, at = row_ptr[m], to = (part + i) * y_pixels;
        depthwise_fill(t, {a.x, a.x + a.batch * p.rows * pixels, a.x + (part + i) * pixels, 1, first, 1, workspace});
        depthwise_channel({t, p.values() + at, p.offsets() + at, row_ptr[m + 1] - at, a.bias ? a.bias[m] : 0.0f, a.y + to,
                           a.residual ? a.residual + to : nullptr, a.min, a.max});
      }
    }
    part += channels;
  }
}
