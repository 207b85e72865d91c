"""The operators inside onnxruntime: against the stock runtime's function bodies, over threads and image sizes, and damaged."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import mutate
import numpy as np
import onnx
import onnxruntime
import pytest

from ticketkit.errors import FormatError, KernelError
from ticketkit.formats import gaps
from ticketkit.lower import operators
from ticketkit.runtime import native, ort


def session(model: onnx.ModelProto, *, sparse: bool, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if sparse:
        ort.register(options)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def images(batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((batch, mutate.CHANNELS, mutate.SIZE, mutate.SIZE)).astype(np.float32)}


def convolution(size: int | str) -> onnx.ModelProto:
    """The first convolution alone, on images of any height and width."""
    model = mutate.model()
    del model.graph.node[1:], model.graph.output[:], model.graph.initializer[3:]
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"side{axis}"
    model.graph.output.append(onnx.helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, None))
    return model


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("batch", [1, 2, 17])
def test_same_outputs_as_the_stock_runtime(threads: int, batch: int) -> None:
    model = mutate.model()
    sparse, stock = (session(model, sparse=s, threads=threads).run(None, images(batch))[0] for s in (True, False))
    np.testing.assert_allclose(sparse, stock, rtol=0, atol=2e-4)
    other = mutate.model(seed=1)
    assert np.abs(session(other, sparse=True).run(None, images(batch))[0] - stock).max() > 1e-2, "negative control"


def test_the_library_really_runs(tmp_path: os.PathLike[str]) -> None:
    """With the library the nodes stay; without it the function bodies are inlined and folded to plain Conv and Gemm."""
    for sparse, expected in ((True, {"SparseConvLeakyRelu", "SparseConvAddClip", "SparseGemmSilu"}), (False, {"Conv", "Gemm"})):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = os.path.join(tmp_path, f"{sparse}.onnx")
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.log_severity_level = 3
        if sparse:
            ort.register(options)
        onnxruntime.InferenceSession(mutate.model().SerializeToString(), options, providers=["CPUExecutionProvider"])
        ops = {node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node}
        assert expected <= ops and "ScatterElements" not in ops


def test_image_size_may_change_between_runs() -> None:
    model = convolution("any")
    sparse, stock = (session(model, sparse=s, threads=2) for s in (True, False))
    for height, width in ((9, 9), (1, 1), (30, 17), (9, 9), (8, 64), (33, 5), (12, 12), (9, 9)):
        x = {"x": np.random.default_rng(height).standard_normal((2, mutate.CHANNELS, height, width)).astype(np.float32)}
        np.testing.assert_allclose(sparse.run(None, x)[0], stock.run(None, x)[0], rtol=0, atol=1e-4)


def test_empty_batch() -> None:
    assert session(mutate.model(), sparse=True).run(None, images(0))[0].shape == (0, 4)


def test_images_beyond_every_size_are_refused() -> None:
    """Without pixels they can be had."""
    with pytest.raises(Exception, match=r"X: .*out of range"):
        session(convolution("any"), sparse=True).run(None, {"x": np.empty((0, mutate.CHANNELS, 2**40, 9), np.float32)})


def test_concurrent_runs_are_right() -> None:
    model = convolution("any")
    sparse, stock = session(model, sparse=True, threads=2), session(model, sparse=False)
    feeds = [{"x": np.random.default_rng(i).standard_normal((1, mutate.CHANNELS, 6 + i, 9)).astype(np.float32)} for i in range(8)]
    expected = [stock.run(None, feed)[0] for feed in feeds]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for got, want in zip(pool.map(lambda feed: sparse.run(None, feed)[0], feeds), expected, strict=True):
                np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def test_runs_repeat_to_the_bit() -> None:
    loaded = session(mutate.model(), sparse=True, threads=2)
    first = loaded.run(None, images(3))[0]
    assert all(np.array_equal(first, loaded.run(None, images(3))[0]) for _ in range(10))


@pytest.mark.parametrize(
    ("tensor", "array", "expected"),
    [
        ("first.gaps", np.zeros(4, np.uint16), "gaps"),
        ("first.values", np.array([np.nan], np.float32), "values"),
        ("first.bias", np.zeros(3, np.float32), "B: expected"),
        ("head.gaps", np.full(3, 65535, np.uint16), "gaps"),
    ],
)
def test_damaged_initializers_are_refused_by_name(tensor: str, array: np.ndarray, expected: str) -> None:
    model = mutate.model()
    parts = [t for t in model.graph.initializer if t.name.split(".")[0] == tensor.split(".", maxsplit=1)[0] and not t.name.endswith("bias")]
    if not tensor.endswith("bias"):  # keep the two lengths equal, so that the content is what is refused
        for part in parts:
            old = onnx.numpy_helper.to_array(part)
            part.CopyFrom(onnx.numpy_helper.from_array(np.resize(old, len(array)), part.name))
    target = next(t for t in model.graph.initializer if t.name == tensor)
    target.CopyFrom(onnx.numpy_helper.from_array(array, tensor))
    assert expected in (mutate.survives(model) or "it ran")


def test_attributes_out_of_range_are_refused() -> None:
    model = mutate.model()
    next(a for a in model.graph.node[0].attribute if a.name == "weight_shape").ints[0] = 2**40
    why = mutate.survives(model) or ""
    assert "weight_shape" in why and "first" in why, "field and node are named"


@pytest.mark.parametrize(("node", "format"), [(0, "bsr1x4"), (0, "ell"), (2, "ell")])
def test_formats_without_a_kernel_are_refused(node: int, format: str) -> None:
    model = mutate.model()
    made = list(operators.nodes(model))[node]
    next(a for a in made.attribute if a.name == "format").s = format.encode()
    assert "format: " in (why := mutate.survives(model) or "") and "expected" in why and made.name in why
    with pytest.raises(FormatError, match=f"{made.name}: format: expected one of csr, bsr.*, got b'{format}'"):
        operators.decode(model)


def test_a_name_that_contradicts_the_attributes_is_refused() -> None:
    """A stock runtime goes by the name's function body, so the two must say the same."""
    model = mutate.model()
    next(a for a in model.graph.node[0].attribute if a.name == "activation").s = b"None"
    assert "contradicts" in (mutate.survives(model) or "")
    model = mutate.model()
    next(a for a in model.graph.node[1].attribute if a.name == "max").f = -2.0
    assert "min <= max" in (mutate.survives(model) or "")


@pytest.mark.parametrize("alpha", [np.nan, np.inf, None])
def test_a_slope_must_be_there_and_finite(alpha: float | None) -> None:
    model = mutate.model()
    (at,) = (i for i, a in enumerate(model.graph.node[0].attribute) if a.name == "alpha")
    if alpha is None:
        del model.graph.node[0].attribute[at]
    else:
        model.graph.node[0].attribute[at].f = alpha
    assert "alpha" in (mutate.survives(model) or "")
    with pytest.raises(FormatError, match="first: alpha: expected a finite float, got"):
        operators.decode(model)


def test_mutations() -> None:
    ran, refused = mutate.main(300)
    assert ran + refused == 300 and min(ran, refused) > 10


@pytest.mark.parametrize("isa", [isa.name for isa in native.isas() if isa.usable])
def test_every_isa_inside_onnxruntime(isa: str) -> None:
    code = "import mutate; assert mutate.survives(mutate.model()) is None; print('ran')"
    path = os.pathsep.join([os.path.dirname(mutate.__file__), os.environ.get("PYTHONPATH", "")])
    forced = os.environ | {"TICKETKIT_ISA": isa, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=forced, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "ran", done.stderr


def test_missing_library_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TICKETKIT_LIBRARY", "/nowhere/libticketkit.so")
    with pytest.raises(KernelError, match="TICKETKIT_LIBRARY not found at /nowhere"):
        ort.register(onnxruntime.SessionOptions())


def depthwise_model(**change: object) -> onnx.ModelProto:
    """One depthwise convolution 3x3, stride 2, of 5 channels as a sparse node; attributes changed, or left out where None."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((mutate.CHANNELS, 1, 3, 3)).astype(np.float32)
    window = {"strides": [2, 2], "pads": [1, 1, 1, 1], "dilations": [1, 1]}
    parts = {**gaps.pack(weight), "bias": rng.standard_normal(mutate.CHANNELS).astype(np.float32)}
    how = operators.Epilogue("", "Relu"), operators.Execution(), mutate.CHANNELS
    node = operators.make_node(operators.CONV, ["x", *parts], "y", "dw", weight.shape, window, *how)
    kept = [a for a in node.attribute if a.name not in change]
    del node.attribute[:]
    node.attribute.extend([*kept, *(onnx.helper.make_attribute(k, v) for k, v in change.items() if v is not None)])
    infos = [onnx.helper.make_tensor_value_info(name, 1, ["N", mutate.CHANNELS, "H", "W"]) for name in ("x", "y")]
    made = [onnx.numpy_helper.from_array(array, name) for name, array in parts.items()]
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid(operators.DOMAIN, operators.VERSION)]
    return onnx.helper.make_model(
        onnx.helper.make_graph([node], "depthwise", infos[:1], infos[1:], made),
        functions=[operators.function(node.op_type, 17)], opset_imports=opsets, ir_version=operators.IR_VERSION,
    )  # fmt: skip


@pytest.mark.parametrize("threads", [1, 3, 9])
def test_depthwise_is_that_of_the_stock_runtime(threads: int) -> None:
    model = depthwise_model()
    sparse, stock = (session(model, sparse=s, threads=threads).run(None, images(2))[0] for s in (True, False))
    np.testing.assert_allclose(sparse, stock, rtol=0, atol=1e-4)
    expanded = session(operators.expand(model), sparse=False).run(None, images(2))[0]
    np.testing.assert_allclose(expanded, stock, rtol=0, atol=1e-5)


@pytest.mark.parametrize("group", [0, 2, -5])
def test_other_groups_are_refused(group: int) -> None:
    with pytest.raises(Exception, match="group: expected 1, or 5"):
        session(depthwise_model(group=group), sparse=True)
    with pytest.raises(FormatError, match="group: expected 1, or 5"):
        operators.decode(depthwise_model(group=group))


def test_files_without_the_attribute_group_still_run() -> None:
    """Files of before there was one: neither nodes nor function bodies have it."""
    model, old = convolution(mutate.SIZE), convolution(mutate.SIZE)
    for holder in (*old.graph.node, *(node for function in old.functions for node in function.node)):
        kept = [a for a in holder.attribute if a.name != "group"]
        del holder.attribute[:]
        holder.attribute.extend(kept)
    for function in old.functions:
        if "group" in function.attribute:
            function.attribute.remove("group")
    assert "group" in str(model) and "group" not in str(old)
    assert [s.group for s in operators.decode(old).values()] == [1]
    for sparse in (True, False):
        new_y, old_y = (session(m, sparse=sparse).run(None, images(2))[0] for m in (model, old))
        np.testing.assert_array_equal(new_y, old_y)
