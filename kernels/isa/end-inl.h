// The algorithms, and the ISA's row of the dispatch table. Included last, inside the ISA's namespace.

#include "../algo/activate-inl.h"
#include "../algo/strips-inl.h"
#include "../algo/rows-inl.h"
#include "../algo/lanes-inl.h"
#include "../algo/csr_rows-inl.h"
#include "../algo/bsr_rows-inl.h"

#ifdef TK_HALVES
#include "../algo/half_rows-inl.h"
using Conv2dCsrRows = HalfCsrRows;
using Conv2dBsrRows = HalfBsrRows;
#else
using Conv2dCsrRows = CsrRows;
using Conv2dBsrRows = BsrRows;
#endif

#include "../algo/conv2d-inl.h"
#include "../algo/conv2d_csr-inl.h"
#include "../algo/conv2d_bsr-inl.h"
#include "../algo/depthwise_csr-inl.h"
#include "../algo/gemm-inl.h"
#include "../algo/gemm_csr-inl.h"
#include "../algo/gemm_bsr-inl.h"
#include "../algo/gemm_bsr1x4-inl.h"

static constexpr Isa describe(const char* name, int32_t rank, bool (*usable)()) {
  return {name,
          rank,
          Vec::kLanes,
          Vec::kRegisters,
          Vec::kTile,
          Vec::kGoodTile,
          Conv2dBsrRows::kMaxVectors,
          Vec::kReadsPlanes,
          Conv2dCsrRows::kValueBytes,
          usable,
          {
#define TK_KERNEL(op, format, type) op##_##format##_##type,
#include "../kernels.inc"
#undef TK_KERNEL
          }};
}
