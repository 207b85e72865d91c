"""Reading ONNX from anywhere: whatever is wrong is said in one line, and nothing crashes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import conv_net
from onnx import helper, numpy_helper

from ticketkit.errors import FormatError, ModelError, TicketkitError
from ticketkit.exporters import export
from ticketkit.lower import lower, operators, read


def changed(**fields: object) -> bytes:
    model = conv_net()
    for name, value in fields.items():
        if name == "opset":
            model.opset_import[0].version = value
        elif name == "dims":
            model.graph.initializer[0].dims[0] = value
        elif name == "kind":
            model.graph.initializer[0].data_type = value
        elif name == "again":
            model.opset_import.append(helper.make_opsetid("", 12))
        elif name == "orphan":
            model.graph.node[3].input[0] = "nobody"
        elif name == "domain":
            model.opset_import.append(helper.make_opsetid("ai.ticketkit", value))
    return model.SerializeToString()


UNREADABLE = {
    "empty": (b"", FormatError, "no nodes"),
    "garbage": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), FormatError, "not a whole ONNX file"),
    "not UTF-8": (conv_net().SerializeToString().replace(b"\x12\x04test", b"\x12\x04t\xf4st"), FormatError, "name: expected UTF-8"),
    "truncated": (conv_net().SerializeToString()[:-1000], FormatError, "not a whole ONNX file"),
    "old opset": (changed(opset=10), ModelError, "opset 10: expected 11 to"),
    "new opset": (changed(opset=999), ModelError, "opset 999: expected 11 to"),
    "two opsets": (changed(again=True), FormatError, "standard operator set once"),
    "newer ticketkit": (changed(domain=2), ModelError, "upgrade ticketkit"),
    "claims more": (changed(dims=10**9), FormatError, "expected .* bytes for shape"),
    "negative dimension": (changed(dims=-4), FormatError, "negative dimension"),
    "unknown element type": (changed(kind=99), FormatError, "unknown element type 99"),
    "missing tensor": (changed(orphan=True), FormatError, "malformed ONNX"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable_files_give_one_clear_line(case: str, tmp_path: Path) -> None:
    data, kind, message = UNREADABLE[case]
    (tmp_path / "m.onnx").write_bytes(data)
    for source in (data, tmp_path / "m.onnx"):
        with pytest.raises(kind, match=message) as caught:
            read(source)
        assert "\n" not in str(caught.value)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        read(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="is a folder"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["conv1.weight", "conv1.var", "conv1.shift", "head.bias"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_name_the_layer(name: str, value: float) -> None:
    model = conv_net()
    tensor = next(t for t in model.graph.initializer if t.name == name)
    array = numpy_helper.to_array(tensor).copy()
    array.reshape(-1)[0] = value
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    if name == "conv1.var" and np.isinf(value):  # divides to a clean zero
        assert np.isfinite(lower(model).layers[1].weight).all()
        return
    with pytest.raises(ModelError, match=f"{name.partition('.')[0]}: its .* holds NaN"):
        lower(model)


def test_bit_flips_never_crash_the_reader() -> None:
    data = bytearray(conv_net(channels=4).SerializeToString())
    rng = np.random.default_rng(0)
    refused = 0
    for at in rng.integers(0, len(data), 300):
        flipped = data.copy()
        flipped[at] ^= 1 << int(rng.integers(8))
        try:
            read(bytes(flipped))
        except TicketkitError:
            refused += 1
    assert refused > 10


def test_external_data(tmp_path: Path) -> None:
    onnx.save(conv_net(), tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
    assert len(lower(read(tmp_path / "m.onnx")).layers) == 5
    (tmp_path / "m.bin").write_bytes((tmp_path / "m.bin").read_bytes()[:-64])
    with pytest.raises(TicketkitError):
        read(tmp_path / "m.onnx")
    (tmp_path / "m.bin").unlink()
    with pytest.raises(TicketkitError):
        read(tmp_path / "m.onnx")


def test_every_flipped_bit_of_an_exported_file_is_noticed(tmp_path: Path) -> None:
    """In weights, attributes, names and function bodies alike; only beyond a damaged hash key are there none to compare."""
    export(conv_net(channels=64), tmp_path / "m.onnx", check=False)
    data = (tmp_path / "m.onnx").read_bytes()
    assert read(data).SerializeToString(deterministic=True) == data
    key, rng = data.index(operators.DIGEST.encode()), np.random.default_rng(0)
    texts = [data.index(text) for text in (b"strides", b"SparseConv", b"GlobalAveragePool")]
    for at in (*texts, *rng.integers(0, len(data), 100)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(rng.integers(8))
        if not key - 4 <= at < key + len(operators.DIGEST):
            with pytest.raises(TicketkitError):
                read(bytes(flipped))
    model = onnx.load_from_string(data)
    sparse = next(operators.nodes(model))
    next(a for a in sparse.attribute if a.name == "strides").ints[0] = 3
    with pytest.raises(FormatError, match="sha256 differs"):
        read(model.SerializeToString())
