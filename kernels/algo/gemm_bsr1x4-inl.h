// Fully connected layer with weights in blocks of 1 row x kBlockColumns columns. Included by isa/*.cc after gemm-inl.h.
struct Bsr1x4Units {
  static constexpr int kRows = 1, kColumns = kBlockColumns, kMaxVectors = kGemmTileVectors;

  // Each column as in CSR: lanes run along the batch, so all a block saves is offsets.
  template <int V>
  static inline void add(const float* values, const uint16_t* offsets, int64_t count, const float* x, Vec (*acc)[V]) {
    constexpr int64_t kTile = V * Vec::kLanes;
    constexpr int kChains = smaller(chains(V), kColumns);
    Vec extra[kChains][V];
    TK_UNROLL for (int c = 1; c < kChains; ++c) TK_UNROLL for (int v = 0; v < V; ++v) extra[c][v] = Vec::set(0.0f);
    for (int64_t e = 0; e < count; ++e) {
      const float* const from = x + offsets[e] * kTile;
      TK_UNROLL for (int c = 0; c < kColumns; ++c) {
        const Vec w = Vec::set(values[kColumns * e + c]);
        Vec* const into = c % kChains == 0 ? acc[0] : extra[c % kChains];
        TK_UNROLL for (int v = 0; v < V; ++v) into[v] = fma(w, Vec::load(from + c * kTile + v * Vec::kLanes), into[v]);
      }
    }
    TK_UNROLL for (int c = 1; c < kChains; ++c) TK_UNROLL for (int v = 0; v < V; ++v) acc[0][v] = acc[0][v] + extra[c][v];
  }

  // Lanes run along the columns of several blocks.
  static inline void dot(const float* values, const uint16_t* offsets, int64_t count, const float* x, int64_t columns, float* sum) {
    dot_lanes<kColumns>(values, offsets, count, x, columns, sum);
  }
};

static void gemm_bsr1x4_f32(const Packed& p, const tk_args& a, int64_t part_begin, int64_t part_end, float* workspace) {
  gemm<Bsr1x4Units>(p, a, part_begin, part_end, workspace);
}
