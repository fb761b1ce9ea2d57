"""Data of users: exact where they can be, and what is said where they are not."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from data_cases import Backwards, Drawing, Failing, Streamed, epoch, same, split, task_data
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fastar
from fastar.data.generators import states
from fastar.data.user_data import IterableData, SampleData, TensorData
from fastar.errors import FastarError, UserCodeError

X, Y = torch.arange(26.0).view(13, 2), torch.arange(13) % 3
LINE = "the train data: its batches come as they are, so a training that was stopped goes on at the end of an epoch"


def makers() -> list[Any]:
    named = {"x": X, "labels": Y}
    return [
        pytest.param(lambda: split((X, Y)), id="tensors"),
        pytest.param(lambda: split(X), id="tensor"),
        pytest.param(lambda: split(named), id="mapping"),
        pytest.param(lambda: split(TensorDataset(X, Y)), id="dataset"),
        pytest.param(lambda: split(Drawing()), id="drawing"),
        pytest.param(lambda: split(DataLoader(Drawing(), 4, shuffle=True)), id="loader"),
    ]


@pytest.mark.parametrize("make", makers())
def test_batches_are_functions_of_seed_epoch_and_place(make: Any) -> None:
    data = make()
    assert data.exact
    whole = epoch(data, 2, seed=5)
    assert len(whole) == data.batch_count(4) == 3
    for begin in range(4):
        assert same(epoch(make(), 2, seed=5, begin=begin), whole[begin:])
    assert not same(epoch(data, 3, seed=5), whole)
    assert not same(epoch(data, 2, seed=6), whole)
    assert same(epoch(data, 2, seed=5), whole)
    with pytest.raises(FastarError, match=r"batch 4 is outside the epoch's 3 batches"):
        epoch(data, begin=4)


def test_every_sample_comes_once() -> None:
    for data in (split((X, Y)), split(TensorDataset(X, Y))):
        batches = list(data.batches(4, seed=0, epoch=0, drop_last=False))
        assert [len(x) for x, _ in batches] == [4, 4, 4, 1]
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        order = x[:, 0].argsort()
        assert torch.equal(x[order], X)
        assert torch.equal(y[order], Y)
        assert not torch.equal(x, X)
        x, y = (torch.cat(parts) for parts in zip(*data.sequential(5), strict=True))
        assert torch.equal(x, X)
        assert torch.equal(y, Y)


def test_tensors_and_a_dataset_of_them_come_in_the_same_order() -> None:
    for number in range(2):
        assert same(epoch(split((X, Y)), number), epoch(split(TensorDataset(X, Y)), number))


def test_workers_give_the_same_bits() -> None:
    alone, beside = split(Drawing()), split(Drawing(), workers=2)
    for number in range(2):
        assert same(epoch(beside, number, seed=3), epoch(alone, number, seed=3))
    assert same(epoch(beside, 1, seed=3, begin=2), epoch(alone, 1, seed=3, begin=2))
    some = beside.batches(4, seed=3, epoch=0)
    assert same(next(some), next(alone.batches(4, seed=3, epoch=0)))  # left in its middle
    assert same(list(beside.sequential(4)), list(alone.sequential(4)))


def test_what_a_sample_draws_follows_from_its_index_and_leaves_generators_alone() -> None:
    wanted = epoch(split(Drawing()), 1)
    for seed in range(2):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        data, before = split(Drawing()), states()
        found = epoch(data, 1)
        after = states()
        assert same(found, wanted)
        assert torch.equal(before[0], after[0])
        assert str(before[1]) == str(after[1])
        assert before[2] == after[2]
    values = torch.cat([x for x, _ in wanted])
    assert len(values[:, 1:].unique()) == values[:, 1:].numel()  # no two samples draw alike
    by_two = torch.cat([x for x, _ in epoch(split(Drawing()), 1, size=2)])
    assert torch.equal(by_two[: len(values)], values)  # nor by the batch that it is in


def summed(samples: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([x for x, _ in samples]) + 100, torch.stack([y for _, y in samples])


def test_a_loader_is_taken_apart() -> None:
    heard: list[str] = []
    given = DataLoader(TensorDataset(X, Y), 6, shuffle=True, collate_fn=summed, num_workers=2)
    data = split(given, say=heard.append)
    assert isinstance(data, SampleData)
    assert heard == ["the train data: batches of 4 samples (train.batch_size); the loader's own are of 6"]
    assert same(epoch(data), [[x + 100, y] for x, y in epoch(split((X, Y)))])
    assert data._loader.num_workers == 2
    split(DataLoader(TensorDataset(X, Y), 4), say=heard.append)
    assert len(heard) == 1


@pytest.mark.parametrize(
    "given",
    [
        DataLoader(TensorDataset(X, Y), 4, sampler=Backwards(13)),
        DataLoader(Streamed(), 4),
        [(X[:4], Y[:4]), (X[4:8], Y[4:8]), (X[8:], Y[8:])],
        lambda: iter([(X[:4], Y[:4])]),
    ],
    ids=["sampler", "iterable", "list", "function"],
)
def test_other_iterables_go_on_at_the_end_of_an_epoch_and_say_so(given: Any) -> None:
    heard: list[str] = []
    data = split(given, say=heard.append)
    assert isinstance(data, IterableData)
    assert not data.exact
    assert heard == [LINE]
    assert len(epoch(data)) == data.batch_count(4)
    assert len(list(data.sequential(4))) == data.batch_count(4)


def test_a_pass_of_an_iterable_follows_from_seed_and_epoch() -> None:
    """Whatever is drawn between its batches; so a training that goes on between epochs goes on to the same bits."""
    for given in (DataLoader(Streamed(), 4), DataLoader(Streamed(), 4, num_workers=1)):
        data = split(given)
        wanted = epoch(data, 1)
        before = states()
        found = []
        for batch in data.batches(4, seed=0, epoch=1):
            found.append(batch)
            torch.manual_seed(9)
        torch.default_generator.set_state(before[0])
        assert same(found, wanted)
        assert not same(epoch(data, 2), wanted)
        assert torch.equal(states()[0], before[0])


def test_an_iterable_of_another_length_than_before_is_refused() -> None:
    lengths = iter([3, 3, 4, 2])
    data = split(lambda: iter([(X[:4], Y[:4])] * next(lengths)))
    assert len(epoch(data)) == 3
    with pytest.raises(FastarError, match=r"the train data: had 3 batches and gave more now: a pass must not change"):
        epoch(data)
    with pytest.raises(FastarError, match=r"had 3 batches and gave 2 now"):
        epoch(data)


def test_a_dataset_whose_length_changes_is_refused() -> None:
    given = Drawing()
    data = split(given)
    given.count = 12
    says = r"the train data: had 13 samples and has 12 now: its length must not change"
    with pytest.raises(FastarError, match=says):
        epoch(data)
    with pytest.raises(FastarError, match=says):
        list(data.sequential(4))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_that_raises_is_named_with_its_sample(workers: int) -> None:
    """The same line with workers, and their traceback above it."""
    data = split(Failing(at=4), workers=workers)  # not among the samples that the digest looks at
    with pytest.raises(UserCodeError) as refused:
        epoch(data, size=13)
    assert str(refused.value) == "the train data[4] (Failing) failed (OSError: no such picture)"
    cause = refused.value.__cause__
    assert "no such picture" in str(cause)
    if workers:
        assert 'raise OSError("no such picture")' in str(cause)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_collate_fn_that_raises_is_named(workers: int) -> None:
    def broken(samples: list[Any]) -> Any:
        raise ValueError("shapes differ")

    data = split(DataLoader(TensorDataset(X, Y), 4, collate_fn=broken, num_workers=workers))
    with pytest.raises(UserCodeError) as refused:
        epoch(data)
    says = "the train data: making a batch of 4 samples (collate_fn) failed (ValueError: shapes differ)"
    assert str(refused.value) == says


def test_an_iterable_that_raises_is_named_with_its_batch() -> None:
    def passes() -> Iterator[Any]:
        yield X, Y
        if begun:
            raise ZeroDivisionError
        yield X, Y

    begun: list[int] = []
    data = split(passes)
    begun.append(1)
    with pytest.raises(UserCodeError, match=r"the train data: batch 1 failed \(ZeroDivisionError\)"):
        epoch(data)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((X, Y[:5]), r"its tensors have the shapes \[13, 2\], \[5\]: give one entry for each sample in all"),
        ((X[:0], Y[:0]), r"holds no sample"),
        ([], r"holds no batch"),
        (iter([(X, Y)]), r"can be gone through once only"),
        ((X.numpy(), Y.numpy()), r"arrays of NumPy: make tensors of them, torch.from_numpy"),
        (None, r"is a NoneType: give tensors, a torch Dataset, a DataLoader"),
        ("digits", r"is a str: give tensors"),
        (3, r"is a int: give tensors"),
        (Drawing, r"is a type: give tensors"),
        (Drawing(0), r"holds no sample"),
    ],
)
def test_what_is_no_data_is_said(given: Any, says: str) -> None:
    with pytest.raises(FastarError, match=r"the train data:? .*" + says if "holds" not in says else says):
        split(given)


def test_digests_tell_data_apart_and_are_the_same_in_every_process() -> None:
    class Objects(Dataset[Any]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            return {"x": X[index], "y": np.arange(3), "made": object()}

    assert split((X, Y)).digest == split((X.clone(), Y)).digest
    assert len({split(one).digest for one in ((X, Y), (X + 1, Y), X, (X.double(), Y))}) == 4
    assert split(Drawing()).digest == split(Drawing()).digest != split(Drawing(12)).digest
    assert split(Objects()).digest == split(Objects()).digest


@pytest.mark.parametrize("given", [(X, Y), TensorDataset(X, Y)], ids=["tensors", "dataset"])
def test_limit_validation_and_evaluation_limit(given: Any) -> None:
    data, _ = task_data(fastar.Data(given, given), limit=6, validation=0.25, evaluation={"limit": 2, "test_limit": 5})
    assert data.names() == ("train", "validation", "test")
    found = {name: torch.cat([x for x, _ in batches()]) for name, batches in data.splits().items()}
    assert {name: len(x) for name, x in found.items()} == {"train": 2, "validation": 2, "test": 5}
    trained = torch.cat([x for x, _ in data.train.sequential(4)])
    whole, _ = task_data(fastar.Data(given), validation=0.25)
    kept = torch.cat([x for x, _ in whole.measured_validation.sequential(4)])
    rest = torch.cat([x for x, _ in whole.train.sequential(4)])
    assert len(trained) == 6
    assert len(kept) == whole.size("validation") == 3
    assert sorted([*kept[:, 0].tolist(), *rest[:, 0].tolist()]) == X[:, 0].tolist()
    assert {*trained[:, 0].tolist()} <= {*rest[:, 0].tolist()}
    assert {*found["validation"][:, 0].tolist()} <= {*kept[:, 0].tolist()}
    assert "dataset_digest" in data.recipe()
    with pytest.raises(FastarError, match=r"the train data: 14 samples are asked for and 13 there"):
        _ = task_data(fastar.Data(given), limit=14)[0].train


def test_limits_need_data_that_can_be_chosen_from() -> None:
    data, heard = task_data(fastar.Data([(X, Y)] * 3), limit=6)
    with pytest.raises(FastarError, match=r"a limit or a share for validation needs tensors or a map-style dataset"):
        _ = data.train
    assert heard == [LINE]


def test_inputs_are_float32_and_whole_batches_are_left_as_they_are() -> None:
    data, _ = task_data(fastar.Data((X.double(), Y.int())))
    inputs, targets = next(iter(data.train.sequential(4)))
    assert inputs.dtype == torch.float32
    assert targets.dtype == torch.int32


def test_data_have_the_forms_that_a_user_has_at_hand() -> None:
    assert isinstance(split((X, Y)), TensorData)
    assert isinstance(split([(X, Y)]), IterableData)
    own, _ = task_data(fastar.Data((X, Y), validation=(X[:3], Y[:3])))
    assert own.names() == ("train", "validation")
    assert own.size("validation") == 3
