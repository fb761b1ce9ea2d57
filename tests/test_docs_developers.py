"""The pages of docs/developers are true: they are followed to the letter in a copy of the package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs" / "developers").glob("add-*.md"))
STEP = re.compile(
    r"^New file `(?P<new>[^`]+)`:\n\n|^In `(?P<old>[^`]+)`, (?P<how>below|instead of) `(?P<line>[^`]+)`:\n\n",
    flags=re.MULTILINE,
)

PROGRAM = """
import json, runpy, shlex, shutil, sys
from fastar.cli.main import main
for page, commands in json.load(sys.stdin).items():
    shutil.rmtree("run", ignore_errors=True)
    for command in commands:
        print("$", command, flush=True)
        program, *arguments = shlex.split(command, comments=True)
        if program == "python":
            runpy.run_path(arguments[0], run_name="__main__")
            continue
        assert program == "fastar", program
        try:
            main(arguments)
        except SystemExit as end:
            assert not end.code, (page, command)
"""


def follow(page: str, package: Path) -> list[str]:
    """Do what the page says of files; its commands, in order."""
    commands = []
    for match in re.finditer(r"```(\w+)\n(.*?)```", page, flags=re.DOTALL):
        language, code = match.groups()
        if language == "sh":
            commands += code.replace("\\\n", " ").splitlines()
            continue
        named = re.match(r"# (\S+\.py)\n", code)
        steps = [step for step in STEP.finditer(page) if step.end() == match.start()]
        if named is not None:
            (package / named.group(1)).write_text(code, encoding="utf-8")
        elif steps and steps[0]["new"]:
            path = package / steps[0]["new"]
            assert not path.exists(), path
            path.write_text(code, encoding="utf-8")
        else:
            assert steps, f"what is to be done with\n{code}"
            path = package / steps[0]["old"]
            before, line, after = path.read_text(encoding="utf-8").partition(f"{steps[0]['line']}\n")
            assert line, f"{path} has no line {steps[0]['line']!r}"
            kept = line if steps[0]["how"] == "below" else ""
            path.write_text(before + kept + code + after, encoding="utf-8")
    return commands


def test_the_pages_are_followed_to_the_letter(tmp_path: Path) -> None:
    """All in one copy, and their commands in one process, since each would import torch anew."""
    for folder in ("fastar", "kernels", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    commands = {page.stem: follow(page.read_text(encoding="utf-8"), tmp_path) for page in PAGES}
    assert len(commands) == 5
    assert all(commands.values())
    # Data go into a home of its own; matplotlib's list of fonts, which takes it seconds, is the one that is there.
    own = {"PYTHONPATH": str(tmp_path), "HOME": str(tmp_path), "MPLCONFIGDIR": matplotlib.get_cachedir()}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(commands),
        cwd=tmp_path,
        env={**os.environ, **own},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.count("$ ") == sum(map(len, commands.values()))
