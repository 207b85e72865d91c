// Fully connected layer with BSR weights. Included by isa/*.cc after gemm-inl.h.
struct BsrUnits {
  static constexpr int kRows = kBlockRows, kColumns = 1, kMaxVectors = BsrRows::kMaxVectors;
  template <int V>
  static inline void add(const float* values, const uint16_t* offsets, int64_t count, const float* x, Vec (*acc)[V]) {
    bsr_unit<V>(values, offsets, count, x, FixedStep<V * Vec::kLanes>(), acc);
  }
  static inline void dot(const float* values, const uint16_t* offsets, int64_t count, const float* x, int64_t, float* sum) {
    constexpr int kChains = 4;  // sums at once, to hide the latency of the additions
    float part[kChains][kRows] = {};
    int64_t e = 0;
    for (; count - e >= kChains; e += kChains) {
      TK_UNROLL for (int c = 0; c < kChains; ++c) {
        TK_UNROLL for (int r = 0; r < kRows; ++r) part[c][r] += values[(e + c) * kRows + r] * x[offsets[e + c]];
      }
    }
    for (; e < count; ++e) {
      TK_UNROLL for (int r = 0; r < kRows; ++r) part[0][r] += values[e * kRows + r] * x[offsets[e]];
    }
    TK_UNROLL for (int c = 0; c < kChains; ++c) TK_UNROLL for (int r = 0; r < kRows; ++r) sum[r] += part[c][r];
  }
};

static void gemm_bsr_f32(const Packed& p, const tk_args& a, int64_t part_begin, int64_t part_end, float* workspace) {
  gemm<BsrUnits>(p, a, part_begin, part_end, workspace);
}
