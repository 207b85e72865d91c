"""The registry of engines is the list of files in this folder: `bench --engine x` is `engines/x.py`.

An engine file is a module with the five names of `Engine`. Its heavy package is imported inside the functions, so that listing
engines costs nothing, and only the engine's own worker process ever pays for (or crashes with) that package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Protocol, TypeAlias, cast

import numpy as np

from ticketkit.errors import TicketkitError

Arrays: TypeAlias = list[np.ndarray]
Feeds: TypeAlias = dict[str, np.ndarray]  # input name -> array, the batch already in its first axis


class Engine(Protocol):
    """What an engine file must offer (a module is a fine implementation of a protocol)."""

    __name__: str
    MULTIPLIES_ZEROS: bool  # True: a dense engine, which does the same work however many weights are zero
    PLAIN_ONNX: bool  # True: the engine needs standard operators only; ticketkit files are converted for it first

    def available(self) -> tuple[bool, str]:
        """(usable here?, why not). Cheap: it may look for a package, not load a model."""

    def version(self) -> str:
        """Version of the engine's package; imports it."""

    def isa(self) -> str:
        """The instruction set the engine says it uses, or "own choice" where it does not tell."""

    def load(self, path: Path, threads: int, feeds: Feeds) -> Callable[[], Arrays]:
        """Load the ONNX file at `path`, float32, for `threads` threads; return the call to be timed.

        The returned function takes nothing and gives the model's outputs, in graph order, for `feeds`, which are bound here
        so that layout changes of the *input* (channels_last, device buffers) are not timed.
        """


def names() -> list[str]:
    """Engine names, sorted."""
    return sorted(module.name for module in iter_modules(__path__))


def get(name: str) -> Engine:
    """The engine called `name`.

    Raises TicketkitError for a name that is no file of this folder.
    """
    if name not in names():
        raise TicketkitError(f"engine: expected one of {', '.join(names())}, got {name!r}; see `ticketkit doctor`")
    return cast(Engine, import_module(f"{__name__}.{name}"))


def label(engine: Engine) -> str:
    """Short name of an engine: its file's name."""
    return engine.__name__.rpartition(".")[2]


def usable() -> tuple[list[Engine], dict[str, str]]:
    """(engines that work here, {name of each other: why not})."""
    verdicts = [(engine, *engine.available()) for engine in map(get, names())]
    return [engine for engine, works, _ in verdicts if works], {label(e): why for e, works, why in verdicts if not works}


def require(chosen: Sequence[str]) -> list[Engine]:
    """The engines of these names, each once, in this order.

    Raises TicketkitError for an unknown name, or an engine that cannot work here (saying why).
    """
    engines = [get(name) for name in dict.fromkeys(chosen)]
    for engine in engines:
        works, why = engine.available()
        if not works:
            raise TicketkitError(f"engine {label(engine)} cannot be used here: {why}")
    return engines
