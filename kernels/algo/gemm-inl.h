// Fully connected layer, for every weight format: y[n, m] = sum_k w[m, k] x[n, k]. One row of x: a sparse dot product per output. More rows:
// lanes run along the batch, a tile of x and of y is transposed through the workspace. Included by isa/*.cc after the formats' rows.

// kRows outputs of one batch row: sum[r] += values[kRows * e + r] * x[column of e], from float `tile` of one column to the next.
template <int kRows>
static inline void dot(const float* values, const uint16_t* offsets, int64_t count, const float* x, int64_t tile, float* sum) {
  constexpr int kChains = 4 / kRows;  // four sums at once hide the latency of the additions
  float part[kChains][kRows] = {};
  int64_t e = 0;
  for (; count - e >= kChains; e += kChains) {
    TK_UNROLL for (int c = 0; c < kChains; ++c) {
      const float column = x[offsets[e + c] / tile];
      TK_UNROLL for (int r = 0; r < kRows; ++r) part[c][r] += values[(e + c) * kRows + r] * column;
    }
  }
  for (; e < count; ++e) {
    TK_UNROLL for (int r = 0; r < kRows; ++r) part[0][r] += values[e * kRows + r] * x[offsets[e] / tile];
  }
  TK_UNROLL for (int c = 0; c < kChains; ++c) TK_UNROLL for (int r = 0; r < kRows; ++r) sum[r] += part[c][r];
}

template <int kRows>
static void gemm_row(const Packed& p, const tk_args& a, int64_t n, int64_t row_begin, int64_t row_end) {
  const float* const x = a.x + n * p.cols;
  for (int64_t m = row_begin; m < row_end; m += kRows) {
    float sum[kRows] = {};
    for (int64_t block = 0; block < p.blocks; ++block) {
      const uint32_t* const row_ptr = p.row_ptr(block) + m / kRows;
      const int64_t at = row_ptr[0];
      dot<kRows>(p.values() + kRows * at, p.offsets() + at, row_ptr[1] - at, x + p.block_begin(block), p.channel_floats, sum);
    }
    for (int64_t r = 0; r < smaller(kRows, row_end - m); ++r) {
      const int64_t at = n * p.rows + m + r;
      a.y[at] = clip(sum[r] + (a.bias ? a.bias[m + r] : 0.0f) + (a.residual ? a.residual[at] : 0.0f), a.min, a.max);
    }
  }
}

// Batch rows [n, n + count) and outputs [row_begin, row_end); workspace: x transposed [block_channels][tile], then y transposed
// [rows][tile].
template <class Rows>
static void gemm_tile(const Packed& p, const tk_args& a, int64_t n, int64_t count, int64_t row_begin, int64_t row_end, float* workspace) {
  const int64_t tile = p.channel_floats;
  float* const x_t = workspace;
  float* const y_t = workspace + p.block_channels * tile;
  const int vectors = static_cast<int>((count + Vec::kLanes - 1) / Vec::kLanes);
  Tile t{};
  t.values = p.values();
  t.offsets = p.offsets();
  t.x = x_t;
  t.acc = y_t;
  t.y = y_t;
  t.residual = nullptr;
  t.bias = a.bias;
  t.acc_stride = tile;
  t.y_stride = tile;
  t.row_begin = row_begin;
  t.row_end = row_end;
  t.last_lanes = Vec::kLanes;
  t.min = a.residual ? -kInfinity : a.min;
  t.max = a.residual ? kInfinity : a.max;
  for (int64_t block = 0; block < p.blocks; ++block) {
    const int64_t begin = p.block_begin(block), end = smaller(begin + p.block_channels, p.cols);
    for (int64_t k = begin; k < end; ++k) {
      float* const column = x_t + (k - begin) * tile;
      for (int64_t i = 0; i < count; ++i) column[i] = a.x[(n + i) * p.cols + k];
      zero(column + count, vectors * Vec::kLanes - count);
    }
    t.row_ptr = p.row_ptr(block);
    t.first = block == 0;
    t.last = block == p.blocks - 1;
    run_rows<Rows>(vectors, t);
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t m = row_begin; m < row_end; ++m) {
      const int64_t at = (n + i) * p.rows + m;
      a.y[at] = a.residual ? clip(y_t[m * tile + i] + a.residual[at], a.min, a.max) : y_t[m * tile + i];
    }
  }
}

template <class Rows, int kRows>
static void gemm(const Packed& p, const tk_args& a, int64_t part_begin, int64_t part_end, float* workspace) {
  const int64_t tile = p.channel_floats;
  for (int64_t part = part_begin; part < part_end;) {
    const int64_t group = part % p.row_groups, groups = smaller(p.row_groups - group, part_end - part);
    const int64_t n = part / p.row_groups * tile, count = smaller(tile, a.batch - n);
    const int64_t row_begin = group * kGroupRows, row_end = smaller(p.rows, (group + groups) * kGroupRows);
    part += groups;
    if (count == 1) {
      gemm_row<kRows>(p, a, n, row_begin, row_end);
    } else {
      gemm_tile<Rows>(p, a, n, count, row_begin, row_end, workspace);
    }
  }
}
