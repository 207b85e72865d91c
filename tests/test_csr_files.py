"""CSR files: the arrays other libraries take, and a refusal that names the field for every way to damage one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from graphs import Array, conv_net, graph, node
from safetensors.numpy import load as from_safetensors
from safetensors.numpy import save as to_safetensors

from ticketkit.errors import ExportError, FormatError
from ticketkit.exporters import csr, export
from ticketkit.lower import lower, read


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pruned network as anybody's ONNX file."""
    path = tmp_path_factory.mktemp("source") / "net.onnx"
    onnx.save(conv_net(0.9, channels=64), path)
    return path


@pytest.fixture
def csr_file(source: Path, tmp_path: Path) -> Path:
    export(source, tmp_path / "net.safetensors", format="csr", check=False)
    return tmp_path / "net.safetensors"


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_csr_arrays_are_scipys_and_torchs(csr_file: Path, source: Path) -> None:
    sparse = pytest.importorskip("scipy.sparse")
    layers, dense = csr.load(csr_file), lower(read(source)).layers
    assert list(layers) == [layer.name for layer in dense]
    assert {name for name, w in layers.items() if w.format == "csr"} == {"conv1", "conv2", "down"}
    for layer in dense:
        w, matrix = layers[layer.name], layer.weight.reshape(len(layer.weight), -1)
        np.testing.assert_array_equal(w.weight(), layer.weight)
        np.testing.assert_array_equal(w.bias, layer.bias)
        assert dict(w.window) == layer.window
        if w.format == "csr":
            parts = w.parts
            theirs = sparse.csr_array((parts["values"], parts["col_indices"], parts["row_ptr"]), shape=matrix.shape)
            np.testing.assert_array_equal(theirs.toarray(), matrix)
            torchs = torch.sparse_csr_tensor(*(torch.tensor(parts[k]) for k in ("row_ptr", "col_indices", "values")), size=matrix.shape)
            np.testing.assert_array_equal(torchs.to_dense().numpy(), matrix)


def test_a_network_without_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no layer with constant float32 weights.*onnx-dense"):
        export(graph([node("Relu", "x", "y")], {"x": ["N", 3, 8, 8]}, ["y"], {}), tmp_path / "net.safetensors", format="csr")
    assert not list(tmp_path.iterdir())


def header_of(data: bytes) -> dict[str, object]:
    header: dict[str, object] = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"][csr.KEY])
    return header


def tampered(data: bytes, change: Callable[[dict[str, Array], dict[str, object]], None]) -> bytes:
    """The file with tensors or header changed and its hash made right again, so that only the checks of the format can object."""
    tensors, header = from_safetensors(data), header_of(data)
    change(tensors, header)
    header["sha256"] = csr._digest(header, tensors)
    return to_safetensors(tensors, {csr.KEY: json.dumps(header)})


def put(name: str, at: int, value: float) -> Callable[[dict[str, Array], dict[str, object]], None]:
    def change(tensors: dict[str, Array], header: dict[str, object]) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name][at] = value

    return change


def entry(key: str, value: object) -> Callable[[dict[str, Array], dict[str, object]], None]:
    def change(tensors: dict[str, Array], header: dict[str, object]) -> None:
        header["layers"][1][key] = value  # type: ignore[index]

    return change


CSR_DAMAGE = [
    (put("conv1.values", 0, np.nan), "conv1: values: expected finite"),
    (put("conv1.col_indices", 0, 10**6), "conv1: col_indices: expected columns"),
    (put("conv1.row_ptr", 3, 10**9), "conv1: row_ptr: expected to never decrease"),
    (put("conv1.bias", 0, np.inf), "conv1: bias: expected finite"),
    (lambda tensors, header: tensors.pop("conv1.row_ptr"), "conv1: row_ptr: missing"),
    (lambda tensors, header: tensors.update({"conv1.bias": tensors["conv1.bias"][1:]}), "conv1: bias: expected float32"),
    (lambda tensors, header: header.update(format=2), "expected CSR file format 1, got 2"),
    (lambda tensors, header: header.update(layers=[{"shape": [1]}]), "malformed entry"),
    (lambda tensors, header: header.update(layers=[7]), "malformed entry"),
    (lambda tensors, header: header.pop("layers"), "layers: expected a list"),
    (entry("format", "ell"), "expected format csr or dense"),
    (entry("shape", [10**9, 10**9, 1, 1]), "row_ptr|weight_shape|values"),
    (entry("shape", ["a"]), "shape of ints"),
]


@pytest.mark.parametrize(("change", "message"), CSR_DAMAGE, ids=[f"{m}-{i}" for i, (_, m) in enumerate(CSR_DAMAGE)])
def test_a_damaged_csr_file_names_the_field(
    change: Callable[[dict[str, Array], dict[str, object]], None], message: str, csr_file: Path
) -> None:
    data = csr_file.read_bytes()
    order = list(csr.load(data))

    def on_conv1(tensors: dict[str, Array], header: dict[str, object]) -> None:
        layers: list[object] = header["layers"]  # type: ignore[assignment]
        layers.insert(1, layers.pop(order.index("conv1")))
        change(tensors, header)

    assert csr.load(tampered(data, lambda tensors, header: None)).keys() == set(order)
    with pytest.raises(FormatError, match=message):
        csr.load(tampered(data, on_conv1))


def test_flipped_bits_and_truncation_of_a_csr_file(csr_file: Path, tmp_path: Path) -> None:
    data, rng = csr_file.read_bytes(), np.random.default_rng(0)
    body = 8 + int.from_bytes(data[:8], "little")
    stride = data.index(b'strides\\":[') + len(b'strides\\":[')  # 1 becomes 3: still a valid file, but for its hash
    with pytest.raises(FormatError, match="sha256 differs"):
        csr.load(data[:stride] + bytes([data[stride] ^ 2]) + data[stride + 1 :])
    for at in (*rng.integers(0, body, 200), *rng.integers(body, len(data), 50)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(rng.integers(8))
        try:
            csr.load(bytes(flipped))
        except FormatError:
            continue
        raise AssertionError(f"the bit flipped at {at} was not noticed")
    for end in (0, 5, 100, len(data) - 1):
        with pytest.raises(FormatError, match="truncated"):
            csr.load(data[:end])
    with pytest.raises(FormatError, match="No such file"):
        csr.load(tmp_path / "none")
    with pytest.raises(FormatError, match=r"without 'ticketkit\.csr' metadata"):
        csr.load(to_safetensors({"a": np.zeros(3, np.float32)}))
