// The packed form of a layer: what tk_*_pack writes and the kernels read. Internal; offsets are from the start of the header.
#ifndef TICKETKIT_PACKED_H_
#define TICKETKIT_PACKED_H_

#include "ticketkit.h"

namespace tk {

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t clamp(int64_t x, int64_t low, int64_t high) { return smaller(larger(x, low), high); }
constexpr bool within(int64_t x, int64_t low, int64_t high) { return x >= low && x <= high; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t to) { return ceil_div(a, to) * to; }
constexpr int32_t i32(int64_t x) { return static_cast<int32_t>(x); }

constexpr uint64_t kMagic = 0x6b63617074656b74;  // "tketpack"; guards against a buffer that was never packed
constexpr int kMaxTileVectors = 20;              // of the widest CSR tile of any ISA
constexpr int kGemmTileVectors = 8;              // of the widest CSR gemm tile
constexpr int64_t kBlockRows = 4;                // output rows of a BSR block
constexpr int64_t kBlockColumns = 4;             // columns of a 1x4 block
constexpr int64_t unit_rows(tk_format format) { return format == TK_BSR ? kBlockRows : 1; }
constexpr int64_t unit_columns(tk_format format) { return format == TK_BSR_1X4 ? kBlockColumns : 1; }
// Vectors of a BSR tile: kBlockRows accumulators for each, the vector itself, and one weight.
constexpr int max_block_vectors(int registers) { return (registers - 1) / static_cast<int>(kBlockRows + 1); }
constexpr int kDepthwiseWeights = 9;                   // of a depthwise channel kept in registers: a 3x3 window
constexpr int kDepthwiseVectors = 4;                   // accumulators beside them
constexpr int kStripMasks = 4;                         // which lanes of a vector are inside the image: none, all, those of a row's ends
constexpr int64_t kMaxCopiedPlane = int64_t{1} << 30;  // pixels of a plane whose places fit 32 bits
constexpr int64_t kMaxBlockFloats = 1 << 16;           // input of one block: entries hold 16-bit offsets
constexpr int64_t kGemmColumns = 64;                   // columns between two row pointers of a gemm
constexpr int64_t kGemmFloats = 48 * 1024;             // accumulators of the rows that one pass over the columns takes: a part of L2

enum Kernel : int32_t {
#define TK_KERNEL(op, format, type) k_##op##_##format##_##type,
#include "kernels.inc"
#undef TK_KERNEL
  kKernelCount
};

// A strip is one channel's pixels as one kernel column and one row phase (Phases in plan.h) see them, flattened over a group of tiles:
// strip[i] = x[stride_h*(oh + row_min) + phase - pad_top, stride_w*ow + column*dilation_w - pad_left] with (oh, ow) the i-th pixel after
// the group's first, zero outside the image. Every tap of that column and phase is then a constant offset into the strip.
struct Strip {
  int32_t x_shift;                   // column * dilation_w - pad_left
  int32_t phase;                     // row phase in [0, stride_h)
  int32_t row_min;                   // smallest row shift of its taps, in output rows
  int32_t halo;                      // floats behind the group's pixels: (row_max - row_min) * pitch, rounded up to whole vectors
  int32_t offset;                    // floats from the start of the channel's strips
  int32_t inside_begin, inside_end;  // output columns whose input column is inside the image
};

struct Packed {
  uint64_t magic;
  int32_t kernel, isa, lanes, tile_vectors;
  int64_t total_bytes;
  int64_t rows, cols;
  int64_t unit_rows;       // output rows that share their columns: kBlockRows for BSR, else 1
  int64_t unit_columns;    // columns of one offset: kBlockColumns for 1x4 blocks, else 1
  tk_conv2d shape;         // convolutions only
  int64_t out_h, out_w;    // convolutions only
  int64_t pitch;           // convolutions only: pixels from output row to output row as lanes see them, >= out_w
  int64_t x_tile, y_tile;  // pixels of a tile of x and of y in memory (tk_layout); 0: planes
  int64_t tiles;           // tiles per image (conv2d) or plane (depthwise)
  int64_t group_tiles;     // neighbouring tiles whose strips are filled together (conv2d)
  int64_t row_groups;      // groups of kGroupRows output rows, for depthwise single rows: the finest part
  int64_t blocks;          // blocks of input channels (conv2d) or columns (gemm)
  int64_t block_channels;  // of every block but the last
  int64_t tile_w;          // columns of output whose taps share strips: of a depthwise tile, else out_w, or 0: no columns share
  int64_t channel_floats;  // floats of one channel's strips (convolutions)
  int64_t x_floats;        // floats of x that are transposed at once (gemm)
  int64_t reads_planes;    // 1: offsets count channels, and planes of x are read where they are (conv2d)
  int32_t strip_count;
  // Byte offsets of Strip[strip_count], uint32_t[blocks][units + 1], float[stored], uint16_t[stored / entry]. Offsets count floats from
  // the start of the block's input, or its channels where planes are read in place; a unit's entries stand together, columns in order,
  // unit_rows * unit_columns values each. For gemm, which joins as many blocks as the batch suits, row pointers are [units][blocks] and one
  // more, and offsets are columns modulo 2^16.
  int64_t strips_at, row_ptr_at, values_at, offsets_at;

  template <class T>
  const T* at(int64_t offset) const {
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(this) + offset);
  }
  int64_t units() const { return ceil_div(rows, unit_rows); }
  int64_t entry_values() const { return unit_rows * unit_columns; }
  int64_t tile_floats() const { return int64_t{tile_vectors} * lanes; }
  // Every output pixel is the input pixel at the same place.
  bool pointwise() const {
    const tk_conv2d& s = shape;
    return s.kernel_h == 1 && s.kernel_w == 1 && s.stride_h == 1 && s.stride_w == 1 && s.pad_top == 0 && s.pad_left == 0 &&
           out_h == s.in_h && out_w == s.in_w && pitch == s.in_w;
  }
  // No vector of a strip holds pieces of two rows, so that strips are filled by masked vectors: pitches of whole vectors, and planes copied
  // as they are.
  bool whole_vectors() const {
    return x_tile == 0 && (pitch % lanes == 0 || pointwise()) && shape.stride_w <= 2 && shape.in_h * shape.in_w < kMaxCopiedPlane;
  }
  // Whole tiles of x are read where they are.
  bool tiles_in_place() const { return x_tile > 0 && x_tile == tile_floats() && pointwise(); }
  bool in_place() const { return reads_planes || tiles_in_place(); }
  // Floats of the strips of one block, with a vector to spare, whole cache lines.
  int64_t strips_floats() const { return round_up(block_channels * channel_floats + lanes, 16); }
  const Strip* strips() const { return at<Strip>(strips_at); }
  const uint32_t* row_ptr(int64_t block) const { return at<uint32_t>(row_ptr_at) + block * (units() + 1); }
  const float* values() const { return at<float>(values_at); }
  const uint16_t* offsets() const { return at<uint16_t>(offsets_at); }
  // Floats behind the strips of a depthwise tile: kStripMasks masks for each strip; where its vectors are read; where those of output go.
  int64_t masks_floats() const { return int64_t{strip_count} * kStripMasks * lanes; }
  int64_t reads_floats() const { return round_up(channel_floats / lanes * 2, 16); }
  int64_t lists_floats() const { return masks_floats() + reads_floats() + int64_t{tile_vectors + kDepthwiseVectors} * 3; }
  int64_t block_begin(int64_t block) const { return block * block_channels; }
  // Rows of batch in one tile of a gemm: whole vectors, shared out evenly.
  int64_t batch_tile(int64_t batch) const { return round_up(ceil_div(batch, ceil_div(batch, tile_floats())), lanes); }
};

constexpr int64_t kGroupRows = 16;

// Where a pixel of an image is in memory: `at` floats from the image's start for channel 0, `stride` from channel to channel, with `left`
// pixels of its plane or tile from there on.
struct Place {
  int64_t at, stride, left;
};

constexpr Place place(int64_t tile, int64_t channels, int64_t pixels, int64_t pixel) {
  if (tile == 0) return {pixel, pixels, pixels - pixel};
  const int64_t first = pixel / tile * tile, length = smaller(tile, pixels - first);
  return {first * channels + pixel - first, length, first + length - pixel};
}

using RunFn = void (*)(const Packed&, const tk_args&, int64_t, int64_t, float*);

// What an isa/NAME.cc file offers, as `const Isa* const isa_NAME`: null where it was compiled for another processor.
struct Isa {
  const char* name;
  int32_t rank;  // the fastest usable one wins: higher is faster, scalar is 0
  int32_t lanes, registers;
  int32_t tile_vectors, good_tile;  // vectors of the widest CSR tile, and of a good one
  bool reads_planes;                // offsets may be numbers of channels, for planes of x that are read in place
  bool (*usable)();
  RunFn run[kKernelCount];

  tk_vectors vectors() const { return {lanes, registers, tile_vectors, good_tile, reads_planes}; }
};

const Isa* isa_at(int32_t index);  // null if out of range

}  // namespace tk

#endif  // TICKETKIT_PACKED_H_
