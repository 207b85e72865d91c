"""The runners for a device's ABI, and the onnxruntime library: given, found in the user's cache, or built and fetched into it.

The cache is ~/.cache/ticketkit ($XDG_CACHE_HOME): `runner/ABI-HASH` holds the two programs and the operator library, built from `kernels/`
with the sources' hash in the name, `onnxruntime/VERSION-ABI` the library out of the wheel that PyPI has for that processor.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ticketkit.bench.devices import shown
from ticketkit.bench.machine import ROOT
from ticketkit.errors import DeviceError

MACHINES = {"aarch64": 183, "x86_64": 62}  # e_machine of an ELF file
PARTS = {"network": "ticketkit-network", "layers": "ticketkit-layers", "operators": "libticketkit.so"}
WHEELS = ("manylinux_2_28", "manylinux_2_27", "manylinux2014")
BUILD_SECONDS, FETCH_SECONDS = 1800, 600
Say = Callable[[str], None]


@dataclass(frozen=True)
class Runner:
    """What of ours runs on the device: the two programs and the operators of onnxruntime."""

    network: Path
    layers: Path
    operators: Path


def runner(abi: str, given: Path | None, say: Say = lambda what: None) -> Runner:
    """The runners for an ABI: of the folder `given`, else of $TICKETKIT_RUNNER, else built from `kernels/`, once for each state of it.

    Raises DeviceError where a folder lacks one or has those of another ABI, or nothing can be built here.
    """
    folder = given or (Path(os.environ["TICKETKIT_RUNNER"]) if os.environ.get("TICKETKIT_RUNNER") else None)
    return _in(folder or _built(abi, say), abi)


def onnxruntime(abi: str, given: Path | None, say: Say = lambda what: None) -> Path:
    """libonnxruntime for an ABI: `given`, or that of the installed package's version: its own here, that of PyPI's wheel for ARM boards.

    Raises DeviceError where there is none, or it is of another ABI.
    """
    if given:
        return _checked(given, abi, "--onnxruntime")
    if abi.endswith("-android"):
        raise DeviceError(
            "--onnxruntime: expected the path of libonnxruntime.so for Android; it is jni/arm64-v8a/libonnxruntime.so in the archive "
            "onnxruntime-android-VERSION.aar (a zip file) of Maven Central"
        )
    version = importlib.metadata.version("onnxruntime")
    if abi == f"{platform.machine()}-linux":
        spec = importlib.util.find_spec("onnxruntime")
        folder = Path(spec.origin or "").parent / "capi" if spec else Path()
        if found := sorted(folder.glob("libonnxruntime.so.*")):
            return _checked(found[0], abi, "onnxruntime")
    kept = _cache() / "onnxruntime" / f"{version}-{abi}" / "libonnxruntime.so"
    if not kept.is_file():
        say(f"fetching onnxruntime {version} for {abi}")
        _fetch(version, abi, kept)
    return _checked(kept, abi, "onnxruntime")


def build(abi: str, sources: Path, to: Path) -> None:
    """Configure and build the runners of `sources` (kernels/) and put them into the folder `to`.

    Raises DeviceError naming the step that failed, its last line, and the log.
    """
    with tempfile.TemporaryDirectory(prefix="ticketkit-build-") as scratch:
        tree, made = Path(scratch) / "build", Path(scratch) / "made"
        preset = ["--preset", _preset(abi)]
        generator = ["-G", "Ninja"] if _tool("ninja") else ["-G", "Unix Makefiles"]
        log = _cache() / "runner" / f"{abi}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            _step(["cmake", *preset, *generator, "-S", str(sources), "-B", str(tree)], sources, log, output.fileno())
            targets = ["--target", "ticketkit", PARTS["network"], PARTS["layers"]]
            _step(["cmake", "--build", str(tree), "-j", str(max(1, (os.cpu_count() or 1) // 2)), *targets], sources, log, output.fileno())
        made.mkdir()
        for name in PARTS.values():
            found = [path for path in tree.rglob(name) if path.is_file()]
            if not found:
                raise DeviceError(f"building for {abi}: expected {name} in {tree}, it is not there; see {log}")
            shutil.copy2(found[0], made / name)
        _keep(made, to)


def _built(abi: str, say: Say) -> Path:
    """The folder of the cache with the runners for these sources, built if need be."""
    sources = ROOT / "kernels"
    if not (sources / "device").is_dir():
        raise DeviceError(
            f"no runner for {abi}: expected --runner DIR or $TICKETKIT_RUNNER, a folder with {', '.join(PARTS.values())}; in ticketkit's "
            "sources, in kernels/, `cmake --preset P && cmake --build --preset P` makes them, with P one of `cmake --list-presets`"
        )
    kept = _cache() / "runner" / f"{abi}-{_digest(sources)}"
    if not kept.is_dir():
        say(f"building the runners for {abi}")
        build(abi, sources, kept)
    return kept


def _preset(abi: str) -> str:
    """The preset of kernels/CMakePresets.json that builds for an ABI here. DeviceError where a compiler is missing, naming one."""
    if abi == f"{platform.machine()}-linux":
        return "device"
    if abi == "aarch64-linux":
        if importlib.util.find_spec("ziglang"):
            return "aarch64-linux-gnu-zig"  # for an older C library too
        if shutil.which("aarch64-linux-gnu-g++"):
            return "aarch64-linux-gnu"
        raise DeviceError(
            "no compiler for 64-bit ARM Linux: pip install 'ticketkit[device]' has one (ziglang), as has Debian's g++-aarch64-linux-gnu"
        )
    if abi == "aarch64-android":
        if os.environ.get("ANDROID_NDK"):
            return "android-arm64"
        raise DeviceError(
            "no compiler for Android: expected $ANDROID_NDK, the folder of Android's NDK; or give built runners with --runner DIR"
        )
    raise DeviceError(f"no runner for {abi}: it can only be built on such a machine; build it there and give it with --runner DIR")


def _in(folder: Path, abi: str) -> Runner:
    found = {}
    for part, name in PARTS.items():
        paths = [path for path in (folder / name, folder / "device" / name) if path.is_file()]
        if not paths:
            raise DeviceError(f"{folder}: expected {', '.join(PARTS.values())} for {abi}, there is no {name}")
        found[part] = _checked(paths[0], abi, "runner")
    return Runner(**found)


def _checked(path: Path, abi: str, what: str) -> Path:
    """The path, once its first bytes say that it is a program or library for the processor of `abi`."""
    try:
        with path.open("rb") as file:
            head = file.read(20)
    except OSError as error:
        raise DeviceError(f"{what}: {path}: {error.strerror or error}") from None
    wanted = abi.partition("-")[0]
    number = int.from_bytes(head[18:20], "little")
    if head[:5] != b"\x7fELF\x02" or number != MACHINES[wanted]:
        name = next((name for name, known in MACHINES.items() if known == number), f"ELF machine {number}")
        got = name if head[:4] == b"\x7fELF" else "no ELF file"
        raise DeviceError(f"{what}: expected {path} to be for {wanted}, got {got}")
    return path


def _fetch(version: str, abi: str, to: Path) -> None:
    """The library out of PyPI's wheel for another processor, by pip."""
    machine = abi.partition("-")[0]
    with tempfile.TemporaryDirectory(prefix="ticketkit-wheel-") as scratch:
        platforms = [word for tag in WHEELS for word in ("--platform", f"{tag}_{machine}")]
        words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *platforms, "-d", scratch]
        try:
            done = subprocess.run(
                [*words, f"onnxruntime=={version}"],
                capture_output=True,
                text=True,
                check=False,
                timeout=FETCH_SECONDS,
                stdin=subprocess.DEVNULL,
            )
            failed, why = done.returncode != 0, (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        except (OSError, subprocess.SubprocessError) as error:
            failed, why = True, str(error)
        wheels = list(Path(scratch).glob("*.whl"))
        if failed or not wheels:
            raise DeviceError(
                f"no onnxruntime {version} for {abi}: pip says {shown(why)}; give a libonnxruntime.so of that ABI with --onnxruntime PATH"
            )
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                (name,) = [name for name in wheel.namelist() if name.startswith("onnxruntime/capi/libonnxruntime.so.")]
                made = Path(scratch) / "made"
                made.mkdir()
                (made / to.name).write_bytes(wheel.read(name))
        except (ValueError, zipfile.BadZipFile) as error:
            raise DeviceError(f"{wheels[0].name}: expected one libonnxruntime.so in it: {error}") from None
        _keep(made, to.parent)


def _keep(made: Path, to: Path) -> None:
    """Move a whole folder into the cache at once; what another process put there meanwhile is as good."""
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=".new-") as near:
        whole = Path(near) / "whole"
        shutil.copytree(made, whole)
        try:
            whole.rename(to)
        except OSError:
            if not to.is_dir():
                raise


def _step(words: Sequence[str], folder: Path, log: Path, output: int) -> None:
    program = _tool(words[0])
    if not program:
        raise DeviceError(f"no {words[0]} on the PATH; pip install 'ticketkit[device]' has it")
    try:
        done = subprocess.run(
            [program, *words[1:]], cwd=folder, stdout=output, stderr=subprocess.STDOUT, check=False, timeout=BUILD_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise DeviceError(f"building the runners took more than {BUILD_SECONDS} s and was stopped; see {log}") from None
    if done.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if "rror" in line] or ["no reason given"]
        raise DeviceError(f"building the runners failed: {shown(lines[0])}; see {log}")


def _tool(name: str) -> str | None:
    """A program beside this Python, where pip puts cmake and ninja, or on the PATH."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]))


@functools.cache
def _digest(sources: Path) -> str:
    """Of every source file under `kernels/` that the runners are built from, names included."""
    total = hashlib.sha256()
    for path in sorted(path for path in sources.rglob("*") if path.is_file() and "fuzz" not in path.parts and path.suffix != ".md"):
        total.update(f"{path.relative_to(sources)}\0{path.stat().st_size}\0".encode())
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ticketkit"
