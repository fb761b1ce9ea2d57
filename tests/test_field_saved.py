"""Checkpoints as people save them, and networks named by their file: what is read, what is said, what is refused."""

from __future__ import annotations

import argparse
import json
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import contents, fastar, refused
from network_cases import own_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastar.cli import doctor
from fastar.errors import FastarError
from fastar.experiments.reuse import given_paths
from fastar.runs import stem_of
from fastar.runs.model_files import Checkpoint, load_checkpoint, load_into

NET = """
import torch
from torch import nn
from helpers_of_{name} import hidden

def build():
    return nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, 3)), torch.zeros(2, 6)
def number():
    return 3
def raises():
    raise ValueError("no data\\nhere")
def leaves():
    raise SystemExit("usage: mynet.py")
"""


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=generator) for name, value in network().state_dict().items()}


def under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], value) for name, value in wanted.items())


def loaded(path: Path) -> Checkpoint:
    """The checkpoint as a network of ours takes it."""
    model = network()
    found = load_into(model, load_checkpoint(path))
    assert same(model.state_dict(), found.state)
    return found


OPTIMIZER = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(8, 6)}}, "param_groups": [{"lr": 0.1}]}
PREFIXES = ["module.", "module.module.", "_orig_mod.", "module._orig_mod.", "model.", "model.net.", "backbone."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_one_prefix_of_all_names(tmp_path: Path, prefix: str, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    state = under(prefix, weights())
    if suffix == "pt":
        torch.save(OrderedDict(state), path)
    else:
        save_file(state, path)
    found = loaded(path)
    assert same(found.state, weights())
    assert found.taken() == f"{path}: took the tensors, without the prefix {prefix!r} of their names"


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_model_that_is_wrapped_itself(tmp_path: Path, wrapped: bool) -> None:
    """Its own names begin with module., and a file's may or may not."""
    torch.save(under("module." if wrapped else "", weights()), tmp_path / "a.pt")
    model = nn.Module()
    model.module = network()
    load_into(model, load_checkpoint(tmp_path / "a.pt"))
    assert same(model.module.state_dict(), weights())


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (lambda w, e: w, None),
        (lambda w, e: {"state_dict": w, "epoch": 3}, "took the tensors of 'state_dict'; left over: epoch"),
        (
            lambda w, e: {"epoch": 3, "model_state_dict": w, "optimizer_state_dict": OPTIMIZER, "loss": torch.ones(())},
            "took the tensors of 'model_state_dict'; left over: epoch, optimizer_state_dict, loss",
        ),
        (lambda w, e: {"net": w, "acc": 91.2}, "took the tensors of 'net'; left over: acc"),
        (
            lambda w, e: {"model": w, "model_ema": e, "optimizer": OPTIMIZER},
            "took the tensors of 'model'; left over: model_ema, optimizer",
        ),
        (
            lambda w, e: {"state_dict": under("module.", w), "state_dict_ema": e},
            "took the tensors of 'state_dict', without the prefix 'module.' of their names; left over: state_dict_ema",
        ),
        (lambda w, e: {"ema": w}, "took the tensors of 'ema', an average of the weights (EMA)"),
        (lambda w, e: {"resnet": w, "resnet_ema": e}, "took the tensors of 'resnet'; left over: resnet_ema"),
        (
            lambda w, e: {"model": {"state_dict": w, "config": {"width": 8}}, "args": {"lr": 0.1}},
            "took the tensors of 'model.state_dict'; left over: args, model.config",
        ),
        (
            lambda w, e: {
                "epoch": 1,
                "global_step": 7,
                "pytorch-lightning_version": "2.5",
                "state_dict": {**under("model.", w), "loss_fn.weight": torch.ones(3)},
                "loops": {"fit_loop": {"state_dict": {}}},
                "optimizer_states": [OPTIMIZER],
                "hyper_parameters": {"lr": 0.1},
            },
            "took the tensors of 'state_dict', without the prefix 'model.' of their names; left over: loss_fn.weight, "
            "epoch, global_step, pytorch-lightning_version and 3 more",
        ),
        (
            lambda w, e: {**under("model.", w), **under("model_ema.", e)},
            "took the tensors, without the prefix 'model.' of their names; left over: model_ema.0.weight, "
            "model_ema.0.bias, model_ema.2.weight, model_ema.2.bias",
        ),
        (
            lambda w, e: {"n_averaged": torch.tensor(3), **under("module.", w)},
            "took the tensors, without the prefix 'module.' of their names; left over: n_averaged",
        ),
        (
            lambda w, e: {
                "a": 1, "b": 2, "c": 3, "d": 4, "model": w, "model_ema": e,
            },
            "took the tensors of 'model'; left over: a, b, c, d and 1 more, an average (EMA) 'model_ema' among them",
        ),
        (lambda w, e: {**w, "0._extra_state": {"scale": 1}}, "left over: 0._extra_state"),
    ],
    ids=range(14),
)  # fmt: skip
@pytest.mark.parametrize("name", ["a.ckpt", "a.pth.tar"])
def test_what_a_training_keeps_beside(
    tmp_path: Path, content: Callable[[Any, Any], Any], line: str | None, name: str
) -> None:
    torch.save(content(weights(), weights(1)), tmp_path / name)
    found = loaded(tmp_path / name)
    assert same(found.state, weights())
    assert found.taken() == (None if line is None else f"{tmp_path / name}: {line}")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lambda w: {"model": w, "net": w}, "holds several networks ('model', 'net')"),
        (lambda w: {"generator": w, "discriminator": w}, "holds several networks ('generator', 'discriminator')"),
        (lambda w: {**under("a.", w), **under("b.", w)}, "several of its networks fit the model ('a.', 'b.')"),
        (
            lambda w: {"state_dict": w, "args": argparse.Namespace(lr=0.1)},
            "it asks for argparse.Namespace; save model.",
        ),
        (lambda w: {"state_dict": {}}, "holds no tensors"),
        (lambda w: {"optimizer": OPTIMIZER}, "entry 'optimizer' is no named tensor"),
    ],
    ids=range(6),
)
def test_what_cannot_be_told_is_refused(tmp_path: Path, content: Callable[[Any], Any], says: str) -> None:
    torch.save(content(weights()), tmp_path / "a.pt")
    with pytest.raises(FastarError) as error:
        loaded(tmp_path / "a.pt")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_container_that_holds_itself(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(FastarError, match="entry 'model' is no named tensor"):
        load_checkpoint(tmp_path / "a.pt")


def folder_of_shards(folder: Path, kind: str) -> Path:
    """A Hugging Face folder in two files with an index."""
    folder.mkdir()
    halves = [{name: value for name, value in weights().items() if name[0] == first} for first in "02"]
    base = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    files = [f"{base}-0000{n}-of-00002.{kind}" for n in (1, 2)]
    for file, half in zip(files, halves, strict=True):
        save_file(half, folder / file) if kind == "safetensors" else torch.save(half, folder / file)
    index = folder / f"{base}.{kind}.index.json"
    where = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return index


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_model_in_several_files(tmp_path: Path, kind: str) -> None:
    index = folder_of_shards(tmp_path / "hub", kind)
    for path in (index, tmp_path / "hub"):
        assert same(loaded(path).state, weights())
    shard = index.with_name(json.loads(index.read_text())["weight_map"]["0.bias"])
    good = shard.read_bytes()
    save_file({"0.bias": torch.ones(8)}, shard) if kind == "safetensors" else torch.save(
        {"0.bias": torch.ones(8)}, shard
    )
    with pytest.raises(FastarError, match=r"lacks the tensor '0\.weight', and .*index\.json says otherwise"):
        load_checkpoint(index)
    shard.unlink()
    with pytest.raises(FastarError, match=rf"{shard.name}: no such checkpoint"):
        load_checkpoint(index)
    shard.write_bytes(good)
    for text in ("{", "[]", '{"weight_map": {"w": "../a.bin"}}', '{"weight_map": {"w": 3}}', "[" * 3000):
        index.write_text(text)
        with pytest.raises(FastarError, match="not a readable index"):
            load_checkpoint(index)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_hugging_face_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FastarError, match=r"no such checkpoint: a folder with none of model\.safetensors"):
        load_checkpoint(tmp_path)
    save_file(weights(), tmp_path / name) if name == "model.safetensors" else torch.save(weights(), tmp_path / name)
    assert same(loaded(tmp_path).state, weights())
    assert loaded(tmp_path).taken() == f"{tmp_path}: took the tensors of {name!r}"
    torch.save(weights(1), tmp_path / "pytorch_model.bin")
    if name == "model.safetensors":
        assert same(loaded(tmp_path).state, weights())
        assert loaded(tmp_path).taken() == f"{tmp_path}: took the tensors of {name!r}; left over: pytorch_model.bin"


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("a.b.pth.tar", "a.b"),
        ("a.pt", "a"),
        ("model.safetensors.index.json", "model"),
        ("llama-3.1", "llama-3.1"),
    ],
)
def test_what_a_permuted_checkpoint_is_called(name: str, stem: str) -> None:
    assert stem_of(Path(name)) == stem


def test_a_folder_s_sources_may_be_called_so(tmp_path: Path) -> None:
    names = ["a.ckpt", "b.pth.tar", "c.bin", "d.pt", "e.safetensors", "f.index.json", "g.txt", ".pt"]
    for name in names:
        (tmp_path / name).touch()
    assert [path.name for path in given_paths(tmp_path, 5)] == names[:5]
    with pytest.raises(FastarError, match="holds 5 checkpoints"):
        given_paths(tmp_path, 6)


def test_a_run_folder_is_not_taken_for_its_sources(tmp_path: Path) -> None:
    """It holds models too: the star, and permutations."""
    (tmp_path / "sources").mkdir()
    for name in ("config.yaml", "matchings.safetensors", "star.safetensors"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(FastarError, match=f"{tmp_path}: is a run folder; give its sources, {tmp_path}/sources"):
        given_paths(tmp_path, 2)


def test_names_alone_differ(tmp_path: Path) -> None:
    names = dict(zip(weights(), ["fc1.w", "fc1.b", "fc2.w", "fc2.b"], strict=True))
    torch.save({names[name]: value for name, value in weights().items()}, tmp_path / "a.pt")
    with pytest.raises(FastarError) as error:
        loaded(tmp_path / "a.pt")
    assert str(error.value) == (
        f"{tmp_path / 'a.pt'} has the model's shapes under other names: 'fc1.w' where the model has '0.weight'; "
        "'fc1.b' where the model has '0.bias'; 'fc2.w' where the model has '2.weight'; and 1 more; rename its tensors, "
        "or use one class of network for both"
    )


@pytest.fixture
def mynet(tmp_path: Path) -> Path:
    """A user's file and one that it imports, in a folder that is not the current one."""
    folder = tmp_path / "nets"
    folder.mkdir()
    name = tmp_path.name.replace("-", "_")
    (folder / f"helpers_of_{name}.py").write_text("hidden = 8\n")
    (folder / "mynet.py").write_text(NET.format(name=name))
    (folder / "broken.py").write_text("def build(:\n")
    (folder / "program.py").write_text("import argparse\nargparse.ArgumentParser().parse_args(['--what'])\n")
    return folder / "mynet.py"


def test_a_network_named_by_its_file(mynet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_model(f"{mynet}:build")[1].shape == (2, 6)
    monkeypatch.chdir(mynet.parent)
    assert isinstance(own_model("mynet.py:build")[0], nn.Sequential)
    assert isinstance(own_model("mynet:build")[0], nn.Sequential)


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("{}/none.py:build", "there is no file {}/none.py"),
        ("{}/mynet.py:bild", "did you mean build?"),
        ("{}/mynet.py:", "write module:function or file.py:function"),
        ("{}/mynet.py", "write module:function or file.py:function"),
        ("{}/mynet.py:number", "returned int"),
        ("{}/mynet.py:raises", "calling it failed (ValueError: no data here)"),
        ("{}/mynet.py:leaves", "calling it failed (SystemExit: usage: mynet.py)"),
        ("{}/broken.py:build", "cannot import {}/broken.py (SyntaxError"),
        ("{}/program.py:build", "cannot import {}/program.py (SystemExit: 2); mend it; what is to run as a program"),
        ("{}:build", "there is no file {}"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(mynet: Path, reference: str, says: str) -> None:
    with pytest.raises(FastarError) as error:
        own_model(reference.format(mynet.parent))
    assert says.format(mynet.parent) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_command_says_what_it_took(mynet: Path, tmp_path: Path) -> None:
    a, b, out = tmp_path / "a.ckpt", tmp_path / "b.pth.tar", tmp_path / "o.safetensors"
    torch.save({"state_dict": under("model.", weights()), "epoch": 3}, a)
    torch.save({"model": under("module.", weights(1)), "ema": weights()}, b)
    outcome = fastar("match", a, b, "--model", f"{mynet}:build", "--out", out, "device=cpu")
    assert outcome.code == 0, outcome
    assert f"{a}: took the tensors of 'state_dict', without the prefix 'model.' of their names; left over: epoch\n" in (
        outcome.err
    )
    assert f"{b}: took the tensors of 'model', without the prefix 'module.' of their names; left over: ema\n" in (
        outcome.err
    )
    assert load_file(out).keys() == weights().keys()
    folder_of_shards(tmp_path / "hub", "safetensors")
    before = contents(tmp_path)
    inside = tmp_path / "hub" / "model-00001-of-00002.safetensors"
    assert "would be written over" in refused(
        "match", a, tmp_path / "hub", "--model", f"{mynet}:build", "--out", inside, "device=cpu"
    )
    assert contents(tmp_path) == before


def test_a_torchvision_of_another_build_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA build beside a CPU build of torch: whoever imports it is told by torch of an operator."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="is of another build than torch"):
        doctor._torchvision()
    (tmp_path / "mynet.py").write_text("import torchvision\n")
    with pytest.raises(FastarError, match="torchvision is of another build than torch"):
        own_model(f"{tmp_path / 'mynet.py'}:build")
