// Fully connected layer with BSR weights. Included by isa/*.cc after gemm-inl.h.
struct BsrUnits {
  static constexpr int kRows = kBlockRows, kMaxVectors = BsrRows::kMaxVectors;
  template <int V>
  static inline void add(const float* values, const uint16_t* offsets, int64_t count, const float* x, Vec (*acc)[V]) {
    bsr_unit<V, V * Vec::kLanes>(values, offsets, count, x, acc);
  }
};

static void gemm_bsr_f32(const Packed& p, const tk_args& a, int64_t part_begin, int64_t part_end, float* workspace) {
  gemm<BsrUnits>(p, a, part_begin, part_end, workspace);
}
