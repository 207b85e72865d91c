"""What surrounds the `main` of every script here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from ticketkit.errors import TicketkitError


def run(main: Callable[[], int | None]) -> NoReturn:
    """Exits with the number that `main` gives; with one line for an expected failure and for Ctrl-C, of which scripts keep their rows."""
    try:
        sys.exit(main())
    except TicketkitError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the rows so far are kept")
