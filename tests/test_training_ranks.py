"""One model trained by several ranks, as torchrun starts them: the same model as by one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from cli_cases import fastar, refused
from data_cases import Drawing, same, split
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from training_cases import dataset, largest_difference

from fastar.api import Recipe
from fastar.config import Settings, load_settings
from fastar.data.convert import prepare
from fastar.data.streaming import StreamingDataset
from fastar.data.user_data import UserSplits
from fastar.errors import FastarError
from fastar.experiments.plan.preflight import check_rank_settings, check_ranks, prepare_ranks
from fastar.experiments.session import Session, new_session
from fastar.experiments.user_task import PYTHON, Given
from fastar.runs import RunFolder, read_metadata
from fastar.runtime import ranks
from fastar.runtime.device import cpus, resolve_device
from fastar.runtime.memory import free_bytes

TESTS = Path(__file__).parent
# What a test waits for at most; nothing takes a tenth of it.
SECONDS = 180
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS.parent), *sys.path])}
# Steps of sums of other order, on parameters of size 1.
ROUNDING_FP64, ROUNDING_FP32 = 1e-10, 1e-4


def torchrun(count: int, *arguments: object) -> list[str]:
    """The command that has so many ranks do something."""
    start = ["-m", "torch.distributed.run", f"--nproc-per-node={count}"]
    return [sys.executable, *start, *map(str, arguments)]


def said(error: str) -> list[str]:
    """The lines that fastar ends with."""
    return [line for line in error.splitlines() if line.startswith("fastar: ")]


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks found in `rank_checks.py`, and what one did."""
    path = tmp_path_factory.mktemp("checks") / "found.pt"
    command = torchrun(2, TESTS / "rank_checks.py", path)
    done = subprocess.run(command, env=ONE_THREAD, timeout=SECONDS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = torch.load(path, weights_only=False)
    return found


def tensors_of(found: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def difference(check: dict[str, Any]) -> float:
    """The largest of what two ranks have and one has."""
    alone, (one, other) = check["alone"], check["ranks"]
    assert one.keys() == other.keys() == alone.keys()
    assert one["losses" if "losses" in one else "mean"].dtype == torch.float64
    return max(largest_difference(found, tensors_of(alone)) for found in (one, other))


@pytest.mark.parametrize("name", ["shared_draws", "dropout", "ignored_targets", "each_draws"])
def test_ranks_train_what_one_does(checks: dict[str, Any], name: str) -> None:
    """Shared draws, synchronised norms, a matching that is shared out, uneven and empty shares, dropout, ignored
    targets; and draws of each rank's own, whose gradient has the same mean."""
    assert difference(checks[name]) < ROUNDING_FP64
    one, other = (list(tensors_of(found).values()) for found in checks[name]["ranks"])
    assert same(one, other)  # ranks stay the same to the bit


def test_the_star_of_the_checks_is_matched_and_learns(checks: dict[str, Any]) -> None:
    found = checks["shared_draws"]["alone"]
    assert found["images"] == [88] * 4
    assert found["losses"][-1] < 0.97 * found["losses"][0]
    assert any((row != torch.arange(len(row))).any() for row in found["moved.conv"])


def test_norms_of_ranks_make_another_star(checks: dict[str, Any]) -> None:
    """As in DDP; so the check of synchronised ones can fail."""
    assert difference(checks["norms_of_ranks"]) > 1e-3


def test_what_one_rank_asks_for_is_known_to_all_a_step_later(checks: dict[str, Any]) -> None:
    both = checks["agreement"]["ranks"][0]
    assert both == {"found": [[0, 0, 5, 0]] * 2, "now": [7, 7]}
    assert checks["agreement"]["alone"] == {"found": [[0, 5, 0, 0]], "now": [7]}


def test_ranks_of_other_versions_are_named(checks: dict[str, Any]) -> None:
    line = "rank 1 has fastar 2.0 and torch 2.11, rank 0 has fastar 1.0 and torch 2.11: install the same for all"
    assert checks["versions"]["ranks"][0]["said"] == [line] * 2


@pytest.mark.parametrize("count", [0, 1, 2, 7, 12])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_shares_are_all_there_is_and_alike(count: int, world: int) -> None:
    shares = [ranks.share(count, rank, world) for rank in range(world)]
    assert [place for share in shares for place in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [len(share) for share in shares] == sorted(map(len, shares), reverse=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of two classes and many sizes."""
    root, random = tmp_path_factory.mktemp("made") / "images", np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 3)):
        for label in range(2):
            folder = root / part / f"n{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                shape = (20 + 2 * number, 40 - number, 3)
                picture = random.integers(0, 90, shape) + 80 * label
                Image.fromarray(picture.astype(np.uint8)).save(folder / f"{number:02}.JPEG", quality=90)
    return root


def test_ranks_see_the_pixels_that_one_would(made: Path) -> None:
    """Batches of shares are cut from those of one process, in every form that data have."""
    files = prepare("imagefolder", own_name="made", raw=made, directory=made.parent / "data", workers=1)
    forms: dict[str, Any] = {
        "on the device": dataset(30),
        "streamed": StreamingDataset(files, "train", "cpu", size=16),
        "page by page": StreamingDataset(files, "train", "cpu", size=16, order="pages"),
        "tensors": split((torch.arange(30.0)[:, None], torch.arange(30))),
        "samples that are drawn": split(Drawing(30)),
    }
    for name, data in forms.items():
        for size, drop_last in ((7, False), (len(data) - 1, False), (4, True)):
            how = {"seed": 3, "epoch": 1, "drop_last": drop_last, "begin": 1 if size < 10 else 0}
            whole = list(data.batches(size, **how))
            for rank in range(3):
                own = list(data.batches(size, **how, share=(rank, 3)))
                for batch, mine in zip(whole, own, strict=True):
                    places = ranks.share(len(batch[0]), rank, 3)
                    wanted = [one[places.start : places.stop] for one in batch]
                    assert (mine is None) == (not places), name
                    assert mine is None or same(list(mine), wanted), (name, size, rank)


OF_IMAGES = [
    *("--dataset", "imagefolder", "--name", "made", "dataset.resolution=32", "--arch", "resnet8", "model.width=0.25"),
    *("train.batch_size=7", "train.drop_last=false", "train.epochs=6", "train.lr=0.02", "train.sync_batch_norm=true"),
    *("star.draws=each", "evaluation.points=3", "device=cpu", "workers=1"),
]
OF_DIGITS = [
    *("--dataset", "digits", "--sources", "3", "--heldout", "1", "dataset.limit=300", "evaluation.points=3"),
    *("train.epochs=2", "train.batch_size=50", "train.drop_last=false", "device=cpu", "workers=1"),
]
# After every step.
SAVED = ("checkpoint.seconds=0", "checkpoint.minutes=0.0000001")


def done_by(count: int, *arguments: object) -> str:
    """What a command prints that so many ranks do."""
    command = torchrun(count, "-m", "fastar", *arguments, "--quiet")
    done = subprocess.run(command, env=ONE_THREAD, timeout=SECONDS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_of_two_ranks(tmp_path: Path, data: Path) -> None:
    """All of a run, each rank with draws of its own: the models before the star are those of one."""
    options = [*OF_DIGITS, "star.draws=each", f"dataset.directory={data}"]
    assert fastar("train-sources", *options, "--quiet", "--out", tmp_path / "alone").code == 0
    out = done_by(2, "train-star", *options, "--out", tmp_path / "run")
    assert out.count("digits, mlp: star model of 3 sources") == out.count("results: ") == 1
    assert largest_of(tmp_path / "run", tmp_path / "alone") < ROUNDING_FP32
    check_whole(RunFolder(tmp_path / "run"), models=5, epochs=2)


def check_whole(run: RunFolder, models: int, epochs: int) -> None:
    """Each epoch is logged once, the sources' permutations are all there, and nothing is left over."""
    entries = [(entry["model"], entry["epoch"]) for entry in run.log.read()]
    assert len(entries) == len(set(entries)) == models * epochs
    moved = [index for name, index in load_file(run.permutations).items() if name != "matched"]
    assert all(len(index) == 3 for index in moved)
    assert all(any((row != torch.arange(len(row))).any() for index in moved for row in index[n:]) for n in range(3))
    assert not (run.path / "in-training").exists()
    assert read_metadata(run.star, own=True)["ranks"] == 2


def largest_of(one: Path, other: Path) -> float:
    """The largest difference of the sources and heldouts that a run has, from another's."""
    files = [path.relative_to(other) for kind in ("sources", "heldout") for path in (other / kind).glob("*")]
    assert len(files) == len([path for kind in ("sources", "heldout") for path in (one / kind).glob("*")]) > 0
    return max(largest_difference(load_file(one / file), load_file(other / file)) for file in files)


def killed_within(count: int, folder: Path, model: str, *command: object) -> str:
    """The line that a command ends with, one of whose ranks is killed while it trains a model."""
    start = torchrun(count, "-m", "fastar", *command, *SAVED, "--quiet", "--out", folder)
    process = subprocess.Popen(start, env=ONE_THREAD, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: any((folder / "in-training" / model).glob("epoch-*")) or process.poll() is not None)
    if process.poll() is None:
        found = psutil.Process(process.pid).children(recursive=True)
        next(one for one in found if one.environ().get("RANK") == "1").kill()
    _, error = process.communicate(timeout=SECONDS)
    assert process.returncode != 0, error
    (line,) = said(error)
    return line


def test_a_rank_that_is_killed_ends_all_and_another_number_goes_on(tmp_path: Path, made: Path) -> None:
    """Two ranks that train on images of any size, one of which is killed; one rank goes on, to the model that one alone
    makes."""
    options = ["train-sources", *OF_IMAGES, "sources.number=1", "sources.heldout=0"]
    options += [f"dataset.root={made}", f"dataset.directory={made.parent / 'data'}"]
    line = killed_within(2, tmp_path / "cut", "source-0000", *options)
    assert "another rank has ended" in line or "stopped by SIGTERM" in line
    assert not (tmp_path / "cut" / "processes").exists()  # nor is it in use
    assert not any((tmp_path / "cut" / "sources").glob("*"))
    for folder in ("cut", "whole"):
        assert fastar(*options, "--quiet", "--out", tmp_path / folder).code == 0
    assert largest_of(tmp_path / "cut", tmp_path / "whole") < ROUNDING_FP32
    assert len(RunFolder(tmp_path / "cut").log.read()) == 6


@pytest.mark.slow
def test_two_ranks_go_on_with_a_run_of_three_on_images(tmp_path: Path, made: Path) -> None:
    options = [
        "train-star",
        *OF_IMAGES,
        "sources.number=3",
        "sources.heldout=1",
        f"dataset.root={made}",
        f"dataset.directory={tmp_path / 'data'}",
    ]
    killed_within(3, tmp_path / "run", "star-0000", *options, "star.epochs=20")
    done_by(2, *options, "star.epochs=20", "--out", tmp_path / "run")
    alone = ["train-sources", *options[1:], "--quiet", "--out", tmp_path / "alone"]
    assert fastar(*alone).code == 0
    assert largest_of(tmp_path / "run", tmp_path / "alone") < 10 * ROUNDING_FP32  # batch norm of few values
    assert len(RunFolder(tmp_path / "run").log.read()) == 4 * 6 + 20


def wait_for(there: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not there():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ranks_that_are_told_to_stop_save_first(tmp_path: Path, number: signal.Signals) -> None:
    options = [*OF_DIGITS, f"dataset.directory={tmp_path / 'data'}", "checkpoint.minutes=0", "checkpoint.epochs=0"]
    command = torchrun(
        2,
        "-m",
        "fastar",
        "train-star",
        *options,
        "train.epochs=20",
        "star.epochs=2000",
        "--quiet",
        "--out",
        tmp_path / "run",
    )
    process = subprocess.Popen(command, env=ONE_THREAD, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "run" / "sources" / "seed-0001.safetensors").exists() or process.poll() is not None)
    time.sleep(1)
    process.send_signal(number)
    _, error = process.communicate(timeout=SECONDS)
    (line,) = said(error)
    assert "run it again to go on from epoch" in line
    assert any((tmp_path / "run" / "in-training").rglob("epoch-*"))


@pytest.mark.slow
def test_ranks_go_back_together_from_losses_that_are_not_finite(tmp_path: Path) -> None:
    options = [*OF_DIGITS, f"dataset.directory={tmp_path / 'data'}", "--on-nonfinite", "retry", "train.lr=1e30"]
    command = torchrun(2, "-m", "fastar", "train-sources", *options, "--quiet", "--out", tmp_path / "run")
    done = subprocess.run(command, env=ONE_THREAD, timeout=SECONDS, capture_output=True, text=True)
    (line,) = said(done.stderr)
    assert "after going back 3 times" in line
    assert sum(entry["kind"] == "retry" for entry in RunFolder(tmp_path / "run").log.read()) == 3


def session_of(*overrides: str) -> Session:
    settings: Settings = load_settings(dataset="digits", overrides=["device=cpu", *overrides])
    return new_session(settings, RunFolder(Path("none")))


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["train.graph=true"], "train.graph=true: steps on several ranks are not captured; set it to false"),
        (["train.batch_size=2"], "train.batch_size=2 is less than one sample for each of 3 ranks; raise it"),
        (
            ["train.batch_size=5", "dataset.limit=101", "train.drop_last=false", "star.draws=each"],
            "train.drop_last=false: an epoch's last batch is of 1 for 3 ranks, star.draws=each needs one for each; "
            "set train.drop_last=true, or another train.batch_size",
        ),
        (["star.draws=each", "sources.number=2"], "star.draws=each: 2 sources for 3 ranks; give each rank one"),
        (
            ["train.sync_batch_norm=true", "train.compile=true"],
            "train.compile=true: synchronised batch norm is not compiled; set train.compile=false",
        ),
    ],
)
def test_what_ranks_cannot_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, data: Path, overrides: list[str], line: str
) -> None:
    session = session_of(f"dataset.directory={data}", *overrides)
    prepare_ranks(session, star=True)  # one can
    monkeypatch.setattr(ranks, "world", lambda: 3)
    with pytest.raises(FastarError) as error:
        prepare_ranks(session, star=True)
    assert str(error.value) == line


def test_ranks_of_other_settings_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = session_of().settings
    other = settings.model_copy(update={"seed": 3}).model_dump(mode="json")
    monkeypatch.setattr(ranks, "world", lambda: 2)
    monkeypatch.setattr(ranks, "gathered", lambda own: [own, other])
    with pytest.raises(FastarError, match=r"^seed is 3 on rank 1, 0 on rank 0: give all the same command$"):
        check_rank_settings(settings, star=True)


def test_data_and_norms_that_ranks_cannot_share_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "world", lambda: 2)
    samples = torch.randn(12, 4), torch.arange(12) % 3
    batches = list(zip(samples[0].split(4), samples[1].split(4), strict=True))
    with pytest.raises(FastarError, match="come in batches of their own, which ranks cannot share"):
        check_ranks(own_session(batches, batch_size=4), star=False)
    check_ranks(own_session(samples, batch_size=4), star=False)
    with pytest.raises(FastarError, match=r"leaves one sample to a rank, and batch-norm layer 1 takes no variance"):
        check_ranks(own_session(samples, batch_size=3), star=False)


def own_session(train: Any, **recipe: Any) -> Session:
    """A session of a batch-normed network on a user's data."""
    given = Given(
        build=lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), data=UserSplits(train)
    )
    settings = Recipe(device="cpu", **recipe).settings(PYTHON, "task_cases:build", "cross_entropy")
    return new_session(settings, RunFolder(Path()), given=given)


def test_each_rank_of_a_host_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("started", 3), ("on_this_host", 3), ("local_rank", 2)):
        monkeypatch.setattr(ranks, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(FastarError, match=r"3 ranks on a host of 2 GPUs: start as many as there are"):
        resolve_device("auto")
    with pytest.raises(FastarError, match=r"device='cuda:1' is one GPU for 3 ranks; use device=cuda"):
        resolve_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert resolve_device("cuda") == torch.device("cuda:2")


def test_ranks_share_a_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for file, text in (("memory.max", "1000000"), ("memory.current", "0"), ("memory.stat", "")):
        (tmp_path / file).write_text(text)
    every = cpus()
    assert free_bytes(torch.device("cpu"), cgroup=tmp_path) == 1_000_000
    monkeypatch.setattr(ranks, "world", lambda: 4)
    monkeypatch.setattr(ranks, "on_this_host", lambda: 2)
    assert free_bytes(torch.device("cpu"), cgroup=tmp_path) == 500_000
    assert cpus() == max(1, every // 2)


def test_other_commands_are_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "launched", lambda: True)  # not joined: nobody is there
    assert refused("runs") == "runs is of one process: give it without torchrun"
