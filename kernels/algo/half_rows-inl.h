// The inner loops for CSR and BSR weights in half precision: weights, input and the sums of one block of channels are halves, sums of blocks,
// bias, residual and activation float32. Included by isa/*.cc after csr_rows-inl.h, bsr_rows-inl.h and strips-inl.h, by those that have `Half`.

// The block's sums of row m, added to what came before it; then on to y or to the accumulators.
template <int V, bool First, bool Last>
static inline void end_half_row(const Tile& t, int64_t m, const Half* sums) {
  float* const acc_at = t.acc + m * t.acc_stride;
  const Vec b = Vec::set(First && t.bias ? t.bias[m] : 0.0f);
  Vec acc[V];
  TK_UNROLL for (int v = 0; v < V; ++v) acc[v] = sums[v].widened() + (First ? b : Vec::load(acc_at + v * Vec::kLanes));
  if constexpr (Last) {
    float* const y = t.y + m * t.y_stride;
    write_row<V>(t, m, y, t.residual ? y + (t.residual - t.y) : nullptr, acc);
  } else {
    TK_UNROLL for (int v = 0; v < V; ++v) acc[v].store(acc_at + v * Vec::kLanes);
  }
}

// to[i] = from[i] as halves for i in [0, n), whole vectors of which more may be written.
static inline void narrow(const float* from, int64_t n, Half::Value* to) {
  constexpr int kAtOnce = 4;
  int64_t i = 0;
  for (; n - i >= kAtOnce * Half::kLanes; i += kAtOnce * Half::kLanes) {
    TK_UNROLL for (int v = 0; v < kAtOnce; ++v) Half::narrow(Vec::load(from + i + v * Half::kLanes), to + i + v * Half::kLanes);
  }
  for (; n - i >= Half::kLanes; i += Half::kLanes) Half::narrow(Vec::load(from + i), to + i);
  if (i < n) Half::narrow(Vec::load_first(from + i, static_cast<int32_t>(n - i)), to + i);
}

struct HalfRows {
  using Value = Half::Value;
  static constexpr int kValueBytes = 2;
  static const float* at(const float* x, int64_t n) { return reinterpret_cast<const float*>(reinterpret_cast<const Value*>(x) + n); }

  // Strips of halves: planes of a pointwise convolution at once, others in place of what has been filled.
  static const float* fill(const Packed& p, const Fill& f) {
    Value* const to = reinterpret_cast<Value*>(f.to);
    const int64_t pixels = p.out_h * p.out_w, length = f.tiles * p.tile_floats(), inside = smaller(length, pixels - f.first);
    if (p.x_tile != 0 || !p.pointwise()) {
      fill_strips(p, f);
      narrow(f.to, f.channels * p.channel_floats, to);
      return f.to;
    }
    for (int64_t c = 0; c < f.channels; ++c) narrow(f.image + (f.begin + c) * pixels + f.first, inside, to + c * p.channel_floats);
    return f.to;
  }
};

struct HalfCsrRows : HalfRows {
  static constexpr int kMaxVectors = Vec::kTile;

  template <int V, bool First, bool Last>
  static void of(const Tile& t) {
    const Value *const values = reinterpret_cast<const Value*>(t.values), *const x = reinterpret_cast<const Value*>(t.x);
    const TileStep step = TileStep(t.x_step);
    int64_t at = t.row_ptr[t.row_begin];
    for (int64_t m = t.row_begin; m < t.row_end; ++m) {
      const int64_t end = t.row_ptr[m + 1];
      if (!First && !Last && at == end) continue;
      if constexpr (Last) prefetch_row<V>(t.y + (m + 2) * t.y_stride, t.residual ? t.residual + (m + 2) * t.y_stride : nullptr);
      Half sums[V];
      TK_UNROLL for (int v = 0; v < V; ++v) sums[v] = Half::set(0.0f);
      csr_row<V>(values + at, t.offsets + at, end - at, x, step, sums);
      at = end;
      end_half_row<V, First, Last>(t, m, sums);
    }
  }
};

struct HalfBsrRows : HalfRows {
  static constexpr int kMaxVectors = max_block_vectors(Half::kRegisters);

  template <int V, bool First, bool Last>
  static void of(const Tile& t) {
    const Value *const values = reinterpret_cast<const Value*>(t.values), *const x = reinterpret_cast<const Value*>(t.x);
    const TileStep step = TileStep(t.x_step);
    int64_t at = t.row_ptr[t.row_begin / kBlockRows];
    for (int64_t m = t.row_begin; m < t.row_end; m += kBlockRows) {
      const int64_t end = t.row_ptr[m / kBlockRows + 1], rows = smaller(kBlockRows, t.row_end - m);
      if (!First && !Last && at == end) continue;
      Half sums[kBlockRows][V];
      TK_UNROLL for (int r = 0; r < kBlockRows; ++r) TK_UNROLL for (int v = 0; v < V; ++v) sums[r][v] = Half::set(0.0f);
      bsr_unit<V>(values + kBlockRows * at, t.offsets + at, end - at, x, step, sums);
      at = end;
      TK_UNROLL for (int r = 0; r < kBlockRows; ++r) {
        if (r < rows) end_half_row<V, First, Last>(t, m + r, sums[r]);
      }
    }
  }
};
