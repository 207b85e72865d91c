"""InferenceSession: onnxruntime's, with the sparse operators registered, for sparse and for plain pruned files alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import onnxruntime

from ticketkit.errors import DataError, KernelError, ModelError
from ticketkit.formats import Array
from ticketkit.runtime import ort, seal
from ticketkit.runtime.streams import Streams, cores

if TYPE_CHECKING:  # whoever loads an exported file needs nothing of what made it
    from onnx import ModelProto

    from ticketkit.planner import Plan

CPU = ["CPUExecutionProvider"]


class InferenceSession:
    """A model ready to run; every method and attribute of `onnxruntime.InferenceSession` is there too.

    A file of `ticketkit export` is loaded as it is. Any other ONNX file is exported in memory first, so that its sparse layers run
    sparse; where none would gain it runs as it is.

    `run` cuts a batch of images into pieces, and each thread takes whole pieces instead of a share of every operator: the activations of a
    few images stay in cache. That needs a sparse model known to treat images one by one (`ticketkit.lower.batch`) on the CPU, and no
    sess_options. With more than one thread, the first batch that is cut makes a second onnxruntime session, hence a second
    copy of the weights in memory. Outputs are those of the whole batch up to rounding, and the same from run to run.

    Any number of threads may use one session at once. A session belongs to the process that made it: it cannot be pickled, and says so
    in a process that was forked from that one, where its threads are missing.

    Attributes:
        plan: how each layer of a plain file is treated; None for a file that was exported before.
    """

    plan: Plan | None

    def __init__(
        self,
        path_or_bytes: str | os.PathLike[str] | bytes,
        sess_options: Any = None,
        providers: Sequence[Any] | None = None,
        provider_options: Sequence[dict[Any, Any]] | None = None,
        *,
        threads: int | None = None,
    ) -> None:
        """Load a model.

        Args:
            path_or_bytes: an ONNX file, or its content.
            sess_options: `onnxruntime.SessionOptions` to start from; the operators are added to it. Batches then run whole.
            providers, provider_options: execution providers as in onnxruntime; the sparse operators run on the CPU. Default: the CPU alone.
            threads: threads within one operator; None: as sess_options say, else onnxruntime's default, one per core.

        Raises:
            ModelError, FormatError: missing, damaged or unsupported file.
            KernelError: the native library is missing or cannot run here.
        """
        if threads is not None and threads < 1:
            raise DataError(f"threads: expected 1 or more, got {threads}")
        self._process = os.getpid()
        options = _options(threads, sess_options)
        model, self.plan, apart = _loadable(path_or_bytes)
        load = partial(onnxruntime.InferenceSession, model, providers=list(providers or CPU), provider_options=provider_options)
        try:
            self._session = load(options)
        except Exception as error:  # onnxruntime's own classes derive from Exception and have no common base
            name = "model" if isinstance(path_or_bytes, bytes) else os.fspath(path_or_bytes)
            raise ModelError(f"{name}: onnxruntime cannot load the model: {_reason(error)}") from None
        self._run = self._session.run
        if apart is not None and sess_options is None and self._session.get_providers() == CPU:
            session, cut = self._session, apart  # not self: that would be a cycle, and memory that waits for the garbage collector

            def single() -> Any:
                return None if not cut() else session if threads == 1 else load(_options(1))

            self._run = Streams(session, threads or cores(), single).run

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Array], run_options: Any = None) -> list[Any]:
        """Run the model on numpy arrays.

        Args:
            output_names: the outputs wanted, None for all.
            input_feed: array by input name, of the declared shape and type.
            run_options: as in onnxruntime.

        Raises:
            DataError: a missing or unknown name, or an array of the wrong shape or type.
            ModelError: onnxruntime stopped for another reason.
            KernelError: another process made the session.
        """
        self._require_own_process()
        self._check(output_names, input_feed)
        try:
            outputs: list[Any] = self._run(output_names, dict(input_feed), run_options)
        except Exception as error:  # onnxruntime's own classes derive from Exception and have no common base
            raise ModelError(f"onnxruntime cannot run the model: {_reason(error)}") from None
        return outputs

    def __getattr__(self, name: str) -> Any:
        if name in ("_process", "_session"):  # not there yet: loading failed
            raise AttributeError(name)
        self._require_own_process()
        return getattr(self._session, name)

    def __reduce__(self) -> NoReturn:
        raise ModelError("a session cannot be pickled or copied: hand on the path of its file, and make a session of it in each process")

    def _require_own_process(self) -> None:
        if os.getpid() != self._process:
            raise KernelError(
                f"this session was made by process {self._process} and cannot be used in this one, forked from it, where its threads are"
                " missing; make a session in each process"
            )

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


def _options(threads: int | None, start: Any = None) -> Any:
    """Session options with the operators registered; `start` is changed, None for new ones."""
    options = start
    if options is None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # whatever goes wrong is raised, and need not be printed as well
    if threads is not None:
        options.intra_op_num_threads = threads
    ort.register(options)
    return options


def _loadable(source: str | os.PathLike[str] | bytes) -> tuple[str | bytes, Plan | None, Callable[[], bool] | None]:
    """What onnxruntime is to load; the plan of a plain file; what tells whether a batch may be cut, None where it may not.

    A sealed file is loaded as it lies there: it was checked when it was written, and the library checks its weights. onnx and the graph
    passes, and the memory they take, are for other files, and for the first batch worth cutting.
    """
    if (stated := seal.unbroken(source)) is not None:
        return source if isinstance(source, bytes) else os.fspath(source), None, partial(_images_apart, source, stated)
    from ticketkit.exporters import get
    from ticketkit.lower import lower, operators, read, storage
    from ticketkit.lower.batch import independent
    from ticketkit.planner import plan

    def apart(model: ModelProto) -> Callable[[], bool] | None:
        return (lambda: True) if independent(model) else None

    model = read(source)
    if any(operators.nodes(model)):
        return model.SerializeToString(), None, apart(model)
    network = lower(model)
    chosen = plan(network)
    if not chosen.sparse:  # a model too large for one message has its weights in files beside it, where onnxruntime finds them
        fits = isinstance(source, bytes) or storage.nbytes(model) < storage.LIMIT
        return model.SerializeToString() if fits else os.fspath(source), chosen, None
    return get("onnx").encode(network, chosen), chosen, apart(network.model)


def _images_apart(source: str | os.PathLike[str] | bytes, stated: str) -> bool:
    """Whether a batch of a sealed file may be cut; False too where another file lies there now."""
    if seal.unbroken(source) != stated:
        return False
    import onnx

    from ticketkit.lower.batch import independent

    return independent(onnx.load_from_string(source) if isinstance(source, bytes) else onnx.load(source))


def _reason(error: Exception) -> str:
    from ticketkit.lower.cleanup import reason

    return reason(error)
