"""The import rule of the house: who may import whom, and which packages each room may use."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "ticketkit"
STDLIB = set(sys.stdlib_module_names)
DEPLOY, TORCH = {"numpy"}, {"numpy", "torch", "torchvision", "lightning_fabric", "torchmetrics", "safetensors", "onnx"}

# room -> (rooms it may import, packages it may import); what a function imports lazily counts too, but for type checking
ROOMS: dict[str, tuple[set[str], set[str]]] = {
    "errors": (set(), set()),
    "quiet": (set(), set()),
    "masks": ({"errors"}, DEPLOY),
    "ticket": ({"errors", "masks"}, DEPLOY | {"safetensors"}),
    "formats": ({"errors"}, DEPLOY),
    "runtime": ({"errors", "formats"}, DEPLOY),
    "lower": ({"errors", "formats", "runtime"}, DEPLOY | {"onnx", "onnxruntime", "onnx_ir"}),
    "cost": ({"errors", "formats", "lower"}, DEPLOY),
    "planner": ({"errors", "formats", "runtime", "lower", "cost"}, DEPLOY | {"onnx", "rich"}),
}
ROOMS["cores"] = ({"errors", "formats", "runtime", "lower", "cost"}, DEPLOY)
ROOMS["tune"] = ({"errors", "formats", "runtime", "lower", "cost", "planner"}, DEPLOY | {"onnxruntime"})
ROOMS["inputs"] = ({"errors", "formats", "ticket"}, DEPLOY | {"PIL"})
ROOMS["exporters"] = ({*ROOMS, "exporters"}, DEPLOY | {"onnx", "onnxruntime", "safetensors"})
ROOMS["session"] = ({*ROOMS}, DEPLOY | {"onnx", "onnxruntime"})
ROOMS["bench"] = ({*ROOMS}, DEPLOY | {"onnx", "onnxruntime", "openvino", "psutil", "rich", "torch"})
ROOMS["doctor"] = ({*ROOMS}, {"rich", "psutil"})
BELOW_TORCH = {"errors", "quiet", "masks", "ticket"}
ROOMS["models"] = (BELOW_TORCH, TORCH)
ROOMS["tasks"] = (BELOW_TORCH | {"models"}, TORCH | {"sklearn", "PIL"})
ROOMS["pretrain"] = (BELOW_TORCH | {"models", "tasks"}, TORCH)
ROOMS["capture"] = (BELOW_TORCH | {"models"}, TORCH | {"onnxscript"})
ROOMS["search"] = (BELOW_TORCH | {"models", "pretrain", "tasks", "capture"}, TORCH | {"rich"})
ROOMS["analysis"] = (BELOW_TORCH | {"search"}, {"numpy", "rich", "matplotlib"})  # of search only what needs no torch
ROOMS["verifier"] = (BELOW_TORCH | {"models", "pretrain", "tasks", "search"}, TORCH | {"rich"})
ROOMS["estimator"] = ({*ROOMS}, DEPLOY | {"onnx", "rich", "torch", "torchvision"})
ROOMS["quickstart"] = (set(ROOMS), {"rich", "torch", "torchvision", "numpy", "onnx"})
ROOMS["cli"] = (set(ROOMS), {"click", "rich", "numpy", "PIL"})
VERBS_ONLY = {("exporters", "search"), ("exporters", "capture")}  # `export` of a run directory reaches torch through these, lazily
MORE = {  # file -> packages that it may use beside those of its room
    "runtime/gpu/__init__.py": {"torch"},
    "runtime/gpu/launch.py": {"torch", "triton"},
    "runtime/gpu/weight.py": {"torch"},
    "runtime/torch_cache.py": {"torch"},
    "runtime/torch_cpu.py": {"torch"},
    "runtime/torch_gpu.py": {"torch"},
    "runtime/torch_modules.py": {"torch"},
    "runtime/torch_op.py": {"torch"},
    "runtime/torch_graph.py": {"torch", "onnx"},
    "runtime/torch_operators.py": {"torch", "onnx"},
    "exporters/_torch.py": {"torch"},
    "exporters/torch.py": {"torch"},
    "exporters/executorch.py": {"torch", "executorch"},
    "bench/engines/executorch.py": {"torch", "executorch"},
}
ONLY_HERE = {"ctypes": "runtime/native.py", "click": "cli"}
LAZY_TORCH = {"bench", "estimator", "exporters", "quickstart"}  # may import torch inside a function, never at module level


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, at module level) of each import but those for type checkers."""
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                found.extend((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                assert child.level == 0, f"{path}: relative import"
                names = [f"ticketkit.{a.name}" for a in child.names] if child.module == "ticketkit" else [child.module]
                found.extend((name, top) for name in names)
            else:
                visit(child, top and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    visit(ast.parse(path.read_text(encoding="utf-8")), True)
    return found


def only_here(package: str, relative: Path) -> bool:
    """Whether the file may import the package: anyone may, or it is the one file or lies in the one room that may."""
    return ONLY_HERE.get(package, str(relative)) in (str(relative), relative.parts[0])


MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_module_imports_only_what_its_room_may(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    room = relative.parts[0].removesuffix(".py")
    assert room in ROOMS, f"{relative}: a new room; give it its place in this table and in the house plan"
    rooms, packages = ROOMS[room]
    for name, top in imports(path):
        package, _, rest = name.partition(".")
        if package == "ticketkit":
            target = rest.partition(".")[0]
            allowed = target in rooms | {room, "__version__"} or ((room, target) in VERBS_ONLY and not top)
            assert allowed, f"{relative} imports ticketkit.{rest}"
        elif package in STDLIB:
            assert only_here(package, relative), f"{relative} imports {package}"
        else:
            assert package in packages | MORE.get(relative.as_posix(), set()), f"{relative} imports {package}"
            assert only_here(package, relative), f"{relative} imports {package}"
            assert not (top and package.startswith("torch") and room in LAZY_TORCH), f"{relative} imports {package} at module level"


def test_the_rule_can_fail(tmp_path: Path) -> None:
    """Negative control: the walker sees imports at module level, in functions and not those for type checkers."""
    source = tmp_path / "m.py"
    lazily = "def f():\n    from ticketkit import cli\n    from ticketkit.a.b import c\n"
    source.write_text("import torch\nif TYPE_CHECKING:\n    import click\n" + lazily)
    assert imports(source) == [("torch", True), ("ticketkit.cli", False), ("ticketkit.a.b", False)]


@pytest.mark.parametrize("words", [["--help"], ["doctor", "--help"], ["doctor"]])
def test_torch_is_not_needed(words: list[str]) -> None:
    """`import ticketkit` and --help work where torch cannot be imported, and stay far from half a second."""
    blocked = "import sys; sys.modules['torch'] = None; sys.modules['torchvision'] = None; "
    blocked += f"from ticketkit import cli; cli.main({words})"
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    heavy = "import sys; import ticketkit.cli; print([m for m in ('torch', 'onnxruntime', 'onnx', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_help_is_fast() -> None:
    """Processor time, not wall time: other work on the machine must not matter. The promise is 0.5 s."""
    before = os.times()
    subprocess.run([sys.executable, "-m", "ticketkit.cli", "--help"], check=True, capture_output=True)
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 0.5
