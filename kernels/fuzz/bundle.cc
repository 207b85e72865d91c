// libFuzzer target: bundles. The fuzzer's bytes are a bundle without its seal, which is put on here, so that what lies behind it is
// reached; every other input keeps the bytes as they are. What is read must be consistent and fit the kernels; what is refused says why.
#include "../device/bundle.h"

#include <stdexcept>

#include "input.h"

namespace {

// What a reader promises of a layer, and that the kernels take it or refuse it with a status.
void check(const tk::device::BundleLayer& l) {
  TK_REQUIRE(static_cast<int64_t>(l.bias.size()) == l.rows());
  TK_REQUIRE(static_cast<int64_t>(l.row_ptr.size()) == l.rows() + 1 && l.row_ptr.back() == static_cast<int64_t>(l.values.size()));
  TK_REQUIRE(l.values.size() == l.col_indices.size());
  TK_REQUIRE(l.out_h >= 1 && l.out_w >= 1);
  TK_REQUIRE(l.x_count() >= 1 && l.x_count() <= tk::device::kMostFloats && l.y_count() >= 1 && l.y_count() <= tk::device::kMostFloats);
  const tk_csr csr = l.csr();
  TK_REQUIRE(tk_csr_validate(&csr) == TK_OK);
  size_t bytes = 0;
  const tk_status status =
      l.product ? tk_gemm_packed_bytes(&csr, l.format, 0, &bytes) : tk_conv2d_packed_bytes(&l.shape, &csr, l.format, 0, &l.tuning, &bytes);
  TK_REQUIRE(tk_status_text(status) != nullptr);
  TK_REQUIRE(status != TK_OK || bytes > 0);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::vector<uint8_t> bytes(data, data + size);
  if (size % 2 == 0) {
    const uint32_t seal = tk::device::crc32(bytes.data(), bytes.size());
    const uint8_t* const raw = reinterpret_cast<const uint8_t*>(&seal);
    bytes.insert(bytes.end(), raw, raw + sizeof(seal));
  }
  try {
    for (const tk::device::BundleLayer& l : tk::device::read_bundle(bytes.data(), bytes.size())) check(l);
  } catch (const std::runtime_error& error) {
    TK_REQUIRE(error.what()[0] != '\0');
  }
  return 0;
}
