// Validation of CSR weights and their packing into the blocked form of packed.h. Runs once per layer, at load.
#include <cmath>

#include "packed.h"

namespace tk {
namespace {

constexpr int64_t kMaxDim = int64_t{1} << 24;  // of images, windows, strides, paddings: keeps every product in 64 bits
constexpr int64_t kMaxOffset = INT32_MAX;      // entries hold 32-bit byte offsets
constexpr int64_t kBlockBytes = 24 * 1024;     // strips of one block: most of a 32 KB L1, output rows get the rest
constexpr int64_t kGemmBlock = 512;            // columns of one gemm block
constexpr int64_t kMaxStrips = 1 << 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t to) { return ceil_div(a, to) * to; }

bool within(int64_t x, int64_t low, int64_t high) { return x >= low && x <= high; }

tk_status check_shape(const tk_conv2d& s, const tk_csr& w) {
  const int64_t at_least_one[] = {s.in_channels, s.in_h,     s.in_w,     s.out_channels, s.kernel_h,
                                  s.kernel_w,    s.stride_h, s.stride_w, s.dilation_h,   s.dilation_w};
  for (const int64_t x : at_least_one) {
    if (!within(x, 1, kMaxDim)) return TK_BAD_SHAPE;
  }
  const int64_t pads[] = {s.pad_top, s.pad_left, s.pad_bottom, s.pad_right};
  for (const int64_t x : pads) {
    if (!within(x, 0, kMaxDim)) return TK_BAD_SHAPE;
  }
  if (s.dilation_h * (s.kernel_h - 1) + 1 > s.in_h + s.pad_top + s.pad_bottom) return TK_BAD_SHAPE;
  if (s.dilation_w * (s.kernel_w - 1) + 1 > s.in_w + s.pad_left + s.pad_right) return TK_BAD_SHAPE;
  const int64_t taps = s.kernel_h * s.kernel_w;
  if (w.rows != s.out_channels || w.cols % taps != 0 || w.cols / taps != s.in_channels) return TK_BAD_SHAPE;
  return TK_OK;
}

// Where a kernel tap reads: its strip and the rows it is shifted by.
struct Tap {
  int32_t strip;
  int64_t row_shift;
};

int64_t phases(const tk_conv2d& s) {
  int64_t n = 0;
  for (int64_t i = 0; i < s.kernel_h && n < s.stride_h; ++i) {
    bool seen = false;
    for (int64_t j = 0; j < i && !seen; ++j) seen = (j * s.dilation_h) % s.stride_h == (i * s.dilation_h) % s.stride_h;
    n += !seen;
  }
  return n;
}

// The k-th distinct row phase in order of kernel rows, its smallest and largest row shift.
void describe_phase(const tk_conv2d& s, int64_t k, int64_t* phase, int64_t* row_min, int64_t* row_max) {
  int64_t n = -1;
  *phase = -1;
  for (int64_t i = 0; i < s.kernel_h; ++i) {
    const int64_t at = (i * s.dilation_h) % s.stride_h, shift = i * s.dilation_h / s.stride_h;
    if (*phase < 0) {
      bool seen = false;
      for (int64_t j = 0; j < i && !seen; ++j) seen = (j * s.dilation_h) % s.stride_h == at;
      n += !seen;
      if (n < k) continue;
      *phase = at;
      *row_min = shift;
    }
    if (at == *phase) *row_max = shift;
  }
}

Tap find_tap(const tk_conv2d& s, int64_t phase_count, int64_t i, int64_t j) {
  const int64_t at = (i * s.dilation_h) % s.stride_h;
  for (int64_t k = 0; k < phase_count; ++k) {
    int64_t phase = 0, low = 0, high = 0;
    describe_phase(s, k, &phase, &low, &high);
    if (phase == at) return {static_cast<int32_t>(j * phase_count + k), i * s.dilation_h / s.stride_h - low};
  }
  return {0, 0};
}

// Fills the header; strips are written when `strips` is not null. Sizes only depend on shape, nnz, ISA and tuning.
tk_status plan_conv2d(const tk_conv2d& s, const tk_csr& w, int32_t isa, const tk_tuning* tuning, Packed* p, Strip* strips) {
  const tk_status bad = check_shape(s, w);
  if (bad != TK_OK) return bad;
  const int64_t lanes = tk_isa_lanes(isa);
  *p = Packed{};
  p->magic = kMagic;
  p->kernel = k_conv2d_csr_f32;
  p->isa = isa;
  p->lanes = static_cast<int32_t>(lanes);
  p->rows = w.rows;
  p->cols = w.cols;
  p->shape = s;
  p->out_h = (s.in_h + s.pad_top + s.pad_bottom - s.dilation_h * (s.kernel_h - 1) - 1) / s.stride_h + 1;
  p->out_w = (s.in_w + s.pad_left + s.pad_right - s.dilation_w * (s.kernel_w - 1) - 1) / s.stride_w + 1;
  const int64_t pixels = p->out_h * p->out_w, vectors = ceil_div(pixels, lanes);
  int64_t tile = tuning ? tuning->tile_vectors : 0;
  if (!within(tile, 0, kMaxTileVectors) || (tuning && tuning->block_channels < 0)) return TK_BAD_ARGUMENT;
  if (tile == 0) tile = ceil_div(vectors, ceil_div(vectors, kMaxTileVectors));
  p->tile_vectors = static_cast<int32_t>(tile);
  p->tiles = ceil_div(vectors, tile);
  p->row_groups = ceil_div(p->rows, kGroupRows);

  const bool pointwise = s.kernel_h * s.kernel_w * s.stride_h * s.stride_w == 1 && s.pad_top + s.pad_left + s.pad_bottom + s.pad_right == 0;
  const int64_t phase_count = phases(s);
  if (phase_count * s.kernel_w > kMaxStrips) return TK_TOO_LARGE;
  p->direct = pointwise && pixels % lanes == 0 && !(tuning && tuning->strips == 1);
  if (tuning && (!within(tuning->strips, 0, 2) || (tuning->strips == 2 && !p->direct))) return TK_BAD_ARGUMENT;
  p->strip_count = p->direct ? 0 : static_cast<int32_t>(phase_count * s.kernel_w);
  if (p->direct) {
    p->channel_floats = pixels;
  } else {
    for (int64_t j = 0, at = 0; j < s.kernel_w; ++j) {
      for (int64_t k = 0; k < phase_count; ++k) {
        int64_t phase = 0, low = 0, high = 0;
        describe_phase(s, k, &phase, &low, &high);
        const int64_t length = round_up(tile * lanes + (high - low) * p->out_w, lanes);
        if (at + length > kMaxOffset / 4) return TK_TOO_LARGE;
        if (strips) {
          strips[j * phase_count + k] = {static_cast<int32_t>(j * s.dilation_w - s.pad_left),
                                         static_cast<int32_t>(phase),
                                         static_cast<int32_t>(low),
                                         static_cast<int32_t>(length),
                                         static_cast<int32_t>(at),
                                         0};
        }
        at += length;
        p->channel_floats = at;
      }
    }
  }
  const int64_t tile_bytes = p->direct ? tile * lanes * 4 : p->channel_floats * 4;
  int64_t block = tuning ? tuning->block_channels : 0;
  if (block == 0) {
    block = kBlockBytes / tile_bytes;
    if (block < 1) block = 1;
    if (block < s.in_channels) block = ceil_div(s.in_channels, ceil_div(s.in_channels, block));
  }
  p->block_channels = block < s.in_channels ? block : s.in_channels;
  p->blocks = ceil_div(s.in_channels, p->block_channels);
  if (p->block_channels > kMaxOffset / 4 / p->channel_floats) return TK_TOO_LARGE;
  return TK_OK;
}

tk_status plan_gemm(const tk_csr& w, int32_t isa, Packed* p) {
  if (!within(w.rows, 1, INT32_MAX) || !within(w.cols, 1, INT32_MAX)) return TK_BAD_SHAPE;
  *p = Packed{};
  p->magic = kMagic;
  p->kernel = k_gemm_csr_f32;
  p->isa = isa;
  p->lanes = tk_isa_lanes(isa);
  p->rows = w.rows;
  p->cols = w.cols;
  p->tile_vectors = kGemmTileVectors;
  p->row_groups = ceil_div(w.rows, kGroupRows);
  p->channel_floats = int64_t{kGemmTileVectors} * p->lanes;
  p->block_channels = w.cols < kGemmBlock ? w.cols : kGemmBlock;
  p->blocks = ceil_div(w.cols, p->block_channels);
  return TK_OK;
}

// Places the arrays behind the header.
tk_status lay_out(int64_t nnz, Packed* p) {
  if (nnz < 0 || nnz > INT32_MAX || p->blocks > (int64_t{1} << 40) / (p->rows + 1)) return TK_TOO_LARGE;
  p->strips_at = round_up(sizeof(Packed), TK_ALIGNMENT);
  p->row_ptr_at = round_up(p->strips_at + p->strip_count * int64_t{sizeof(Strip)}, TK_ALIGNMENT);
  p->entries_at = round_up(p->row_ptr_at + p->blocks * (p->rows + 1) * int64_t{sizeof(uint32_t)}, TK_ALIGNMENT);
  p->total_bytes = round_up(p->entries_at + nnz * int64_t{sizeof(Entry)}, TK_ALIGNMENT);
  return TK_OK;
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % TK_ALIGNMENT == 0; }

template <class T>
T* mutable_at(void* packed, int64_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(packed) + offset);
}

// Copies the non-zeros block by block, rows in order; offset(column) says where a column's input starts within its block.
template <class Offset>
void write_entries(const tk_csr& w, int64_t columns_per_channel, const Packed& p, void* packed, Offset offset) {
  uint32_t* row_ptr = mutable_at<uint32_t>(packed, p.row_ptr_at);
  Entry* const entries = mutable_at<Entry>(packed, p.entries_at);
  uint32_t count = 0;
  for (int64_t block = 0; block < p.blocks; ++block) {
    const int64_t begin = p.block_begin(block) * columns_per_channel, end = begin + p.block_channels * columns_per_channel;
    for (int64_t m = 0; m < w.rows; ++m) {
      *row_ptr++ = count;
      int64_t low = w.row_ptr[m], high = w.row_ptr[m + 1];  // first entry at or behind `begin`
      while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (w.col_indices[middle] < begin) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      for (int64_t i = low; i < w.row_ptr[m + 1] && w.col_indices[i] < end; ++i) {
        entries[count++] = {w.values[i], static_cast<int32_t>(offset(w.col_indices[i] - begin))};
      }
    }
    *row_ptr++ = count;
  }
}

tk_status check_buffer(const Packed& p, const void* packed, size_t bytes) {
  return packed && aligned(packed) && bytes >= static_cast<size_t>(p.total_bytes) ? TK_OK : TK_BAD_BUFFER;
}

bool known_isa(int32_t isa) { return within(isa, 0, tk_isa_count() - 1) && tk_isa_usable(isa); }

}  // namespace
}  // namespace tk

using namespace tk;

extern "C" {

tk_status tk_csr_validate(const tk_csr* w) {
  if (!w || !w->row_ptr || (w->nnz > 0 && (!w->values || !w->col_indices))) return TK_BAD_ARGUMENT;
  if (!within(w->rows, 1, INT32_MAX) || !within(w->cols, 1, INT32_MAX)) return TK_BAD_SHAPE;
  if (!within(w->nnz, 0, INT32_MAX)) return TK_TOO_LARGE;
  if (w->row_ptr[0] != 0 || w->row_ptr[w->rows] != w->nnz) return TK_BAD_ROW_PTR;
  for (int64_t m = 0; m < w->rows; ++m) {
    if (w->row_ptr[m + 1] < w->row_ptr[m] || w->row_ptr[m + 1] > w->nnz) return TK_BAD_ROW_PTR;
    int64_t previous = -1;
    for (int64_t i = w->row_ptr[m]; i < w->row_ptr[m + 1]; ++i) {
      if (w->col_indices[i] <= previous || w->col_indices[i] >= w->cols) return TK_BAD_COL_INDICES;
      previous = w->col_indices[i];
    }
  }
  for (int64_t i = 0; i < w->nnz; ++i) {
    if (!std::isfinite(w->values[i])) return TK_BAD_VALUES;
  }
  return TK_OK;
}

tk_status tk_gaps_decode(int64_t rows, int64_t cols, int64_t nnz, const uint16_t* gaps, int32_t* col_indices, int64_t* row_ptr) {
  if (!row_ptr || (nnz > 0 && (!gaps || !col_indices))) return TK_BAD_ARGUMENT;
  if (!within(rows, 1, INT32_MAX) || !within(cols, 1, INT32_MAX)) return TK_BAD_SHAPE;
  if (!within(nnz, 0, INT32_MAX)) return TK_TOO_LARGE;
  int64_t position = 0, row = 0;
  row_ptr[0] = 0;
  for (int64_t i = 0; i < nnz; ++i) {
    if (i > 0 && gaps[i] == 0) return TK_BAD_GAPS;
    position += gaps[i];
    if (position >= rows * cols) return TK_BAD_GAPS;
    while (position >= (row + 1) * cols) row_ptr[++row] = i;
    col_indices[i] = static_cast<int32_t>(position - row * cols);
  }
  while (row < rows) row_ptr[++row] = nnz;
  return TK_OK;
}

tk_status tk_conv2d_csr_packed_bytes(const tk_conv2d* shape, const tk_csr* w, int32_t isa, const tk_tuning* tuning, size_t* packed_bytes) {
  if (!shape || !w || !packed_bytes) return TK_BAD_ARGUMENT;
  if (!known_isa(isa)) return TK_BAD_ISA;
  Packed p;
  tk_status status = plan_conv2d(*shape, *w, isa, tuning, &p, nullptr);
  if (status == TK_OK) status = lay_out(w->nnz, &p);
  if (status == TK_OK) *packed_bytes = static_cast<size_t>(p.total_bytes);
  return status;
}

tk_status tk_conv2d_csr_pack(const tk_conv2d* shape, const tk_csr* w, int32_t isa, const tk_tuning* tuning, void* packed,
                             size_t packed_bytes) {
  if (!shape || !w) return TK_BAD_ARGUMENT;
  if (!known_isa(isa)) return TK_BAD_ISA;
  Packed p;
  tk_status status = plan_conv2d(*shape, *w, isa, tuning, &p, nullptr);
  if (status == TK_OK) status = lay_out(w->nnz, &p);
  if (status == TK_OK) status = check_buffer(p, packed, packed_bytes);
  if (status == TK_OK) status = tk_csr_validate(w);
  if (status != TK_OK) return status;
  Packed again;
  plan_conv2d(*shape, *w, isa, tuning, &again, p.direct ? nullptr : mutable_at<Strip>(packed, p.strips_at));
  *static_cast<Packed*>(packed) = p;

  const tk_conv2d& s = *shape;
  const int64_t taps = s.kernel_h * s.kernel_w, phase_count = phases(s);
  const Strip* const strips = p.at<Strip>(0) ? static_cast<const Packed*>(packed)->strips() : nullptr;
  write_entries(*w, taps, p, packed, [&](int64_t column) {
    int64_t floats = column / taps * p.channel_floats;
    if (!p.direct) {
      const Tap tap = find_tap(s, phase_count, column % taps / s.kernel_w, column % s.kernel_w);
      floats += strips[tap.strip].offset + tap.row_shift * p.out_w;
    }
    return floats * 4;
  });
  return TK_OK;
}

tk_status tk_gemm_csr_packed_bytes(const tk_csr* w, int32_t isa, size_t* packed_bytes) {
  if (!w || !packed_bytes) return TK_BAD_ARGUMENT;
  if (!known_isa(isa)) return TK_BAD_ISA;
  Packed p;
  tk_status status = plan_gemm(*w, isa, &p);
  if (status == TK_OK) status = lay_out(w->nnz, &p);
  if (status == TK_OK) *packed_bytes = static_cast<size_t>(p.total_bytes);
  return status;
}

tk_status tk_gemm_csr_pack(const tk_csr* w, int32_t isa, void* packed, size_t packed_bytes) {
  if (!w) return TK_BAD_ARGUMENT;
  if (!known_isa(isa)) return TK_BAD_ISA;
  Packed p;
  tk_status status = plan_gemm(*w, isa, &p);
  if (status == TK_OK) status = lay_out(w->nnz, &p);
  if (status == TK_OK) status = check_buffer(p, packed, packed_bytes);
  if (status == TK_OK) status = tk_csr_validate(w);
  if (status != TK_OK) return status;
  *static_cast<Packed*>(packed) = p;
  write_entries(*w, 1, p, packed, [&](int64_t column) { return column * p.channel_floats * 4; });
  return TK_OK;
}

int64_t tk_parts(const void* packed, int64_t batch) {
  const Packed* p = static_cast<const Packed*>(packed);
  if (!p || p->magic != kMagic || batch < 1) return 0;
  const int64_t tiles = p->kernel == k_gemm_csr_f32 ? ceil_div(batch, p->channel_floats) : batch * p->tiles;
  return tiles * p->row_groups;
}

size_t tk_workspace_bytes(const void* packed) {
  const Packed* p = static_cast<const Packed*>(packed);
  if (!p || p->magic != kMagic || p->direct) return 0;
  int64_t floats = p->block_channels * p->channel_floats;
  if (p->kernel == k_gemm_csr_f32) floats += p->rows * p->channel_floats;
  return static_cast<size_t>(round_up(floats * 4, TK_ALIGNMENT));
}

}  // extern "C"
