"""InferenceSession: onnxruntime's, with the sparse operators registered, for sparse and for plain pruned files alike."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import onnxruntime
from onnx import ModelProto

from ticketkit.errors import DataError, ModelError
from ticketkit.exporters import get
from ticketkit.formats import Array
from ticketkit.lower import lower, operators, read
from ticketkit.lower.cleanup import reason
from ticketkit.planner import Plan, plan
from ticketkit.runtime import ort


class InferenceSession:
    """A model ready to run; every method and attribute of `onnxruntime.InferenceSession` is there too.

    A file of `ticketkit export` is loaded as it is. Any other ONNX file is exported in memory first, so that its sparse layers run
    sparse; where none would gain it runs as it is.

    Attributes:
        plan: how each layer of a plain file is treated; None for a file that was exported before.
    """

    plan: Plan | None

    def __init__(
        self,
        path_or_bytes: str | os.PathLike[str] | bytes,
        sess_options: Any = None,
        providers: Sequence[Any] | None = None,
        *,
        threads: int | None = None,
    ) -> None:
        """Load a model.

        Args:
            path_or_bytes: an ONNX file, or its content.
            sess_options: `onnxruntime.SessionOptions` to start from; the operators are added to it, so give each session its own.
            providers: execution providers as in onnxruntime; the sparse operators run on the CPU. Default: the CPU alone.
            threads: threads within one operator; None: as sess_options say, else onnxruntime's default, one per core.

        Raises:
            ModelError, FormatError: missing, damaged or unsupported file.
            KernelError: the native library is missing or cannot run here.
        """
        if threads is not None and threads < 1:
            raise DataError(f"threads: expected 1 or more, got {threads}")
        options = sess_options
        if options is None:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4  # whatever goes wrong is raised, and need not be printed as well
        if threads is not None:
            options.intra_op_num_threads = threads
        ort.register(options)
        model, self.plan = _sparse(read(path_or_bytes))
        name = "model" if isinstance(path_or_bytes, bytes) else os.fspath(path_or_bytes)
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=list(providers or ["CPUExecutionProvider"]))
        except Exception as error:  # onnxruntime's own classes derive from Exception and have no common base
            raise ModelError(f"{name}: onnxruntime cannot load the model: {reason(error)}") from None

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Array], run_options: Any = None) -> list[Any]:
        """Run the model on numpy arrays.

        Args:
            output_names: the outputs wanted, None for all.
            input_feed: array by input name, of the declared shape and type.
            run_options: as in onnxruntime.

        Raises:
            DataError: a missing or unknown name, or an array of the wrong shape or type.
            ModelError: onnxruntime stopped for another reason.
        """
        self._check(output_names, input_feed)
        try:
            outputs: list[Any] = self._session.run(output_names, dict(input_feed), run_options)
        except Exception as error:  # onnxruntime's own classes derive from Exception and have no common base
            raise ModelError(f"onnxruntime cannot run the model: {reason(error)}") from None
        return outputs

    def __getattr__(self, name: str) -> Any:
        if name == "_session":  # not there yet: loading failed, or the object is being copied
            raise AttributeError(name)
        return getattr(self._session, name)

    def _check(self, output_names: Sequence[str] | None, feed: Mapping[str, Array]) -> None:
        declared = {info.name: info for info in self._session.get_inputs()}
        if feed.keys() != declared.keys():
            raise DataError(f"inputs: expected {', '.join(declared)}; got {', '.join(map(str, feed)) or 'none'}")
        known = [info.name for info in self._session.get_outputs()]
        if unknown := [name for name in output_names or () if name not in known]:
            raise DataError(f"outputs: expected some of {', '.join(known)}; got {', '.join(unknown)}")
        for name, value in feed.items():
            shape = getattr(value, "shape", None)
            if shape is None or callable(shape):  # an OrtValue, a list, ...: onnxruntime's to judge
                continue
            expected = declared[name].shape
            fits = len(shape) == len(expected) and all(not isinstance(e, int) or e == s for e, s in zip(expected, shape, strict=True))
            if not fits:
                text = ", ".join(str(e) if e is not None else "?" for e in expected)
                raise DataError(f"input {name!r}: expected shape [{text}], got {list(shape)}")
            if declared[name].type == "tensor(float)" and value.dtype != "float32":
                raise DataError(f"input {name!r}: expected float32, got {value.dtype}; convert it with .astype('float32')")


def _sparse(model: ModelProto) -> tuple[bytes, Plan | None]:
    """The bytes to load: of the model itself where it is sparse already or would not gain."""
    if any(operators.nodes(model)):
        return model.SerializeToString(), None
    network = lower(model)
    chosen = plan(network)
    return (get("onnx").encode(network, chosen) if chosen.sparse else model.SerializeToString()), chosen
