"""CSR and BSR files: the arrays other libraries take, and a refusal that names the field for every way to damage one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
from graphs import Array, conv_net, graph, node, pruned
from safetensors.numpy import load as from_safetensors
from safetensors.numpy import save as to_safetensors

from ticketkit.errors import ExportError, FormatError
from ticketkit.exporters import _weights, bsr, csr, export
from ticketkit.lower import lower, read

KINDS = {"csr": csr, "bsr": bsr}
Change = Callable[[dict[str, Array], dict[str, object]], None]


def in_blocks(shape: Sequence[int], block: tuple[int, int], sparsity: float, seed: int = 0) -> Array:
    """f32 weights whose zeros are whole blocks of the matrix [M, C*kh*kw]."""
    rows, columns = shape[0], int(np.prod(shape[1:]))
    kept = pruned((-(-rows // block[0]), -(-columns // block[1])), sparsity, seed) != 0
    weight = pruned((rows, columns), 0.0, seed + 1) * np.kron(kept, np.ones(block))[:rows, :columns]
    return weight.astype(np.float32).reshape(shape)


def block_net() -> onnx.ModelProto:
    """Three convolutions pruned in different blocks, the second of which do not fit its 30 channels, one without zeros, one of zeros."""
    constants = {
        "a.weight": in_blocks((32, 16, 3, 3), (16, 1), 0.8, 1),
        "b.weight": in_blocks((30, 32, 3, 3), (4, 1), 0.9, 2),
        "c.weight": in_blocks((17, 30, 1, 1), (1, 8), 0.7, 3),
        "d.weight": pruned((8, 17, 1, 1), 0.0),
        "e.weight": np.zeros((8, 8, 3, 3), np.float32),
    }
    names = [name.removesuffix(".weight") for name in constants]
    nodes = [node("Conv", f"{x} {y}.weight", y) for x, y in zip(["x", *names], names, strict=False)]
    return graph(nodes, {"x": ["N", 16, 12, 12]}, ["e"], constants)


SOURCES = {"single zeros": conv_net(0.9, channels=64), "blocks": block_net()}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def file(kind: str, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    export(source, path, format=kind, check=False)
    return path


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("net", SOURCES)
def test_arrays_are_scipys_and_torchs(kind: str, net: str, tmp_path: Path) -> None:
    sparse = pytest.importorskip("scipy.sparse")
    export(SOURCES[net], tmp_path / "w", format=kind)
    layers, dense = KINDS[kind].load(tmp_path / "w"), lower(read(SOURCES[net].SerializeToString())).layers
    assert list(layers) == [layer.name for layer in dense]
    assert {name for name, w in layers.items() if w.format == kind} == ({*"abce"} if net == "blocks" else {"conv1", "conv2", "down"})
    for layer in dense:
        w, matrix = layers[layer.name], layer.weight.reshape(len(layer.weight), -1)
        np.testing.assert_array_equal(w.weight(), layer.weight)
        np.testing.assert_array_equal(w.bias, layer.bias)
        assert dict(w.window) == layer.window
        if w.format == "dense":
            with pytest.raises(FormatError, match="stored dense"):
                w.arrays  # noqa: B018
            continue
        whole = np.zeros(w.size, np.float32)
        whole[: matrix.shape[0], : matrix.shape[1]] = matrix
        theirs = getattr(sparse, f"{kind}_array")(w.arrays, w.size)
        np.testing.assert_array_equal(theirs.toarray(), whole)
        theirs.check_format() if kind == "csr" else theirs.check_format(full_check=True)
        torchs = getattr(torch, f"sparse_{kind}_tensor")(*map(torch.tensor, w.arrays[::-1]), w.size, check_invariants=True)
        np.testing.assert_array_equal(torchs.to_dense().numpy(), whole)
        x = np.random.default_rng(0).standard_normal((w.size[1], 5)).astype(np.float32)
        np.testing.assert_allclose(theirs @ x, whole @ x, atol=1e-4)


def test_the_tensors_are_arrays_without_ticketkit(tmp_path: Path) -> None:
    sparse = pytest.importorskip("scipy.sparse")
    export(block_net(), tmp_path / "w", format="bsr")
    t = from_safetensors((tmp_path / "w").read_bytes())
    found = sparse.bsr_array((t["a.values"], t["a.col_indices"], t["a.row_ptr"]), shape=(32, 144))
    assert found.blocksize == (16, 1)
    np.testing.assert_array_equal(found.toarray().reshape(32, 16, 3, 3), in_blocks((32, 16, 3, 3), (16, 1), 0.8, 1))


def test_blocks_are_those_of_the_zeros(tmp_path: Path) -> None:
    export(block_net(), tmp_path / "w", format="bsr")
    found = {name: w.arrays[0].shape[1:] for name, w in bsr.load(tmp_path / "w").items() if w.format == "bsr"}
    assert {name: found[name] for name in "abc"} == {"a": (16, 1), "b": (4, 1), "c": (1, 8)}


def test_blocks_take_fewer_bytes_where_there_are_some(tmp_path: Path) -> None:
    sizes = {kind: export(block_net(), tmp_path / kind, format=kind).bytes for kind in KINDS}
    scattered = {kind: export(SOURCES["single zeros"], tmp_path / kind, format=kind).bytes for kind in KINDS}
    assert sizes["bsr"] < 0.8 * sizes["csr"] and scattered["bsr"] > scattered["csr"]


def test_a_network_without_layers_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no layer with constant float32 weights.*onnx-dense"):
        export(graph([node("Relu", "x", "y")], {"x": ["N", 3, 8, 8]}, ["y"], {}), tmp_path / "net.safetensors", format=kind)
    assert not list(tmp_path.iterdir())


def header_of(data: bytes, kind: str) -> dict[str, object]:
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    header: dict[str, object] = json.loads(metadata[f"ticketkit.{kind}"])
    return header


def tampered(data: bytes, kind: str, change: Change) -> bytes:
    """The file with tensors or header changed and its hash made right again, so that only the checks of the format can object."""
    tensors, header = from_safetensors(data), header_of(data, kind)
    change(tensors, header)
    header["sha256"] = _weights.digest(header, tensors)
    return bytes(to_safetensors(tensors, {f"ticketkit.{kind}": json.dumps(header)}))


def put(name: str, at: int, value: float) -> Change:
    def change(tensors: dict[str, Array], header: dict[str, object]) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name].reshape(-1)[at] = value

    return change


def swap(name: str, make: Callable[[Array], Array]) -> Change:
    def change(tensors: dict[str, Array], header: dict[str, object]) -> None:
        tensors[name] = np.ascontiguousarray(make(tensors[name]))

    return change


def entry(key: str, value: object) -> Change:
    def change(tensors: dict[str, Array], header: dict[str, object]) -> None:
        header["layers"][1][key] = value  # type: ignore[index]

    return change


DAMAGE = [
    (put("conv1.values", 0, np.nan), "conv1: values: expected finite"),
    (put("conv1.col_indices", 0, 10**6), "conv1: col_indices: expected columns"),
    (swap("conv1.col_indices", lambda a: a[::-1]), "conv1: col_indices: expected ascending"),
    (put("conv1.row_ptr", 3, 10**9), "conv1: row_ptr: expected to never decrease"),
    (put("conv1.bias", 0, np.inf), "conv1: bias: expected finite"),
    (lambda tensors, header: tensors.pop("conv1.row_ptr"), "conv1: row_ptr: missing"),
    (lambda tensors, header: tensors.pop("conv1.values"), "conv1: values: missing"),
    (swap("conv1.bias", lambda a: a[1:]), "conv1: bias: expected float32"),
    (lambda tensors, header: header.update(format=2), "file format 1, got 2"),
    (lambda tensors, header: header.update(layers=[{"shape": [1]}]), "malformed entry"),
    (lambda tensors, header: header.update(layers=[7]), "malformed entry"),
    (lambda tensors, header: header.pop("layers"), "layers: expected a list"),
    (entry("format", "ell"), "expected format (csr|bsr) or dense"),
    (entry("shape", [10**9, 10**9, 1, 1]), "weight_shape: .* claims 1000000000000000000 weights"),
    (entry("shape", [64, 10**9]), "weight_shape: .* claims 64000000000 weights"),
    (entry("shape", [0, 64, 3, 3]), "weight_shape: expected 2 or more positive dimensions"),
    (entry("shape", ["a"]), "shape of ints"),
]
BLOCK_DAMAGE = [
    (entry("block", [16, 1]), r"conv1: values: expected blocks of \[16, 1\]"),
    (entry("block", [0, 1]), r"conv1: values: expected blocks of \[0, 1\]"),
    (entry("block", [2**40, 1]), "malformed entry"),
    (entry("block", None), "malformed entry"),
    (entry("block", [4]), "conv1: values: expected blocks of"),
    (swap("conv1.values", np.ravel), "conv1: values: expected blocks of"),
    (swap("conv1.values", lambda a: a[1:]), "conv1: values: expected"),
]
CASES = [("csr", *case) for case in DAMAGE] + [("bsr", *case) for case in [*DAMAGE, *BLOCK_DAMAGE]]


@pytest.mark.parametrize(("name", "change", "message"), CASES, ids=[f"{n}-{m[:30]}-{i}" for i, (n, _, m) in enumerate(CASES)])
def test_a_damaged_file_names_the_field(name: str, change: Change, message: str, source: Path, tmp_path: Path) -> None:
    target: ModuleType = KINDS[name]
    export(source, tmp_path / "w", format=name, check=False)
    data = (tmp_path / "w").read_bytes()
    order = list(target.load(data))

    def on_conv1(tensors: dict[str, Array], header: dict[str, object]) -> None:
        layers: list[object] = header["layers"]  # type: ignore[assignment]
        layers.insert(1, layers.pop(order.index("conv1")))
        change(tensors, header)

    assert target.load(tampered(data, name, lambda tensors, header: None)).keys() == set(order)
    with pytest.raises(FormatError, match=message):
        target.load(tampered(data, name, on_conv1))


def test_flipped_bits_and_truncation(kind: str, file: Path, tmp_path: Path) -> None:
    load, data, rng = KINDS[kind].load, file.read_bytes(), np.random.default_rng(0)
    body = 8 + int.from_bytes(data[:8], "little")
    stride = data.index(b'strides\\":[') + len(b'strides\\":[')  # 1 becomes 3: still a valid file, but for its hash
    with pytest.raises(FormatError, match="sha256 differs"):
        load(data[:stride] + bytes([data[stride] ^ 2]) + data[stride + 1 :])
    for at in (*rng.integers(0, body, 200), *rng.integers(body, len(data), 50)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(rng.integers(8))
        try:
            load(bytes(flipped))
        except FormatError:
            continue
        raise AssertionError(f"the bit flipped at {at} was not noticed")
    for end in (0, 5, 100, len(data) - 1):
        with pytest.raises(FormatError, match="truncated"):
            load(data[:end])
    with pytest.raises(FormatError, match="No such file"):
        load(tmp_path / "none")
    with pytest.raises(FormatError, match=rf"without 'ticketkit\.{kind}' metadata"):
        load(to_safetensors({"a": np.zeros(3, np.float32)}))
