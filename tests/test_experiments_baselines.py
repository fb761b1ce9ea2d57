"""SWA, SWAG and the student of the ensemble."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_cases import fastar
from run_cases import Killed, at_call, kill, trained_run
from torch.nn import functional as F

from fastar.data.dataset import Dataset
from fastar.errors import FastarError
from fastar.experiments.averages import uncertainty
from fastar.experiments.baselines.student import Taught, student
from fastar.experiments.baselines.swag import RANK, Moments, swag_epochs, swag_moments
from fastar.experiments.families import Families
from fastar.experiments.finished_run import FinishedRun
from fastar.experiments.look import Look
from fastar.runs.model_files import load_checkpoint
from fastar.training.moments import MomentsStep


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A run with validation samples."""
    folder = tmp_path_factory.mktemp("baselines") / "run"
    more = ["dataset.limit=null", "dataset.validation=0.2", "train.batch_size=200", "train.epochs=8", "star.epochs=30"]
    return trained_run(data, folder, *more)


def test_moments_are_those_of_what_was_collected(run: FinishedRun) -> None:
    """Against the formulas, more collections than deviations that are kept."""
    step = MomentsStep(run.session.network.build(seed=0), run.session.settings.train, rank=3)
    rows = torch.randn(5, len(step.theta), generator=torch.Generator().manual_seed(0))
    for epoch, row in enumerate(rows):
        step.begin_epoch(epoch, 1)
        step.theta.copy_(row)
    found = step.moments()
    assert int(found["count"]) == 5
    assert torch.allclose(found["mean"], rows.mean(0), atol=1e-6)
    assert torch.allclose(found["variance"], rows.var(0, unbiased=False), atol=1e-5)
    wanted = torch.stack([rows[i] - rows[: i + 1].mean(0) for i in (3, 4, 2)])
    assert torch.allclose(found["deviations"], wanted, atol=1e-6)


def test_draws_have_the_covariance_of_swag() -> None:
    numbers = torch.Generator().manual_seed(1)
    variance = torch.tensor([0.0, 1.0, 4.0])
    moments = Moments(torch.tensor([1.0, 2.0, 3.0]), variance, torch.randn(5, 3, generator=numbers))
    draws = torch.stack([moments.drawn(seed) for seed in range(4000)]).double()
    low_rank = (moments.deviations.T @ moments.deviations / 4).double()
    assert torch.allclose(draws.mean(0), moments.mean.double(), atol=0.15)
    assert torch.allclose(draws.T.cov(), 0.5 * (variance.diag().double() + low_rank), atol=0.3)
    assert torch.equal(moments.drawn(7), moments.drawn(7))


def test_swag_is_trained_once_and_kept(run: FinishedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    found = swag_moments(run)
    assert found.deviations.shape == (RANK, run.session.network.layout.numel)
    assert load_checkpoint(run.session.run.swag, own=True).metadata["epochs"] == swag_epochs(8) == 2 * RANK
    source = run.session.network.layout.flatten(run.sources[0].state)
    assert float((found.mean - source).norm()) > 0
    at_call(monkeypatch, MomentsStep, 1, kill)  # nothing is trained again
    assert torch.equal(swag_moments(run).variance, found.variance)
    of = uncertainty(run, most=2, repetitions=2, swag=True)["families"]
    assert (len(of["swa"]["k"]), of["swag"]["k"]) == (1, [1, 2])
    assert of["swag"]["disagreement"]["mean"][1] >= 0
    rows = [one.row_on(torch.device("cpu")) for one in Families(run, moments=found).members("swag", 2)]
    assert not torch.equal(rows[0], rows[1])


@pytest.mark.slow
def test_swag_that_is_killed_goes_on_to_the_same_bits(run: FinishedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within an epoch, with moments of those before: it saves itself after every step."""
    whole = swag_moments(run)
    run.session.run.swag.unlink()
    settings = run.session.settings
    often = settings.checkpoint.model_copy(update={"minutes": 1e-7})
    saving = FinishedRun(replace(run.session, settings=settings.model_copy(update={"checkpoint": often})))
    with monkeypatch.context() as patch:
        at_call(patch, MomentsStep, 47, kill)
        with pytest.raises(Killed):
            swag_moments(saving)
    assert list(run.session.run.in_training("swag", 0).glob("epoch-*"))
    again = swag_moments(run)
    for name, value in vars(whole).items():
        assert torch.equal(getattr(again, name), value), name


def test_a_student_learns_the_ensemble(run: FinishedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearer to it than probabilities that say nothing; trained once, and then read."""
    given: list[Taught] = []
    made = Taught.__init__

    def kept(self: Taught, data: Dataset, taught: torch.Tensor, *, whole: bool) -> None:
        given.append(self)
        made(self, data, taught, whole=whole)

    monkeypatch.setattr(Taught, "__init__", kept)
    found = student(run)
    assert found.metadata["kind"] == "student"
    assert len(given) == 1
    again = student(run)
    assert len(given) == 1
    assert all(torch.equal(value, again.state[name]) for name, value in found.state.items())
    look = Look(run.session, ["test"])
    ensemble = np.mean([one["test"] for one in look(map(Families(run).source, range(2)))], 0)
    model = run.session.network.build(seed=0)
    model.load_state_dict(found.state)
    batches = list(run.session.data.splits()["test"]())
    with torch.no_grad():
        own = torch.cat([model.eval()(images) for images, _ in batches]).softmax(1)
    untrained = torch.full_like(own, 0.1)
    target = torch.from_numpy(ensemble)
    assert F.kl_div(own.log(), target, reduction="batchmean") < F.kl_div(untrained.log(), target, reduction="batchmean")


def test_targets_belong_to_their_images(run: FinishedRun) -> None:
    """Each image of a batch has the teacher's row of its own place, whatever the order, from any step on."""
    data = run.session.data.train
    images, _ = next(iter(data.sequential(len(data))))
    taught = torch.arange(len(data), dtype=torch.float32)[:, None]
    for begin in (0, 2):
        batches = list(Taught(data, taught, whole=False).batches(50, seed=3, epoch=1, begin=begin, augment=False))
        assert len(batches) == len(data) // 50 - begin
        for inputs, targets in batches:
            assert torch.equal(inputs, images[targets[:, 0].long()])


def test_another_training_is_not_taken_for_it(run: FinishedRun) -> None:
    swag_moments(run)
    path = run.session.run.student
    path.unlink(missing_ok=True)
    shutil.copy(run.session.run.swag, path)
    with pytest.raises(FastarError, match="is another model"):
        student(run)
    assert any("is swag 0 by what it says" in line for line in recheck_damage(run))
    path.unlink()


def recheck_damage(run: FinishedRun) -> list[str]:
    done = fastar("verify", run.session.run.path, "--json")
    found: list[str] = json.loads(done.out)["damaged"]
    return found


def test_the_command_adds_rows(run: FinishedRun) -> None:
    done = fastar("fuse", run.session.run.path, "--student", "--swag", "--quiet")
    assert done.code == 0, done.err
    predictors = json.loads((run.session.run.path / "fusion.json").read_text())["predictors"]
    assert {name: predictors[name]["networks"] for name in ("student", "swa", "ensemble at T")} == {
        "student": 1,
        "swa": 1,
        "ensemble at T": 2,
    }
    assert predictors["ensemble at T"]["accuracy"] == predictors["ensemble"]["accuracy"]
    assert recheck_damage(run) == []
    states = json.loads(fastar("runs", run.session.run.path.parent, "--json").out)
    assert states[0]["state"] == "finished"
