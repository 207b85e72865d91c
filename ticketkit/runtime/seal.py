"""The seal of a sparse file: the sha256 of its other bytes, an entry of the model's metadata (`ticketkit.exporters.onnx.finish`).

A file with an unbroken seal is what ticketkit wrote and checked, so it can be loaded without being parsed and checked once more, which
costs several times its size in memory. What is wrong with any other file is for `ticketkit.lower.read` to say.
"""

from __future__ import annotations

import hashlib
import io
import os
from typing import BinaryIO

KEY = b"ticketkit.sha256"  # `ticketkit.lower.operators.DIGEST`
DOMAIN = b"ai.ticketkit"  # `ticketkit.lower.operators.DOMAIN`
DIGITS = 64
CHUNK = 1 << 20  # bytes read at a time; at the end of a file they hold the entry, which only the function bodies of sparse operators follow
# Field 14 of ModelProto, a message of two strings: key and value (onnx.proto, StringStringEntryProto).
ENTRY = bytes([0x72, len(KEY) + DIGITS + 4, 0x0A, len(KEY)]) + KEY + bytes([0x12, DIGITS])


def unbroken(source: str | os.PathLike[str] | bytes) -> str | None:
    """The sha256 that a sparse file, or its content, states of itself and has.

    None for one that states none or has another, for a dense file, and where there is nothing to read.
    """
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            return _unbroken(file)
    except OSError:
        return None


def _unbroken(file: BinaryIO) -> str | None:
    start = file.seek(max(file.seek(0, os.SEEK_END) - CHUNK, 0))
    end = file.read()
    at = end.rfind(ENTRY)
    behind = at + len(ENTRY) + DIGITS
    if at < 0 or DOMAIN not in end[behind:]:
        return None
    found, left = hashlib.sha256(), start + at
    file.seek(0)
    while left > 0 and (chunk := file.read(min(left, CHUNK))):
        found.update(chunk)
        left -= len(chunk)
    found.update(end[behind:])
    digits = found.hexdigest()
    return digits if digits.encode() == end[behind - DIGITS : behind] else None
