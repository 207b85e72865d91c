"""What surrounds the `main` of every script here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from ticketkit.errors import TicketkitError


def run(main: Callable[[], int | None]) -> NoReturn:
    """Exits with the number that `main` gives, 0 for none; with one line for an expected failure and for Ctrl-C."""
    try:
        sys.exit(main())
    except TicketkitError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
