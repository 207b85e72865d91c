// Packing of weights into the blocked form of packed.h. Runs once per layer and image size, at load.
#include <cmath>
#include <cstring>

#include "plan.h"

namespace tk {
namespace {

constexpr int64_t kMaxRowPointers = int64_t{1} << 28;  // over all blocks: 1 GiB

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % TK_ALIGNMENT == 0; }

template <class T>
T* mutable_at(void* packed, int64_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(packed) + offset);
}

// Walks the entries of a unit, so many columns of so many rows with a non-zero in any of them, ascending: `at` is the first column,
// INT64_MAX at the end.
struct Entries {
  Entries(const tk_csr& weight, int64_t unit_rows, int64_t unit_columns, int64_t unit)
      : w(weight), rows(i32(unit_rows)), columns(i32(unit_columns)) {
    for (int32_t r = 0; r < rows; ++r) {
      const int64_t m = unit * rows + r;
      next[r] = m < w.rows ? w.row_ptr[m] : 0;
      end[r] = m < w.rows ? w.row_ptr[m + 1] : 0;
    }
    find();
  }
  Entries(const tk_csr& weight, const Packed& p, int64_t unit) : Entries(weight, p.unit_rows, p.unit_columns, unit) {}
  // The entry's values, rows inside; then on to the next.
  void take(float* values) {
    for (int32_t r = 0; r < rows; ++r) {
      for (int32_t c = 0; c < columns; ++c) {
        const bool here = next[r] < end[r] && w.col_indices[next[r]] == at + c;
        if (values) values[c * rows + r] = here ? w.values[next[r]] : 0.0f;
        next[r] += here;
      }
    }
    find();
  }
  void find() {
    at = INT64_MAX;
    for (int32_t r = 0; r < rows; ++r) {
      if (next[r] < end[r] && w.col_indices[next[r]] < at) at = w.col_indices[next[r]] / columns * columns;
    }
  }

  const tk_csr& w;
  int32_t rows, columns;
  int64_t at, next[kBlockRows], end[kBlockRows];
};

// The weight must be valid.
int64_t stored_values(const tk_csr& w, int64_t unit_rows, int64_t unit_columns) {
  if (unit_rows * unit_columns == 1) return w.nnz;
  int64_t entries = 0;
  for (int64_t unit = 0; unit < ceil_div(w.rows, unit_rows); ++unit) {
    for (Entries e(w, unit_rows, unit_columns, unit); e.at != INT64_MAX; e.take(nullptr)) ++entries;
  }
  return entries * unit_rows * unit_columns;
}

// The half nearest to a float of at most kMaxHalf, ties to even.
uint16_t to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude < 0x38800000) {  // below 2^-14: a multiple of 2^-24, where adding 0.5 leaves the last digits
    float shifted = std::fabs(x) + 0.5f;
    std::memcpy(&bits, &shifted, sizeof(bits));
    return static_cast<uint16_t>(sign | (bits - 0x3f000000));
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
}

// Whether every weight has a half near it.
bool fits_halves(const tk_csr& w) {
  constexpr float kMaxHalf = 65504;
  for (int64_t i = 0; i < w.nnz; ++i) {
    if (std::fabs(w.values[i]) > kMaxHalf) return false;
  }
  return true;
}

// Writes the stored values block by block, units in order; offset(column) says where a column's input starts within its block.
template <class Offset>
void write_entries(const tk_csr& w, int64_t columns_per_channel, const Packed& p, void* packed, Offset offset) {
  uint32_t* const row_ptr = mutable_at<uint32_t>(packed, p.row_ptr_at);
  float* const values = mutable_at<float>(packed, p.values_at);
  uint16_t *const halves = mutable_at<uint16_t>(packed, p.values_at), *const offsets = mutable_at<uint16_t>(packed, p.offsets_at);
  const int64_t units = p.units(), block_columns = p.block_channels * columns_per_channel;
  const auto pointer = [&](int64_t block, int64_t unit) -> uint32_t& { return row_ptr[block * (units + 1) + unit]; };
  for (int64_t i = 0; i < p.blocks * (units + 1); ++i) row_ptr[i] = 0;
  for (int64_t unit = 0; unit < units; ++unit) {
    for (Entries e(w, p, unit); e.at != INT64_MAX; e.take(nullptr)) ++pointer(e.at / block_columns, unit + 1);
  }
  for (int64_t block = 0; block < p.blocks; ++block) {  // from counts to where each unit of a block starts
    if (block > 0) pointer(block, 0) = pointer(block - 1, units);
    for (int64_t unit = 0; unit < units; ++unit) pointer(block, unit + 1) += pointer(block, unit);
  }
  for (int64_t unit = 0; unit < units; ++unit) {
    int64_t block = -1, to = 0;
    for (Entries e(w, p, unit); e.at != INT64_MAX; ++to) {
      if (e.at / block_columns != block) {
        block = e.at / block_columns;
        to = pointer(block, unit);
      }
      offsets[to] = static_cast<uint16_t>(offset(e.at - block * block_columns));
      if (p.value_bytes == sizeof(float)) {
        e.take(values + to * p.entry_values());
        continue;
      }
      float entry[kBlockRows * kBlockColumns];
      e.take(entry);
      for (int64_t i = 0; i < p.entry_values(); ++i) halves[to * p.entry_values() + i] = to_half(entry[i]);
    }
  }
}

// Writes the stored values of a gemm: unit by unit, columns in order, with a pointer to where each block of columns starts.
void write_rows(const tk_csr& w, const Packed& p, void* packed) {
  uint32_t* const row_ptr = mutable_at<uint32_t>(packed, p.row_ptr_at);
  float* const values = mutable_at<float>(packed, p.values_at);
  uint16_t* const offsets = mutable_at<uint16_t>(packed, p.offsets_at);
  int64_t to = 0, pointers = 0;
  const auto start = [&](int64_t pointer) {
    while (pointers <= pointer) row_ptr[pointers++] = static_cast<uint32_t>(to);
  };
  for (int64_t unit = 0; unit < p.units(); ++unit) {
    for (Entries e(w, p, unit); e.at != INT64_MAX; ++to) {
      start(unit * p.blocks + e.at / kGemmColumns);
      offsets[to] = static_cast<uint16_t>(e.at);
      e.take(values + to * p.entry_values());
    }
  }
  start(p.units() * p.blocks);
}

// Places the arrays behind the header.
tk_status lay_out(const tk_csr& w, Packed* p) {
  if (p->blocks > kMaxRowPointers / (p->units() + 1)) return TK_TOO_LARGE;
  const int64_t stored = stored_values(w, p->unit_rows, p->unit_columns);
  if (stored > INT32_MAX) return TK_TOO_LARGE;
  p->strips_at = round_up(sizeof(Packed), TK_ALIGNMENT);
  p->row_ptr_at = round_up(p->strips_at + p->strip_count * int64_t{sizeof(Strip)}, TK_ALIGNMENT);
  p->values_at = round_up(p->row_ptr_at + p->blocks * (p->units() + 1) * int64_t{sizeof(uint32_t)}, TK_ALIGNMENT);
  p->offsets_at = round_up(p->values_at + stored * p->value_bytes, TK_ALIGNMENT);
  p->total_bytes = round_up(p->offsets_at + stored / p->entry_values() * int64_t{sizeof(uint16_t)}, TK_ALIGNMENT);
  return TK_OK;
}

bool is_gemm(const Packed& p) { return p.kernel == k_gemm_csr_f32 || p.kernel == k_gemm_bsr_f32 || p.kernel == k_gemm_bsr1x4_f32; }

tk_status check_buffer(const Packed& p, const void* packed, size_t bytes) {
  return packed && aligned(packed) && bytes >= static_cast<size_t>(p.total_bytes) ? TK_OK : TK_BAD_BUFFER;
}

bool known_format(tk_format format) { return within(format, TK_CSR, TK_BSR_1X4); }

// What every packing checks first.
tk_status check_weight(const tk_csr& w, tk_format format, int32_t isa) {
  if (!known_format(format)) return TK_BAD_ARGUMENT;
  if (!within(isa, 0, tk_isa_count() - 1) || !tk_isa_usable(isa)) return TK_BAD_ISA;
  return tk_csr_validate(&w);
}

// The whole header, its arguments checked.
tk_status whole_conv2d(const tk_conv2d& shape, const tk_csr& w, tk_format format, int32_t isa, const tk_tuning* tuning, Packed* p) {
  tk_status status = check_weight(w, format, isa);
  if (status == TK_OK) status = plan_conv2d(shape, w, format, isa_at(isa)->vectors(), tuning, tk_stored_values(&w, format), p);
  p->isa = isa;
  if (status == TK_OK && p->value_bytes == sizeof(uint16_t) && !fits_halves(w)) status = TK_BAD_VALUES;
  return status == TK_OK ? lay_out(w, p) : status;
}

tk_status whole_gemm(const tk_csr& w, tk_format format, int32_t isa, Packed* p) {
  tk_status status = check_weight(w, format, isa);
  if (status == TK_OK) status = plan_gemm(w, format, isa_at(isa)->vectors(), p);
  p->isa = isa;
  return status == TK_OK ? lay_out(w, p) : status;
}

}  // namespace
}  // namespace tk

using namespace tk;

extern "C" {

int64_t tk_stored_values(const tk_csr* w, tk_format format) {
  if (tk_csr_validate(w) != TK_OK || !known_format(format)) return 0;
  return stored_values(*w, unit_rows(format), unit_columns(format));
}

tk_status tk_conv2d_packed_bytes(const tk_conv2d* shape, const tk_csr* w, tk_format format, int32_t isa, const tk_tuning* tuning,
                                 size_t* packed_bytes) {
  if (!shape || !w || !packed_bytes) return TK_BAD_ARGUMENT;
  Packed p;
  tk_status status = whole_conv2d(*shape, *w, format, isa, tuning, &p);
  if (status == TK_OK) *packed_bytes = static_cast<size_t>(p.total_bytes);
  return status;
}

tk_status tk_conv2d_pack(const tk_conv2d* shape, const tk_csr* w, tk_format format, int32_t isa, const tk_tuning* tuning, void* packed,
                         size_t packed_bytes) {
  if (!shape || !w) return TK_BAD_ARGUMENT;
  Packed p;
  tk_status status = whole_conv2d(*shape, *w, format, isa, tuning, &p);
  if (status == TK_OK) status = check_buffer(p, packed, packed_bytes);
  if (status != TK_OK) return status;
  *static_cast<Packed*>(packed) = p;
  const tk_conv2d& s = *shape;
  Strip* const strips = mutable_at<Strip>(packed, p.strips_at);
  plan_strips(&p, strips);

  const int64_t taps = s.kernel_h * s.kernel_w;
  const Phases rows = row_phases(p), columns = column_phases(p);
  write_entries(*w, taps, p, packed, [&](int64_t column) {
    if (p.reads_planes) return column;
    const int64_t i = column % taps / s.kernel_w, j = column % s.kernel_w;
    const Strip& strip = strips[j % columns.period * rows.count + i % rows.period];
    return column / taps * p.channel_floats + strip.offset + rows.shift_in_strip(i) * p.pitch + columns.shift_in_strip(j);
  });
  return TK_OK;
}

tk_status tk_gemm_packed_bytes(const tk_csr* w, tk_format format, int32_t isa, size_t* packed_bytes) {
  if (!w || !packed_bytes) return TK_BAD_ARGUMENT;
  Packed p;
  tk_status status = whole_gemm(*w, format, isa, &p);
  if (status == TK_OK) *packed_bytes = static_cast<size_t>(p.total_bytes);
  return status;
}

tk_status tk_gemm_pack(const tk_csr* w, tk_format format, int32_t isa, void* packed, size_t packed_bytes) {
  if (!w) return TK_BAD_ARGUMENT;
  Packed p;
  tk_status status = whole_gemm(*w, format, isa, &p);
  if (status == TK_OK) status = check_buffer(p, packed, packed_bytes);
  if (status != TK_OK) return status;
  *static_cast<Packed*>(packed) = p;
  write_rows(*w, p, packed);
  return TK_OK;
}

int64_t tk_tile_pixels(tk_layout layout, int64_t pixels, int32_t isa) {
  if (!within(layout, TK_CSR_TILES, TK_BSR_TILES) || !within(pixels, 1, INT64_MAX / 2) || !within(isa, 0, tk_isa_count() - 1)) return 0;
  return tile_pixels(layout, pixels, isa_at(isa)->vectors());
}

int64_t tk_parts(const void* packed, int64_t batch) {
  const Packed* p = static_cast<const Packed*>(packed);
  if (!p || p->magic != kMagic || !within(batch, 1, INT32_MAX)) return 0;
  if (p->kernel == k_depthwise_csr_f32) return batch * p->row_groups;
  const int64_t tiles = is_gemm(*p) ? ceil_div(batch, p->batch_tile(batch)) : batch * p->tiles;
  return tiles * p->row_groups;
}

size_t tk_workspace_bytes(const void* packed) {
  const Packed* p = static_cast<const Packed*>(packed);
  if (!p || p->magic != kMagic) return 0;
  int64_t floats = p->strips_floats();
  if (p->kernel == k_depthwise_csr_f32) {
    floats += p->lists_floats();
  } else if (is_gemm(*p)) {
    const int64_t rows = round_up(p->rows, kGroupRows) * p->tile_floats();
    floats = p->x_floats + (rows < kGemmFloats ? rows : kGemmFloats);
  } else if (p->blocks > 1) {
    floats += p->group_tiles * p->units() * p->unit_rows * p->tile_floats();
  }
  return static_cast<size_t>(round_up(floats * 4, TK_ALIGNMENT));
}

}  // extern "C"
