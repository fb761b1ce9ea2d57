"""Layouts, modules that live in flat buffers, and training over them against ordinary training."""

import copy
from collections.abc import Callable

import pytest
import torch
from fastar.kernels import sgd_update
from torch import nn

from fastar.errors import FastarError
from fastar.flat import FlatLayout, FlatParameters, WorkingWeights


class ConvNet(nn.Module):
    """3x3, depthwise, 1x1 and one-output convolutions, batch norms, a linear layer, a 0-d and a 3-D parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 5, 1)
        self.single = nn.Conv2d(5, 1, (1, 2))
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.mix = nn.Parameter(torch.rand(1, 5, 1))
        self.head = nn.Linear(5, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norm(self.wide(images)))
        hidden = self.point(torch.relu(self.depthwise(hidden)))
        shift = self.single(hidden).mean()
        pooled = (hidden.flatten(2) * self.mix).mean(2) * self.gain + shift
        return self.head(pooled)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(6, 6)
        self.decode = nn.Linear(6, 6)
        self.decode.weight = self.encode.weight

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.decode(torch.tanh(self.encode(values)))


def make(kind: type[nn.Module], seed: int = 3) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind()


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(11)
    return [
        (torch.randn(12, 3, 8, 8, generator=generator), torch.randint(4, (12,), generator=generator))
        for _ in range(count)
    ]


# --- layout ---


def test_entries_are_aligned_disjoint_and_sorted_into_sections() -> None:
    module = make(ConvNet)
    layout = FlatLayout.from_module(module)
    assert {entry.name for entry in layout.entries} == {name for name, _ in module.named_parameters()}
    end = 0
    for entry in layout.entries:
        assert entry.offset % 16 == 0
        assert end <= entry.offset < end + 16
        end = entry.offset + entry.numel
        assert (len(entry.shape) >= 2) == (entry.offset < layout.matrices)
    assert layout.matrices % 16 == layout.numel % 16 == 0
    assert end <= layout.numel < end + 16
    in_module_order = [name for name, parameter in module.named_parameters() if parameter.dim() >= 2]
    assert [entry.name for entry in layout.entries if entry.offset < layout.matrices] == in_module_order


def test_views_alias_the_buffer_with_torchs_channels_last_strides() -> None:
    layout = FlatLayout.from_module(make(ConvNet))
    buffer = torch.arange(float(layout.numel))
    store = torch.stack([buffer, buffer + 0.5, -buffer])
    rows = layout.views(store)
    for entry in layout.entries:
        view = layout.views(buffer)[entry.name]
        assert tuple(view.shape) == entry.shape
        order = torch.channels_last if len(entry.shape) == 4 else torch.contiguous_format
        strides = torch.empty(entry.shape).to(memory_format=order).stride()
        assert view.stride() == strides
        assert view.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
        assert view.storage_offset() == entry.offset
        assert sorted(view.flatten().tolist()) == list(range(entry.offset, entry.offset + entry.numel))
        if len(entry.shape) == 4:
            outputs, inputs, height, width = entry.shape
            assert view[outputs - 1, inputs - 1, height - 1, 0] == entry.offset + entry.numel - 1 - (width - 1) * inputs
        assert rows[entry.name].shape == (3, *entry.shape)
        for row in range(3):
            assert torch.equal(rows[entry.name][row], layout.views(store[row])[entry.name])
            assert rows[entry.name][row].stride() == strides
    layout.views(buffer)["wide.weight"][2, 1, 0, 2] = -5.0
    start = next(entry.offset for entry in layout.entries if entry.name == "wide.weight")
    assert buffer[start + ((2 * 3 + 0) * 3 + 2) * 3 + 1] == -5.0  # (O, H, W, I) order


@pytest.mark.quick
def test_flatten_and_unflatten_are_inverse_and_pad_with_zeros() -> None:
    module = make(ConvNet)
    layout = FlatLayout.from_module(module)
    state = module.state_dict()  # with batch-norm buffers, which are not parameters
    flat = layout.flatten(state)
    back = layout.unflatten(flat)
    assert set(back) == {name for name, _ in module.named_parameters()}
    for name, copied in back.items():
        assert torch.equal(copied, state[name])
        assert copied.is_contiguous()
        assert copied.untyped_storage().data_ptr() != flat.untyped_storage().data_ptr()
    padding = torch.ones(layout.numel, dtype=torch.bool)
    for entry in layout.entries:
        padding[entry.offset : entry.offset + entry.numel] = False
    assert padding.any()
    assert (flat[padding] == 0).all()
    row = torch.zeros(2, layout.numel, dtype=torch.float64)[1]
    assert layout.flatten(state, row) is row
    assert torch.equal(row.float(), flat)


def test_flatten_names_what_does_not_fit_and_writes_nothing() -> None:
    module = make(ConvNet)
    layout, state = FlatLayout.from_module(module), module.state_dict()
    out = torch.full((layout.numel,), 7.0)
    missing = {name: value for name, value in state.items() if name != "head.bias"}
    with pytest.raises(FastarError, match=r"parameter head\.bias is missing"):
        layout.flatten(missing, out)
    with pytest.raises(FastarError, match=r"parameter head\.weight has shape \(4, 6\), needed \(4, 5\)"):
        layout.flatten({**state, "head.weight": torch.zeros(4, 6)}, out)
    assert (out == 7.0).all()
    with pytest.raises(FastarError, match="does not fit this layout"):
        layout.views(torch.zeros(layout.numel + 16))


def test_layouts_are_equal_exactly_for_the_same_architecture() -> None:
    layout = FlatLayout.from_module(make(ConvNet, seed=1))
    same = FlatLayout.from_module(make(ConvNet, seed=2).to("meta"))
    assert layout == same
    other = make(ConvNet)
    other.head = nn.Linear(5, 7)
    wider = FlatLayout.from_module(other)
    del other.head
    assert layout not in (wider, FlatLayout.from_module(other))


# --- modules in flat buffers ---


@pytest.mark.quick
def test_a_flat_module_computes_what_the_module_computed() -> None:
    module = make(ConvNet)
    plain = copy.deepcopy(module)
    flat = FlatParameters(module)
    assert flat.module is module
    for images, labels in batches(2):
        plain.zero_grad()
        loss = nn.functional.cross_entropy(module(images), labels)
        plain_loss = nn.functional.cross_entropy(plain(images), labels)
        # Channels-last weights take other convolution kernels, whose sums run in another order.
        torch.testing.assert_close(loss, plain_loss, rtol=1e-6, atol=1e-6)
        loss.backward()
        plain_loss.backward()
        gradients = flat.layout.unflatten(flat.collect_gradient())
        for name, parameter in plain.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)
    flat.buffer.zero_()
    assert all((parameter == 0).all() for parameter in module.parameters())


def test_gradients_add_up_until_cleared_and_are_zero_where_unused() -> None:
    module = make(Tied)
    module.unused = nn.Linear(2, 2)
    flat = FlatParameters(module)
    values = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))

    def gradient(passes: int) -> torch.Tensor:
        for _ in range(passes):
            module(values).square().mean().backward()
        return flat.collect_gradient().clone()

    once = gradient(1)
    assert once.norm() > 0
    torch.testing.assert_close(gradient(3), 3 * once)
    torch.testing.assert_close(gradient(1), once)  # nothing is left over from before
    unused = flat.layout.views(once)["unused.weight"]
    assert (unused == 0).all()


def test_a_gradient_does_not_outlive_the_step_that_made_it() -> None:
    module = make(Tied)
    flat = FlatParameters(module)
    values = torch.ones(2, 6)
    module(values).sum().backward()
    biases = flat.layout.views(flat.collect_gradient())
    assert (biases["decode.bias"] != 0).all()
    torch.tanh(module.encode(values)).sum().backward()  # this time without the decoder
    biases = flat.layout.views(flat.collect_gradient())
    assert (biases["decode.bias"] == 0).all()
    assert (biases["encode.bias"] != 0).all()


def test_gather_leaves_no_gradients_behind_and_refuses_to_collect_nothing() -> None:
    module = make(Tied)
    flat = FlatParameters(module)
    with pytest.raises(FastarError, match="run backward first"):
        flat.collect_gradient()
    module(torch.ones(2, 6)).sum().backward()
    flat.collect_gradient()
    assert all(parameter.grad is None for parameter in module.parameters())
    with pytest.raises(FastarError, match="collect once per backward"):
        flat.collect_gradient()


def test_tied_parameters_share_one_entry() -> None:
    module = make(Tied)
    plain = copy.deepcopy(module)
    flat = FlatParameters(module)
    assert flat.layout.aliases == (("decode.weight", "encode.weight"),)
    assert module.decode.weight is module.encode.weight
    values = torch.ones(2, 6)
    module(values).sum().backward()
    plain(values).sum().backward()
    assert plain.encode.weight.grad is not None
    gradient = flat.layout.unflatten(flat.collect_gradient())
    torch.testing.assert_close(gradient["encode.weight"], plain.encode.weight.grad)
    assert gradient["decode.weight"] is gradient["encode.weight"]
    assert set(gradient) == set(module.state_dict())


def test_loading_a_state_dict_keeps_the_views() -> None:
    module, other = make(ConvNet, seed=1), make(ConvNet, seed=2)
    flat = FlatParameters(module)
    module.load_state_dict(other.state_dict())
    assert torch.equal(flat.buffer, flat.layout.flatten(other.state_dict()))
    other.load_state_dict(module.state_dict())  # and the other way


def test_modules_that_cannot_be_flat_are_refused() -> None:
    with pytest.raises(FastarError, match="without parameters"):
        FlatParameters(nn.ReLU())
    with pytest.raises(FastarError, match="no shape yet"):
        FlatParameters(nn.LazyLinear(3))
    two_devices = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(FastarError, match=r"1\.weight is on meta, 0\.weight on cpu"):
        FlatParameters(two_devices)
    sharing = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    sharing[1].weight = nn.Parameter(sharing[0].weight.data)
    with pytest.raises(FastarError, match=r"0\.weight and 1\.weight share memory"):
        FlatParameters(sharing)


def test_a_frozen_parameter_is_named_rather_than_moved() -> None:
    frozen = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    frozen[0].weight.requires_grad_(False)
    flat = FlatParameters(frozen)
    frozen(torch.ones(1, 2)).sum().backward()
    with pytest.raises(FastarError, match=r"0\.weight is frozen"):
        flat.collect_gradient()


# --- training over flat buffers ---

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9, nesterov=True, weight_decay=5e-3),
    "adam": lambda parameters: torch.optim.Adam(parameters, 3e-3, weight_decay=5e-3),
}


def ordinary_training(
    module: nn.Module, optimizer: torch.optim.Optimizer, data: list[tuple[torch.Tensor, torch.Tensor]]
) -> list[float]:
    losses = []
    for images, labels in data:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same_course(
    losses: list[float], expected: list[float], flat: torch.Tensor, plain: nn.Module, layout: FlatLayout
) -> None:
    """Channels-last convolutions sum in another order; that grows to 1e-5 in these steps, a wrong step to 1e-2."""
    assert max(expected) - min(expected) > 0.05  # the course is not flat, so following it says something
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(flat, layout.flatten(plain.state_dict()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_torch_optimizers_train_a_flat_module_as_any_other(kind: str) -> None:
    module = make(ConvNet)
    plain = copy.deepcopy(module)
    data = batches(8)
    expected = ordinary_training(plain, OPTIMIZERS[kind](list(plain.parameters())), data)
    flat = FlatParameters(module)
    losses = ordinary_training(module, OPTIMIZERS[kind](list(module.parameters())), data)
    assert_same_course(losses, expected, flat.buffer, plain, flat.layout)


def test_training_by_the_kernels_equals_torch_sgd() -> None:
    module = make(ConvNet)
    plain = copy.deepcopy(module)
    data = batches(12)
    expected = ordinary_training(plain, OPTIMIZERS["sgd"](list(plain.parameters())), data)
    flat = FlatParameters(module)
    buffer, one = torch.zeros_like(flat.buffer), torch.tensor(1.0)
    losses = []
    for images, labels in data:
        loss = nn.functional.cross_entropy(module(images), labels)
        loss.backward()
        sgd_update(
            flat.buffer,
            flat.collect_gradient(),
            buffer,
            lr=torch.tensor(0.05),
            scale=one,
            inverse_loss_scale=one,
            weight_decay=5e-3,
            momentum=0.9,
            nesterov=True,
        )
        losses.append(loss.item())
    assert_same_course(losses, expected, flat.buffer, plain, flat.layout)


# --- working weights ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_working_weights_follow_theta_and_the_path(dtype: torch.dtype) -> None:
    module, other = make(ConvNet, seed=1), make(ConvNet, seed=2)
    layout = FlatLayout.from_module(module)
    theta, source = layout.flatten(module.state_dict()), layout.flatten(other.state_dict())
    working = WorkingWeights(layout, module, dtype)
    start = layout.unflatten(theta)

    def assert_holds(values: dict[str, torch.Tensor], half_ulps: int) -> None:
        precision = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
        for name, parameter in module.named_parameters():
            wanted = dtype if parameter.dim() >= 2 else torch.float32
            assert parameter.dtype == wanted
            tolerance = half_ulps * precision[wanted]
            torch.testing.assert_close(parameter.detach().float(), values[name], rtol=tolerance, atol=1e-6)

    assert_holds(start, 1)
    working.write(source)
    assert_holds(layout.unflatten(source), 1)
    t = torch.tensor(0.3)
    between = {name: 0.7 * start[name] + 0.3 * value for name, value in layout.unflatten(source).items()}
    working.interpolate(theta, source, t)
    assert_holds(between, 4)
    working.write(theta)
    assert torch.equal(theta, layout.flatten(start))  # the master is only read


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_working_weights_hand_out_gradients_by_section(dtype: torch.dtype) -> None:
    """A star step in small: gradient at the interpolated point, update of theta, section by section."""
    module = make(ConvNet, seed=1)
    layout = FlatLayout.from_module(module)
    theta = layout.flatten(module.state_dict())
    source = layout.flatten(make(ConvNet, seed=2).state_dict())
    reference = make(ConvNet, seed=1)
    t = torch.tensor(0.25)
    reference.load_state_dict(layout.unflatten(0.75 * theta + 0.25 * source), strict=False)
    working = WorkingWeights(layout, module, dtype)
    working.interpolate(theta, source, t)
    images, labels = batches(1)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = nn.functional.cross_entropy(module(images).float(), labels)
    loss.backward()
    reference_loss = nn.functional.cross_entropy(reference(images), labels)
    reference_loss.backward()
    expected = layout.flatten({name: p.grad for name, p in reference.named_parameters() if p.grad is not None})

    gradients = working.collect_gradient()
    dtypes = [torch.float32] if dtype == torch.float32 else [torch.bfloat16, torch.float32]
    assert [gradient.dtype for gradient in gradients] == dtypes
    whole = torch.cat([gradient.float() for gradient in gradients])
    # fp32: summation order. bf16: 8 bits through some ten layers.
    assert (whole - expected).norm() <= (1e-5 if dtype == torch.float32 else 0.05) * expected.norm()

    before = theta.clone()
    scalars = {"lr": torch.tensor(0.1), "scale": 1 - t, "inverse_loss_scale": torch.tensor(1.0)}
    settings = {"weight_decay": 0.01, "momentum": 0.0, "nesterov": False}
    for part, gradient in zip(working.sections(theta), gradients, strict=True):
        sgd_update(part, gradient, None, **scalars, **settings)  # type: ignore[arg-type]
    torch.testing.assert_close(theta, before - 0.1 * (0.75 * whole + 0.01 * before), rtol=1e-6, atol=1e-7)


def test_working_weights_of_one_section_only() -> None:
    module = nn.Sequential(nn.Linear(4, 3, bias=False))
    layout = FlatLayout.from_module(module)
    theta = layout.flatten(module.state_dict())
    working = WorkingWeights(layout, module, torch.bfloat16)
    working.interpolate(theta, theta, torch.tensor(0.5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module(torch.ones(2, 4)).sum().backward()
    (gradient,) = working.collect_gradient()
    (part,) = working.sections(theta)
    assert gradient.shape == part.shape == (layout.numel,)


def test_working_weights_refuse_another_architecture() -> None:
    with pytest.raises(ValueError, match="the layout is not of this ConvNet"):
        WorkingWeights(FlatLayout.from_module(make(Tied)), make(ConvNet))
