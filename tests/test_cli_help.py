"""Help and documentation say nothing that does not exist; `fastar doctor` says what is here."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from cli_cases import fastar

from fastar._version import __version__
from fastar.cli import doctor
from fastar.cli.main import app
from fastar.config import flatten, load_settings

ROOT = Path(__file__).resolve().parent.parent
GROUP = typer.main.get_command(app)
assert hasattr(GROUP, "commands")
COMMANDS = GROUP.commands


def examples(text: str) -> list[list[str]]:
    """The fastar commands in a text, split as a shell would, continuation lines joined."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return [shlex.split(line, comments=True)[1:] for line in re.findall(r"^\s*(fastar [a-z].*)$", joined, re.MULTILINE)]


def check(arguments: list[str]) -> None:
    """Parse `fastar ARGUMENTS`, run nothing, and check that every key=value is a setting."""
    name, *rest = arguments
    command = COMMANDS[name]
    context = command.make_context(name, rest, resilient_parsing=False)
    given = [value for key, value in context.params.items() if key not in ("model_args", "sbatch")]
    words = [str(v) for value in given for v in (value if isinstance(value, list | tuple) else [value])]
    settings = [word for word in words if re.match(r"[a-z_]+(\.[a-z_]+)*=", word)]
    dataset = context.params.get("dataset") or "digits"
    called = context.params.get("name") if "dataset" in context.params else None
    settings += [] if called is None else [f"dataset.own_name={called}"]
    load_settings(dataset=dataset, arch=context.params.get("arch"), overrides=[s for s in settings if "DIR" not in s])


def test_commands_are_those_promised() -> None:
    assert set(COMMANDS) == {
        *("train-star", "plan", "sweep", "train-sources", "match", "match-many"),
        *("barrier", "uncertainty", "fuse", "perturb", "distances", "theory"),
        *("graph", "plane", "curve", "reproduce"),
        *("symmetry", "report", "runs", "verify", "configs", "doctor"),
    }


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_examples_that_parse(name: str) -> None:
    found = examples(COMMANDS[name].help or "")
    assert found, "no example"
    for arguments in found:
        assert arguments[0] == name
        check(arguments)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_explains_every_option(name: str) -> None:
    for flag in ("--help", "-h"):
        outcome = fastar(name, flag)
        assert outcome.code == 0
        assert "Example" in outcome.out
        assert outcome.err == ""
    for parameter in COMMANDS[name].params:
        if parameter.name != "help":
            assert getattr(parameter, "help", None), f"{name}: {parameter.name} has no help"


def test_an_example_that_is_wrong_would_be_noticed() -> None:
    with pytest.raises(Exception, match="No such option"):  # of click, which typer may carry within itself
        check(["train-star", "--datset", "digits"])
    with pytest.raises(ValueError):
        check(["train-star", "--dataset", "digits", "train.epoch=3"])


def test_top_help_and_bare_command() -> None:
    outcome = fastar("--help")
    assert outcome.code == 0
    assert "fastar train-star --dataset digits" in outcome.out
    for name in COMMANDS:
        assert name in outcome.out
    bare = fastar()
    assert (bare.code, bare.err) == (0, "")
    assert "train-star" in bare.out


def test_version() -> None:
    assert fastar("--version") == type(fastar("--version"))(0, f"fastar {__version__}\n", "")


PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", *PAGES])
def test_documented_commands_exist(file: str) -> None:
    path = ROOT / file
    if not path.is_file():
        pytest.skip(f"no {file} yet")
    text = path.read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)) + "\n"
    inline = [code for code in re.findall(r"`(fastar [^`]+)`", text) if "[" not in code]
    names = {code.split()[1] for code in inline if len(code.split()) == 2}  # a command's name in a sentence
    assert names <= {*COMMANDS, "--help"}
    quoted = "\n".join(code for code in inline if len(code.split()) > 2)
    for arguments in examples(blocks + quoted):
        check([argument.replace("NAME", "digits") for argument in arguments])
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"`?\bmake ([a-z-]+)", blocks) + re.findall(r"`make ([a-z-]+)", text):
        assert target in targets, f"make {target}"
    for script in re.findall(r"\b(tools/\w+\.(?:py|sh)|configs/[\w-]+\.yaml|tests/\w+\.py)", text):
        assert (ROOT / script).is_file(), script


def test_settings_named_in_help_exist() -> None:
    keys = set(flatten(load_settings(dataset="digits").model_dump(mode="json")))
    texts = [GROUP.help or "", *(getattr(p, "help", "") or "" for c in COMMANDS.values() for p in c.params)]
    named = {match for text in texts for match in re.findall(r"\b((?:train|sources|star|dataset)\.[a-z_]+)", text)}
    assert named
    assert named <= keys


def test_doctor_tries_every_part(capfd: pytest.CaptureFixture[str]) -> None:
    outcome = fastar("doctor")
    assert outcome.code == 0, outcome
    lines = outcome.out.splitlines()
    assert [line.split()[1].rstrip(":") for line in lines] == [
        *("python", "torch", "gpu", "bf16", "kernels", "assignment", "lapjv", "triton", "data", "ffcv"),
        *("torchvision", "memory"),
    ]
    assert all(re.match(r"(ok  |note) \w+: .{5,}", line) for line in lines)
    assert "wrote and read 1797 images" in outcome.out
    found = json.loads(fastar("doctor", "--json").out)
    assert [set(entry) for entry in found] == [{"name", "ok", "text", "needed"}] * 12


def test_doctor_says_what_is_broken_and_what_is_only_slower() -> None:
    def broken() -> str:
        raise ImportError("libfoo.so:\n  cannot open")

    def fine() -> str:
        return "1.0"

    assert [str(check) for check in doctor.examine([("a", broken, True), ("b", broken, False), ("c", fine, True)])] == [
        "FAIL a: libfoo.so: cannot open",
        "note b: libfoo.so: cannot open",
        "ok   c: 1.0",
    ]


@pytest.mark.parametrize(
    ("cpuinfo", "found"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 amx_bf16 amx_tile\n", ["avx512_bf16", "amx_bf16"]),
        ("processor\t: 0\nflags\t\t: fpu avx avx2 avx512_bf16x\n", []),
        ("processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n", ["bf16"]),
        ("", []),
        (None, []),
    ],
)
def test_doctor_knows_cpus_that_compute_in_bf16(cpuinfo: str | None, found: list[str], tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        path.write_text(cpuinfo)
    said = doctor._bf16(path)
    assert ("can halve" in said, "emulated" in said) == (bool(found), not found)
    assert f"({', '.join(found)})" in said or not found


def test_doctor_notices_a_kernel_that_computes_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "lerp", lambda *given, out: out.fill_(0))
    outcome = fastar("doctor")
    assert outcome.code == 1
    assert "FAIL kernels" in outcome.out
