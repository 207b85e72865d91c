"""ticketkit-layers and the bundles it reads: every engine on every kind of layer, wrong answers found, damaged files refused."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import Array, conv_net, everything_sparse, graph, node, pruned
from runners import events, refused, runner, say

from ticketkit.bench import bundle
from ticketkit.errors import ModelError, TicketError
from ticketkit.exporters import get
from ticketkit.lower import lower, operators, read
from ticketkit.planner import plan


def assorted() -> onnx.ModelProto:
    """Every kind of layer at ugly sizes: windows, strides, dilation, depthwise, all epilogues, products of one and of more rows."""
    constants: dict[str, Array] = {
        "a.w": pruned((21, 3, 3, 3), 0.5, 1),
        "b.w": pruned((40, 21, 1, 1), 0.9, 2),
        "c.w": pruned((40, 1, 5, 3), 0.6, 3),
        "d.w": pruned((24, 40, 3, 1), 0.9, 4),
        "e.w": pruned((24, 24, 1, 1), 0.8, 5),
        "f.w": pruned((13, 24, 3, 3), 0.97, 6),
        "g.w": pruned((17, 13 * 3 * 5), 0.9, 7),
        "h.w": pruned((19, 17), 0.5, 8),
        "a.b": np.linspace(-1, 1, 21, dtype=np.float32),
        "g.b": np.linspace(-1, 1, 17, dtype=np.float32),
        "low": np.float32(-0.5),
        "high": np.float32(0.75),
    }
    nodes = [
        node("Conv", "x a.w a.b", "a", pads=[1, 0, 2, 1], name="a"),
        node("HardSigmoid", "a", "a.s", alpha=1 / 6, beta=0.5),
        node("Mul", "a a.s", "a.y"),
        node("Conv", "a.y b.w", "b", name="b"),
        node("Clip", "b low high", "b.y"),
        node("Conv", "b.y c.w", "c", pads=[2, 1, 2, 1], group=40, strides=[2, 1], name="c"),
        node("LeakyRelu", "c", "c.y", alpha=2.5),
        node("Conv", "c.y d.w", "d", pads=[2, 0, 2, 0], dilations=[2, 1], name="d"),
        node("Relu", "d", "d.y"),
        node("Conv", "d.y e.w", "e", name="e"),
        node("Add", "e d.y", "e.sum"),
        node("Relu", "e.sum", "e.y"),
        node("Conv", "e.y f.w", "f", pads=[1, 1, 1, 1], strides=[3, 2], name="f"),
        node("Sigmoid", "f", "f.s"),
        node("Mul", "f f.s", "f.y"),
        node("Flatten", "f.y", "flat"),
        node("Gemm", "flat g.w g.b", "g", transB=1, name="g"),
        node("Gemm", "g h.w", "y", transB=1, name="h"),
    ]
    return graph(nodes, {"x": ["N", 3, 13, 11]}, ["y"], constants)


def exported(model: onnx.ModelProto, **executions: operators.Execution) -> onnx.ModelProto:
    """With every layer sparse, run as said."""
    network = lower(read(model))
    free = {layer.name: executions.get(layer.name, operators.Execution()) for layer in network.layers}
    return onnx.load_from_string(get("onnx").encode(network, plan(network, keep=free)))


@pytest.fixture(scope="module")
def layers() -> Path:
    return runner("ticketkit-layers")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "net.bundle"
    assert bundle.write(onnx.load_from_string(everything_sparse(assorted())), path, (3, 13, 11)) == list("abcdefgh")
    return path


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("isa", ["", "scalar"])
def test_every_engine_is_right_on_every_layer(layers: Path, tmp_path: Path, batch: int, isa: str) -> None:
    tiles = {"b": {"y_layout": "bsr"}, "e": {"format": "bsr", "x_layout": "bsr", "y_layout": "csr"}, "g": {"format": "bsr1x4"}}
    model = exported(assorted(), **{name: operators.Execution(**fields) for name, fields in tiles.items()})
    names = bundle.write(model, tmp_path / "b", (batch, 3, 13, 11))
    done = say(layers, tmp_path / "b", "--check-only", env={"TICKETKIT_ISA": isa} if isa else None)
    checked = events(done.stdout, "checked")
    assert done.returncode == 0 and not done.stderr, done
    assert {(c["layer"], c["engine"]) for c in checked} >= {(name, engine) for name in names for engine in ("sparse", "dense")}
    assert all(c["ok"] and c["max_abs_diff"] <= c["tolerance"] < 1e-2 * c["max_abs_output"] for c in checked)
    assert {c["format"] for c in checked} >= {"csr", "bsr", "bsr1x4", "dense"}
    assert events(done.stdout)[0]["isa"] == (isa or events(done.stdout)[0]["isa"]) and events(done.stdout)[-1] == {"event": "end"}
    shapes = {event["layer"]: event["shape"] for event in events(done.stdout, "layer")}
    assert shapes["a"] == [batch, 3, 13, 11, 21, 3, 3, 1, 1, 1] and shapes["h"] == [batch, 17, 1, 1, 19, 1, 1, 1, 1, 1]


def test_xnnpack_where_it_is_linked(layers: Path, written: Path) -> None:
    """Its sparse operator takes pointwise layers of stride 1 alone; what neither operator fuses is said."""
    if "xnnpack" in refused(say(layers, written, "--engines", "none")):
        checked = events(say(layers, written, "--check-only", "--engines", "xnnpack-dense,xnnpack-sparse").stdout, "checked")
        assert [c["layer"] for c in checked if c["engine"] == "xnnpack-sparse"] == ["b", "e"]
        assert [c["layer"] for c in checked if c["engine"] == "xnnpack-dense"] == list("abcdefgh")
        without = {c["layer"]: c["without"] for c in checked}
        assert all(c["ok"] for c in checked)
        assert without == dict.fromkeys("bdgh") | dict.fromkeys("acf", "activation") | {"e": "residual"}
        plain = events(say(layers, written, "--check-only", "--plain").stdout, "checked")
        assert all(c["ok"] and c["without"] is None for c in plain) and len(plain) == 3 * 8 + 2, "all compute the same"
    else:
        pytest.skip("this build has no XNNPACK")


def test_plain_leaves_out_what_follows_the_clip(layers: Path, written: Path) -> None:
    runs = [say(layers, written, "--check-only", "--engines", "sparse", *more).stdout for more in ((), ("--plain",))]
    whole, plain = ({c["layer"]: c["max_abs_output"] for c in events(run, "checked")} for run in runs)
    assert {name for name in whole if whole[name] != plain[name]} == set("acef")  # activations, and the residual of e


@pytest.mark.parametrize("engine", ["sparse", "dense"])
def test_a_wrong_answer_is_found_and_not_timed(layers: Path, written: Path, engine: str) -> None:
    done = say(layers, written, "--engines", "sparse,dense", "--rounds", 1, "--seconds", 0, "--warmup", 0, "--spoil", engine)
    assert done.returncode == 1
    assert {c["engine"] for c in events(done.stdout, "checked") if not c["ok"]} == {engine}
    assert {r["engine"] for r in events(done.stdout, "round")} == {"sparse", "dense"} - {engine}


def test_rounds_alternate_and_states_are_read(layers: Path, written: Path, tmp_path: Path) -> None:
    for name, text in {
        "proc/cpuinfo": "processor\t: 0\nCPU part\t: 0xd05\n\nprocessor\t: 1\nCPU part\t: 0xd0b\n\nHardware\t: Board\n",
        "sys/devices/system/cpu/cpu0/cpu_capacity": "400\n",
        "sys/devices/system/cpu/cpu1/cpufreq/cpuinfo_max_freq": "2400000\n",
        "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "1800000\n",
        "sys/devices/system/cpu/cpu1/cpufreq/scaling_governor": "schedutil\n",
        "sys/class/thermal/thermal_zone0/type": 'odd "name"\n',
        "sys/class/thermal/thermal_zone0/temp": "41500\n",
        "sys/class/thermal/thermal_zone7/temp": "-1000\n",
        "sys/class/thermal/thermal_zone8/temp": "broken\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    words = ["--rounds", 2, "--seconds", 0, "--warmup", 0, "--least", 2, "--only", "b", "--engines", "sparse,dense", "--sysfs", tmp_path]
    done = say(layers, written, *words)
    assert done.returncode == 0, done
    device = events(done.stdout)[0]
    assert device["cpu"] == "Board" and device["cpus"] == [
        {"cpu": 0, "max_khz": None, "capacity": 400, "part": "0xd05"},
        {"cpu": 1, "max_khz": 2400000, "capacity": None, "part": "0xd0b"},
    ]
    before, after = events(done.stdout, "state")
    assert before == {"event": "state", "at": "before", "temperatures": {'odd "name"': 41500, "#7": -1000},
                      "khz": {"1": 1800000}, "governor": "schedutil"}  # fmt: skip
    assert after == {**before, "at": "after"}
    rounds = events(done.stdout, "round")
    assert [(r["round"], r["engine"]) for r in rounds] == [(0, "sparse"), (0, "dense"), (1, "dense"), (1, "sparse")]
    assert all(r["layer"] == "b" and len(r["ms"]) == 2 and min(r["ms"]) > 0 for r in rounds)
    assert {f["engine"] for f in events(done.stdout, "finished") if f["peak_rss_bytes"] > 0} == {"sparse", "dense"}


def resealed(data: bytes) -> bytes:
    return data + struct.pack("<I", zlib.crc32(data))


def hostile(whole: bytes) -> Iterator[tuple[bytes, str]]:
    """(damaged bundle, what the error says)."""
    body = whole[:-4]
    for cut in (0, 1, 11, 19, 40, len(whole) // 2, len(whole) - 1):
        yield whole[:cut], "cut off"
    for at in range(20, len(whole), len(whole) // 25):
        yield whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :], "checksum"
    yield b"NOT" + whole[3:], "not a bundle"
    yield resealed(body[:8] + struct.pack("<I", 2) + body[12:]), "version: expected 1, got 2"
    yield resealed(body[:12] + struct.pack("<I", 2**32 - 1) + body[16:]), "the file ends within it"
    yield resealed(body[:16]), "the file ends within it"
    yield resealed(body + b"more"), "nothing after its last layer, got 4"
    yield resealed(body[:12] + struct.pack("<I", 0)), "at least one layer"
    at = 16 + 4 + 1  # of the first layer's flags; its name is one letter
    for offset, code, value, text in [
        (0, "<I", 8, "flags"), (4, "<i", 3, "format"), (8, "<i", 4, "activation"), (12, "<f", np.nan, "min, max"), (24, "<i", -1, "tuning"),
        (40, "<q", 0, "sizes from 1"), (48, "<q", 2**40, "sizes from 1"), (48, "<q", 2, "weight: "), (56, "<q", 2**24, "2\\^27"),
        (80, "<q", 2**20, "larger than its image"), (112, "<q", -1, "pads"), (160, "<q", 7, "one group, or depthwise"),
        (168, "<q", 3, "layouts"), (184, "<q", -1, "col_indices"), (184, "<q", 2**60, "col_indices"), (192, "<f", np.inf, "bias"),
    ]:  # fmt: skip
        field = struct.pack(code, value)
        yield resealed(body[: at + offset] + field + body[at + offset + len(field) :]), text


def test_damaged_bundles_are_refused_in_one_line(layers: Path, written: Path, tmp_path: Path) -> None:
    count = 0
    for data, text in hostile(written.read_bytes()):
        (tmp_path / "b").write_bytes(data)
        message = refused(say(layers, tmp_path / "b", "--check-only"))
        assert re.search(text, message) and str(tmp_path / "b") in message, (text, message)
        count += 1
    assert count > 50


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "expected the path of a bundle"),
        (("none.bundle",), "No such file"),
        (("/",), "expected a file"),
        (("B", "--rounds", "x"), "--rounds: expected a whole number from 1"),
        (("B", "--rounds", "0"), "--rounds"),
        (("B", "--seconds", "nan"), "--seconds"),
        (("B", "--seconds"), "expected a value after it"),
        (("B", "--cpu", "1-"), "--cpu: expected numbers of processors"),
        (("B", "--cpu", "1000"), "cannot be bound to processors 1000"),
        (("B", "--only", "zebra"), "no layer of this bundle"),
        (("B", "--engines", "sparse,"), "--engines"),
        (("B", "--engines", "fast"), "engine 'fast': this program was built with sparse, dense"),
        (("B", "--what"), "unknown option '--what'"),
    ],
)
def test_options_that_make_no_sense(layers: Path, written: Path, words: tuple[str, ...], text: str) -> None:
    assert text in refused(say(layers, *(str(written) if word == "B" else word for word in words)))


def test_what_cannot_be_a_bundle(tmp_path: Path) -> None:
    bare = graph([node("Relu", "x", "y")], {"x": [1, 3, 4, 4]}, ["y"], {})
    with pytest.raises(ModelError, match="no convolution or product"):
        bundle.write(bare, tmp_path / "b")
    with pytest.raises(TicketError):
        bundle.write(conv_net(), tmp_path / "none" / "b")
    assert not list(tmp_path.iterdir())


def test_a_plain_file_is_exported_first_and_dense_layers_are_kept(layers: Path, tmp_path: Path) -> None:
    onnx.save(conv_net(0.9, channels=64), tmp_path / "plain.onnx")
    assert bundle.write(tmp_path / "plain.onnx", tmp_path / "b") == ["stem", "conv1", "conv2", "down", "head"]
    checked = events(say(layers, tmp_path / "b", "--check-only", "--engines", "sparse,dense").stdout, "checked")
    assert [c["layer"] for c in checked if c["engine"] == "sparse"] == ["conv1", "conv2", "down"]
    assert [c["layer"] for c in checked if c["engine"] == "dense"] == ["stem", "conv1", "conv2", "down", "head"]
