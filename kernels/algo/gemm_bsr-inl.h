// Fully connected layer with BSR weights. Included by isa/*.cc after gemm-inl.h.
static void gemm_bsr_f32(const Packed& p, const tk_args& a, int64_t part_begin, int64_t part_end, float* workspace) {
  gemm<BsrRows, kBlockRows>(p, a, part_begin, part_end, workspace);
}
