// Fully connected layer with CSR weights. Included by isa/*.cc after gemm-inl.h.
struct CsrUnits {
  static constexpr int kRows = 1, kColumns = 1, kMaxVectors = kGemmTileVectors;
  template <int V>
  static inline void add(const float* values, const uint16_t* offsets, int64_t count, const float* x, Vec (*acc)[V]) {
    csr_row<V>(values, offsets, count, x, FixedStep<V * Vec::kLanes>(), acc[0]);
  }
  static inline void dot(const float* values, const uint16_t* offsets, int64_t count, const float* x, int64_t columns, float* sum) {
    dot_lanes<kColumns>(values, offsets, count, x, columns, sum);
  }
};

static void gemm_csr_f32(const Packed& p, const tk_args& a, int64_t part_begin, int64_t part_end, float* workspace) {
  gemm<CsrUnits>(p, a, part_begin, part_end, workspace);
}
