"""What a row says of the machine and the code that produced it."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]  # of the checkout, where there is one


def cpu_name() -> str:
    """The processor's own name for itself, or its architecture where the system does not tell."""
    table = Path("/proc/cpuinfo")
    if table.exists():
        for line in table.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in {"model name", "Hardware"}:
                return value.strip()
    if platform.system() == "Darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def cores() -> tuple[int, int]:
    """(physical cores, logical processors this process may use)."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return psutil.cpu_count(logical=False) or usable, usable


def commit() -> str:
    """Commit of the checkout ticketkit runs from, "-dirty" appended where its code was changed; "" for an installed package."""
    if not (ROOT / ".git").exists():
        return ""
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", "ticketkit", "kernels")
    return _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
