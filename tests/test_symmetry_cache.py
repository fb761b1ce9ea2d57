"""Records of proven symmetries: found again for the same architecture, never for another, never torn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from fastar.models import build_model
from fastar.symmetry import Group, Member, Symmetry, cache, derive_symmetry

MODEL: dict[str, Any] = {"arch": "mlp", "input_shape": (1, 4, 4), "classes": 3, "seed": 0}
IMAGES = (torch.zeros(2, 1, 4, 4),)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTAR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def derived(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each network that is traced."""
    done: list[str] = []
    export = torch.export.export

    def tracing(*arguments: Any, **options: Any) -> Any:
        done.append("traced")
        return export(*arguments, **options)

    monkeypatch.setattr(torch.export, "export", tracing)
    return done


def records(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "symmetries").iterdir())


def find(name: object = ("mlp", {}), images: Any = IMAGES, *, allow_partial: bool = False, **changed: Any) -> Symmetry:
    return derive_symmetry(build_model(**{**MODEL, **changed}), images, name=name, allow_partial=allow_partial)


def test_the_second_time_derives_nothing(derived: list[str], tmp_path: Path) -> None:
    first = find()
    assert len(first.groups) == 2
    assert find() == first
    model = build_model(**{**MODEL, "seed": 5}).train()  # other weights are the same architecture
    assert derive_symmetry(model, (torch.ones(2, 1, 4, 4),), name=("mlp", {})) == first
    assert derived == ["traced"]
    (file,) = records(tmp_path)
    assert {"format", "symmetry", "digest"} == set(json.loads(file.read_text()))


def test_another_architecture_is_derived_anew(derived: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    find()
    find(("mlp", {"width": 512}))
    find(classes=4)
    find(images=(torch.zeros(4, 1, 4, 4),))
    find(allow_partial=True)
    monkeypatch.setattr(cache, "_sources", lambda room: f"other {room}")
    find()
    assert len(derived) == 6


def test_another_process_finds_the_record() -> None:
    first = find()
    code = (
        "import torch\nfrom fastar.symmetry import derive_symmetry\nfrom fastar.models import build_model\n"
        "model = build_model('mlp', input_shape=(1, 4, 4), classes=3, seed=5)\ntorch.export.export = None\n"
        "print(len(derive_symmetry(model, (torch.zeros(2, 1, 4, 4),), name=('mlp', {})).groups))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [str(len(first.groups))]


def test_networks_of_users_are_proven_every_time(derived: list[str], tmp_path: Path) -> None:
    class Other(nn.Sequential):
        pass

    for model in (Other(nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3)), build_model(**MODEL)):
        for name in ("net", None) if isinstance(model, Other) else (None,):
            derive_symmetry(model, IMAGES, name=name)
    assert len(derived) == 3
    assert not (tmp_path / "cache").exists()
    hooked, replaced = build_model(**MODEL), build_model(**MODEL)
    next(hooked.children()).register_forward_hook(lambda module, inputs, out: out)
    replaced.forward = lambda x: x.flatten(1)[:, :3]  # type: ignore[method-assign]
    assert [cache.record_of("mlp", model, IMAGES) for model in (Other(), hooked, replaced)] == [None] * 3


def test_a_hook_of_all_modules_is_not_served_what_was_found_without_it() -> None:
    kept = find()

    def uneven(module: nn.Module, inputs: object, out: Any) -> Any:
        return out * torch.linspace(1, 2, out.shape[-1]) if isinstance(module, nn.Linear) else out

    handle = register_module_forward_hook(uneven)
    try:
        assert find() != kept
    finally:
        handle.remove()
    assert find() == kept


@pytest.mark.parametrize("damage", ["torn", "empty", "altered", "foreign", "binary", "deep"])
def test_a_damaged_record_is_not_believed(
    derived: list[str], tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = find()
    (file,) = records(tmp_path)
    whole = file.read_text()
    damaged = {
        "torn": whole[: len(whole) // 2].encode(),
        "empty": b"",
        "altered": whole.replace('"axis": 1', '"axis": 0').encode(),
        "foreign": json.dumps({"symmetry": json.loads(whole)["symmetry"]}).encode(),
        "binary": b"\xff\x00",
        "deep": b"[" * 100000,
    }
    file.write_bytes(damaged[damage])
    assert find() == first
    assert derived == ["traced"] * 2
    assert "derived again" in caplog.text
    assert file.read_text() == whole, "it was not written again"


def test_off_keeps_nothing_and_a_folder_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FASTAR_CACHE", "off")
    assert len(find().groups) == 2
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTAR_CACHE", str(tmp_path / "file"))
    assert len(find().groups) == 2
    assert "cannot be written" in caplog.text


BY_HAND = Symmetry(
    (Group("hidden", 7, (Member("hidden.weight", 0), Member("readout.weight", 1))),),
    {"hidden.weight": (7, 6), "readout.weight": (3, 7)},
)


def test_commands_that_keep_the_same_record_at_once_never_show_a_torn_one(tmp_path: Path) -> None:
    """Three processes write it over and over while this one reads it; what is found is always whole."""
    record = tmp_path / "symmetries" / "a.json"
    cache.keep(record, BY_HAND)
    running = set()
    for _ in range(3):
        writer = os.fork()
        if writer == 0:
            code = 1
            try:
                for _ in range(15):
                    cache.keep(record, BY_HAND)
                code = 0
            finally:
                os._exit(code)
        running.add(writer)
    while running:
        assert cache.find(record) == BY_HAND
        for writer in sorted(running):
            ended, status = os.waitpid(writer, os.WNOHANG)
            if ended:
                running.remove(writer)
                assert os.waitstatus_to_exitcode(status) == 0
    assert list(record.parent.iterdir()) == [record]


def test_threads_that_keep_the_same_record_at_once_write_files_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They have one process id, as processes of two containers with one home may have."""
    both, fsync = threading.Barrier(2), os.fsync

    def meeting(handle: int) -> None:
        both.wait(60)  # each has a file open, and has not renamed it
        fsync(handle)

    record = tmp_path / "b.json"
    monkeypatch.setattr(os, "fsync", meeting)
    threads = [threading.Thread(target=cache.keep, args=(record, BY_HAND)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert caplog.text == ""
    assert cache.find(record) == BY_HAND
