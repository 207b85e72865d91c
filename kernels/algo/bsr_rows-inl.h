// The inner loop for BSR weights, blocks of kBlockRows x 1: accumulators of kBlockRows rows in registers, so that each input vector is read
// once for all of them. Included by isa/*.cc after rows-inl.h.

// acc += the unit's columns: of column e the weights values[kBlockRows * e …], one for each row; kStep floats from offset to offset.
template <int V, int kStep = 1>
static inline void bsr_unit(const float* values, const uint16_t* offsets, int64_t count, const float* x, Vec (*acc)[V]) {
  for (int64_t e = 0; e < count; ++e) {
    const float* const from = x + int64_t{offsets[e]} * kStep;
    Vec column[V];
    TK_UNROLL for (int v = 0; v < V; ++v) column[v] = Vec::load(from + v * Vec::kLanes);
    TK_UNROLL for (int r = 0; r < kBlockRows; ++r) {
      const Vec w = Vec::set(values[kBlockRows * e + r]);
      TK_UNROLL for (int v = 0; v < V; ++v) acc[r][v] = fma(w, column[v], acc[r][v]);
    }
  }
}

struct BsrRows {
  static constexpr int kMaxVectors = max_block_vectors(Vec::kRegisters);

  template <int V, bool First, bool Last>
  static void of(const Tile& t) {
    const float *const x = t.x, *const bias = t.bias;
    const int64_t to_residual = t.residual - t.y;
    int64_t at = t.row_ptr[t.row_begin / kBlockRows];
    for (int64_t m = t.row_begin; m < t.row_end; m += kBlockRows) {
      const int64_t end = t.row_ptr[m / kBlockRows + 1], rows = smaller(kBlockRows, t.row_end - m);
      if (!First && !Last && at == end) continue;
      Vec acc[kBlockRows][V];
      float* const acc_at = t.acc + m * t.acc_stride;
      TK_UNROLL for (int r = 0; r < kBlockRows; ++r) {
        const Vec b = Vec::set(First && bias && r < rows ? bias[m + r] : 0.0f);
        TK_UNROLL for (int v = 0; v < V; ++v) acc[r][v] = First ? b : Vec::load(acc_at + r * t.acc_stride + v * Vec::kLanes);
      }
      bsr_unit<V>(t.values + kBlockRows * at, t.offsets + at, end - at, x, acc);
      at = end;
      TK_UNROLL for (int r = 0; r < kBlockRows; ++r) {
        if constexpr (Last) {
          if (r == rows) break;
          float* const y = t.y + (m + r) * t.y_stride;
          write_row<V>(t, m + r, y, t.residual ? y + to_residual : nullptr, acc[r]);
        } else {
          TK_UNROLL for (int v = 0; v < V; ++v) acc[r][v].store(acc_at + r * t.acc_stride + v * Vec::kLanes);
        }
      }
    }
  }
};
