// Fully connected layer with CSR weights: y[n, m] = sum_k w[m, k] x[n, k]. One row of x: a sparse dot product per output. More rows: lanes
// run along the batch, a tile of x and of y is transposed through the workspace. Included by isa/*.cc after rows-inl.h.

// One output of one batch row; four chains hide the latency of the additions.
static float dot(const float* values, const uint16_t* offsets, int64_t count, const float* x) {
  constexpr int column_floats = kGemmTileVectors * Vec::kLanes;
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  int64_t e = 0;
  for (; count - e >= 4; e += 4) {
    for (int i = 0; i < 4; ++i) sum[i] += values[e + i] * x[offsets[e + i] / column_floats];
  }
  for (; e < count; ++e) sum[0] += values[e] * x[offsets[e] / column_floats];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

static void gemm_row(const Packed& p, const tk_args& a, int64_t n, int64_t row_begin, int64_t row_end) {
  const float* const x = a.x + n * p.cols;
  for (int64_t m = row_begin; m < row_end; ++m) {
    float sum = (a.bias ? a.bias[m] : 0.0f) + (a.residual ? a.residual[n * p.rows + m] : 0.0f);
    for (int64_t block = 0; block < p.blocks; ++block) {
      const uint32_t* const row_ptr = p.row_ptr(block);
      const int64_t at = row_ptr[m];
      sum += dot(p.values() + at, p.offsets() + at, row_ptr[m + 1] - at, x + p.block_begin(block));
    }
    a.y[n * p.rows + m] = clip(sum, a.min, a.max);
  }
}

// Batch rows [n, n + count) and outputs [row_begin, row_end); workspace: x transposed [block_channels][tile], then y transposed
// [rows][tile].
static void gemm_tile(const Packed& p, const tk_args& a, int64_t n, int64_t count, int64_t row_begin, int64_t row_end, float* workspace) {
  constexpr int64_t tile = int64_t{kGemmTileVectors} * Vec::kLanes;
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
    csr_rows(vectors, t);
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t m = row_begin; m < row_end; ++m) {
      const int64_t at = (n + i) * p.rows + m;
      a.y[at] = a.residual ? clip(y_t[m * tile + i] + a.residual[at], a.min, a.max) : y_t[m * tile + i];
    }
  }
}

static void gemm_csr_f32(const Packed& p, const tk_args& a, int64_t part_begin, int64_t part_end, float* workspace) {
  constexpr int64_t tile = int64_t{kGemmTileVectors} * Vec::kLanes;
  for (int64_t part = part_begin; part < part_end;) {
    const int64_t group = part % p.row_groups, groups = smaller(p.row_groups - group, part_end - part);
    const int64_t n = part / p.row_groups * tile, count = smaller(tile, a.batch - n);
    const int64_t row_begin = group * kGroupRows, row_end = smaller(p.rows, (group + groups) * kGroupRows);
    part += groups;
    if (count == 1) {
      gemm_row(p, a, n, row_begin, row_end);
    } else {
      gemm_tile(p, a, n, count, row_begin, row_end, workspace);
    }
  }
}
