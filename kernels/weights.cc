// Weights as they come: validation of CSR arrays, and decoding of the gap-coded form of files. Runs once per layer, at load.
#include <cmath>

#include "packed.h"

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

}  // extern "C"
