// A bundle: the layers of a network in one file, for a program without ONNX. Little-endian, nothing between the fields:
//
//   "TKBUNDLE" | u32 version = 1 | u32 count of layers | layer ... | u32 CRC-32 (as in zlib) of all bytes before it
//
//   layer   u32 length of name, name in UTF-8 | u32 flags: 1 product instead of convolution, 2 residual, 4 kept dense in the model
//           i32 format (tk_format), activation (tk_activation) | f32 min, max, slope
//           i32 lanes, tile_vectors, block_channels, group_tiles (tk_tuning, for vectors of so many lanes; 0: choose)
//           i64 batch | i64 the 17 fields of tk_conv2d in their order; of a product all but in_channels and out_channels are 1, pads and
//           layouts 0 | i64 nnz | f32 bias [rows] | i64 row_ptr [rows + 1] | i32 col_indices [nnz] | f32 values [nnz]
//
// `ticketkit/bench/bundle.py` writes it.
#ifndef TICKETKIT_DEVICE_BUNDLE_H_
#define TICKETKIT_DEVICE_BUNDLE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../ticketkit.h"

namespace tk::device {

struct BundleLayer {
  std::string name;
  bool product = false, residual = false, dense = false;
  tk_format format = TK_CSR;
  int32_t activation = TK_IDENTITY;
  float min = 0, max = 0, slope = 0;
  int32_t lanes = 0;
  tk_tuning tuning{};
  int64_t batch = 1;
  tk_conv2d shape{};
  int64_t out_h = 1, out_w = 1;
  std::vector<float> bias, values;
  std::vector<int64_t> row_ptr;
  std::vector<int32_t> col_indices;

  int64_t rows() const { return shape.out_channels; }
  int64_t cols() const { return shape.in_channels / shape.groups * shape.kernel_h * shape.kernel_w; }
  int64_t x_count() const { return batch * shape.in_channels * shape.in_h * shape.in_w; }
  int64_t y_count() const { return batch * shape.out_channels * out_h * out_w; }
  tk_csr csr() const { return {rows(), cols(), static_cast<int64_t>(values.size()), values.data(), col_indices.data(), row_ptr.data()}; }
};

constexpr int64_t kMostFloats = int64_t{1} << 27;  // of an input, output or dense weight: 512 MiB

// The layers of a file's bytes, all checked: seal, lengths, ranges, shapes that fit, weights that tk_csr_validate takes. Throws
// std::runtime_error naming layer and field.
std::vector<BundleLayer> read_bundle(const uint8_t* bytes, size_t size);

// The same of a file.
std::vector<BundleLayer> read_bundle(const std::string& path);

// CRC-32 of zlib.
uint32_t crc32(const uint8_t* bytes, size_t size);

}  // namespace tk::device

#endif  // TICKETKIT_DEVICE_BUNDLE_H_
