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
        suite["Part"]("a part", 1, arguments, limit, arguments), arguments, limit, **more
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


@pytest.mark.slow
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
    assert suite["state_of"]({"skipped": "not begun"}) == "not begun"
    ruled = run_code(suite, "print('===== 1 failed, 3 passed in 2.05s =====')", 60)
    assert ruled["summary"] == "1 failed, 3 passed in 2.05s"


def test_what_was_left_out_is_counted_by_its_reason(suite: dict[str, Any]) -> None:
    lines = [{"case": 1}, {"case": 2, "skipped": "no luck"}, {"case": 3, "skipped": "no luck"}]
    result = {"exit_code": 0, "seconds": 2.0, "lines": lines, "without": ["--graph"]}
    told = ["ok, 2.0 s, 3 lines, 0 of errors.", "left out: no luck (2)", "left out: --graph needs a GPU (1)"]
    assert suite["state_of"](result).split("\n    ") == told


def test_two_calls_do_everything_in_their_time(suite: dict[str, Any]) -> None:
    """Whatever each part takes of its limit: the sum of a call's limits is less than its budget."""
    parts, limit_of = suite["PARTS"], suite["seconds_for"]
    for call in (1, 2):
        limits = [part.limit for part in parts if part.call == call]
        assert sum(limits) <= suite["CALL"] <= 540 - 15  # the rest: until the suite itself has begun
        for spent_of_limit in (0.2, 1.0):  # parts that are quicker than thought leave their time to the others
            left = suite["CALL"]
            for number, limit in enumerate(limits):
                given = limit_of(limits[number:], left)
                assert given is not None
                assert given >= limit
                left -= spent_of_limit * given if spent_of_limit < 1 else limit
                assert left >= sum(limits[number + 1 :])
    assert {part.call for part in parts} == {1, 2}


def test_a_part_that_cannot_end_is_not_begun(suite: dict[str, Any]) -> None:
    limit_of = suite["seconds_for"]
    assert limit_of([100, 50, 30], 300) == 220  # what the others leave over
    assert limit_of([100, 50, 30], 179) == 100  # never at the cost of its own limit
    assert limit_of([100, 50, 30], 100) == 100
    assert limit_of([100, 50, 30], 99.9) is None


def run_suite(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    """Its exit code, of a run in this process."""
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", *arguments])
    before, path = signal.getsignal(signal.SIGTERM), list(sys.path)
    try:
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(TOOLS / "gpu_suite.py"), run_name="__main__")
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.path[:] = path
    return stopped.value.code


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["--call", "1", "--skip", "gpu_smoke"], ["bench_step", "bench_kernels"]),
        (["--call", "2"], ["bench_imagenet", "tests"]),
        (["--only", "tests", "bench_step"], ["bench_step", "tests"]),
    ],
)
def test_parts_are_chosen_and_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: list[str], names: list[str]
) -> None:
    assert run_suite(monkeypatch, "--list", *given) == 0
    listed = [text.split(": ")[0] for text in capsys.readouterr().out.splitlines()]
    assert listed[: len(names)] == names


def test_no_part_left_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_suite(monkeypatch, "--list", "--call", "1", "--only", "tests") == 2
    assert "no part is left" in capsys.readouterr().err


def test_a_cpu_is_not_asked_for_graphs(suite: dict[str, Any]) -> None:
    part = next(part for part in suite["PARTS"] if part.name == "bench_epoch")
    given, without = suite["arguments_for"](part, True, torch.device("cpu"))
    assert ("--graph" in part.small, "--graph" in given, without) == (True, False, ["--graph"])
    assert given[-2:] == ("--device", "cpu")
    assert suite["arguments_for"](part, False, torch.device("cuda")) == ((*part.arguments, "--device", "cuda"), [])


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
    assert "tests/test_runtime_cuda_graph.py" in named  # decorated tests
    assert "tests/test_kernels_operations.py" in named  # a parameter's mark
    assert "tests/test_tools_gpu_smoke.py" not in named  # it only speaks of them: "@pytest.mark.gpu"
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
    # Each call has a file of its own, though each may be run on a machine that has none of the other's.
    assert suite["results_file"](tmp_path, "NVIDIA H100 80GB HBM3", "2030-01-02", 2).name == f"{stem}-call-2.json"


@pytest.mark.slow
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
    assert record["started"][:10] == record["date"]
    assert record["cores"] >= 1
    assert record["device"].startswith("cpu")
    assert "tests" not in [part["part"] for part in record["parts"]]
    told = [part["skipped"] for part in record["parts"]]
    assert all(re.fullmatch(r"not begun: it may take \d+ s, [01] s are left", text) for text in told), told


def test_without_a_gpu_the_suite_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_suite(monkeypatch) == 2
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
    assert [line.get("skipped") for line in lines] == [
        None,
        None,
        "a cap is of a GPU's memory",
        "CUDA graphs need a GPU",
        None,
    ]
    assert lines[0]["kernels"] == "reference"
    assert len(lines[4]["losses"][0]) == 3


def test_the_smoke_test_notices_wrong_numbers() -> None:
    tool = runpy.run_path(str(TOOLS / "gpu_smoke.py"))
    tool["alike"]([2.3, 2.0], [2.31, 1.95], "of eager steps")  # as bf16 rounds
    with pytest.raises(tool["FastarError"], match=r"losses \[2.3, 2.0\] differ from \[2.3, 2.2\] of eager steps"):
        tool["alike"]([2.3, 2.0], [2.3, 2.2], "of eager steps")
