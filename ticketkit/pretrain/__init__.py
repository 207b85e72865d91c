"""Training objectives by name. One file here is one objective; adding a file adds its name here, on the command line and in the tests.

An objective file states `OBJECTIVE`, a frozen dataclass that follows `Objective`; its fields are the options of the objective. Files
that begin with an underscore are no objectives.
"""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module

from ticketkit.errors import TicketError
from ticketkit.pretrain._objective import Objective

__all__ = ["Objective", "get", "names"]


@cache
def objectives() -> dict[str, type[Objective]]:
    """Objective name -> its class."""
    found = sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_"))
    return {name: import_module(f"{__name__}.{name}").OBJECTIVE for name in found}


def names() -> list[str]:
    """Every objective that `get` knows."""
    return list(objectives())


def get(name: str) -> type[Objective]:
    """The objective of that name.

    Raises:
        TicketError: there is none.
    """
    if name not in objectives():
        raise TicketError(f"unknown objective {name!r}; expected one of {', '.join(names())}")
    return objectives()[name]
