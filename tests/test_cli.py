"""The frame of the command line: every expected failure is one line on stderr, an exit code other than 0, and no traceback."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ticketkit import cli, errors


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_missing_extra_is_named() -> None:
    done = run("import sys; sys.modules['torch'] = None; from ticketkit import cli; cli.main(['find', 'digits'])")
    assert done.returncode == 1
    assert done.stderr.startswith("ticketkit: error: torch is needed") and "ticketkit[find]" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("failure", "code", "says"),
    [
        (errors.DataError("two\nlines"), 1, "two lines"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "/full/disk"), 1, "/full/disk: No space left on device"),
        (MemoryError(), 1, "out of memory"),
    ],
)
def test_failures_become_one_line(
    failure: BaseException, code: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(cli.cli, "main", fails)
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    printed = capsys.readouterr().err
    assert stop.value.code == code and says in printed and printed.count("\n") == 1


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only expected failures are shortened; hiding a bug would help nobody."""

    def fails(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli.cli, "main", fails)
    with pytest.raises(ZeroDivisionError):
        cli.main([])


def test_unknown_command_and_option() -> None:
    for words in ("['fly']", "['find', '--wings']"):
        done = run(f"from ticketkit import cli; cli.main({words})")
        assert done.returncode == 2 and "Error: No such" in done.stderr and "Traceback" not in done.stderr
