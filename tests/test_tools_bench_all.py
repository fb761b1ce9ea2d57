"""tools/bench_all.py: the table of docs/benchmarks.md follows from the lines of claims, and parts fail alone."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from bench import claim

from fastar.errors import FastarError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    specification = importlib.util.spec_from_file_location("bench_all", ROOT / "tools" / "bench_all.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["bench_all"] = module  # its dataclass looks for it
    specification.loader.exec_module(module)
    return module


def line(part: str, text: str, ours: list[float], peer: list[float], **more: Any) -> dict[str, Any]:
    versions = {"torch": "2.13.0", "commit": "abc+changes"}
    both = {"ours": ours, "peer": peer}
    found = json.loads(claim("matching", text, "rebasin", both, both if more.pop("cpu_known", True) else None, **more))
    return {**found, "part": part, "cores": 1, "date": "2026-01-02", "cpu": "a CPU", "versions": versions}


def test_the_table_follows_from_the_lines(tool: ModuleType) -> None:
    lines = [
        {"part": "loader", "cores": 1, "failed": "more than 60 s"},
        line("matching", "a pair", [0.5, 1.0, 2.0], [6.0, 11.0, 20.0]),
        line("matching", "another", [0.0123], [1.5], cpu_known=False),
        line("job", "the whole job", [100.0], [300.0]),
        line("a part that is no more", "old", [1.0], [1.0]),
    ]
    table = tool.table(lines)
    assert [row for row in table.splitlines() if row.startswith("| ")][1:] == [
        "| the whole job | rebasin | 100 s | 300 s | 3 | 3 | 1 | 1 |",
        "| a pair | rebasin | 1 s | 11 s | 11 (10.5 to 11.5) | 11 (10.5 to 11.5) | 3 | 1 |",
        "| another | rebasin | 12.3 ms | 1.5 s | 122 | - | 1 | 1 |",
    ]
    assert table.endswith("2026-01-02: a CPU, torch 2.13.0, commit abc.\n\nNot finished: loader (more than 60 s).")
    page = f"before\n{tool.BEGIN}\n\nold\n\n{tool.END}\nafter\n"
    written = tool.with_table(page, table)
    assert written == f"before\n{tool.BEGIN}\n\n{table}\n\n{tool.END}\nafter\n"
    assert tool.with_table(written, table) == written
    with pytest.raises(FastarError, match="has no"):
        tool.with_table("nothing", table)


def test_readme_and_the_page_say_what_was_measured(tool: ModuleType) -> None:
    kept = tool.read(tool.RESULTS)
    page, readme = tool.PAGE.read_text(encoding="utf-8"), tool.README.read_text(encoding="utf-8")
    assert tool.with_figures(readme, kept) == readme
    assert tool.with_table(page, tool.table(kept)) == page
    claims = [line(part, f"{text} (x)", [1.0], [11.25 + n]) for n, (part, text) in enumerate(tool.FIGURES)]
    assert tool.with_figures(readme, claims[1:]) == readme  # one is not known
    changed = tool.with_figures(readme, claims)
    assert "matching is 11.2 times faster" in " ".join(changed.split())
    assert "the whole job 14.2:" in " ".join(changed.split())
    assert len(changed.splitlines()) <= 150
    assert tool.with_figures(changed, claims) == changed


def test_a_part_that_fails_ends_no_other(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scripts = {
        "good.py": f"print({json.dumps(line('x', 'fast', [1.0], [2.0]))!r})",
        "bad.py": f"print({json.dumps(line('x', 'half', [1.0], [3.0]))!r}); raise SystemExit('no luck')",
        "empty.py": "print('{}')",
    }
    (tmp_path / "tools").mkdir()
    for name, text in scripts.items():
        (tmp_path / "tools" / name).write_text(text)
    parts = [tool.Part(name, 1, 60, f"{name}.py", f"{name}.py") for name in ("bad", "good", "empty")]
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "PARTS", parts)
    saved: list[list[dict[str, Any]]] = []
    kept = [line("good", "from before", [1.0], [2.0])]
    for part in parts:
        kept = tool.measure(part, kept, part.command, 60, saved.append)
    assert saved[-1] == kept
    assert len(saved) == 6  # with each line, and when each part had ended
    assert [(one["part"], one.get("claim"), one.get("failed")) for one in kept] == [
        ("bad", "half", None),
        ("bad", None, "exit code 1"),
        ("good", "fast", None),
        ("empty", None, "claimed nothing"),
    ]
    assert all(one["cores"] == 1 for one in kept)
    told = capsys.readouterr()
    assert "FAILED: exit code 1, 1 claims" in told.out
    assert "no luck" in told.err


def test_every_part_is_a_script_with_options_it_knows(tool: ModuleType) -> None:
    """A part's name is its own, and its script is there."""
    assert len({part.name for part in tool.PARTS}) == len(tool.PARTS)
    for part in tool.PARTS:
        for command in (part.command, part.small):
            script = (ROOT / "tools" / command.split()[0]).read_text(encoding="utf-8")
            shared = (ROOT / "tools" / "bench" / "problem.py").read_text(encoding="utf-8")
            options = [word for word in command.split() if word.startswith("--")]
            assert all(f'"{option}"' in script + shared for option in options), command
    assert sum(part.limit for part in tool.PARTS) <= 40 * 60  # twice as long as they are thought to take
