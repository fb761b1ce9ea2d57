"""`fastar verify`: what is damaged on disk is found, whatever it is, and said in a line each."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from cli_cases import contents, fastar, refused
from run_cases import Killed, at_call, kill, small

from fastar.experiments import train_star
from fastar.experiments.files.verify_files import recheck
from fastar.report.results import barrier_picture
from fastar.runs import RETRY, RunFolder, hold, write_json
from fastar.runs.live_metrics import EventFile
from fastar.runs.model_files import load_checkpoint, save_checkpoint
from fastar.training import StarStep


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A small finished run with all that a run folder may hold; not to be changed."""
    run = RunFolder(tmp_path_factory.mktemp("runs") / "finished")
    options = ["sources.heldout=1", "logging.tensorboard=true", "model.width=8"]
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, StarStep, 5, kill)
        with pytest.raises(Killed):
            train_star(small(data, *options), run.path)
    kept = Path(shutil.copytree(run.path / "in-training", run.path.with_name("kept")))
    barrier_picture(train_star(small(data, *options), run.path), run.picture)
    kept.rename(run.path / "in-training")
    return run.path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(finished, tmp_path / "run")))


def flipped(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_what_commands_write_is_checked_too(run: RunFolder) -> None:
    """Whatever `write_json` writes, by any command; another's JSON without a digest is named."""
    for name in ("uncertainty.json", "graph.json"):
        write_json(run.path / name, {"families": {"star": [0.5, None]}})
        assert damage(run, name, list(range(0, 8 * (run.path / name).stat().st_size, 211))) == []
    (run.path / "mine.json").write_text("{}")
    assert [line.split(":")[0] for line in recheck(run.path).notes] == [str(run.path / "mine.json")]


def test_a_run_that_is_well(finished: Path) -> None:
    before = contents(finished)
    outcome = fastar("verify", finished, "--quiet")
    assert (outcome.code, outcome.out, outcome.err) == (0, f"{finished}: run, all well\n", "")
    said = json.loads(fastar("verify", finished, "--json").out)
    assert said == {"path": str(finished), "kind": "run", "damaged": [], "notes": []}
    assert contents(finished) == before
    kinds = {Path(name).suffix for name in before} | {Path(name).parts[0] for name in before}
    assert {"config.yaml", "log.jsonl", "results.json", "barrier.png", "star.safetensors", "sources"} <= kinds
    assert {"permutations.safetensors", "heldout", "tensorboard", "in-training"} <= kinds


def damage(run: RunFolder, name: str, bits: list[int]) -> list[int]:
    """Those of the bits that may change without being found; the file is as it was afterwards.

    Another way to spell the same number (1e-05, 1E-05) is no damage.
    """
    path, missed = run.path / name, []
    read: Callable[[], object] = {"log.jsonl": run.log.lines, "results.json": run.read_results}.get(
        name, path.read_bytes
    )
    if name.endswith(".json"):
        read = partial(content, path)
    whole, wanted = path.read_bytes(), read()
    for bit in bits:
        flipped(path, bit)
        found = recheck(run.path).damaged
        assert all("\n" not in line for line in found)
        if not any(name in line for line in found) and read() != wanted:
            missed.append(bit)
        path.write_bytes(whole)
    return missed


def test_a_bit_of_any_file_is_found(run: RunFolder) -> None:
    draw = random.Random(0)
    for name, content in contents(run.path).items():
        bits = [draw.randrange(8 * len(content)) for _ in range(2)] + [8 * len(content) - 1]
        assert damage(run, name, bits) == [], name


def content(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


@pytest.mark.slow
def test_many_bits_of_any_file_are_found(run: RunFolder) -> None:
    draw = random.Random(1)
    for name, content in contents(run.path).items():
        assert damage(run, name, [draw.randrange(8 * len(content)) for _ in range(100)]) == [], name


def test_any_bit_of_a_line_of_the_log_counts(run: RunFolder) -> None:
    """Except where it spells the same number in another way."""
    (run.path / "log.jsonl").write_bytes(run.log.path.read_bytes().splitlines(keepends=True)[0])
    (wanted,) = run.log.lines()
    whole = run.log.path.read_bytes()
    for bit in range(0, 8 * len(whole), 11):
        flipped(run.log.path, bit)
        lines = run.log.lines()
        assert lines == [wanted] or None in lines, whole[bit // 8 - 9 : bit // 8 + 9]
        run.log.path.write_bytes(whole)


DAMAGES: dict[str, Callable[[RunFolder], None]] = {
    "sources/seed-0001.safetensors: missing": lambda run: run.model("source", 1).unlink(),
    "heldout/seed-0000.safetensors: missing": lambda run: run.model("heldout", 0).unlink(),
    "permutations.safetensors: missing": lambda run: run.permutations.unlink(),
    "star.safetensors: missing": lambda run: run.star.unlink(),
    "seed-0000.safetensors: is source 1": lambda run: shutil.copy(run.model("source", 1), run.model("source", 0)),
    "seed-0000.safetensors: is source 0": lambda run: shutil.copy(run.model("source", 0), run.model("heldout", 0)),
    "seed-0000.safetensors: is not the source that": lambda run: changed(run.model("source", 0)),
    "permutations.safetensors: belongs to another star": lambda run: changed(run.star),
    "is no permutation of its units": lambda run: changed(run.permutations),
    "star.safetensors: says nothing": lambda run: save_checkpoint(run.star, {"w": torch.ones(1)}, {"kind": "x"}),
    "config.yaml: is not as it was written": lambda run: edited(run.config, "workers: 1", "workers: 2"),
    "log.jsonl: 1 of ": lambda run: edited(run.log.path, '"epoch": 0', '"epoch": 1'),
    "log.jsonl: cut short: it has 0 of 2 epochs of heldout 0, and results.json": lambda run: halved(run.log.path),
    "results.json: holds no results": lambda run: edited(run.results, '"seed": 0', '"seed": 1'),
    "retry.json: damaged": lambda run: (run.in_training("star", 0) / RETRY).write_text("{"),
}


def changed(path: Path) -> None:
    """A file with digests that fit, and other values."""
    checkpoint = load_checkpoint(path)
    state = dict(checkpoint.state)
    name = next(name for name, value in state.items() if value.ndim)
    save_checkpoint(path, {**state, name: state[name] * 2}, checkpoint.metadata)


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edited(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


@pytest.mark.parametrize("said", DAMAGES)
def test_what_is_damaged_is_said(run: RunFolder, said: str) -> None:
    DAMAGES[said](run)
    outcome = fastar("verify", run.path, "--quiet")
    assert (outcome.code, outcome.err) == (1, "")
    assert [line for line in outcome.out.splitlines() if said in line] != []
    assert json.loads(fastar("verify", run.path, "--json").out)["damaged"] == outcome.out.splitlines()


def test_each_damage_has_a_line(run: RunFolder) -> None:
    for path in (run.model("source", 0), run.model("source", 1), run.star, run.results):
        flipped(path, 8 * path.stat().st_size - 80)
    assert len(recheck(run.path).damaged) == 4


def test_a_star_with_a_damaged_header_has_one_line(run: RunFolder) -> None:
    """It was read once more for the permutations, and said twice."""
    flipped(run.star, 8 * 40)
    assert [str(run.star) in line for line in recheck(run.path).damaged] == [True]


@pytest.mark.parametrize(
    "name", ["config.yaml", "barrier.png", "tensorboard", "in-training", "results.json", "sources"]
)
def test_a_pipe_is_not_waited_for(run: RunFolder, name: str) -> None:
    path = run.path / name
    path = path if path.is_file() else next(file for file in sorted(path.rglob("*")) if file.is_file())
    path.unlink()
    os.mkfifo(path)
    assert any(path.name in line for line in recheck(run.path).damaged)


def test_a_stopped_run_is_well(run: RunFolder) -> None:
    """Without star and results, with a line that a kill has cut, notes and copies: nothing of that is damage."""
    for path in (run.star, run.permutations, run.results, run.picture):
        path.unlink()
    run.log.path.write_bytes(run.log.path.read_bytes()[:-10])
    file = EventFile(run.path / "tensorboard" / "star-0001")
    file.add(1, {"loss": 1.0})
    file.close()
    events = next((run.path / "tensorboard" / "star-0001").iterdir())
    events.write_bytes(events.read_bytes()[:-10])
    (run.path / "sources" / "seed-0000 (copy).safetensors").write_text("mine")
    (run.path / "in-training" / "star-0000.bak").write_text("mine")
    assert recheck(run.path).damaged == []


def test_a_run_in_use_is_named(run: RunFolder) -> None:
    with hold(run.path):
        found = recheck(run.path)
    assert (found.damaged, len(found.notes), "in use (process" in found.notes[0]) == ([], 1, True)


def test_what_older_versions_wrote_is_named(run: RunFolder) -> None:
    results = run.read_results()
    run.results.write_text(json.dumps(results, indent=1) + "\n")
    run.config.write_text(run.config.read_text().rpartition("# digest: ")[0])
    run.log.path.write_text("".join(json.dumps(entry) + "\n" for entry in run.log.read()))
    permutations = load_checkpoint(run.permutations)
    save_checkpoint(run.permutations, permutations.state, {"kind": "matching"})
    found = recheck(run.path)
    assert found.damaged == []
    assert [line.split(":")[0].removeprefix(f"{run.path}/") for line in found.notes] == [
        *("config.yaml", "permutations.safetensors", "results.json"),
    ]


def test_a_model_alone(run: RunFolder, tmp_path: Path) -> None:
    assert fastar("verify", run.star).out == f"{run.star}: model, all well\n"
    flipped(run.star, 8 * run.star.stat().st_size - 1)
    outcome = fastar("verify", run.star)
    assert (outcome.code, outcome.out.count("\n"), "damaged" in outcome.out) == (1, 1, True)
    torch.save({"w": torch.ones(2)}, tmp_path / "other.pt")
    found = recheck(tmp_path / "other.pt")
    assert (found.kind, found.damaged, len(found.notes)) == ("model", [], 1)


def test_a_data_set(data: Path, finished: Path, tmp_path: Path) -> None:
    (original,) = (path.parent for path in data.rglob("metadata.json"))
    folder = Path(shutil.copytree(original, tmp_path / "data"))
    assert fastar("verify", folder, "--quiet").out == f"{folder}: data set, all well\n"
    flipped(folder / "train.beton", 8 * (folder / "train.beton").stat().st_size - 800)
    outcome = fastar("verify", folder, "--quiet")
    assert (outcome.code, outcome.out.count("train.beton")) == (1, 1)


def test_what_is_none_of_them_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    for path in (tmp_path, tmp_path / "letter.txt", tmp_path / "nowhere"):
        assert str(path) in refused("verify", path)


def test_what_commands_train_in_the_run_folder_is_checked_too(run: RunFolder) -> None:
    """Bends of curves, and the run of one source."""
    shutil.copytree(run.path, run.star_of_one)
    run.curves.mkdir()
    bend = Path(shutil.copy(run.star, run.curves / "heldout-0_star_chain.safetensors"))
    assert recheck(run.path).damaged == []
    for path in (bend, run.star_of_one / "sources" / "seed-0001.safetensors"):
        os.truncate(path, 1000)
    said = recheck(run.path).damaged
    assert [any(str(path) in line for line in said) for path in (bend, run.star_of_one)] == [True, True]


def test_a_folder_of_runs_is_checked_whole(run: RunFolder) -> None:
    """As a sweep's or a reproduction's: all runs in it, and what commands have written about them."""
    folder = run.path.parent
    (folder / "sweep.yaml").write_text("kind: sources\n")
    (folder / "inner").mkdir()
    for path in (folder / "sweep.json", folder / "inner" / "paths.json"):
        write_json(path, {"points": [1, 2, 3]})
    outcome = fastar("verify", folder, "--quiet")
    assert (outcome.code, outcome.out) == (0, f"{folder}: folder of runs, all well\n")
    for path in (folder / "sweep.json", folder / "inner" / "paths.json", run.star):
        os.truncate(path, 20)
    (folder / "sweep.yaml").write_text("kind: [")
    outcome = fastar("verify", folder, "--quiet")
    assert outcome.code == 1
    for name in ("sweep.json: damaged", "paths.json: damaged", "sweep.yaml: damaged", "star.safetensors"):
        assert name in outcome.out
