"""What is made of tensors, packed weights above all, kept until the next is made after the tensors' memory is gone."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ticketkit.errors import KernelError

Key: TypeAlias = tuple[Any, ...]
Made = TypeVar("Made")
MOST = 8  # forms kept of one weight; of more (image sizes, types) the oldest goes


@dataclass
class _Entry(Generic[Made]):
    memory: tuple[StorageWeakRef, ...]
    versions: Key
    forms: dict[Key, Made] = field(default_factory=dict)

    @property
    def gone(self) -> bool:
        return any(storage.expired() for storage in self.memory)


class Cache(Generic[Made]):
    """Results by the tensors they were made of, and a form. Tensors changed in place count as others, and replace what was made of them.

    Changes that torch does not count are not seen: through `.data`, and of tensors made in inference mode; `clear` forgets all. Any number
    of threads may share one; a forked child starts with what its parent had.
    """

    def __init__(self) -> None:
        self.entries: dict[Key, _Entry[Made]] = {}
        self._lock = threading.Lock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._unlock)  # whoever held the lock is not in the child

    def get(self, tensors: tuple[Tensor, ...], form: Key, make: Callable[[], Made]) -> Made:
        """What `make` returned for these tensors and this form, made once.

        A storage whose weak reference is held keeps its address, so no other tensor can be taken for one that is gone.
        """
        storages = [tensor.untyped_storage() for tensor in tensors]
        key = tuple((s._cdata, t.data_ptr(), t.shape, t.stride(), t.dtype) for s, t in zip(storages, tensors, strict=True))
        versions = tuple(map(_version, tensors))
        entry = self.entries.get(key)
        made = entry.forms.get(form) if entry is not None and entry.versions == versions else None
        if made is not None:
            return made
        with self._lock:
            for old in [old for old, entry in self.entries.items() if entry.gone]:
                del self.entries[old]
            entry = self.entries.get(key)
            if entry is None or entry.versions != versions:
                entry = self.entries[key] = _Entry(tuple(map(StorageWeakRef, storages)), versions)
            if form not in entry.forms:
                made = _made(tensors[0].device, make)
                while len(entry.forms) >= MOST:
                    del entry.forms[next(iter(entry.forms))]
                entry.forms[form] = made
            return entry.forms[form]

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self.entries.clear()

    def _unlock(self) -> None:
        self._lock = threading.Lock()


def _made(device: torch.device, make: Callable[[], Made]) -> Made:
    """What `make` returns, on a GPU once it is there: other streams may be the next to read it."""
    if device.type != "cuda":
        return make()
    if torch.cuda.is_current_stream_capturing():
        raise KernelError("a weight is packed at its first call, which a CUDA graph cannot hold: run the layer once before the capture")
    made = make()
    torch.cuda.current_stream(device).synchronize()
    return made


def _version(tensor: Tensor) -> int:
    """Counts changes in place; tensors made in inference mode have no such count, and count as constant."""
    return 0 if tensor.is_inference() else tensor._version
