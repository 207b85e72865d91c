"""The runners for a device's ABI, and the onnxruntime library: given, found in the user's cache, or built and fetched into it.

The cache is ~/.cache/ticketkit ($XDG_CACHE_HOME): `runner/PRESET-WHAT-HASH` holds what was built from `kernels/`, with the sources' hash in
the name, `onnxruntime/VERSION-ABI` the library out of the wheel that PyPI has for that processor.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from ticketkit.bench.devices import shown
from ticketkit.bench.devices._facts import ABIS
from ticketkit.bench.machine import ROOT
from ticketkit.errors import DeviceError, KernelError
from ticketkit.runtime import native

MACHINES = {"aarch64": 183, "x86_64": 62}  # e_machine of an ELF file
NETWORK, LAYERS, OPERATORS = "ticketkit-network", "ticketkit-layers", "libticketkit.so"
WHEELS = ("manylinux_2_28", "manylinux_2_27", "manylinux2014")
BUILD_SECONDS, FETCH_SECONDS = 1800.0, 600.0
Say = Callable[[str], None]


def programs(abi: str, names: Sequence[str], given: Path | None, say: Say = lambda what: None) -> dict[str, Path]:
    """The named files of ours for an ABI: of the folder `given` (`--runner`, $TICKETKIT_RUNNER), or, for this machine, of the installed
    package, or else built from `kernels/`, once for each state of it.

    Raises DeviceError where a folder lacks one or has one of another ABI, or nothing can be built here.
    """
    if given is None and (named := os.environ.get("TICKETKIT_RUNNER")):
        given = Path(named)
    if given is not None:
        return _in(given, abi, names)
    if _here(abi):
        with suppress(DeviceError, KernelError):
            return _in(native.library_path().parent, abi, names)
    return _in(_built(abi, names, say), abi, names)


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
    import onnxruntime as installed

    version = installed.__version__  # not the distribution's, which may have another name
    if _here(abi):
        spec = importlib.util.find_spec("onnxruntime")
        folder = Path(spec.origin or "").parent / "capi" if spec else Path()
        if found := sorted(folder.glob("libonnxruntime.so.*")):
            return _checked(found[0], abi, "onnxruntime")
    kept = _cache() / "onnxruntime" / f"{version}-{abi}" / "libonnxruntime.so"
    if not kept.is_file():
        say(f"fetching onnxruntime {version} for {abi}")
        _fetch(version, abi, kept)
    return _checked(kept, abi, "onnxruntime")


def build(preset: str, names: Sequence[str], sources: Path, to: Path) -> None:
    """Configure and build files of ours from `sources` (kernels/) by a preset of CMakePresets.json and put them into the folder `to`.

    Raises DeviceError naming the step that failed, its first error, and the log.
    """
    with tempfile.TemporaryDirectory(prefix="ticketkit-build-") as scratch:
        tree, made = Path(scratch) / "build", Path(scratch) / "made"
        generator = ["-G", "Ninja"] if _tool("ninja") else ["-G", "Unix Makefiles"]
        log = _cache() / "runner" / f"{preset}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            _step(["cmake", "--preset", preset, *generator, "-S", str(sources), "-B", str(tree)], sources, log, output.fileno())
            targets = [name.removeprefix("lib").removesuffix(".so") for name in names]
            jobs = str(max(1, (os.cpu_count() or 1) // 2))
            _step(["cmake", "--build", str(tree), "-j", jobs, "--target", *targets], sources, log, output.fileno())
        made.mkdir()
        for name in names:
            found = [path for path in tree.rglob(name) if path.is_file()]
            if not found:
                raise DeviceError(f"building {preset}: expected {name} in {tree}, it is not there; see {log}")
            shutil.copy2(found[0], made / name)
        _keep(made, to)


def preset(abi: str, names: Sequence[str]) -> str:
    """The preset of kernels/CMakePresets.json that builds these files for an ABI here.

    For ARM a program that needs no library is built static, so that it runs on every Linux and Android. DeviceError where a compiler is
    missing, naming one.
    """
    if _here(abi):
        return "device"
    zig = importlib.util.find_spec("ziglang") is not None
    if abi.startswith("aarch64") and zig and set(names) == {LAYERS}:
        return "aarch64-linux-musl"
    if abi == "aarch64-android":
        if os.environ.get("ANDROID_NDK"):
            return "android-arm64"
        raise DeviceError(
            "no compiler for Android: expected $ANDROID_NDK, the folder of Android's NDK, or built runners with --runner DIR; "
            "--layers needs pip install 'ticketkit[device]' only"
        )
    if abi == "aarch64-linux":
        if zig:
            return "aarch64-linux-gnu-zig"  # for older C libraries too
        if shutil.which("aarch64-linux-gnu-g++"):
            return "aarch64-linux-gnu"
        raise DeviceError(
            "no compiler for 64-bit ARM Linux: pip install 'ticketkit[device]' has one (ziglang), as has Debian's g++-aarch64-linux-gnu"
        )
    raise DeviceError(f"no runner for {abi}: it can only be built on such a machine; build it there and give it with --runner DIR")


def _sources() -> Path:
    """`kernels/` of the checkout that runs, or of the one that is the current directory; DeviceError where there is none."""
    for folder in (ROOT / "kernels", Path.cwd() / "kernels"):
        if (folder / "CMakePresets.json").is_file() and (folder / "device").is_dir():
            return folder
    raise DeviceError(
        "runners are built from ticketkit's sources, and the installed package has none: run this in a checkout (where kernels/ is), or "
        "give built ones with --runner DIR or $TICKETKIT_RUNNER"
    )


def buildable() -> dict[str, str]:
    """{"ABI, what is measured": how its runner would be built here, or what is missing}, for `ticketkit doctor`."""
    found = {}
    for abi in ABIS:
        for what, names in (("models", (NETWORK, OPERATORS)), ("layers", (LAYERS,))):
            try:
                found[f"{abi}, {what}"] = _ready(abi, names)
            except DeviceError as error:
                found[f"{abi}, {what}"] = f"no: {error}"
    return found


def _ready(abi: str, names: Sequence[str]) -> str:
    if _here(abi):
        with suppress(DeviceError, KernelError):
            _in(native.library_path().parent, abi, names)
            return "in the package"
    chosen = preset(abi, names)
    return f"built by the preset {chosen} from {_sources()}"


def _here(abi: str) -> bool:
    return platform.system() == "Linux" and abi == f"{platform.machine()}-linux"


def _built(abi: str, names: Sequence[str], say: Say) -> Path:
    """The folder of the cache with these files for these sources, built if need be."""
    chosen = preset(abi, names)
    try:
        sources = _sources()
    except DeviceError as error:
        raise DeviceError(f"no runner for {abi}, {', '.join(names)}: {error}") from None
    kept = _cache() / "runner" / f"{chosen}-{'layers' if LAYERS in names else 'network'}-{_digest(sources)}"
    if not kept.is_dir():
        say(f"building {', '.join(names)} for {abi}")
        build(chosen, names, sources, kept)
    return kept


def _in(folder: Path, abi: str, names: Sequence[str]) -> dict[str, Path]:
    found = {}
    for name in names:
        paths = [path for path in (folder / name, folder / "device" / name) if path.is_file()]
        if not paths:
            raise DeviceError(f"{folder}: expected {', '.join(names)} for {abi}, there is no {name}")
        found[name] = _checked(paths[0], abi, "runner")
    return found


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
        code = _bounded([program, *words[1:]], folder, output)
    except subprocess.TimeoutExpired:
        raise DeviceError(f"building the runners took more than {BUILD_SECONDS:g} s and was stopped; see {log}") from None
    if code:
        lines = [line for line in log.read_text(errors="replace").splitlines() if "rror" in line] or ["no reason given"]
        raise DeviceError(f"building the runners failed: {shown(lines[0])}; see {log}")


def _bounded(words: Sequence[str], folder: Path, output: int) -> int:
    """The exit code of a program. After BUILD_SECONDS, or a Ctrl-C, it is ended with all that it has started, compilers too."""
    child = subprocess.Popen(
        words,
        cwd=folder,
        env={**os.environ, "TICKETKIT_PYTHON": sys.executable},  # whose ziglang the presets use
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return child.wait(BUILD_SECONDS)
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        raise


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
