"""`fastar match-many`, and `fastar match --model`: sets of checkpoints, and networks of the user's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_cases import contents, fastar, refused, tiny
from safetensors.torch import load_file

from fastar.runs import read_metadata
from fastar.runs.model_files import load_checkpoint
from fastar.symmetry import Permutations

PLACE = "device=cpu"
NETS = """
import torch
from torch import nn
def build():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))
def example():
    return build(), torch.zeros(2, 6)
class Spectrum(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)
    def forward(self, x):
        return self.c(torch.relu(self.b(torch.fft.fft(self.a(x)).abs())))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three trained sources."""
    folder = tmp_path_factory.mktemp("runs") / "three"
    data = tmp_path_factory.mktemp("data")
    assert fastar("train-sources", *tiny(data, sources=3, heldout=0), "--out", folder).code == 0
    return sorted((folder / "sources").glob("*.safetensors"))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path, Path]:
    """A module of networks in the current folder, and two state dicts of its `build`."""
    name = f"many_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    module = __import__(name)
    for seed, file in enumerate("ab"):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            torch.save(module.build().state_dict(), tmp_path / f"{file}.pt")
    return name, tmp_path / "a.pt", tmp_path / "b.pt"


def row(path: Path) -> torch.Tensor:
    return torch.cat([value.double().flatten() for _, value in sorted(load_file(path).items())])


def test_to_the_mean_writes_the_set_and_its_average(trained: list[Path], tmp_path: Path) -> None:
    before = contents(trained[0].parent)
    out, average = tmp_path / "matched", tmp_path / "mean.safetensors"
    result = fastar("match-many", *trained, "--out", out, "--average", average, "--json", PLACE)
    assert result.code == 0, result
    found = json.loads(result.out)
    assert contents(trained[0].parent) == before
    assert found["to"] == "mean"
    assert found["converged"]
    assert sorted(found["history"]) == found["history"]
    rows = [row(out / path.name) for path in trained]
    torch.testing.assert_close(row(average), torch.stack(rows).mean(0), rtol=1e-6, atol=1e-7)  # saved as float32
    assert torch.equal(rows[0], row(trained[0]))  # the first stays
    for file, path in zip(found["files"], trained, strict=True):
        assert file["file"] == str(path)
        assert file["distance"] == pytest.approx(float((row(average) - row(out / path.name)).norm()), rel=1e-5)
        assert file["distance"] <= file["distance_start"]
    metadata = read_metadata(average)
    assert (metadata["kind"], metadata["of"]) == ("average", [path.name for path in trained])
    # It is a checkpoint like others.
    assert fastar("match", average, out / trained[1].name, "--json", PLACE).code == 0
    shown = " ".join(fastar("match-many", *trained, "--quiet", PLACE).out.split())  # as one line
    assert "matched to their mean" in shown
    assert "seed-0002" in shown
    assert "without 1-D" in shown


def test_to_a_centre_each_is_matched_as_by_match(trained: list[Path], tmp_path: Path) -> None:
    centre, *others = trained
    result = json.loads(fastar("match-many", *others, "--centre", centre, "--out", tmp_path, "--json", PLACE).out)
    assert result["to"] == "star"
    for file, path in zip(result["files"], others, strict=True):
        alone = json.loads(fastar("match", centre, path, "--json", PLACE).out)
        for figure in ("distance", "objective", "objective_weights"):
            assert file[figure] == pytest.approx(alone[figure], rel=1e-6)
        assert file["objective_weights"] != file["objective"]
        assert load_checkpoint(tmp_path / path.name).metadata["matched_to"] == centre.name


def test_pairwise_gives_each_pairs_permutations(trained: list[Path]) -> None:
    result = json.loads(fastar("match-many", *trained, "--to", "pairwise", "--json", PLACE).out)
    assert [(Path(p["first"]).stem, Path(p["second"]).stem) for p in result["pairs"]] == [
        ("seed-0000", "seed-0001"),
        ("seed-0000", "seed-0002"),
        ("seed-0001", "seed-0002"),
    ]
    for pair in result["pairs"]:
        alone = json.loads(fastar("match", pair["first"], pair["second"], "--json", PLACE).out)
        assert Permutations.from_dict(pair["permutations"]) == Permutations.from_dict(alone["permutations"])
        assert pair["objective_weights"] == pytest.approx(alone["objective_weights"], rel=1e-6)


def test_nothing_is_matched_by_method_none(trained: list[Path], tmp_path: Path) -> None:
    found = json.loads(fastar("match-many", *trained, "--out", tmp_path, "--json", PLACE, "matching.method=none").out)
    assert all(file["distance"] == file["distance_start"] for file in found["files"])
    assert torch.equal(row(tmp_path / trained[1].name), row(trained[1]))


def test_a_network_of_ones_own(own: tuple[str, Path, Path], tmp_path: Path) -> None:
    name, a, b = own
    out = tmp_path / "b.safetensors"
    arguments = ["match", a, b, "--model", f"{name}:example", PLACE]
    found = json.loads(fastar(*arguments, "--json", "--out", out).out)
    assert found["groups"] == {"0": 8, "2": 5}
    assert found["distance"] < found["distance_start"]
    model = __import__(name).build()
    x = torch.randn(7, 6)
    outputs = []
    for state in (torch.load(b), load_file(out)):
        model.load_state_dict(state)
        outputs.append(model(x))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)
    shaped = json.loads(fastar("match", a, b, "--model", f"{name}:build", "--input-shape", "2x6", "--json", PLACE).out)
    assert shaped["permutations"] == found["permutations"]
    many = fastar("match-many", a, b, "--model", f"{name}:example", "--json", PLACE)
    assert json.loads(many.out)["groups"] == found["groups"]


def test_what_cannot_be_proven_is_refused_or_left(own: tuple[str, Path, Path], tmp_path: Path) -> None:
    name, *_ = own
    states = []
    for seed in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            states.append(tmp_path / f"spectrum{seed}.pt")
            torch.save(__import__(name).Spectrum().state_dict(), states[-1])
    arguments = ["match", *states, "--model", f"{name}:Spectrum", "--input-shape", "2x6", PLACE]
    assert "fft_fft" in refused(*arguments)
    outcome = fastar(*arguments, "--allow-partial")
    assert outcome.code == 0, outcome
    assert "b (7)" in outcome.out
    assert "fft_fft" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["match", "A", "B", "--model", "{}:example", "--arch", "mlp"], "leave one out"),
        (["match", "A", "B", "--input-shape", "2x6"], "--input-shape belongs to --model"),
        (["match", "A", "B", "--model", "{}:example", "train.lr=1"], "only matching.*"),
        (["match", "A", "B", "--model", "{}:example", "matching.method=activation"], "no data"),
        (["match", "A", "B", "--model", "{}:Spectrum", "--input-shape", "2x6"], "a.pt"),
        (["match-many", "A", "--model", "{}:example"], "needs at least 2 models"),
        (["match-many", "seed=1", "--model", "{}:example"], "give checkpoints"),
        (["match-many", "A", "B", "--to", "stars", "--model", "{}:example"], "none of star, mean, pairwise"),
        (["match-many", "A", "B", "--to", "star", "--model", "{}:example"], "needs a centre: give one"),
        (["match-many", "A", "B", "--to", "pairwise", "--out", "x", "--model", "{}:example"], "no one set"),
        (["match-many", "A", "B", "--out", "x.safetensors", "--model", "{}:example"], "into a folder"),
        (["match-many", "A", "B", "--average", "x.pt", "--model", "{}:example"], "written as .safetensors"),
        (["match-many", "A", "A", "--out", "x", "--model", "{}:example"], "several checkpoints would be written"),
        (["match-many", "A", "B", "--rounds", "0", "--model", "{}:example"], "rounds=0"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments: list[str], says: str, own: tuple[str, Path, Path]) -> None:
    name, a, b = own
    files = {"A": str(a), "B": str(b)}
    before = sorted(a.parent.iterdir())
    assert says in refused(*(files.get(word, word.format(name)) for word in arguments), PLACE)
    assert [path for path in sorted(a.parent.iterdir()) if path.name != "__pycache__"] == [
        path for path in before if path.name != "__pycache__"
    ]


def test_nothing_that_is_read_is_written_over(trained: list[Path], tmp_path: Path) -> None:
    folder = trained[0].parent
    before = contents(folder)
    out = tmp_path / "matched"
    for arguments, says in (
        (["match-many", *trained, "--out", folder], "would be written over"),
        (["match-many", *trained, "--average", folder / ".." / folder.name / trained[1].name], "would be written over"),
        (["match-many", *trained[1:], "--centre", trained[0], "--average", trained[0]], "would be written over"),
        (["match-many", *trained, "--out", out, "--average", out / trained[0].name], "would be written twice"),
        (["match", *trained[:2], "--out", trained[0]], "would be written over"),
        (["match", *trained, "--out", folder], "would be written over"),
    ):
        assert says in refused(*arguments, PLACE)
    assert contents(folder) == before
    assert not out.exists()
