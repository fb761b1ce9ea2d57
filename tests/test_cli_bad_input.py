"""Bad input to the command line: one line on stderr, exit code 2, nothing half-written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_cases import contents, fastar, refused, tiny
from safetensors.torch import load_file, save_file
from test_runs_model_files import Malicious, files_at_most

from fastar.config import load_settings
from fastar.runs import RunFolder
from fastar.runs.model_files import load_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder of two sources, not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert fastar("train-sources", *tiny(data, heldout=0), "--out", folder).code == 0
    return folder / "sources"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train-star", "--dataset", "digit"], ["unknown dataset 'digit'", "did you mean 'digits'", "cifar100"]),
        (["train-star", "--dataset", "digits", "--arch", "resnet9"], ["unknown architecture", "resnet8", "mlp"]),
        (["train-star", "--dataset", "digits", "train.lrr=1"], ["train.lrr", "did you mean train.lr?"]),
        (["train-star", "--dataset", "digits", "model.widht=4"], ["model.widht", "did you mean 'width'"]),
        (["train-star", "--dataset", "digits", "model.width=abc"], ["model.width='abc'"]),
        (["train-star", "--dataset", "digits", "model.width=0"], ["model.width=0"]),
        (["train-star", "--dataset", "digits", "train.lr=-1"], ["train.lr=-1"]),
        (["train-star", "--dataset", "digits", "--sources", "0"], ["sources.number=0"]),
        (["train-star", "--dataset", "digits", "--sources", "many"], ["--sources"]),
        (["train-star", "--dataset", "digits", "--sources", "1", "--heldout", "0"], ["give more sources or heldouts"]),
        (["train-star", "--dataset", "digits", "seed=-1"], ["seed=-1"]),
        (["train-star", "--dataset", "digits", "device=gpu"], ["device='gpu'", "cuda"]),
        (["train-star", "--dataset", "digits", "device=mps"], ["device='mps'"]),
        (["train-star", "--dataset", "digits", "device=cpu", "train.precision=fp16"], ["fp16", "GPU"]),
        (["train-star", "--dataset", "digits", "dataset"], ["'dataset'", "key=value"]),
        (["train-star"], ["--dataset NAME"]),
        (["train-star", "--config", "none.yaml"], ["none.yaml"]),
        (["train-star", "--nonsense"], ["--nonsense", "fastar --help"]),
        (["train-star", "--dataset"], ["--dataset", "argument"]),
        (["trainstar"], ["trainstar"]),
        (["train-sources", "--dataset", "digits", "sources.folder=x", "sources.heldout_folder=x"], ["sources.folder"]),
        (["match", "a.pt"], ["B"]),
        (["match", "a.pt", "b.pt"], ["a.pt", "no such checkpoint"]),
        (["barrier", "a.pt"], ["B"]),
        (["report", "nowhere"], ["nowhere", "train-star"]),
        (["report"], ["DIR"]),
    ],
)
def test_refused_in_one_line_and_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Path, arguments: list[str], parts: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    where = [f"dataset.directory={data}"] if arguments[0].startswith("train") and len(arguments) > 3 else []
    message = refused(*arguments, *where)
    for part in parts:
        assert part in message
    assert list(tmp_path.iterdir()) == []


def test_no_gpu(tmp_path: Path, data: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    message = refused("train-star", *tiny(data), "device=cuda", "--out", tmp_path / "run")
    assert "no such GPU" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100", "fashion-mnist"])
def test_missing_raw_data_says_where_it_looked_and_how_to_get_it(tmp_path: Path, name: str) -> None:
    root = tmp_path / "raw"
    root.mkdir()
    message = refused(
        *("train-star", "--dataset", name, "--data-root", root, "--out", tmp_path / "run"),
        *(f"dataset.directory={tmp_path / 'data'}", "device=cpu", "--arch", "mlp"),
    )
    assert str(root) in message
    assert "get " in message or "put " in message
    assert [p.name for p in tmp_path.iterdir()] == ["raw"]


KERNELS = [
    ("foo", "FASTAR_KERNELS=foo: no such kernel path; use auto, reference or triton"),
    ("triton", "FASTAR_KERNELS=triton on cpu: Triton compiles for CUDA only; set TRITON_INTERPRET=1"),
]


@pytest.mark.parametrize(("setting", "said"), KERNELS)
def test_kernels_that_cannot_run_are_refused(
    data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, said: str
) -> None:
    """Before data are written, and where a barrier first needs them."""
    monkeypatch.setenv("FASTAR_KERNELS", setting)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for command in ("train-star", "train-sources"):
        options = [*tiny(tmp_path / "data"), "--out", tmp_path / "run"]
        assert refused(command, *options).startswith(said)
    assert not list(tmp_path.iterdir())
    models = sorted(trained.iterdir())
    assert refused("barrier", *models, "--quiet", f"dataset.directory={data}", "device=cpu").startswith(said)


def test_data_root_keeps_its_characters(tmp_path: Path) -> None:
    root = tmp_path / "a #b: [c] = ü"
    message = refused(
        "train-star", "--dataset", "mnist", "--data-root", root, f"dataset.directory={tmp_path / 'data'}", "device=cpu"
    )
    assert str(root) in message


@pytest.mark.parametrize("change", ["train.batch_size=5000", "train.lr=1e10", "dataset.limit=3"])
def test_what_training_refuses_can_be_mended_in_the_same_folder(tmp_path: Path, data: Path, change: str) -> None:
    out = tmp_path / "run"
    message = refused("train-sources", *tiny(data, heldout=0, sources=1), change, "--out", out)
    assert change.partition("=")[0].split(".")[1] in message
    assert not list(tmp_path.rglob("*.safetensors"))
    assert fastar("train-sources", *tiny(data, heldout=0, sources=1), "--out", out).code == 0


def with_nan(folder: Path) -> None:
    path = folder / "seed-0001.safetensors"
    checkpoint = load_checkpoint(path)
    next(iter(checkpoint.state.values())).view(-1)[0] = float("nan")
    save_checkpoint(path, checkpoint.state, checkpoint.metadata)


def of_other_data(folder: Path) -> None:
    path = folder / "seed-0001.safetensors"
    checkpoint = load_checkpoint(path)
    save_checkpoint(path, checkpoint.state, {**checkpoint.metadata, "dataset_digest": "0" * 64})


def of_other_dataset(folder: Path) -> None:
    path = folder / "seed-0001.safetensors"
    checkpoint = load_checkpoint(path)
    save_checkpoint(path, checkpoint.state, {**checkpoint.metadata, "dataset": "mnist"})


def of_other_width(folder: Path) -> None:
    path = folder / "seed-0001.safetensors"
    state = {name: torch.ones(3) for name in load_file(path)}
    save_file(state, path)


def executing(folder: Path) -> None:
    (folder / "seed-0001.safetensors").unlink()
    torch.save({"state_dict": {}, "x": Malicious(folder / "executed")}, folder / "seed-0001.pt")


def truncated(folder: Path) -> None:
    path = folder / "seed-0001.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (with_nan, ["seed-0001", "NaN"]),
        (of_other_data, ["seed-0001", "dataset_digest"]),
        (of_other_dataset, ["seed-0001", "dataset is 'mnist' there, 'digits' here"]),
        (of_other_width, ["seed-0001", "of shape [3] where the model's is [8]"]),
        (executing, ["seed-0001", "weights only"]),
        (truncated, ["seed-0001", "not a readable"]),
        (lambda folder: (folder / "seed-0001.safetensors").unlink(), ["holds 1 checkpoints", "sources.number=2"]),
        (shutil.rmtree, ["no such folder"]),
    ],
    ids=["nan", "digest", "dataset", "shape", "pickle", "truncated", "too few", "missing"],
)
def test_unfit_sources_are_refused(
    tmp_path: Path, data: Path, trained: Path, spoil: Callable[[Path], object], parts: list[str]
) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "sources"))
    spoil(folder)
    message = refused("train-star", *tiny(data), f"sources.folder={folder}", "--out", tmp_path / "run")
    for part in [str(folder), *parts]:
        assert part in message
    assert not (tmp_path / "run").exists()
    assert not (folder / "executed").exists()


def test_sources_of_another_architecture_are_refused(tmp_path: Path, data: Path, trained: Path) -> None:
    for change, part in (
        ("model.width=3", "model.width is"),
        ("--arch=resnet8", "arch is 'mlp' there, 'resnet8' here"),
    ):
        message = refused("train-star", *tiny(data), change, f"sources.folder={trained}", "--out", tmp_path / "run")
        assert part in message
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_sources_of_others_are_taken(tmp_path: Path, data: Path, trained: Path, form: str) -> None:
    """The star of the same weights is the same, whoever saved them."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for path in trained.iterdir():
        state = load_file(path)
        if form == "pt":
            torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, folder / f"{path.stem}.pt")
        else:
            save_file(state, folder / path.name)
    for name, given in (("a", trained), ("b", folder)):
        outcome = fastar("train-star", *tiny(data, heldout=0), f"sources.folder={given}", "--out", tmp_path / name)
        assert outcome.code == 0, outcome
        assert not (tmp_path / name / "sources").exists()
    a, b = (load_file(tmp_path / name / "star.safetensors") for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_output_in_use_with_other_settings(tmp_path: Path, data: Path) -> None:
    run = RunFolder(tmp_path)
    with run.open(load_settings(dataset="digits", arch="mlp", values={})):
        assert "in use by another fastar" in refused("train-star", *tiny(data), "--out", tmp_path)
        assert (tmp_path / "config.yaml").is_file()


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_output_on_a_file(tmp_path: Path, data: Path, where: str) -> None:
    (tmp_path / "file").write_text("precious")
    assert "is a file" in refused("train-star", *tiny(data), "--out", tmp_path / where)
    assert contents(tmp_path) == {"file": b"precious"}


def test_output_in_a_folder_of_something_else(tmp_path: Path, data: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    assert "letter.txt" in refused("train-star", *tiny(data), "--out", tmp_path)
    assert contents(tmp_path) == {"letter.txt": b"dear"}


def test_a_full_disk_while_saving_a_model(tmp_path: Path, data: Path) -> None:
    """The kernel refuses the write itself; what was finished stays, and the same command goes on."""
    out = tmp_path / "run"
    arguments = ("train-sources", *tiny(data, heldout=0), "--out", out)
    assert fastar("train-sources", *tiny(data, heldout=0, sources=1), "--out", out).code == 0
    (first,) = (out / "sources").iterdir()
    before = first.read_bytes()
    with files_at_most(len(before) // 2):
        message = refused(*arguments)
    assert "seed-0001.safetensors: cannot be written" in message
    assert "free space" in message
    assert list((out / "sources").iterdir()) == [first]
    assert first.read_bytes() == before
    assert not [p for p in out.rglob(".*")]
    assert fastar(*arguments).code == 0
    assert len(list((out / "sources").iterdir())) == 2


def test_a_full_disk_while_logging(tmp_path: Path, data: Path) -> None:
    """Empty lines make the log the largest of the run's files."""
    out = tmp_path / "run"
    assert fastar("train-sources", *tiny(data, heldout=0, sources=1), "--out", out).code == 0
    with (out / "log.jsonl").open("ab") as log:
        log.write(b"\n" * (1 << 20))
        size = log.tell()
    with files_at_most(size):
        message = refused("train-sources", *tiny(data, heldout=0), "--out", out)
    assert "log.jsonl: cannot be written (File too large)" in message
    assert len(list((out / "sources").iterdir())) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a", "--only a: write a number or two joined by a dash"),
        ("0,2", "--only 0,2: write a number"),
        ("7", "--only 7: the run's sources and heldouts have the numbers 0 to"),
        ("1-7", "--only 1-7: the run's"),
        ("1-0", "--only 1-0: the run's"),
    ],
)
def test_numbers_of_only_are_those_of_the_run(tmp_path: Path, data: Path, text: str, said: str) -> None:
    assert said in refused("train-sources", *tiny(data), "--only", text, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
