// ticketkit: sparse kernels for pruned networks. The C ABI; knows nothing of Python, torch or ONNX Runtime.
//
// Life of a layer:   tk_*_packed_bytes -> (caller allocates) -> tk_*_pack -> tk_run, from any number of threads at once.
//
// Rules that hold for every call
//   * Sizes are element counts; a name that ends in `_bytes` says otherwise.
//   * Nothing allocates, prints, aborts, throws or starts a thread. The caller owns every buffer and splits the work.
//   * Formats are checked once, when packing. tk_run trusts a packed buffer that tk_*_pack filled.
//   * Every function but the plain getters returns a tk_status; TK_OK is 0; tk_status_text() gives one line in words.
//   * Activations and images are float32, C order but where a tk_layout says otherwise. Unless said otherwise pointers need the natural alignment of their type only.
//   * Results depend on the packed buffer and the inputs alone, never on how the parts are split over threads.
#ifndef TICKETKIT_H_
#define TICKETKIT_H_

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define TK_API __declspec(dllexport)
#else
#define TK_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum tk_status {
  TK_OK = 0,
  TK_BAD_ARGUMENT = 1,  // a null pointer, or a count, range, bound, activation or slope outside what the call allows
  TK_BAD_SHAPE =
      2,  // a dimension below 1 or above 2^24 (2^31 - 1 for rows and cols), a window that does not fit, or a weight of another shape
  TK_BAD_VALUES = 3,       // a weight that is NaN or infinite, or beyond 65504 on "neon_fp16"
  TK_BAD_COL_INDICES = 4,  // a column index outside [0, cols) or not strictly increasing within its row
  TK_BAD_ROW_PTR = 5,      // row pointers that do not rise from 0 to nnz
  TK_BAD_GAPS = 6,         // gap-coded positions that repeat or leave the weight
  TK_BAD_BUFFER = 7,       // a packed buffer too small or never packed, or a buffer not aligned to TK_ALIGNMENT bytes
  TK_BAD_ISA = 8,          // an ISA this build or this machine does not have
  TK_TOO_LARGE = 9         // a layer beyond the offsets of the packed form
} tk_status;

TK_API const char* tk_status_text(tk_status status);

enum { TK_ALIGNMENT = 64 };  // bytes; packed buffers and workspaces start on this boundary

// ---- instruction sets -------------------------------------------------------------------------------------------------------

// The ISAs are numbered 0 … tk_isa_count()-1, slowest first; number 0 is "scalar" and always usable.
TK_API int32_t tk_isa_count(void);
TK_API const char* tk_isa_name(int32_t isa);  // "scalar", "avx2", "avx512", "neon", "neon_fp16"; null if out of range
TK_API int32_t tk_isa_usable(int32_t isa);    // 1 where both the processor and the operating system support it
TK_API int32_t tk_isa_lanes(int32_t isa);     // float32 lanes of one vector
// The ISA to use: the one named by the environment variable TICKETKIT_ISA, else the fastest usable that computes in float32. Returns
// TK_BAD_ISA for a name that is unknown or not usable here.
//
// "neon_fp16" computes convolutions (not depthwise ones) in half precision and is therefore used only where it is named. Weights and x are
// rounded to halves, and products are summed in halves within one block of input channels; sums of blocks, and all that follows, are
// float32, as x and y stay in memory. With k products of a row the error is about 2^-9 (k + 1) max|w| max|x|, and 2^-24 (k + 1) (1 + max|w| +
// max|x|) more where numbers are below 2^-14. Numbers of x, and sums, beyond 65504 become infinite.
TK_API tk_status tk_isa_active(int32_t* isa);

// ---- the table of kernels (kernels.inc), the same for every ISA ----------------------------------------------------------------

TK_API int32_t tk_kernel_count(void);
TK_API const char* tk_kernel_name(int32_t kernel);  // "conv2d_csr_f32", …: operation, weight format, type; null if out of range

// ---- sparse weights -----------------------------------------------------------------------------------------------------------

// A rows x cols matrix in compressed sparse rows. For a convolution rows = out_channels and cols = in_channels * kernel_h * kernel_w,
// in the C order of the dense weight [out_channels, in_channels, kernel_h, kernel_w].
typedef struct tk_csr {
  int64_t rows, cols, nnz;
  const float* values;         // [nnz], finite
  const int32_t* col_indices;  // [nnz], strictly increasing within a row
  const int64_t* row_ptr;      // [rows + 1], from 0 to nnz, never falling
} tk_csr;

TK_API tk_status tk_csr_validate(const tk_csr* weight);

// Gap coding, the form weights have in files: flat C-order positions p_0 = gaps[0], p_i = p_{i-1} + gaps[i], strictly increasing and
// below rows * cols. Writes col_indices [nnz] and row_ptr [rows + 1]; the values stay as they are. nnz may be 0.
TK_API tk_status tk_gaps_decode(int64_t rows, int64_t cols, int64_t nnz, const uint16_t* gaps, int32_t* col_indices, int64_t* row_ptr);

// ---- operations ---------------------------------------------------------------------------------------------------------------

// The order of an image's floats in memory. TK_PLANES is NCHW. The others keep together what a tile of a 1x1 convolution reads: the flat
// pixels of an image [C,H,W] are cut into tiles of T = tk_tile_pixels(), the last one shorter; tile after tile, in each the channels one
// after the other. Pixel p of channel c is at (p - p % T) * C + c * length of the tile + p % T. As many floats as in NCHW, and the same
// where one tile holds all pixels.
typedef enum tk_layout {
  TK_PLANES = 0,
  TK_CSR_TILES = 1,  // the tiles that a convolution in TK_CSR has
  TK_BSR_TILES = 2   // the tiles that one in TK_BSR has
} tk_layout;

// Pixels of a tile of that layout in an image of so many; 0 where the layout is NCHW, and where an argument is out of range.
TK_API int64_t tk_tile_pixels(tk_layout layout, int64_t pixels, int32_t isa);

// y[n,m,oh,ow] = act(clip(bias[m] + residual[n,m,oh,ow] + sum_{c,i,j} w[m,c,i,j] * x[n, c, oh*stride_h - pad_top + i*dilation_h,
//                                                                                      ow*stride_w - pad_left + j*dilation_w]))
// with x zero outside the image; groups = 1. Or depthwise, groups = in_channels = out_channels: w is [out_channels, 1, kernel_h, kernel_w],
// so cols = kernel_h * kernel_w, and c is m alone. out_h = (in_h + pad_top + pad_bottom - dilation_h*(kernel_h-1) - 1) / stride_h + 1, out_w alike.
typedef struct tk_conv2d {
  int64_t in_channels, in_h, in_w, out_channels;
  int64_t kernel_h, kernel_w, stride_h, stride_w;
  int64_t pad_top, pad_left, pad_bottom, pad_right;
  int64_t dilation_h, dilation_w;
  int64_t groups;
  int64_t x_layout, y_layout;  // tk_layout of x, and of y and residual; depthwise has TK_PLANES only
} tk_conv2d;

// How a layer is cut up. 0 means: choose. The choice changes speed and, in the last bits, the order of summation. Depthwise ignores it.
typedef struct tk_tuning {
  int32_t tile_vectors;    // vectors of pixels per tile, 1 … 20; an ISA takes fewer (14 on x86)
  int32_t block_channels;  // input channels per block, at most; fewer where they would not fit 16-bit offsets
  int32_t group_tiles;     // tiles whose input is gathered at once, at most
} tk_tuning;

// The forms a weight can be packed in. CSR: each row its own columns. BSR: blocks of 4 rows x 1 column, so that rows 4i … 4i+3 share
// their columns, or of 1 row x 4 columns, 4i … 4i+3; what a block holds beyond the weight's own non-zeros is stored as zeros. Convolutions
// have no TK_BSR_1X4, depthwise ones have TK_CSR only.
typedef enum tk_format { TK_CSR = 0, TK_BSR = 1, TK_BSR_1X4 = 2 } tk_format;

// Values the form stores, zeros of half-full blocks included: nnz for TK_CSR. 0 for a weight that tk_csr_validate refuses.
TK_API int64_t tk_stored_values(const tk_csr* weight, tk_format format);

// Bytes of the packed buffer, and the packing itself. `tuning` may be null. The packed buffer is position independent and
// refers to neither `weight` nor `shape` afterwards.
TK_API tk_status tk_conv2d_packed_bytes(const tk_conv2d* shape, const tk_csr* weight, tk_format format, int32_t isa,
                                        const tk_tuning* tuning, size_t* packed_bytes);
TK_API tk_status tk_conv2d_pack(const tk_conv2d* shape, const tk_csr* weight, tk_format format, int32_t isa, const tk_tuning* tuning,
                                void* packed, size_t packed_bytes);

// y[n,m] = act(clip(bias[m] + residual[n,m] + sum_k w[m,k] * x[n,k]))
TK_API tk_status tk_gemm_packed_bytes(const tk_csr* weight, tk_format format, int32_t isa, size_t* packed_bytes);
TK_API tk_status tk_gemm_pack(const tk_csr* weight, tk_format format, int32_t isa, void* packed, size_t packed_bytes);

// act(z), of an output z that is clipped: z; z, but slope * z where z < 0; z * min(max(z / 6 + 1 / 2, 0), 1); z / (1 + exp(-z)).
typedef enum tk_activation { TK_IDENTITY = 0, TK_LEAKY_RELU = 1, TK_HARD_SWISH = 2, TK_SILU = 3 } tk_activation;

// What one run reads and writes. x: [batch, in_channels, in_h, in_w] or [batch, cols]; y and residual: [batch, out_channels, out_h,
// out_w] or [batch, rows], each image in the shape's layout; bias: [out_channels] or [rows]. bias and residual may be null (zero). y may
// equal residual and overlaps nothing else. The sum is clipped to [min, max], min <= max: -INFINITY and INFINITY for none, 0 and INFINITY
// for ReLU; then act is applied. NaN stays NaN. batch is 1 … 2^31 - 1.
typedef struct tk_args {
  int64_t batch;
  const float* x;
  const float* bias;
  const float* residual;
  float* y;
  float min, max;
  int32_t activation;  // a tk_activation
  float slope;         // of TK_LEAKY_RELU; finite, whatever the activation
} tk_args;

// The work of one run is tk_parts() independent parts. Neighbouring parts share set-up, so give each thread one contiguous range.
TK_API int64_t tk_parts(const void* packed, int64_t batch);
TK_API size_t tk_workspace_bytes(const void* packed);  // per thread
TK_API tk_status tk_run(const void* packed, const tk_args* args, int64_t part_begin, int64_t part_end, void* workspace);

// ---- how a layer would be cut up ------------------------------------------------------------------------------------------------

// What of an ISA decides how layers are cut up; also of an ISA that this build has no kernels for.
typedef struct tk_vectors {
  int32_t lanes;         // float32 of a vector: a power of two, 1 … 16
  int32_t registers;     // 8 … 32
  int32_t tile;          // vectors of the widest tile of single rows: 1 … 20
  int32_t good_tile;     // and of one as a rule, at most `tile`
  int32_t block_tile;    // of the widest tile of a convolution in TK_BSR: 1 … 20
  int32_t reads_planes;  // 1 where pointwise convolutions may read planes in place
  int32_t value_bytes;   // of a convolution's weight in memory: 4, or 2 for halves
} tk_vectors;

// Those of an ISA of this build. TK_BAD_ARGUMENT, TK_BAD_ISA.
TK_API tk_status tk_isa_vectors(int32_t isa, tk_vectors* vectors);

// In counts. Of one image; of one channel of a depthwise
// convolution; of a whole product. What it says of this machine's vectors is what packing there does.
typedef struct tk_cut {
  int64_t tiles, tile_vectors;     // tiles of pixels or rows of batch; vectors of each but the last. Products of one row have no vectors
  int64_t vectors;                 // of all tiles
  int64_t units;                   // rows of the output, or in TK_BSR fours of them: each has a visit for every tile and block
  int64_t blocks, block_channels;  // blocks of input channels; for products passes over blocks of columns, and columns of a row pointer
  int64_t group_tiles;             // tiles whose input is gathered at once
  int64_t strips;                  // copies of a channel that it is gathered into
  int64_t window;                  // floats of input that a tile reads in one block
  int64_t filled, pieces;          // floats gathered or transposed, and in how many pieces; 0 pieces: by whole vectors
  int64_t waiting;                 // floats of the accumulators that wait from block to block
  int64_t spans;                   // pieces a channel of output is written in, about; 0: whole tiles
  int64_t taps, misaligned_taps;   // of the window, and those whose loads begin in the middle of a vector
  int64_t pitch, in_place;         // of output rows as lanes see them; 1 where tiles are read where they are
} tk_cut;

// Of a weight of so many stored values. `tuning` may be null. TK_BAD_ARGUMENT, TK_BAD_SHAPE, TK_TOO_LARGE as in packing.
TK_API tk_status tk_conv2d_cut(const tk_conv2d* shape, int64_t stored, tk_format format, const tk_vectors* vectors, const tk_tuning* tuning,
                               tk_cut* cut);
// Of a weight rows x cols with so many non-zeros and a batch of 1 … 2^31 - 1 rows.
TK_API tk_status tk_gemm_cut(int64_t rows, int64_t cols, int64_t nnz, tk_format format, const tk_vectors* vectors, int64_t batch,
                             tk_cut* cut);

TK_API const char* tk_version(void);

#ifdef __cplusplus
}
#endif

#endif  // TICKETKIT_H_
