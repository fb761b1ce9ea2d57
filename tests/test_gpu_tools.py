"""The GPU suite and its smoke test, as far as a machine without a GPU can try them."""

from __future__ import annotations

import json
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"


@pytest.fixture(scope="module")
def suite() -> dict[str, Any]:
    path = list(sys.path)
    found = runpy.run_path(str(TOOLS / "gpu_suite.py"), run_name="gpu_suite")
    sys.path[:] = path
    return found


def run_code(suite: dict[str, Any], code: str, limit: float, **more: Any) -> dict[str, Any]:
    arguments = ("-c", code)
    result: dict[str, Any] = suite["run_part"](
        suite["Part"]("a part", arguments, limit, arguments), arguments, limit, **more
    )
    return result


def test_lines_are_told_of_as_they_come(suite: dict[str, Any], tmp_path: Path) -> None:
    """The part goes on only when its first line has been told of: else it is stopped without a second one."""
    gate = str(tmp_path / "gate")
    code = (
        "import json, os, sys, time\n"
        "print(json.dumps({'case': 1}), flush=True)\n"
        f"while not os.path.exists({gate!r}): time.sleep(0.01)\n"
        "print('{not json}'); print('text'); print(json.dumps({'case': 2}))"
    )

    def told(lines: list[dict[str, Any]]) -> None:
        Path(gate).touch()
        seen.append(len(lines))

    seen: list[int] = []
    result = run_code(suite, code, 60, on_line=told)
    assert seen == [1, 2]
    assert (result["exit_code"], result["lines"]) == (0, [{"case": 1}, {"case": 2}])
    assert "end_of_output" not in result


def alive(process: int) -> bool:
    """Whether it runs (a process that ended may wait for its parent to take note)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("ends", [True, False])
def test_nothing_that_a_part_started_outlives_it(suite: dict[str, Any], ends: bool) -> None:
    """Neither when the part ends by itself, nor when its time is over; 5 s: enough for Python to begin."""
    code = (
        "import json, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(json.dumps({'child': child.pid}), flush=True)\n" + ("" if ends else "time.sleep(600)")
    )
    result = run_code(suite, code, 5)
    (line,) = result["lines"]
    deadline = time.monotonic() + 10
    while alive(line["child"]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(line["child"])
    assert result["exit_code"] == (0 if ends else None)
    assert ("stopped_after_seconds" in result) != ends


def test_what_failed_is_kept(suite: dict[str, Any]) -> None:
    """Named at the end, or, where the part is stopped before, as each test ended."""
    told = [
        "tests/a.py::a PASSED [ 50%]",
        "[gw1] [100%] FAILED tests/a.py::b",
        "FAILED tests/a.py::b - E",
        "1 failed in 2s",
    ]
    result = run_code(suite, f'print(\'{{"case": 1, "error": "x"}}\'); print({chr(10).join(told)!r})', 60)
    assert result["failed"] == told[1:3]
    assert result["summary"] == "1 failed in 2s"
    assert "FAILED tests/a.py::b" in result["end_of_output"]  # kept for a line of an error too
    assert suite["state_of"](result) == f"ok, {result['seconds']} s, 1 lines, 1 of errors. 1 failed in 2s"
    assert suite["state_of"]({"skipped": "no time left in the budget"}) == "no time left in the budget"


@pytest.mark.slow
def test_every_test_of_a_gpu_is_in_the_suite(suite: dict[str, Any]) -> None:
    given = suite["gpu_tests"](8)
    named = {argument for argument in given if argument.startswith("tests")}
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider", "tests"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout
    marked = set(re.findall(r"^(tests/\w+\.py)", collected, re.MULTILINE))
    assert marked
    assert marked == named
    assert given[:4] == ("-m", "pytest", "-m", "gpu")


def test_files_with_marks_of_any_form_are_found(suite: dict[str, Any]) -> None:
    named = suite["gpu_tests"](1)
    assert "tests/test_graphs.py" in named  # decorated tests
    assert "tests/test_kernels_operations.py" in named  # a parameter's mark
    assert "tests/test_gpu_tools.py" not in named  # it only speaks of them: "@pytest.mark.gpu"
    assert "-n" not in named


def test_parts_have_arguments_that_their_tools_take(
    suite: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [part.name for part in suite["PARTS"]]
    assert len(set(names)) == len(names)
    assert names[0] == "gpu_smoke"
    for part in suite["PARTS"]:
        if part.name == "tests":
            continue
        monkeypatch.setattr(sys, "argv", [part.arguments[0], "--help"])
        with pytest.raises(SystemExit):
            runpy.run_path(part.arguments[0], run_name="__main__")
        help_text = capsys.readouterr().out
        for argument in (*part.arguments[1:], *part.small[1:], *(("--device",) if part.on_device else ())):
            if argument.startswith("--"):
                assert argument in help_text, f"{part.name}: {argument}"


def test_a_suite_of_a_day_overwrites_no_other(suite: dict[str, Any], tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        path = suite["results_file"](tmp_path, "NVIDIA H100 80GB HBM3", "2030-01-02")
        path.touch()
        names.append(path.name)
    stem = "nvidia-h100-80gb-hbm3-2030-01-02"
    assert names == [f"{stem}.json", f"{stem}-2.json", f"{stem}-3.json"]


def test_a_suite_without_time_says_so(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "tools/gpu_suite.py",
        "--cpu",
        "--budget",
        "1",
        "--out",
        str(tmp_path),
        "--commit",
        "abc",
    ]
    done = subprocess.run([*command, "--skip", "tests"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    (path,) = tmp_path.glob("*.json")
    assert done.stdout.splitlines()[-1] == str(path)
    record = json.loads(path.read_text())
    assert record["small"] is True
    assert record["device"].startswith("cpu")
    assert "tests" not in [part["part"] for part in record["parts"]]
    assert {part["skipped"] for part in record["parts"]} == {"no time left in the budget"}


def test_without_a_gpu_the_suite_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py"])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(TOOLS / "gpu_suite.py"), run_name="__main__")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == 2
    assert capsys.readouterr() == ("", "gpu_suite: no GPU here: run on one, or try the suite with --cpu\n")


def test_items_of_the_smoke_test_fail_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = runpy.run_path(str(TOOLS / "gpu_smoke.py"))

    def broken(problem: Any) -> dict[str, Any]:
        raise ZeroDivisionError("luck")

    tool["ITEMS"]["regular"] = broken
    items = ["kernels", "regular", "memory cap", "star, graph", "evaluation by graphs"]
    monkeypatch.setattr(sys, "argv", ["gpu_smoke.py", "--small", "--device", "cpu", "--only", *items])
    assert tool["main"]() == 1
    lines = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert [line["case"] for line in lines] == items
    assert [line.get("error") for line in lines] == [None, "ZeroDivisionError: luck", None, None, None]
    assert [line.get("skipped") for line in lines] == [None, None, "needs a GPU", "CUDA graphs need a GPU", None]
    assert lines[0]["kernels"] == "reference"
    assert len(lines[4]["losses"][0]) == 3


def test_the_smoke_test_notices_wrong_numbers() -> None:
    tool = runpy.run_path(str(TOOLS / "gpu_smoke.py"))
    tool["alike"]([2.3, 2.0], [2.31, 1.95], "of eager steps")  # as bf16 rounds
    with pytest.raises(tool["FastarError"], match=r"losses \[2.3, 2.0\] differ from \[2.3, 2.2\] of eager steps"):
        tool["alike"]([2.3, 2.0], [2.3, 2.2], "of eager steps")
