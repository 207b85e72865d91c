// Fully connected layer, for every weight format: y[n, m] = sum_k w[m, k] x[n, k]. One row of x: a sparse dot product per output. More rows:
// lanes run along the batch, a tile of x and of y is transposed through the workspace. Included by isa/*.cc after the formats' rows.
//
// Units, a format, has kRows and kColumns of an entry, kMaxVectors of a tile, and
//   add<V>(values, offsets, count, x, acc)            acc[kRows][V] += so many entries times their columns of the transposed x
//   dot(values, offsets, count, x, columns, sum)      sum[kRows] += the same of one row of batch, of which so many columns can be read

constexpr int64_t kSpan = int64_t{1} << 16;  // offsets are columns modulo this
constexpr int64_t kSpanBlocks = kSpan / kGemmColumns;

// Outputs [row_begin, row_end) of batch rows [n, n + count).
struct Gemm {
  const Packed& p;
  const tk_args& a;
  int64_t n, count, tile, row_begin, row_end;
  float *x_t, *y_t;  // some columns of x, and the accumulators: `tile` floats each, a lane for each row of batch
};

// One output of one row of batch, lanes along its entries: blocks of kColumns columns, of which the last may stick out of x.
template <int kColumns>
static inline void dot_lanes(const float* values, const uint16_t* offsets, int64_t count, const float* x, int64_t columns, float* sum) {
  constexpr int kChains = 2, kBlocks = Vec::kLanes / kColumns;
  if (kColumns > 1 && count > 0 && offsets[count - 1] + kColumns > columns) {
    --count;
    for (int64_t c = offsets[count], i = kColumns * count; c < columns; ++c, ++i) sum[0] += values[i] * x[c];
  }
  Vec part[kChains];
  TK_UNROLL for (int c = 0; c < kChains; ++c) part[c] = Vec::set(0.0f);
  int64_t e = 0;
  for (; count - e >= kChains * kBlocks; e += kChains * kBlocks) {
    TK_UNROLL for (int c = 0; c < kChains; ++c) {
      const int64_t at = e + c * kBlocks;
      part[c] = fma(Vec::load(values + kColumns * at), Vec::gather<kColumns>(x, offsets + at), part[c]);
    }
  }
  for (; count - e >= kBlocks; e += kBlocks) {
    part[0] = fma(Vec::load(values + kColumns * e), Vec::gather<kColumns>(x, offsets + e), part[0]);
  }
  if (e < count && count >= kBlocks) {  // the last whole vector once more, without the lanes that are in
    const Vec left = Vec::mask((kBlocks - (count - e)) * kColumns, Vec::kLanes);
    const int64_t at = count - kBlocks;
    part[1] = fma(Vec::load(values + kColumns * at), Vec::gather<kColumns>(x, offsets + at) & left, part[1]);
    e = count;
  }
  TK_UNROLL for (int c = 1; c < kChains; ++c) part[0] = part[0] + part[c];
  sum[0] += part[0].sum();
  for (; e < count; ++e) {
    for (int c = 0; c < kColumns; ++c) sum[0] += values[kColumns * e + c] * x[offsets[e] + c];
  }
}

template <class Units>
static void gemm_row(const Gemm& g) {
  constexpr int kRows = Units::kRows, kEntry = kRows * Units::kColumns;
  const Packed& p = g.p;
  const tk_args& a = g.a;
  const float* const x = a.x + g.n * p.cols;
  for (int64_t m = g.row_begin; m < g.row_end; m += kRows) {
    float sum[kRows] = {};
    const uint32_t* const starts = p.row_ptr(0) + m / kRows * p.blocks;
    for (int64_t block = 0; block < p.blocks; block += kSpanBlocks) {
      const int64_t at = starts[block], end = starts[smaller(block + kSpanBlocks, p.blocks)];
      const int64_t begin = p.block_begin(block);
      Units::dot(p.values() + kEntry * at, p.offsets() + at, end - at, x + begin, p.cols - begin, sum);
    }
    for (int64_t r = 0; r < smaller(kRows, g.row_end - m); ++r) {
      const int64_t at = g.n * p.rows + m + r;
      a.y[at] = clip(sum[r] + (a.bias ? a.bias[m + r] : 0.0f) + (a.residual ? a.residual[at] : 0.0f), a.min, a.max);
    }
  }
  activate(a.activation, a.slope, a.y + g.n * p.rows + g.row_begin, g.row_end - g.row_begin);
}

// Columns [begin, end) of x to x_t, and zeros to a whole block behind them; lanes behind the last row of batch are zero.
static void transpose_x(const Gemm& g, int64_t begin, int64_t end) {
  constexpr int kLanes = Vec::kLanes;
  const int64_t cols = g.p.cols, tile = g.tile;
  for (int64_t lane = 0; lane < tile; lane += kLanes) {
    const int64_t rows = smaller(g.count - lane, kLanes);
    for (int64_t k = begin; k < end; k += kLanes) {
      const float* const from = g.a.x + (g.n + lane) * cols + k;
      float* const to = g.x_t + (k - begin) * tile + lane;
      const int32_t columns = static_cast<int32_t>(smaller(end - k, kLanes));
      Vec square[kLanes];
      if (rows == kLanes && columns == kLanes) {
        TK_UNROLL for (int i = 0; i < kLanes; ++i) square[i] = Vec::load(from + i * cols);
        transpose(square);
        TK_UNROLL for (int i = 0; i < kLanes; ++i) square[i].store(to + i * tile);
      } else {
        for (int i = 0; i < kLanes; ++i) square[i] = i < rows ? Vec::load_first(from + i * cols, columns) : Vec::set(0.0f);
        transpose(square);
        for (int i = 0; i < round_up(columns, kBlockColumns); ++i) square[i].store(to + i * tile);
      }
    }
  }
}

// Outputs [begin, end) from y_t to y: adds the residual, clips, activates.
static void transpose_y(const Gemm& g, int64_t begin, int64_t end) {
  constexpr int kLanes = Vec::kLanes;
  const int64_t rows = g.p.rows, tile = g.tile;
  const Vec lo = Vec::set(g.a.min), hi = Vec::set(g.a.max);
  for (int64_t lane = 0; lane < g.count; lane += kLanes) {
    const int64_t count = smaller(g.count - lane, kLanes);
    for (int64_t m = begin; m < end; m += kLanes) {
      const float* const from = g.y_t + (m - g.row_begin) * tile + lane;
      const int64_t at = (g.n + lane) * rows + m;
      const int32_t outputs = static_cast<int32_t>(smaller(end - m, kLanes));
      Vec square[kLanes];
      TK_UNROLL for (int i = 0; i < kLanes; ++i) square[i] = Vec::load(from + i * tile);
      transpose(square);
      if (count == kLanes && outputs == kLanes) {
        if (g.a.residual) TK_UNROLL for (int i = 0; i < kLanes; ++i) square[i] = square[i] + Vec::load(g.a.residual + at + i * rows);
        TK_UNROLL for (int i = 0; i < kLanes; ++i) clip(square[i], lo, hi).store(g.a.y + at + i * rows);
      } else {
        for (int i = 0; i < count; ++i) {
          if (g.a.residual) square[i] = square[i] + Vec::load_first(g.a.residual + at + i * rows, outputs);
          const Vec y = clip(square[i], lo, hi);
          float* const to = g.a.y + at + i * rows;
          outputs == kLanes ? y.store(to) : y.store_first(to, outputs);
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) activate(g.a.activation, g.a.slope, g.a.y + (g.n + lane + i) * rows + begin, end - begin);
  }
}

// Every group of blocks of columns passes over all outputs in turn.
template <class Units, int V>
static void gemm_tile(const Gemm& g) {
  constexpr int64_t kTile = V * Vec::kLanes, kRows = Units::kRows, kEntry = kRows * Units::kColumns, kAhead = 4;
  const Packed& p = g.p;
  const float *const values = p.values(), *const bias = g.a.bias;
  const uint16_t* const offsets = p.offsets();
  const int64_t blocks = p.blocks, groups = ceil_div(blocks, p.x_floats / kTile / kGemmColumns), step = ceil_div(blocks, groups);
  for (int64_t block = 0, next; block < blocks; block = next) {
    next = smaller(smaller(block + step, blocks), round_up(block + 1, kSpanBlocks));
    const int64_t begin = p.block_begin(block);
    transpose_x(g, begin, smaller(p.block_begin(next), p.cols));
    const float* const x = g.x_t - begin % kSpan * kTile;
    const uint32_t* starts = p.row_ptr(0) + g.row_begin / kRows * blocks;
    float* y_t = g.y_t;
    for (int64_t m = g.row_begin; m < g.row_end; m += kRows, starts += blocks, y_t += kRows * kTile) {
      const int64_t at = starts[block], end = starts[next];
      // A block's pieces of rows lie apart, where no hardware prefetcher follows.
      const uint32_t* const ahead = starts + (m + kAhead * kRows < g.row_end ? kAhead * blocks : 0);
      for (int64_t e = ahead[block]; e < ahead[next]; e += 16 / kEntry) __builtin_prefetch(values + kEntry * e);
      for (int64_t e = ahead[block]; e < ahead[next]; e += 32) __builtin_prefetch(offsets + e);
      Vec acc[kRows][V];
      TK_UNROLL for (int r = 0; r < kRows; ++r) {
        const Vec start = Vec::set(block == 0 && bias && m + r < g.row_end ? bias[m + r] : 0.0f);
        TK_UNROLL for (int v = 0; v < V; ++v) acc[r][v] = block == 0 ? start : Vec::load(y_t + r * kTile + v * Vec::kLanes);
      }
      Units::template add<V>(values + kEntry * at, offsets + at, end - at, x, acc);
      TK_UNROLL for (int r = 0; r < kRows; ++r) TK_UNROLL for (int v = 0; v < V; ++v) acc[r][v].store(y_t + r * kTile + v * Vec::kLanes);
      const int64_t done = smaller(m + kRows, g.row_end);
      if (next == blocks && (done % kGroupRows == 0 || done == g.row_end)) transpose_y(g, (done - 1) / kGroupRows * kGroupRows, done);
    }
  }
}

template <class Units, int V = 1>
static void gemm_tiles(const Gemm& g) {
  if (g.tile == V * Vec::kLanes) return gemm_tile<Units, V>(g);
  if constexpr (V < Units::kMaxVectors) gemm_tiles<Units, V + 1>(g);
}

// A range that ends within a tile transposes x for its own outputs only; so do the chunks of outputs whose accumulators stay in L2.
template <class Units>
static void gemm(const Packed& p, const tk_args& a, int64_t part_begin, int64_t part_end, float* workspace) {
  const int64_t tile = p.batch_tile(a.batch);
  for (int64_t part = part_begin; part < part_end;) {
    const int64_t group = part % p.row_groups, groups = smaller(p.row_groups - group, part_end - part);
    const int64_t n = part / p.row_groups * tile, count = smaller(tile, a.batch - n);
    const int64_t chunks = ceil_div(groups, kGemmFloats / tile / kGroupRows), chunk = ceil_div(groups, chunks);
    for (int64_t i = 0; i < groups; i += chunk) {
      const int64_t row_begin = (group + i) * kGroupRows, row_end = smaller(p.rows, (group + smaller(i + chunk, groups)) * kGroupRows);
      const Gemm g{p, a, n, count, tile, row_begin, row_end, workspace, workspace + p.x_floats};
      count == 1 ? gemm_row<Units>(g) : gemm_tiles<Units>(g);
    }
    part += groups;
  }
}
