// The inner loop for CSR weights: accumulators of one row in registers, one weight per non-zero. Included by isa/*.cc after rows-inl.h.

// acc += the row's non-zeros values[0 … count) times their vectors of x.
template <int V, class T, class Step>
static inline void csr_row(const float* values, const uint16_t* offsets, int64_t count, const float* x, Step step, T* acc) {
  constexpr int kAtOnce = T::kWeights > 1 ? T::kWeights : chains(V), kChains = chains(V);
  int64_t e = 0;
  if constexpr (kAtOnce > 1) {
    if (count >= kAtOnce) {
      T sums[kChains][V];
      TK_UNROLL for (int v = 0; v < V; ++v) sums[0][v] = acc[v];
      TK_UNROLL for (int c = 1; c < kChains; ++c) TK_UNROLL for (int v = 0; v < V; ++v) sums[c][v] = T::set(0.0f);
      for (; count - e >= kAtOnce; e += kAtOnce) {
        if constexpr (T::kWeights > 1) {
          add_lanes<1, V, kAtOnce>(values + e, offsets + e, x, step, sums);
        } else {
          TK_UNROLL for (int c = 0; c < kChains; ++c) {
            const T w = T::set(values[e + c]);
            const float* const from = step.of(x, offsets[e + c]);
            TK_UNROLL for (int v = 0; v < V; ++v) sums[c][v] = fma(w, T::load(from + v * T::kLanes), sums[c][v]);
          }
        }
      }
      TK_UNROLL for (int c = 1; c < kChains; ++c) TK_UNROLL for (int v = 0; v < V; ++v) sums[0][v] = sums[0][v] + sums[c][v];
      TK_UNROLL for (int v = 0; v < V; ++v) acc[v] = sums[0][v];
    }
  }
  for (; e < count; ++e) {
    if constexpr (T::kWeights > 1) {
      add_lanes<1, V, 1>(values + e, offsets + e, x, step, reinterpret_cast<T(*)[V]>(acc));
    } else {
      const T w = T::set(values[e]);
      const float* const from = step.of(x, offsets[e]);
      TK_UNROLL for (int v = 0; v < V; ++v) acc[v] = fma(w, T::load(from + v * T::kLanes), acc[v]);
    }
  }
}

struct CsrRows {
  static constexpr int kMaxVectors = Vec::kTile;

  template <int V, bool First, bool Last>
  static void of(const Tile& t) {
    const uint32_t* const row_ptr = t.row_ptr;
    const float *const x = t.x, *const bias = t.bias;
    const TileStep step = TileStep(t.x_step);
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
      csr_row<V>(t.values + at, t.offsets + at, count, x, step, acc);
      at += count;
      if constexpr (Last) {
        write_row<V>(t, m, y, residual ? y + to_residual : nullptr, acc);
      } else {
        TK_UNROLL for (int v = 0; v < V; ++v) acc[v].store(acc_at + v * Vec::kLanes);
      }
    }
  }
};
