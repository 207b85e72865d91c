// Fully connected layer with CSR weights. Included by isa/*.cc after gemm-inl.h.
static void gemm_csr_f32(const Packed& p, const tk_args& a, int64_t part_begin, int64_t part_end, float* workspace) {
  gemm<CsrRows, 1>(p, a, part_begin, part_end, workspace);
}
