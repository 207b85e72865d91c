"""The Triton kernels, `kernels/triton/` of the repository: installed they lie beside this file, in a source tree they are read there."""

from pathlib import Path

_KERNELS = Path(__file__).resolve().parents[3] / "kernels"
if (_KERNELS / "kernels.inc").exists():
    __path__.append(str(_KERNELS / "triton"))
