"""The weights alone, as CSR arrays in one safetensors file, for other people's kernels.

For each layer NAME stored sparse: ``NAME.values`` f32 [nnz], ``NAME.col_indices`` i32 [nnz], ``NAME.row_ptr`` i64 [M + 1], as in
`ticketkit.formats.csr`; the rest of the file is specified in `ticketkit.exporters._weights`. With w = load(file)[NAME],
``scipy.sparse.csr_array(w.arrays, w.size)`` and ``torch.sparse_csr_tensor(*map(torch.tensor, w.arrays[::-1]), w.size)`` take them.
"""

from __future__ import annotations

from ticketkit.exporters._weights import Kind

SUFFIX = ".safetensors"
KIND = Kind("csr")
encode, decode, load = KIND.encode, KIND.decode, KIND.load
