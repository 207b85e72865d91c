"""doctor: what works here, and a plain reason for what does not."""

import io
import json
import os
import subprocess
import sys

import pytest
from rich.console import Console

from ticketkit import doctor
from ticketkit.bench import devices, engines

native = pytest.importorskip("ticketkit.runtime.native")


def run(*arguments, **environment):
    command = [sys.executable, "-m", "ticketkit.cli", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


def test_findings_are_complete_and_true():
    found = doctor.examine()
    assert json.loads(json.dumps(found)) == found
    assert found["cpu"]["name"]
    assert 1 <= found["cpu"]["processors"] <= os.cpu_count()
    assert found["library"]["error"] is None
    assert found["library"]["path"] == str(native.library_path())
    assert [(i["name"], i["usable"]) for i in found["library"]["isas"]] == [(i.name, i.usable) for i in native.isas()]
    assert found["library"]["active"] in {i["name"] for i in found["library"]["isas"] if i["usable"]}
    assert set(found["engines"]) == set(engines.names())
    assert found["engines"]["onnxruntime"] == {"usable": True, "why_not": "", "multiplies_zeros": True}
    assert all(bool(e["why_not"]) != e["usable"] for e in found["engines"].values())
    assert found["packages"]["numpy"]
    assert set(found["devices"]) == set(devices.names())
    assert all(bool(device["why_not"]) != device["usable"] for device in found["devices"].values())
    abis = ("aarch64-linux", "x86_64-linux", "aarch64-android")
    assert set(found["runners"]) == {f"{abi}, {what}" for abi in abis for what in ("models", "layers")}


def test_json_and_tables_say_the_same():
    as_json, as_table = run("--json"), run()
    assert as_json.returncode == as_table.returncode == 0, as_json.stderr + as_table.stderr
    found = json.loads(as_json.stdout)
    isas = [f"ISA {isa['name']}" for isa in found["library"]["isas"]]
    for expected in (found["cpu"]["name"], found["python"], *isas, *found["engines"], *found["packages"], "ssh:[USER@]HOST[:PORT]"):
        assert expected in as_table.stdout


def test_a_missing_library_is_said_and_fails(tmp_path):
    missing = str(tmp_path / "none.so")
    done = run("--json", TICKETKIT_LIBRARY=missing)
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert "not found" in found["library"]["error"]
    assert found["library"]["active"] is None
    assert not found["engines"]["ticketkit"]["usable"]
    assert "not found" in found["engines"]["ticketkit"]["why_not"]
    assert found["engines"]["onnxruntime"]["usable"]  # negative control: the rest is examined all the same


def test_something_that_is_no_library_is_said_and_fails(tmp_path):
    (tmp_path / "broken.so").write_bytes(b"not ELF")
    done = run("--json", TICKETKIT_LIBRARY=str(tmp_path / "broken.so"))
    assert done.returncode == 1
    assert "cannot be loaded" in json.loads(done.stdout)["library"]["error"]


@pytest.mark.parametrize("isa", [i.name for i in native.isas() if i.usable])
def test_a_forced_isa_is_the_active_one(isa, monkeypatch):
    monkeypatch.setenv("TICKETKIT_ISA", isa)
    assert doctor.examine()["library"]["active"] == isa


def test_an_unknown_isa_is_said_but_the_library_loads(monkeypatch):
    monkeypatch.setenv("TICKETKIT_ISA", "mmx")
    found = doctor.examine()
    assert "mmx" in found["library"]["isa_error"]
    assert (found["library"]["active"], found["library"]["error"]) == (None, None)
    assert "mmx" in found["engines"]["ticketkit"]["why_not"]


def test_missing_packages_are_reasons(monkeypatch):
    """As in a base install: no torch, no openvino."""
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in {"torch", "openvino"} else "1.0")
    for name in ("torch", "xnnpack", "openvino", "executorch"):
        monkeypatch.setattr(engines.get(name), "find_spec", lambda _: None)
    found = doctor.examine()
    assert found["packages"]["torch"] is None
    for name, extra in (("torch", "find"), ("xnnpack", "find"), ("openvino", "bench"), ("executorch", "executorch")):
        assert not found["engines"][name]["usable"]
        assert f"ticketkit[{extra}]" in found["engines"][name]["why_not"]
        console = Console(width=200, file=io.StringIO())
        console.print(doctor.render(found))
        assert f"ticketkit[{extra}]" in console.file.getvalue()  # rich would take [find] for markup
