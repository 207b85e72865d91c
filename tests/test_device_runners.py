"""Where the runner and the libraries for a device come from."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import psutil
import pytest
from boards import program
from test_bench import eventually

from ticketkit.bench.devices import _facts, _runner
from ticketkit.errors import DeviceError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the fake cmake is a shell script")


def elf(path, machine=183):
    path.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + (3).to_bytes(2, "little") + machine.to_bytes(2, "little") + bytes(44))
    return path


WHOLE = (_runner.NETWORK, _runner.OPERATORS)


def test_runners_of_a_folder(tmp_path, monkeypatch):
    for name in (*WHOLE, _runner.LAYERS):
        elf(tmp_path / name)
    assert _runner.programs("aarch64-linux", [_runner.LAYERS], tmp_path) == {"ticketkit-layers": tmp_path / "ticketkit-layers"}
    monkeypatch.setenv("TICKETKIT_RUNNER", str(tmp_path))
    assert _runner.programs("aarch64-android", WHOLE, None)["libticketkit.so"] == tmp_path / "libticketkit.so"
    with pytest.raises(DeviceError, match=r"runner: expected .*ticketkit-network to be for x86_64, got aarch64"):
        _runner.programs("x86_64-linux", WHOLE, tmp_path)
    (tmp_path / "ticketkit-network").write_text("#!/bin/sh")
    with pytest.raises(DeviceError, match="got no ELF file"):
        _runner.programs("aarch64-linux", WHOLE, None)
    (tmp_path / "ticketkit-network").unlink()
    with pytest.raises(DeviceError, match="there is no ticketkit-network"):
        _runner.programs("aarch64-linux", WHOLE, None)


def test_a_package_without_sources_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("TICKETKIT_RUNNER", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("ANDROID_NDK", str(tmp_path))
    monkeypatch.setattr(_runner, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    why = r"the installed package has none: run this in a checkout \(where kernels/ is\), or give built ones with --runner DIR"
    with pytest.raises(DeviceError, match=rf"no runner for aarch64-android, ticketkit-network, libticketkit\.so: .*{why}"):
        _runner.programs("aarch64-android", WHOLE, None)
    assert re.search(f"no: .*{why}", _runner.buildable()["aarch64-android, models"])
    (tmp_path / "checkout" / "kernels" / "device").mkdir(parents=True)
    (tmp_path / "checkout" / "kernels" / "CMakePresets.json").touch()
    monkeypatch.chdir(tmp_path / "checkout")
    built = []
    monkeypatch.setattr(_runner, "build", lambda preset, names, sources, to: built.append(sources))
    with pytest.raises(DeviceError, match="there is no ticketkit-network"):  # this build makes nothing
        _runner.programs("aarch64-android", WHOLE, None)
    assert built == [tmp_path / "checkout" / "kernels"]
    assert _runner.buildable()["aarch64-android, models"] == f"built by the preset android-arm64 from {built[0]}"


def test_a_build_that_takes_too_long_ends_with_its_compilers(tmp_path, monkeypatch):
    monkeypatch.setattr(_runner, "BUILD_SECONDS", 1.0)
    compiler = tmp_path / "pid"
    with (tmp_path / "log").open("w") as log, pytest.raises(subprocess.TimeoutExpired):
        _runner._bounded(["sh", "-c", f"sleep 60 & echo $! >{compiler}; wait"], tmp_path, log.fileno())
    pid = int(compiler.read_text())
    assert eventually(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, 10)


def test_runners_are_built_once_for_each_state_of_the_sources(tmp_path, monkeypatch):
    """cmake is a script here; the real build is a step of .ci/run."""
    source, cache, tools = tmp_path / "kernels", tmp_path / "cache", tmp_path / "tools"
    (source / "device").mkdir(parents=True)
    (source / "CMakePresets.json").touch()
    (source / "a.cc").write_text("int a;")
    tools.mkdir()
    elf(tmp_path / "made")
    script = f"""#!/bin/sh
echo "$@" >>{tmp_path}/calls
[ -e {tmp_path}/broken ] && {{ echo 'a.cc:1: error: no'; exit 1; }}
while [ $# -gt 0 ]; do [ "$1" = -B ] && tree=$2; shift; done
[ -n "$tree" ] || exit 0
mkdir -p $tree/device
for name in ticketkit-network ticketkit-layers libticketkit.so; do cp {tmp_path}/made $tree/device/$name; done
"""
    program(tools / "cmake", script)
    for name, value in {"XDG_CACHE_HOME": cache, "ANDROID_NDK": tmp_path}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("TICKETKIT_RUNNER", raising=False)
    monkeypatch.setattr(_runner, "ROOT", tmp_path)
    monkeypatch.setattr(_runner, "_tool", lambda name: str(tools / "cmake") if name == "cmake" else None)

    def build(say=lambda what: None):
        _runner._digest.cache_clear()
        return _runner.programs("aarch64-android", WHOLE, None, say)

    (tmp_path / "broken").touch()
    with pytest.raises(DeviceError, match=r"building the runners failed: 'a\.cc:1: error: no'; see .*android-arm64\.log"):
        build()
    (tmp_path / "broken").unlink()
    said = []
    first = build(said.append)
    assert first == build(said.append)
    assert said == ["building ticketkit-network, libticketkit.so for aarch64-android"]
    calls = (tmp_path / "calls").read_text()
    assert "--preset android-arm64 -G Unix Makefiles" in calls and "--target ticketkit-network ticketkit\n" in calls
    (source / "a.cc").write_text("int b;")
    assert build() != first
    monkeypatch.setattr(_runner, "_tool", lambda name: None)
    (source / "a.cc").write_text("int c;")
    with pytest.raises(DeviceError, match=r"no cmake on the PATH; pip install 'ticketkit\[device\]' has it"):
        build()


@pytest.mark.parametrize(
    ("abi", "names", "tools", "preset"),
    [
        ("riscv64-linux", WHOLE, "", "device"),
        ("aarch64-linux", WHOLE, "zig gcc ndk", "aarch64-linux-gnu-zig"),
        ("aarch64-linux", WHOLE, "gcc", "aarch64-linux-gnu"),
        ("aarch64-linux", [_runner.LAYERS], "zig", "aarch64-linux-musl"),
        ("aarch64-linux", [_runner.LAYERS], "gcc", "aarch64-linux-gnu"),
        ("aarch64-android", [_runner.LAYERS], "zig ndk", "aarch64-linux-musl"),
        ("aarch64-android", [_runner.LAYERS], "ndk", "android-arm64"),
        ("aarch64-android", WHOLE, "zig ndk", "android-arm64"),
        ("aarch64-android", WHOLE, "zig gcc", r"expected \$ANDROID_NDK"),
        ("aarch64-linux", WHOLE, "ndk", r"pip install 'ticketkit\[device\]' has one \(ziglang\)"),
        ("x86_64-linux", WHOLE, "zig gcc ndk", "can only be built on such a machine"),
    ],
)
def test_what_builds_for_what(abi, names, tools, preset, monkeypatch, tmp_path):
    monkeypatch.setenv("ANDROID_NDK", str(tmp_path) if "ndk" in tools else "")
    monkeypatch.setattr(_runner.shutil, "which", lambda name, path=None: "/bin/gcc" if "gcc" in tools else None)
    monkeypatch.setattr(_runner.importlib.util, "find_spec", lambda name: "zig" if "zig" in tools else None)
    monkeypatch.setattr(_runner.platform, "machine", lambda: "riscv64")
    try:
        assert _runner.preset(abi, names) == preset
    except DeviceError as error:
        assert re.search(preset, str(error))


def test_the_library_of_this_machine_and_of_android(tmp_path):
    pytest.importorskip("onnxruntime")
    here = f"{os.uname().machine}-linux"
    if here in _facts.ABIS:
        assert _runner.onnxruntime(here, None).name.startswith("libonnxruntime.so.")
    with pytest.raises(DeviceError, match=r"jni/arm64-v8a/libonnxruntime\.so in the archive"):
        _runner.onnxruntime("aarch64-android", None)
    assert _runner.onnxruntime("aarch64-android", elf(tmp_path / "lib.so")) == tmp_path / "lib.so"
    with pytest.raises(DeviceError, match=r"--onnxruntime: .*none\.so: No such file"):
        _runner.onnxruntime("aarch64-android", tmp_path / "none.so")


def test_the_library_of_another_processor_comes_from_a_wheel(tmp_path, monkeypatch):
    """pip is a stand-in here: a shelf with one wheel."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(_runner.platform, "machine", lambda: "riscv64")
    asked = []

    def pip(words, **_):
        asked.append(words)
        with zipfile.ZipFile(Path(words[words.index("-d") + 1]) / "onnxruntime.whl", "w") as wheel:
            wheel.writestr("onnxruntime/capi/libonnxruntime.so.1.2.3", elf(tmp_path / "lib").read_bytes())
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(_runner.subprocess, "run", pip)
    first = _runner.onnxruntime("aarch64-linux", None)
    assert first == _runner.onnxruntime("aarch64-linux", None) and first.read_bytes()[:4] == b"\x7fELF"
    ((python, *words),) = asked
    assert python == sys.executable and "manylinux_2_28_aarch64" in words and words[-1].startswith("onnxruntime==")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution")
    monkeypatch.setattr(_runner.subprocess, "run", lambda words, **_: failed)
    with pytest.raises(DeviceError, match=r"pip says 'ERROR: No matching distribution'; give a libonnxruntime\.so"):
        _runner.onnxruntime("aarch64-linux", None)
