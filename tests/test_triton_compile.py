"""The Triton kernels compile for the GPUs they are meant for, without one, and come with the package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from ticketkit.runtime.gpu import launch

POINTERS = dict.fromkeys(("columns", "row_ptr", "order", "block_at", "value_at", "block_rows", "rows"), "*i32")


def compiled(name: str, dtype: str, capability: int, constants: dict[str, Any], side: int = 32, precision: str = "tf32") -> str:
    """PTX of a kernel, as Triton specialises it for tensors of the usual alignment, channels_last."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget

    kernel = launch._kernel(name)
    sort = {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16, "fp64": tl.float64}[dtype]
    total = tl.float64 if dtype == "fp64" else tl.float32
    constants = {**constants, "SUM": total, "GPU": "test", "KERNEL_W": 3, "x_c": 1, "y_c": 1}
    if "bsr" in name:
        constants |= {"PRECISION": precision, "FACTOR": sort, "BLOCK_M": side, "BLOCK_K": side}
    floats = {"x", "values", "bias", "residual", "y", "gradient"}
    signature, hints = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        kind = "fp32" if argument in ("minimum", "maximum") else "i32"
        kind = f"*{dtype}" if argument in floats else "*fp32" if argument == "result" else POINTERS.get(argument, kind)
        signature[argument] = "constexpr" if argument in constants else kind
        if kind.startswith("*") or argument in ("x_n", "x_h", "x_w", "y_n", "y_h", "y_w"):
            hints[(i,)] = [["tt.divisibility", 16]]
    known = {(kernel.arg_names.index(key),): value for key, value in constants.items() if key in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature, known, {at: hint for at, hint in hints.items() if at not in known})
    return str(triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"])


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles(capability: int) -> None:
    """Without a GPU: for A100 and H100; blocks are products on matrix units, and their tiles are fetched ahead, 16 bytes at a time."""
    epilogue = {"BIAS": True, "RESIDUAL": True, "CLIP": True}
    for pointwise, transposed in ((True, False), (False, True)):
        forms = {"POINTWISE": pointwise, "TRANSPOSED": transposed, **epilogue}
        for dtype in ("fp16", "fp32") if pointwise else ("bf16",):
            ptx = compiled("conv2d_bsr", dtype, capability, {**forms, "BLOCK_P": 64})
            assert "mma" in ptx and "cp.async.cg.shared.global" in ptx
        assert "fma.rn.f32" in compiled("conv2d_csr", "fp32", capability, {**forms, "BLOCK_P": 128, "BLOCK_M": 4})
        compiled("conv2d_csr", "fp16", capability, {**forms, "BLOCK_P": 32, "BLOCK_M": 1})
        assert "mma" in compiled("conv2d_bsr_values", "bf16", capability, {"POINTWISE": pointwise, "BLOCK_P": 64})
        compiled("conv2d_csr_values", "fp32", capability, {"POINTWISE": pointwise, "BLOCK_P": 64, "BLOCK_E": 16})
    forms = {"POINTWISE": False, "TRANSPOSED": False, **epilogue}
    assert "mma" not in compiled("conv2d_bsr", "fp32", capability, {**forms, "BLOCK_P": 32}, precision="ieee")  # said in gpu/launch.py
    compiled("conv2d_bsr", "fp16", capability, {**forms, "BLOCK_P": 32}, side=128)
    compiled("conv2d_csr", "fp64", capability, {**forms, "BLOCK_P": 64, "BLOCK_M": 4})


def test_every_configuration_is_one_of_its_kernel() -> None:
    for name, space in launch.SPACE.items():
        arguments = launch._kernel(name).arg_names
        assert {"GPU"} <= set(launch.KEYS[name]) <= set(arguments)
        for one in (*space, launch.INTERPRETED[name]):
            assert {key for key in one if key.isupper()} <= set(arguments), f"{name}: {one}"


def test_the_kernels_come_with_the_package() -> None:
    """They lie in kernels/triton, and CMake installs them beside the module that finds them there."""
    import ticketkit.runtime.triton as kernels

    found = {path.name for folder in kernels.__path__ for path in Path(folder).glob("*.py")}
    assert {"bsr.py", "csr.py", "geometry.py"} <= found
