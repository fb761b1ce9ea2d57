"""Model files as they are met: damaged by a bit, of types that cannot be computed with, tied in one place alone, cut
short while they are read."""

from __future__ import annotations

import os
import random
import struct
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import contents, fastar, refused, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastar as library
from fastar.errors import FastarError
from fastar.runs import RunFolder, read_metadata, stored_digest
from fastar.runs.model_files import load_checkpoint, load_into, save_checkpoint

NETS = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), torch.zeros(2, 6)

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.head = nn.Linear(5, 8, bias=False), nn.Linear(8, 8), nn.Linear(5, 8, bias=False)
        self.head.weight = self.embed.weight
    def forward(self, x):
        return torch.relu(self.hidden(self.embed(x))) @ self.head.weight

def tied():
    return Tied(), torch.zeros(2, 5)

class WithBuffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("phase", torch.ones(3, dtype=torch.complex64))
        self.register_buffer("steps", torch.tensor(0))
    def forward(self, x):
        return self.b(torch.relu(self.a(x))) * self.phase.abs()

def with_buffers():
    return WithBuffers(), torch.zeros(2, 6)
"""


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("nets") / "nets.py"
    file.write_text(NETS)
    return file


@pytest.fixture(scope="module")
def made(nets: Path) -> dict[str, Any]:
    scope: dict[str, Any] = {}
    exec(compile(NETS, str(nets), "exec"), scope)
    return scope


def state_of(made: dict[str, Any], function: str, seed: int) -> dict[str, Tensor]:
    """Random values for all floating-point tensors of a network."""
    generator = torch.Generator().manual_seed(seed)
    state = made[function]()[0].state_dict()
    return {
        name: torch.randn(value.shape, generator=generator, dtype=value.dtype)
        if value.is_floating_point() or value.is_complex()
        else value + seed
        for name, value in state.items()
    }


def small() -> dict[str, Tensor]:
    return {"a.weight": torch.arange(6.0).view(2, 3), "n": torch.tensor(7), "half": torch.ones(3).half()}


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in wanted.items()
    )


def flipped(data: bytes, seed: int, count: int | None = None) -> Iterator[bytes]:
    """`data` with one bit changed: in every byte, or in `count` of them."""
    chance = random.Random(seed)
    places = range(len(data)) if count is None else chance.sample(range(len(data)), count)
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << chance.randrange(8)
        yield bytes(changed)


def test_no_changed_bit_of_a_zip_file_gives_other_values(tmp_path: Path) -> None:
    """PyTorch stores a checksum with every tensor, and does not look at it."""
    path = tmp_path / "a.pt"
    torch.save({"state_dict": small(), "epoch": 3}, path)
    refused_with = []
    for mutant in flipped(path.read_bytes(), seed=0, count=200):
        path.write_bytes(mutant)
        try:
            found = load_checkpoint(path)
        except FastarError as error:
            refused_with.append(str(error))
        else:
            assert same(found.state, small())
    assert len(refused_with) > 50  # the rest is padding and time stamps
    assert not any("\n" in line for line in refused_with)


def test_a_member_of_a_zip_file_that_is_marked_as_a_folder(tmp_path: Path) -> None:
    """One bit of its directory: torch then gives tensors of whatever memory held."""
    path = tmp_path / "a.pt"
    torch.save(small(), path)
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02")
    while not data[entry + 46 :].startswith(b"a/data/0"):
        entry = data.index(b"PK\x01\x02", entry + 1)
    data[entry + 38] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(FastarError, match="a/data/0 is marked as a folder"):
        load_checkpoint(path)


@pytest.mark.parametrize("own", [False, True])
def test_no_changed_bit_of_fastars_file_is_read(tmp_path: Path, own: bool) -> None:
    """Its mark is under the digest too: a file whose mark is damaged is no other people's file."""
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, small(), {"kind": "source", "arch": "mlp"})
    for mutant in flipped(path.read_bytes(), seed=1):
        path.write_bytes(mutant)
        with pytest.raises(FastarError) as error:
            load_checkpoint(path, own=own)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("read", [load_checkpoint, read_metadata, stored_digest])
def test_a_plain_file_is_not_fastars(tmp_path: Path, read: Any) -> None:
    path = tmp_path / "a.safetensors"
    save_file(small(), path, {"format": "pt"})
    read(path)
    with pytest.raises(FastarError, match=r"a\.safetensors: is not as fastar writes its files"):
        read(path, own=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("run")
    options = tiny(folder / "data", sources=2, heldout=0)
    assert fastar("train-sources", *options, "--out", folder / "run").code == 0
    return RunFolder(folder / "run")


def test_a_run_reads_no_file_that_it_did_not_write(run: RunFolder) -> None:
    source = run.model("source", 1)
    good = source.read_bytes()
    save_file(load_file(source), source)
    options = tiny(run.path.parent / "data", sources=2, heldout=0)
    try:
        assert refused("train-sources", *options, "--out", run.path).startswith(
            f"{source}: is not as fastar writes its files"
        )
    finally:
        source.write_bytes(good)


def save(path: Path, state: Mapping[str, Tensor]) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    else:
        torch.save(dict(state), path)
    return path


def match(a: Path, b: Path, model: str, *more: object) -> tuple[object, ...]:
    return ("match", a, b, "--model", model, "device=cpu", *more)


def test_tied_in_the_network_but_not_in_the_file(nets: Path, made: dict[str, Any], tmp_path: Path) -> None:
    state = state_of(made, "tied", 0)
    state["head.weight"] = state["embed.weight"]
    a = save(tmp_path / "a.pt", state)
    b = save(tmp_path / "b.pt", {**state, "head.weight": state["head.weight"] + 1})
    before = contents(tmp_path)
    for first, second in ((a, b), (b, a)):
        line = refused(*match(first, second, f"{nets}:tied", "--out", tmp_path / "o.safetensors"))
        assert line.startswith(f"{b} has two values for 'embed.weight' and 'head.weight', which are one tensor")
    assert contents(tmp_path) == before
    assert fastar(*match(a, a, f"{nets}:tied", "--out", tmp_path / "o.safetensors")).code == 0
    found = load_file(tmp_path / "o.safetensors")
    assert torch.equal(found["head.weight"], found["embed.weight"])


def test_tied_in_one_model_alone(made: dict[str, Any]) -> None:
    """In Python the other is a network of its own: it is matched, but no path leads to it."""
    a, inputs = made["tied"]()
    b, _ = made["tied"]()
    b.head.weight = torch.nn.Parameter(b.head.weight + 1)
    library.match(a, b, example_inputs=inputs)
    with pytest.raises(FastarError, match=r"model_b has two values for 'embed\.weight' and 'head\.weight'"):
        library.barrier(a, b, [])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: v.to(torch.complex64), "has '0.weight' as complex64: parameters are matched"),
        (lambda v: v.to(torch.float8_e4m3fn), "has '0.weight' as float8_e4m3fn: parameters are matched"),
        (lambda v: v.to(torch.int8), "has '0.weight' as int8 (codes, not numbers): parameters are matched"),
        (lambda v: v.view(torch.int32)[:, :2], "has '0.weight' as int32 (codes, not numbers): parameters"),
        (lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8), ": 0.weight is quantised (torch.qint8)"),
        (lambda v: v.to_sparse(), ": 0.weight is sparse (torch.sparse_coo)"),
    ],
    ids=["complex", "float8", "int8", "packed", "quantised", "sparse"],
)
@pytest.mark.filterwarnings("ignore")
def test_weights_that_cannot_be_computed_with_are_named(
    nets: Path, made: dict[str, Any], tmp_path: Path, change: Any, says: str
) -> None:
    state = state_of(made, "build", 0)
    a = save(tmp_path / "a.pt", state)
    b = save(tmp_path / "b.pt", {**state, "0.weight": change(state["0.weight"])})
    before = contents(tmp_path)
    assert says in refused(*match(b, a, f"{nets}:build", "--out", tmp_path / "o.safetensors"))
    assert contents(tmp_path) == before


def test_a_module_of_codes_is_named_in_python_too(made: dict[str, Any]) -> None:
    a, inputs = made["build"]()
    b, _ = made["build"]()
    b[0].weight = torch.nn.Parameter(b[0].weight.to(torch.float8_e4m3fn), requires_grad=False)
    for one, other, says in ((a, b, "model_b has '0.weight' as float8"), (b, a, "in the model '0.weight' is float8")):
        with pytest.raises(FastarError, match=says):
            library.match(one, other, example_inputs=inputs)
        with pytest.raises(FastarError, match=says):
            library.barrier(one, other, [(inputs, torch.zeros(2, dtype=torch.int64))])


def test_a_complex_buffer_is_kept_and_never_cut(nets: Path, made: dict[str, Any], tmp_path: Path) -> None:
    a, b = (save(tmp_path / f"{n}.safetensors", state_of(made, "with_buffers", n)) for n in range(2))
    out, average = tmp_path / "o.safetensors", tmp_path / "m.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fastar(*match(a, b, f"{nets}:with_buffers", "--out", out)).code == 0
    assert torch.equal(load_file(out)["phase"], load_file(b)["phase"])
    options = ("--model", f"{nets}:with_buffers", "--average", average, "device=cpu")
    assert fastar("match-many", a, b, *options).code == 0
    found = load_file(average)
    assert torch.equal(found["phase"], (load_file(a)["phase"] + load_file(b)["phase"]) / 2)
    assert torch.equal(found["steps"], load_file(a)["steps"])  # of whole numbers, the first's


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_is_written_is_of_the_type_that_was_read(
    nets: Path, made: dict[str, Any], tmp_path: Path, dtype: torch.dtype
) -> None:
    """A permutation moves values: each bit of them stays."""
    a, b = (
        save(tmp_path / f"{n}.safetensors", {k: v.to(dtype) for k, v in state_of(made, "build", n).items()})
        for n in range(2)
    )
    out, average = tmp_path / "o.safetensors", tmp_path / "m.safetensors"
    assert fastar(*match(a, b, f"{nets}:build", "--out", out)).code == 0
    before, after = load_file(b), load_file(out)
    assert not torch.equal(before["2.weight"], after["2.weight"])
    for name, value in before.items():
        assert after[name].dtype == dtype
        assert torch.equal(value.flatten().sort().values, after[name].flatten().sort().values), name
    folder = tmp_path / "many"
    options = ("--model", f"{nets}:build", "--out", folder, "--average", average, "device=cpu")
    assert fastar("match-many", a, b, *options).code == 0
    matched = [load_file(folder / path.name) for path in (a, b)]
    for name, value in load_file(average).items():
        assert value.dtype == dtype
        assert torch.equal(value, ((matched[0][name].double() + matched[1][name].double()) / 2).to(dtype)), name


def test_fastars_own_network_in_half_precision(run: RunFolder, tmp_path: Path) -> None:
    a = run.model("source", 0)
    b = tmp_path / "b.safetensors"
    save_checkpoint(b, {k: v.half() for k, v in load_file(run.model("source", 1)).items()}, read_metadata(a))
    assert fastar("match", a, b, "--out", tmp_path / "o.safetensors", "device=cpu").code == 0
    assert {value.dtype for value in load_file(tmp_path / "o.safetensors").values()} == {torch.float16}


def test_a_mean_of_float8_buffers_is_not_made(nets: Path, tmp_path: Path) -> None:
    file = tmp_path / "f8.py"
    file.write_text(NETS.replace("torch.ones(3, dtype=torch.complex64)", "torch.ones(3).to(torch.float8_e5m2)"))
    scope: dict[str, Any] = {}
    exec(compile(file.read_text().replace(".abs()", ".float()"), str(file), "exec"), scope)
    file.write_text(file.read_text().replace(".abs()", ".float()"))
    a = save(tmp_path / "a.safetensors", scope["with_buffers"]()[0].state_dict())
    options = ("--model", f"{file}:with_buffers", "device=cpu")
    assert "phase is float8_e5m2, of which no average" in refused(
        "match-many", a, a, *options, "--average", tmp_path / "m.safetensors"
    )
    assert fastar("match", a, a, *options, "--out", tmp_path / "o.safetensors").code == 0
    assert load_file(tmp_path / "o.safetensors")["phase"].dtype == torch.float8_e5m2


@pytest.mark.filterwarnings("ignore")  # torch's, of protocols that do not exist
def test_damaged_files_of_old_versions_of_torch(tmp_path: Path) -> None:
    """They have no checksum: what is read may have other values, but nothing ends in a traceback."""
    path = tmp_path / "a.pt"
    torch.save(small(), path, _use_new_zipfile_serialization=False)
    good = path.read_bytes()
    refused_with = []
    cut = (good[:length] for length in range(0, len(good), 37))
    for mutant in (*flipped(good, seed=2, count=150), *cut):
        path.write_bytes(mutant)
        try:
            load_checkpoint(path)
        except FastarError as error:
            refused_with.append(str(error))
    assert len(refused_with) > 50
    assert not any("\n" in line or "\x1b" in line for line in refused_with)


def test_a_file_that_is_cut_short_while_it_is_read(tmp_path: Path) -> None:
    """A mapped one ended the process."""
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"w": torch.arange(100_000.0)}, {})
    state = load_checkpoint(path).released().state
    assert torch.equal(state["w"], torch.arange(100_000.0))
    os.truncate(path, 8192)
    with pytest.raises(FastarError, match=r"a\.safetensors: was changed while it was in use"):
        _ = state["w"]


@pytest.mark.parametrize("read", [load_checkpoint, read_metadata, stored_digest])
@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, read: Any, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(FastarError, match="it is no regular file"):
        read(tmp_path / name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_files_are_read_alike_under_every_default_type(tmp_path: Path, dtype: torch.dtype) -> None:
    wanted = small()
    save_checkpoint(tmp_path / "a.safetensors", wanted, {})
    torch.set_default_dtype(dtype)
    try:
        assert same(load_checkpoint(tmp_path / "a.safetensors").state, wanted)
    finally:
        torch.set_default_dtype(torch.float32)


def test_every_type_is_read_as_it_was_written(tmp_path: Path) -> None:
    raw = torch.arange(32, dtype=torch.uint8) % 2
    kinds = [torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.int16, torch.uint32, torch.bool]
    kinds += [torch.float8_e4m3fn, torch.float8_e5m2]
    state = {str(kind): raw.clone().view(kind) for kind in kinds} | {
        "none": torch.empty(0, 3),
        "one": torch.tensor(2.0),
    }
    save_file(state, tmp_path / "a.safetensors")
    found = load_checkpoint(tmp_path / "a.safetensors").state
    for name, value in state.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert found[name].reshape(-1).view(torch.uint8).tolist() == value.reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize(
    "header",
    [
        "[" * 3000,
        '{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,' + "9" * 5000 + "]}}",
        '{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,8]}}',
        '{"w":{"dtype":"F32","shape":[2],"data_offsets":[4,8]}}',
        '{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{"dtype":"I32","shape":[2],"data_offsets":[0,8]}}',
        '{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"v":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        '{"w":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}',
        '{"w":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}',
        '{"w":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
        '{"w":3}',
        "3",
    ],
    ids=range(11),
)
def test_headers_that_are_damaged(tmp_path: Path, header: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(8))
    with pytest.raises(FastarError, match="not a readable safetensors file") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


def test_sources_under_other_names_stay_in_their_files(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3))
    wanted = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    save_file({f"model.net.{name}": value for name, value in wanted.items()}, tmp_path / "a.safetensors")
    found = load_into(model, load_checkpoint(tmp_path / "a.safetensors")).released()
    assert type(found.state).__name__ == "StoredState"
    assert same(dict(found.state), wanted)
    assert same(model.state_dict(), wanted)
