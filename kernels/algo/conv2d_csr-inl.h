// Convolution with CSR weights. Included by isa/*.cc after conv2d-inl.h.
static void conv2d_csr_f32(const Packed& p, const tk_args& a, int64_t part_begin, int64_t part_end, float* workspace) {
  conv2d<Conv2dCsrRows>(p, a, part_begin, part_end, workspace);
}
