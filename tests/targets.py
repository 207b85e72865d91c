"""The export targets as test parameters: skipped where what they need is not installed."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from ticketkit import exporters

NEEDS = {"executorch": "executorch", "torch": "torch"}  # target -> package


def _parameter(target: str) -> object:
    missing = target in NEEDS and not find_spec(NEEDS[target])
    return pytest.param(target, marks=pytest.mark.skipif(missing, reason=f"{NEEDS.get(target)} is not installed"))


TARGETS = [_parameter(target) for target in exporters.names()]
