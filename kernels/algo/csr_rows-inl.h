// The inner loop for CSR weights: accumulators of one row in registers, one broadcast weight per non-zero. Included by isa/*.cc after
// rows-inl.h.

// A fused multiply-add takes about 4 cycles and two start per cycle, so narrow tiles run several non-zeros at once.
constexpr int chains(int vectors) { return vectors >= 6 ? 1 : vectors >= 3 ? 2 : 4; }

// acc += the row's non-zeros values[0 … count) times their vectors of x, kStep floats from offset to offset.
template <int V, int kStep = 1>
static inline void csr_row(const float* values, const uint16_t* offsets, int64_t count, const float* x, Vec* acc) {
  constexpr int kChains = chains(V);
  int64_t e = 0;
  if constexpr (kChains > 1) {
    if (count >= kChains) {
      Vec extra[kChains - 1][V];
      TK_UNROLL for (int c = 0; c < kChains - 1; ++c) TK_UNROLL for (int v = 0; v < V; ++v) extra[c][v] = Vec::set(0.0f);
      for (; count - e >= kChains; e += kChains) {
        TK_UNROLL for (int c = 0; c < kChains; ++c) {
          const Vec w = Vec::set(values[e + c]);
          const float* const from = x + int64_t{offsets[e + c]} * kStep;
          Vec* const into = c == 0 ? acc : extra[c - 1];
          TK_UNROLL for (int v = 0; v < V; ++v) into[v] = fma(w, Vec::load(from + v * Vec::kLanes), into[v]);
        }
      }
      TK_UNROLL for (int c = 0; c < kChains - 1; ++c) TK_UNROLL for (int v = 0; v < V; ++v) acc[v] = acc[v] + extra[c][v];
    }
  }
  for (; e < count; ++e) {
    const Vec w = Vec::set(values[e]);
    const float* const from = x + int64_t{offsets[e]} * kStep;
    TK_UNROLL for (int v = 0; v < V; ++v) acc[v] = fma(w, Vec::load(from + v * Vec::kLanes), acc[v]);
  }
}

struct CsrRows {
  static constexpr int kMaxVectors = kMaxTileVectors;

  template <int V, bool First, bool Last>
  static void of(const Tile& t) {
    const uint32_t* const row_ptr = t.row_ptr;
    const float *const x = t.x, *const bias = t.bias;
    float *acc_at = t.acc + t.row_begin * t.acc_stride, *y = t.y + t.row_begin * t.y_stride;
    const int64_t y_stride = t.y_stride, acc_stride = t.acc_stride, to_residual = t.residual - t.y;
    const bool residual = t.residual;
    int64_t at = row_ptr[t.row_begin];
    for (int64_t m = t.row_begin, row_end = t.row_end; m < row_end; ++m, acc_at += acc_stride, y += y_stride) {
      const int64_t count = row_ptr[m + 1] - at;
      if (!First && !Last && count == 0) continue;
      Vec acc[V];
      if constexpr (Last) prefetch_row<V>(y + 2 * y_stride, residual ? y + to_residual + 2 * y_stride : nullptr);
      if constexpr (First) {
        const Vec b = Vec::set(bias ? bias[m] : 0.0f);
        TK_UNROLL for (int v = 0; v < V; ++v) acc[v] = b;
      } else {
        TK_UNROLL for (int v = 0; v < V; ++v) acc[v] = Vec::load(acc_at + v * Vec::kLanes);
      }
      csr_row<V>(t.values + at, t.offsets + at, count, x, acc);
      at += count;
      if constexpr (Last) {
        write_row<V>(t, m, y, residual ? y + to_residual : nullptr, acc);
      } else {
        TK_UNROLL for (int v = 0; v < V; ++v) acc[v].store(acc_at + v * Vec::kLanes);
      }
    }
  }
};
