"""What the runners say, one JSON object a line (`kernels/README.md`, "Device"), believed only after every field was checked.

The device may be broken or hostile: lines that are no events are passed over, an event with a field that cannot be is an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

from ticketkit.bench.devices import shown
from ticketkit.errors import DeviceError

Event: TypeAlias = dict[str, Any]
Check = Callable[[Any], bool]

LONGEST_MS = 1e8  # more than a day for one run
MOST_RUNS = 100_000  # of one turn, as the runners have it


def _number(low: float, high: float) -> Check:
    return lambda v: isinstance(v, int | float) and not isinstance(v, bool) and low <= v <= high  # NaN is in no range


def _whole(low: int, high: int) -> Check:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high


def _text(v: Any) -> bool:
    return isinstance(v, str) and len(v) <= 10_000


def _optional(check: Check) -> Check:
    return lambda v: v is None or check(v)


def _each(check: Check, least: int = 0, most: int = 4096) -> Check:
    return lambda v: isinstance(v, list) and least <= len(v) <= most and all(map(check, v))


def _table(check: Check) -> Check:
    return lambda v: isinstance(v, dict) and len(v) <= 4096 and all(map(_text, v)) and all(map(check, v.values()))


_milliseconds = _number(0, LONGEST_MS)  # 0: shorter than a tick of the clock
_bytes = _whole(0, 1 << 50)
_flag: Check = lambda v: isinstance(v, bool)  # noqa: E731 (one of a list of checks)

# event -> field -> (what it must be, in words; the check). Fields that are not listed are passed over, those in OPTIONAL may be missing.
FIELDS: dict[str, dict[str, tuple[str, Check]]] = {
    "device": {
        "machine": ("text", _text),
        "isa": ("text or null", _optional(_text)),
        "kernel": ("text or null", _optional(_text)),
        "runtime": ("text or null", _optional(_text)),
    },
    "state": {
        "at": ("before or after", lambda v: v in ("before", "after")),
        "temperatures": ("millidegrees by zone", _table(_number(-1e6, 1e9))),
        "khz": ("kHz by processor", _table(_number(0, 1e9))),
    },
    "loaded": {"engine": ("text", _text), "load_s": ("seconds", _number(0, 1e6))},
    "round": {
        "engine": ("text", _text),
        "round": ("a number from 0", _whole(0, 100_000)),
        "ms": (f"1 to {MOST_RUNS:,} times in ms, none below 0", _each(_milliseconds, 1, MOST_RUNS)),
    },
    "checked": {
        "engine": ("text", _text),
        "max_abs_diff": ("a number or null", _optional(_number(0, 1e300))),
        "max_abs_output": ("a number or null", _optional(_number(0, 1e300))),
        "ok": ("true or false", _flag),
    },
    "layer": {
        "layer": ("text", _text),
        "op": ("conv2d, depthwise or gemm", lambda v: v in ("conv2d", "depthwise", "gemm")),
        "shape": ("10 sizes", _each(_whole(0, 1 << 40), 10, 10)),
        **{name: ("a count", _whole(0, 1 << 62)) for name in ("weights", "nnz", "multiply_adds", "multiply_adds_dense")},
    },
    "finished": {"engine": ("text", _text), "peak_rss_bytes": ("bytes", _bytes)},
    "failed": {"engine": ("text", _text), "message": ("text", _text)},
    "error": {"message": ("text", _text)},
    "end": {},
    "exit": {"code": ("an exit code", _whole(0, 255))},
}
EXTRA: dict[str, tuple[str, Check]] = {
    "layer": ("text", _text),
    "format": ("text or null", _optional(_text)),
    "tolerance": ("a number or null", _optional(_number(0, 1e300))),
}


def parse(line: str) -> Event | None:
    """The event in a line; None for a line that is none (a login message, half an event, something else's JSON).

    Raises DeviceError for an event with a field that is missing, of the wrong type, NaN or out of its range.
    """
    line = line.strip()
    if not line.startswith("{"):
        return None
    try:
        event = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    except _NotANumber as error:
        raise DeviceError(f"the device sent {error} in {shown(line, 120)}; expected numbers") from None
    kind = event.get("event")
    if not isinstance(kind, str) or kind not in FIELDS:
        return None
    for field, (what, check) in (FIELDS[kind] | {name: rule for name, rule in EXTRA.items() if name in event}).items():
        if not check(event.get(field)):
            got = shown(json.dumps(event[field]), 80) if field in event else "nothing"
            raise DeviceError(f"the device sent an event {kind!r} whose {field} is {got}; expected {what}")
    return dict(event)


class _NotANumber(Exception):
    pass


def _refuse(constant: str) -> NoReturn:
    raise _NotANumber(constant)
