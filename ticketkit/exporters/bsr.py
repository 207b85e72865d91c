"""The weights alone, as BSR arrays in one safetensors file: blocks of weights that share an index, for other people's kernels.

For each layer NAME stored sparse: ``NAME.values`` f32 [blocks, r, c], ``NAME.col_indices`` i32 [blocks], ``NAME.row_ptr`` i64
[ceil(M / r) + 1], as in `ticketkit.formats.bsr`; the block is the one its zeros are pruned in (`formats.bsr.detect`), else 4x1. The rest
of the file is specified in `ticketkit.exporters._weights`. With w = load(file)[NAME], ``scipy.sparse.bsr_array(w.arrays, w.size)`` and
``torch.sparse_bsr_tensor(*map(torch.tensor, w.arrays[::-1]), w.size)`` take them, w.size being that of whole blocks.
"""

from __future__ import annotations

from ticketkit.exporters._weights import Kind

SUFFIX = ".safetensors"
KIND = Kind("bsr")
encode, decode, load = KIND.encode, KIND.decode, KIND.load
