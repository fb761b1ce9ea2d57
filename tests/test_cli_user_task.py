"""Networks, data and losses of users on the command line; the page on them is followed to the letter."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_cases import fastar, refused

PAGE = Path(__file__).resolve().parent.parent / "docs" / "your-own-network.md"
FILE = re.compile(r"```python\n# (\S+\.py)\n(.*?)```", flags=re.DOTALL)
NETS = """
from torch import nn

HIDDEN = 6

def build(width=HIDDEN):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 1))
def images():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
def few():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
"""
DATA = """
import torch
import fastar

def draw(n, *shape):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(n))
def looking(outputs, batch):
    assert batch[1].sum().item() < 1000
    return (outputs - batch[1]).square().mean(1)
def numbers():
    return (draw(40, 4), draw(40, 1)), (draw(20, 4), draw(20, 1))
def pictures():
    return fastar.Data(train=(draw(40, 1, 8, 8), torch.arange(40) % 3), classes=3)
def unnamed():
    return {"train": (draw(40, 1, 8, 8), torch.arange(40) % 3)}
"""
SMALL = (
    *("--quiet", "--sources", "2", "--heldout", "1", "train.epochs=2", "train.batch_size=20", "train.lr=0.01"),
    *("evaluation.points=3", "device=cpu", "workers=1", "logging.tensorboard=false"),
)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A folder with a module of networks and one of data; their names are no other test's."""
    folder = tmp_path_factory.mktemp("user")
    for name, text in (("task_nets", NETS), ("task_data", DATA)):
        (folder / f"{name}.py").write_text(text)
    return folder, "task_nets", "task_data"


@pytest.fixture(autouse=True)
def here(names: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(names[0])
    monkeypatch.syspath_prepend("")


TASK = ("--model", "task_nets:build", "--data", "task_data:numbers", "--loss", "mse", "--metrics", "rmse,mae")


@pytest.fixture(scope="module")
def run(names: tuple[Path, str, str]) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(names[0])
        patch.syspath_prepend("")
        done = fastar("train-star", *TASK, *SMALL)
    assert done.code == 0, done.err
    for word in ("rmse, star", "mae, regular", "barrier, star to heldouts"):
        assert word in done.out
    return names[0] / "runs" / "task_data_numbers-task_nets_build-seed0"


def test_the_same_command_twice_says_finished(run: Path) -> None:
    done = fastar("train-star", *TASK, *(word for word in SMALL if word != "--quiet"))
    assert done.code == 0, done.err
    assert "finished already" in done.err
    assert "rmse" in fastar("runs").out
    assert "mae, star" in fastar("report", run).out
    assert fastar("verify", run).code == 0


def test_what_a_checkpoint_is_of_need_not_be_said(run: Path) -> None:
    star, heldout = run / "star.safetensors", run / "heldout" / "seed-0000.safetensors"
    for more in ((), ("--permutations", run / "matchings.safetensors")):
        assert fastar("barrier", star, heldout, *more).code == 0
    assert fastar("match", star, heldout).code == 0


def test_distances_of_a_users_own_networks(run: Path) -> None:
    done = fastar("distances", run, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert [found[kind]["matched"]["distance"]["n"] for kind in ("star_heldout", "star_source")] == [1, 2]


def test_half_precision_checkpoints_are_sources_and_heldouts(run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for number, dtype in enumerate((torch.float16, torch.bfloat16)):
        state = load_file(run / "sources" / f"seed-000{number}.safetensors")
        torch.save({name: value.to(dtype) for name, value in state.items()}, tmp_path / f"{number}.pt")
    small = [word for word in SMALL if word not in ("--sources", "--heldout", "2", "1")]
    given = ("--sources-from", tmp_path / "*.pt", "--heldout-from", tmp_path / "0.p*")
    done = fastar("train-star", *TASK, *small, *given, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert "given + given" in fastar("runs", tmp_path).out


def test_a_plan_counts_a_users_tensors() -> None:
    done = fastar("plan", *TASK, *SMALL, "gpu_memory=1GB", "--images-per-second", "100", "--json")
    assert done.code == 0, done.err
    assert '"bytes": 1200' in done.out  # 60 samples of 5 numbers
    assert "a step on 20 samples" in done.out


def test_a_plan_says_what_it_cannot_count() -> None:
    done = fastar("plan", *TASK[:4], "--loss", "task_data:looking", *SMALL)
    assert done.code == 0, done.err
    assert "not counted: activations" in done.out


def test_a_network_with_a_name_on_a_users_images(tmp_path: Path) -> None:
    options = ("train-sources", "--arch", "mlp", *SMALL, "model.width=8", "--out", tmp_path / "run")
    assert fastar(*options[:-1], tmp_path / "done", "--data", "task_data:pictures").code == 0
    assert "classes=N" in refused(*options, "--data", "task_data:unnamed")
    assert "takes images" in refused(*options, "--data", "task_data:numbers")


def test_a_users_network_on_data_with_a_name(tmp_path: Path) -> None:
    done = fastar(
        *("train-sources", "--model", "task_nets:images", "--dataset", "digits", *SMALL, "--out", tmp_path / "run"),
        *(f"dataset.directory={tmp_path}", "dataset.limit=100"),
    )
    assert done.code == 0, done.err
    few = (
        *("train-sources", "--model", "task_nets:few", "--dataset", "digits", *SMALL),
        f"dataset.directory={tmp_path}",
    )
    assert "digits has 10 classes, and the network's outputs are of 3" in refused(*few, "--out", tmp_path / "few")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--data", "task_data:numbers"), "no network: give --model"),
        (("--model", "task_nets:build"), "no dataset: give --dataset"),
        (("--model", "task_nets:build", "--data", "task_data:numbers"), "cross_entropy of one class is always 0"),
        ((*TASK, "train.label_smoothing=0.1"), "label_smoothing belongs to cross_entropy"),
        ((*TASK, "--arch", "mlp"), "leave one out"),
        ((*TASK, "--sources-from", "none/*.pt"), "holds 0 checkpoints"),
        ((*TASK[:-1], "rmse,nope"), "unknown metric 'nope'"),
    ],
)
def test_bad_input_is_one_line(options: tuple[str, ...], says: str, tmp_path: Path) -> None:
    assert says in refused("train-star", *options, *SMALL, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_page_is_followed_to_the_letter(tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name, text in FILE.findall(page):
        (tmp_path / name).write_text(text, encoding="utf-8")
    paths = os.pathsep.join([str(PAGE.parent.parent), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": paths, "FASTAR_CACHE": "off"}
    (program,) = [text for text in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if text[0] != "#"]
    commands = [line for text in re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL) for line in text.splitlines()]
    calls = [["-c", program], *(["-m", *shlex.split(line)] for line in commands)]
    for call in calls:
        done = subprocess.run(
            [sys.executable, *call], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{call}\n{done.stdout}\n{done.stderr}"
