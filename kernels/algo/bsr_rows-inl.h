// The inner loop for BSR weights, blocks of kBlockRows x 1: accumulators of kBlockRows rows in registers, so that each input vector is read
// once for all of them. Included by isa/*.cc after rows-inl.h.

// acc += the unit's columns: of column e the weights values[kBlockRows * e …], one for each row.
template <int V, class T, class Step>
static inline void bsr_unit(const float* values, const uint16_t* offsets, int64_t count, const float* x, Step step, T (*acc)[V]) {
  int64_t e = 0;
  if constexpr (T::kWeights > 1) {
    for (; count - e >= 2; e += 2) add_lanes<kBlockRows, V, 2>(values + kBlockRows * e, offsets + e, x, step, acc);
    if (e < count) add_lanes<kBlockRows, V, 1>(values + kBlockRows * e, offsets + e, x, step, acc);
  } else {
    for (; e < count; ++e) {
      const float* const from = step.of(x, offsets[e]);
      T column[V];
      TK_UNROLL for (int v = 0; v < V; ++v) column[v] = T::load(from + v * T::kLanes);
      TK_UNROLL for (int r = 0; r < kBlockRows; ++r) {
        const T w = T::set(values[kBlockRows * e + r]);
        TK_UNROLL for (int v = 0; v < V; ++v) acc[r][v] = fma(w, column[v], acc[r][v]);
      }
    }
  }
}

struct BsrRows {
  static constexpr int kMaxVectors = max_block_vectors(Vec::kRegisters);

  template <int V, bool First, bool Last>
  static void of(const Tile& t) {
    const float *const x = t.x, *const bias = t.bias;
    const TileStep step = TileStep(t.x_step);
    const int64_t to_residual = t.residual - t.y;
    int64_t at = t.row_ptr[t.row_begin / kBlockRows];
    for (int64_t m = t.row_begin; m < t.row_end; m += kBlockRows) {
      const int64_t end = t.row_ptr[m / kBlockRows + 1], rows = smaller(kBlockRows, t.row_end - m);
      if (!First && !Last && at == end) continue;
      Vec acc[kBlockRows][V];
      float* const acc_at = t.acc + m * t.acc_stride;
      TK_UNROLL for (int r = 0; r < kBlockRows; ++r) {
        const Vec b = Vec::set(First && bias && r < rows ? bias[m + r] : 0.0f);
        const float* const from = Vec::in_register(acc_at + r * t.acc_stride);
        TK_UNROLL for (int v = 0; v < V; ++v) acc[r][v] = First ? b : Vec::load(from + v * Vec::kLanes);
      }
      bsr_unit<V>(t.values + kBlockRows * at, t.offsets + at, end - at, x, step, acc);
      at = end;
      TK_UNROLL for (int r = 0; r < kBlockRows; ++r) {
        if constexpr (Last) {
          if (r == rows) break;
          float* const y = t.y + (m + r) * t.y_stride;
          write_row<V>(t, m + r, y, t.residual ? y + to_residual : nullptr, acc[r]);
        } else {
          float* const to = Vec::in_register(acc_at + r * t.acc_stride);
          TK_UNROLL for (int v = 0; v < V; ++v) acc[r][v].store(to + v * Vec::kLanes);
        }
      }
    }
  }
};
