"""Checkpoints: fastar's own and other people's, whole or refused, and never executed."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fastar.errors import FastarError
from fastar.runs import read_metadata, stored_digest, write_atomically
from fastar.runs.model_files import (
    Checkpoint,
    load_checkpoint,
    load_into,
    save_checkpoint,
    state_digest,
    tensors_digest,
)


def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 2, 3, 3, generator=generator).to(memory_format=torch.channels_last),
        "a.bias": torch.randn(3, generator=generator),
        "n.num_batches_tracked": torch.tensor(7),
    }


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
        assert found[name].dtype == value.dtype


def only_line(folder: Path, error: pytest.ExceptionInfo[FastarError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert "\x1b" not in message  # torch colours its advice
    assert str(folder) in message
    return message


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "x y" / "ü.safetensors"
    metadata = {"arch": "mlp", "model": {"width": 3}, "loss": 0.1 + 0.2, "none": None, "name": "ü"}
    save_checkpoint(path, state(), metadata)
    found = load_checkpoint(path)
    same(found.state, state())
    assert found.metadata == metadata == read_metadata(path)
    assert found.path == path
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize("form", ["bare", "state_dict", "module", "module in state_dict", "old format"])
def test_other_peoples_files(tmp_path: Path, suffix: str, form: str) -> None:
    content: Any = state()
    if "module" in form:
        content = {f"module.{name}": value for name, value in content.items()}
    if "state_dict" in form:
        content = {"state_dict": content, "epoch": 3, "optimizer": {"lr": 0.1}}
    path = tmp_path / f"a{suffix}"
    torch.save(content, path, _use_new_zipfile_serialization=form != "old format")
    found = load_checkpoint(path)
    same(found.state, state())
    assert found.metadata == {}


def test_module_is_removed_only_as_a_prefix(tmp_path: Path) -> None:
    torch.save({"module.my.module.w": torch.ones(1)}, tmp_path / "a.pt")
    assert list(load_checkpoint(tmp_path / "a.pt").state) == ["my.module.w"]


class Malicious:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path: Path, zipped: bool) -> None:
    target, path = tmp_path / "executed", tmp_path / "evil.pt"
    torch.save({"state_dict": state(), "extra": Malicious(target)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(FastarError, match="weights only") as error:
        load_checkpoint(path)
    only_line(tmp_path, error)
    assert not target.exists()
    torch.load(path, weights_only=False)  # the file does what it says: the refusal above is what stopped it
    assert target.exists()


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pt")
    with pytest.raises(FastarError, match="state_dict") as error:
        load_checkpoint(tmp_path / "a.pt")
    only_line(tmp_path, error)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ([1, 2], "found list"),
        ({"w": torch.ones(2), "lr": 0.1}, "'lr'"),
        ({1: torch.ones(2)}, "entry 1"),
        ({}, "no tensors"),
        ({"state_dict": {}}, "no tensors"),
        (torch.ones(2), "found Tensor"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: Any, part: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(FastarError) as error:
        load_checkpoint(tmp_path / "a.pt")
    assert part in only_line(tmp_path, error)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.3, 0.7, 0.99])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str, keep: float) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".pt":
        torch.save(state(), path)
    else:
        save_checkpoint(path, state(), {"arch": "mlp"})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(FastarError) as error:
        load_checkpoint(path)
    only_line(path, error)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_foreign_content_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"hello, world\n" * 100)
    with pytest.raises(FastarError) as error:
        load_checkpoint(path)
    only_line(path, error)


@pytest.mark.parametrize("name", ["a.onnx", "a", "a.npz", ".safetensors.tmp", ".pt"])
def test_wrong_suffix(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(FastarError, match=r"\.safetensors, \.pt, \.pth"):
        load_checkpoint(tmp_path / name)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_missing_file_or_folder_in_its_place(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    for _ in range(2):
        with pytest.raises(FastarError, match="no such checkpoint"):
            load_checkpoint(path)
        path.mkdir(exist_ok=True)


@pytest.mark.parametrize("metadata", ["[1]", "3", "{", '{"model": 3}', "null"])
def test_damaged_metadata_is_refused(tmp_path: Path, metadata: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(2)}, path, {"fastar": metadata})
    with pytest.raises(FastarError) as error:
        load_checkpoint(path)
    only_line(path, error)


def test_safetensors_of_others_have_no_metadata(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors", {"format": "pt"})
    assert load_checkpoint(tmp_path / "a.safetensors").metadata == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float) -> None:
    broken = state()
    broken["a.bias"][1] = value
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, broken, {})
    with pytest.raises(FastarError, match=r"a\.bias has NaN or infinite") as error:
        load_checkpoint(path)
    only_line(path, error)


def network() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))


def test_load_into_copies() -> None:
    model = network()
    good = {name: value.clone() for name, value in network().state_dict().items()}
    load_into(model, Checkpoint(good))
    same(dict(model.state_dict()), good)
    with torch.no_grad():
        model[0].weight.zero_()
    assert good["0.weight"].any()  # a copy
    without = {k: v for k, v in good.items() if k != "1.num_batches_tracked"}
    load_into(model, Checkpoint(without))  # says nothing of the function
    assert torch.equal(model[0].weight, good["0.weight"])


@pytest.mark.parametrize(
    ("lost", "more", "says"),
    [
        (["1.bias"], {}, "a.pt lacks parameter '1.bias': it is of another architecture or width than the model"),
        (["1.running_var"], {}, "a.pt lacks buffer '1.running_var': it"),
        ([], {"0.weight": (3, 4)}, "a.pt has '0.weight' of shape [3, 4] where the model's is [3, 2]: it"),
        ([], {"1.running_mean": (4,)}, "a.pt has '1.running_mean' of shape [4] where the model's is [3]: it"),
        ([], {"2.weight": (1,)}, "a.pt has a tensor '2.weight' that the model lacks: it"),
        (
            ["1.weight"],
            {"1.wieght": (3,)},
            "a.pt has the model's shapes under other names: '1.wieght' where the model has '1.weight'; rename its",
        ),
        (
            ["0.bias", "1.bias"],
            {"0.weight": (3, 4), "1.weight": (4,), "x": (1,)},
            "a.pt lacks parameter '0.bias'; lacks parameter '1.bias'; "
            "has '0.weight' of shape [3, 4] where the model's is [3, 2]; and 2 more differences: it",
        ),
    ],
    ids=["parameter", "buffer", "shape", "buffer's shape", "strange", "misspelt", "many"],
)
def test_load_into_names_the_first_differences(lost: list[str], more: dict[str, tuple[int, ...]], says: str) -> None:
    wrong = {name: value for name, value in network().state_dict().items() if name not in lost}
    wrong |= {name: torch.ones(shape) for name, shape in more.items()}
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(FastarError) as error:
        load_into(model, Checkpoint(wrong, path=Path("a.pt")))
    assert str(error.value).startswith(says)
    assert "\n" not in str(error.value)
    same(dict(model.state_dict()), before)


@pytest.mark.parametrize("given", ["0.weight", "1.weight"])
def test_one_name_of_a_tied_tensor_is_enough(given: str) -> None:
    """Some files (safetensors of shared tensors) hold one of the two."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    load_into(model, Checkpoint({given: torch.full((3, 3), 2.0)}))
    assert model[0].weight is model[1].weight
    assert torch.equal(model[0].weight, torch.full((3, 3), 2.0))
    with pytest.raises(
        FastarError, match=r"the checkpoint lacks parameter '0\.weight'; lacks parameter '1\.weight': it"
    ):
        load_into(model, Checkpoint({}))


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """A disk that takes no file beyond `size` bytes: the kernel refuses the rest of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_layer_of_two_names_may_lack_its_count_of_batches() -> None:
    norm = torch.nn.BatchNorm1d(3)
    model = torch.nn.Sequential(norm, torch.nn.Linear(3, 3), norm)
    state = {name: value for name, value in model.state_dict().items() if "tracked" not in name}
    loaded = load_into(model, Checkpoint(state))
    assert loaded.state.keys() == state.keys()


def test_a_write_cut_short_leaves_the_old_file_and_no_debris(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, state(), {"old": True})
    before = path.read_bytes()
    with files_at_most(200), pytest.raises(FastarError, match=r"cannot be written.*free space") as error:
        save_checkpoint(path, {"w": torch.ones(1000)}, {"old": False})
    only_line(path, error)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("owner", "call", "error"),
    [
        (os, "fsync", OSError(errno.ENOSPC, "")),
        (Path, "replace", OSError(errno.ENOSPC, "")),
        (os, "fsync", KeyboardInterrupt()),
    ],
    ids=["fsync", "replace", "Ctrl-C"],
)
def test_a_write_that_fails_late_leaves_no_debris(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, call: str, error: BaseException
) -> None:
    def fails(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(owner, call, fails)
    with pytest.raises((FastarError, KeyboardInterrupt), match=r"cannot be written|^$"):
        write_atomically(tmp_path / "a.bin", b"x")
    assert list(tmp_path.iterdir()) == []


def test_data_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(Path, "replace", lambda a, b: (calls.append("replace"), replace(a, b))[1])
    write_atomically(tmp_path / "a.bin", b"x")
    assert calls[:2] == ["fsync", "replace"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(FastarError, match="cannot be written"):
        write_atomically(tmp_path / "file" / "a.bin", b"x")


def changed(path: Path, was: bytes, now: bytes) -> None:
    data = path.read_bytes()
    assert data.count(was) == 1
    path.write_bytes(data.replace(was, now))


@pytest.mark.parametrize("read", [load_checkpoint, read_metadata, stored_digest])
def test_metadata_changed_by_hand_are_refused(tmp_path: Path, read: Any) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, state(), {"step": 4, "loss": 0.1 + 0.2, "inf": float("inf"), "by": {2: "ü"}})
    read(path)
    changed(path, b'\\"step\\": 4', b'\\"step\\": 5')
    with pytest.raises(FastarError, match="metadata are not those that were saved") as error:
        read(path)
    only_line(path, error)


def test_others_files_without_digests_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(2)}, path, {"by": '{"step": 4}'})
    assert load_checkpoint(path).metadata == {}
    assert stored_digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("text", ['{"step": 4}', '{"step": 4, "digest": null}', '{"tensors_digest": "0"}'])
@pytest.mark.parametrize("read", [load_checkpoint, read_metadata, stored_digest])
def test_fastars_files_without_their_digests_are_refused(tmp_path: Path, read: Any, text: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(2)}, path, {"fastar": text})
    with pytest.raises(FastarError, match="damaged") as error:
        read(path)
    only_line(path, error)


def test_the_stored_digest_is_of_the_tensors_alone(tmp_path: Path) -> None:
    one, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_checkpoint(one, state(), {"step": 4})
    save_checkpoint(other, state(), {"step": 5})
    assert stored_digest(one) == stored_digest(other) == tensors_digest(state())
    save_checkpoint(other, {**state(), "a.bias": torch.zeros(3)}, {"step": 4})
    assert stored_digest(one) != stored_digest(other)


def test_tensors_can_stay_in_their_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    state = {"a.weight": torch.randn(3, 2), "b": torch.arange(4)}
    save_checkpoint(path, state, {"kind": "source"})
    found = load_checkpoint(path).released()
    assert found.metadata == {"kind": "source"}
    assert sorted(found.state) == sorted(state)
    assert all(torch.equal(found.state[name], value) for name, value in state.items())
    assert found.state["b"] is not found.state["b"]  # read each time: nothing is held
    assert "c" not in found.state
    path.unlink()
    with pytest.raises(FastarError, match=r"a\.safetensors: cannot be read any more"):
        _ = found.state["b"]


def test_a_file_that_is_released_keeps_its_digest(tmp_path: Path) -> None:
    path, model = tmp_path / "a.safetensors", network()
    counted = {name: value for name, value in model.state_dict().items() if "num_batches" not in name}
    wanted = tensors_digest(counted)[:16]
    for load in (load_checkpoint, lambda path: load_into(network(), load_checkpoint(path))):
        save_checkpoint(path, model.state_dict(), {})
        found = load(path)
        assert state_digest(found) == wanted
        left = found.released()
        path.unlink()  # it cannot be read again
        assert state_digest(left) == wanted


def test_what_stays_in_its_file_is_checked_first(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"a": torch.tensor([1.0, float("nan")])}, {})
    with pytest.raises(FastarError, match="NaN or infinite"):
        load_checkpoint(path).released()
    save_checkpoint(path, {"module.a": torch.ones(2)}, {})
    assert dict(load_checkpoint(path).released().state).keys() == {"a"}
