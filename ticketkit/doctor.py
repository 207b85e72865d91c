"""What works here, and why the rest does not: `ticketkit doctor`."""

from __future__ import annotations

import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ticketkit import __version__
from ticketkit.bench import devices, engines, machine
from ticketkit.bench.devices import _runner
from ticketkit.errors import KernelError

PACKAGES = (
    *("numpy", "onnx", "onnxruntime", "safetensors", "click", "rich", "psutil"),  # the base install
    *("torch", "torchvision", "lightning-fabric", "torchmetrics", "onnxscript", "scikit-learn", "pillow"),  # [find]
    "openvino",  # [bench]
    "triton",  # [gpu]
)


def examine() -> dict[str, Any]:
    """Facts about this machine and installation, ready for JSON. Never raises for what is merely missing.

    `library.error` is the one finding that means ticketkit cannot work here; it is None when the native library loads.
    """
    physical, usable = machine.cores()
    return {
        "ticketkit": __version__,
        "commit": machine.commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"name": machine.cpu_name(), "cores": physical, "processors": usable},
        "library": _library(),
        "gpu": _gpu(),
        "packages": {name: _version(name) for name in PACKAGES},
        "engines": {name: _engine(name) for name in engines.names()},
        "devices": {name: _device(name) for name in devices.names()},
        "runners": _runner.buildable(),
    }


def render(found: dict[str, Any]) -> RenderableType:
    """The findings as tables."""
    return Group(_machine(found), _engines(found), _devices(found), _runners(found), _packages(found))


def _library() -> dict[str, Any]:
    from ticketkit.runtime import native

    found: dict[str, Any] = {"path": None, "version": None, "isas": [], "active": None, "isa_error": None, "error": None}
    try:
        found["path"] = str(native.library_path())
        found["version"] = native.version()
        found["isas"] = [{"name": isa.name, "usable": isa.usable, "lanes": isa.lanes} for isa in native.isas()]
    except KernelError as error:
        return found | {"error": str(error)}
    try:
        found["active"] = native.active_isa().name
    except KernelError as error:  # TICKETKIT_ISA names one that cannot run: the library itself is fine
        found["isa_error"] = str(error)
    return found


def _gpu() -> dict[str, Any]:
    """Whether the GPU kernels run here; importing torch to ask costs seconds, so only where there is a driver."""
    if find_spec("torch") is None:
        return {"usable": False, "why_not": "torch is not installed (pip install 'ticketkit[gpu]')"}
    if not Path("/proc/driver/nvidia/version").exists() and not Path("/dev/kfd").exists():
        return {"usable": False, "why_not": "no driver of a GPU here"}
    from ticketkit.runtime import gpu

    try:
        gpu.require()
    except KernelError as error:
        return {"usable": False, "why_not": str(error)}
    return {"usable": True, "why_not": ""}


def _engine(name: str) -> dict[str, Any]:
    engine = engines.get(name)
    usable, why = engine.available()
    return {"usable": usable, "why_not": why, "multiplies_zeros": engine.MULTIPLIES_ZEROS}


def _device(name: str) -> dict[str, Any]:
    kind = devices.get(name)
    usable, why = kind.available()
    return {"usable": usable, "why_not": why, "usage": kind.USAGE, "client": shutil.which(kind.CLIENT) if kind.CLIENT else None}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _machine(found: dict[str, Any]) -> Table:
    cpu, library = found["cpu"], found["library"]
    table = Table(title="machine and library", title_justify="left", show_header=False)
    table.add_row("ticketkit", " ".join(filter(None, (found["ticketkit"], found["commit"]))))
    table.add_row("python", f"{found['python']} on {found['platform']}")
    table.add_row("CPU", Text(f"{cpu['name']}, {cpu['cores']} cores, {cpu['processors']} processors usable"))
    table.add_row("library", Text(library["error"] or f"{library['path']} ({library['version']})"))
    for isa in library["isas"]:
        state = "usable" if isa["usable"] else "built, but not supported by this CPU or system"
        active = ", active" if isa["name"] == library["active"] else ""
        table.add_row(f"ISA {isa['name']}", f"{state}, {isa['lanes']} lanes{active}")
    gpu = found["gpu"]
    table.add_row("GPU kernels", Text("usable" if gpu["usable"] else f"no: {gpu['why_not']}"))
    if library["isa_error"]:
        table.add_row("ISA", Text(library["isa_error"]))
    return table


def _engines(found: dict[str, Any]) -> Table:
    table = Table("engine", "usable", "zeros", title="engines of `ticketkit bench`", title_justify="left")
    for name, engine in found["engines"].items():
        zeros = "multiplied" if engine["multiplies_zeros"] else "skipped"
        table.add_row(name, Text("yes" if engine["usable"] else f"no: {engine['why_not']}"), zeros)
    return table


def _devices(found: dict[str, Any]) -> Table:
    table = Table("device", "usable", "client", title="devices of `ticketkit bench --device`", title_justify="left")
    for device in found["devices"].values():
        table.add_row(Text(device["usage"]), Text("yes" if device["usable"] else f"no: {device['why_not']}"), Text(device["client"] or "-"))
    return table


def _runners(found: dict[str, Any]) -> Table:
    table = Table("runner for", "here", title="runners for devices", title_justify="left")
    for what, how in found["runners"].items():
        table.add_row(what, Text(how))
    return table


def _packages(found: dict[str, Any]) -> Table:
    table = Table("package", "version", title="packages", title_justify="left")
    for name, number in found["packages"].items():
        table.add_row(name, number or "not installed")
    return table
