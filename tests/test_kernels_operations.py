"""Every operation on every path, against float64 arithmetic written out here and torch.optim."""

import doctest
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastar.kernels import adam_update, find_nonfinite, interpolate, operations, reference, sgd_update

from fastar.runtime.device import simulated

# One element, an odd tail, a prime over one Triton block (1024), an exact number of blocks.
SIZES = (1, 1023, 1361, 2048)
# Half a unit in the last place, relative: what one correct rounding may cost.
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SENTINEL = -77.0


@pytest.fixture(params=["reference", "reference-on-device", "interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Force one of the paths for the test."""
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        monkeypatch.setenv("FASTAR_KERNELS", "triton")
    elif request.param == "interpreter":
        if torch.cuda.is_available():
            pytest.skip("the kernels are compiled in this process: run with CUDA_VISIBLE_DEVICES= to interpret them")
        # Where kernels are interpreted they were defined so (conftest.py); this is for what asks now.
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setenv("FASTAR_KERNELS", "triton")
    else:
        monkeypatch.setenv("FASTAR_KERNELS", "reference")
        if request.param == "reference-on-device":
            monkeypatch.setattr(reference, "_in_blocks", lambda device: False)
        else:
            monkeypatch.setattr(reference, "BLOCK", 600)  # several blocks and a tail, at the sizes of these tests
    return str(request.param)


@pytest.fixture
def device(path: str) -> torch.device:
    return torch.device("cuda" if path == "gpu" else "cpu")


@pytest.fixture
def random(device: torch.device) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(20)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    return draw


def guarded(size: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer of `size` elements at an odd offset inside a larger one that is full of a sentinel."""
    whole = torch.full((size + 2 * 1024,), SENTINEL, dtype=dtype, device=device)
    return whole, whole[7 : 7 + size]


def assert_only_inside_written(whole: torch.Tensor, size: int) -> None:
    assert (whole[:7] == SENTINEL).all()
    assert (whole[7 + size :] == SENTINEL).all()


def scalar(value: float, device: torch.device) -> torch.Tensor:
    return torch.tensor(value, device=device)


# --- interpolate ---


@pytest.mark.quick
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16])
def test_interpolate_is_the_weighted_mean(
    path: str,
    device: torch.device,
    random: Callable[..., torch.Tensor],
    size: int,
    out_dtype: torch.dtype,
    source_dtype: torch.dtype,
) -> None:
    theta, source = random(size), random(size, dtype=source_dtype)
    for t in (0.0, 0.3, 0.5, 0.8125, 1.0):
        whole, out = guarded(size, out_dtype, device)
        t_tensor = scalar(t, device)
        assert interpolate(theta, source, t_tensor, out) is out
        weight = float(t_tensor)
        exact = (1 - weight) * theta.double() + weight * source.double()
        # fp32 arithmetic: a difference, a product and a sum, each half an ulp of at most |theta| + |source|.
        arithmetic = 3 * HALF_ULP[torch.float32] * (theta.double().abs() + source.double().abs())
        # Triton's interpreter truncates to bf16, where the hardware rounds: a whole ulp there.
        store = HALF_ULP[out_dtype] * (2 if path == "interpreter" or simulated() else 1) * exact.abs()
        tolerance = arithmetic + store + 2.0**-25  # the last: half the spacing of fp16's subnormal numbers
        assert ((out.double() - exact).abs() <= tolerance).all()
        assert_only_inside_written(whole, size)


@pytest.mark.quick
@pytest.mark.parametrize("size", SIZES)
def test_interpolate_is_exact_at_both_ends_and_between_equals(
    device: torch.device, random: Callable[..., torch.Tensor], size: int
) -> None:
    theta, source = random(size), random(size) * 1e4
    out = torch.empty_like(theta)
    assert torch.equal(interpolate(theta, source, scalar(0.0, device), out), theta)
    assert torch.equal(interpolate(theta, source, scalar(1.0, device), out), source)
    for t in (0.1, 0.5, 0.7, 1 / 3):
        assert torch.equal(interpolate(theta, theta.clone(), scalar(t, device), out), theta)


def test_interpolate_may_write_over_theta(device: torch.device, random: Callable[..., torch.Tensor]) -> None:
    theta, source, t = random(1361), random(1361), scalar(0.6, device)
    apart = interpolate(theta, source, t, torch.empty_like(theta))
    assert torch.equal(interpolate(theta, source, t, theta), apart)


# --- sgd_update ---

SETTINGS = [
    {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
    {"momentum": 0.9, "nesterov": False, "weight_decay": 0.0},
    {"momentum": 0.0, "nesterov": False, "weight_decay": 1e-2},
]


def settings_name(settings: dict[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in settings.items())


@pytest.mark.quick
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("settings", SETTINGS, ids=settings_name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sgd_update_follows_its_formula(
    device: torch.device,
    random: Callable[..., torch.Tensor],
    size: int,
    settings: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    whole, theta = guarded(size, torch.float32, device)
    theta.copy_(random(size))
    buffer_whole, buffer = guarded(size, torch.float32, device)
    buffer.zero_()
    expected, expected_buffer = theta.double(), buffer.double()
    momentum, weight_decay = settings["momentum"], settings["weight_decay"]
    for step in range(4):
        gradient = random(size, dtype=dtype)
        before = gradient.clone()
        lr, scale, inverse = scalar(0.1 / (step + 1), device), scalar(0.25 * step, device), scalar(2.0**-3, device)
        sgd_update(theta, gradient, buffer, lr=lr, scale=scale, inverse_loss_scale=inverse, **settings)
        velocity = float(scale) * float(inverse) * gradient.double() + weight_decay * expected
        expected_step = velocity
        if momentum:
            expected_buffer = momentum * expected_buffer + velocity
            expected_step = velocity + momentum * expected_buffer if settings["nesterov"] else expected_buffer
        expected -= float(lr) * expected_step
        assert torch.equal(gradient, before)
    # Four steps of at most six fp32 roundings each, on numbers below 8: 4 * 6 * 2^-24 * 8.
    assert (theta.double() - expected).abs().max() <= 24 * 2.0**-21
    assert (buffer.double() - expected_buffer).abs().max() <= 24 * 2.0**-21
    assert_only_inside_written(whole, size)
    assert_only_inside_written(buffer_whole, size)


@pytest.mark.parametrize("settings", SETTINGS, ids=settings_name)
def test_sgd_update_equals_torch_sgd_over_many_steps(
    device: torch.device, random: Callable[..., torch.Tensor], settings: dict[str, Any]
) -> None:
    theta = random(1361)
    buffer = torch.zeros_like(theta) if settings["momentum"] else None
    parameter = torch.nn.Parameter(theta.clone())
    optimizer = torch.optim.SGD([parameter], lr=0.05, **settings)
    one = scalar(1.0, device)
    for _ in range(30):
        # A gradient that depends on theta, so that a drift would feed itself.
        noise = random(1361)
        parameter.grad = (parameter.detach() - noise).tanh()
        optimizer.step()
        gradient = (theta - noise).tanh()
        sgd_update(theta, gradient, buffer, lr=scalar(0.05, device), scale=one, inverse_loss_scale=one, **settings)
    # 30 steps of a few fp32 roundings on numbers of order one.
    torch.testing.assert_close(theta, parameter.detach(), rtol=0, atol=30 * 2.0**-22)


def test_sgd_update_scales_the_gradient_and_not_the_weight_decay(device: torch.device) -> None:
    """At t = 1 the loss gradient vanishes and the decay remains."""
    theta, one = torch.full((9,), 2.0, device=device), scalar(1.0, device)
    sgd_update(
        theta,
        torch.full_like(theta, 100.0),
        None,
        lr=scalar(0.5, device),
        scale=scalar(0.0, device),
        inverse_loss_scale=one,
        weight_decay=0.25,
        momentum=0.0,
        nesterov=False,
    )
    assert (theta == 1.75).all()


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_sgd_update_skips_a_nonfinite_step(
    device: torch.device, random: Callable[..., torch.Tensor], found: float
) -> None:
    theta, buffer, gradient = random(1361), random(1361), random(1361)
    if found:
        gradient[3] = math.inf
    before, buffer_before = theta.clone(), buffer.clone()
    scalars = {name: scalar(0.5, device) for name in ("lr", "scale", "inverse_loss_scale")}
    sgd_update(theta, gradient, buffer, **scalars, **SETTINGS[0], found_nonfinite=scalar(found, device))
    assert torch.equal(theta, before) == bool(found)
    assert torch.equal(buffer, buffer_before) == bool(found)
    if not found:
        unguarded, unguarded_buffer = before.clone(), buffer_before.clone()
        sgd_update(unguarded, gradient, unguarded_buffer, **scalars, **SETTINGS[0])
        assert torch.equal(theta, unguarded)
        assert torch.equal(buffer, unguarded_buffer)


# --- adam_update ---

ADAM_SETTINGS = [
    {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 5e-3, "decoupled": True},
    {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 5e-3, "decoupled": False},
    {"betas": (0.0, 0.5), "eps": 1e-3, "weight_decay": 0.0, "decoupled": False},
]


@pytest.mark.quick
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("settings", ADAM_SETTINGS, ids=settings_name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adam_update_follows_its_formula(
    device: torch.device,
    random: Callable[..., torch.Tensor],
    size: int,
    settings: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    buffers = [guarded(size, torch.float32, device) for _ in range(3)]
    theta, first, second = (buffer for _, buffer in buffers)
    theta.copy_(random(size))
    first.zero_()
    second.zero_()
    exact, exact_first, exact_second = theta.double(), first.double(), second.double()
    (beta1, beta2), weight_decay = settings["betas"], settings["weight_decay"]
    for step in range(4):
        # Away from zero, where sqrt(s) / (sqrt(s) + eps) would turn a rounding of the gradient into one of the step.
        gradient = (random(size).abs() + 0.5).to(dtype)
        before = gradient.clone()
        scalars = {"lr": 0.1 / (step + 1), "scale": 1 - 0.25 * step, "inverse_loss_scale": 2.0**-3}
        given = {name: scalar(value, device) for name, value in scalars.items()}
        adam_update(theta, gradient, first, second, steps_done=scalar(float(step), device), **given, **settings)
        lr = float(given["lr"])
        velocity = scalars["scale"] * scalars["inverse_loss_scale"] * gradient.double()
        if settings["decoupled"]:
            exact = exact * (1 - lr * weight_decay)
        else:
            velocity = velocity + weight_decay * exact
        exact_first = beta1 * exact_first + (1 - beta1) * velocity
        exact_second = beta2 * exact_second + (1 - beta2) * velocity**2
        mean, square = exact_first / (1 - beta1 ** (step + 1)), exact_second / (1 - beta2 ** (step + 1))
        exact = exact - lr * mean / (square.sqrt() + settings["eps"])
        assert torch.equal(gradient, before)
    # Four steps of at most a dozen fp32 roundings each, on numbers below 8 (theta), 1 (m and s).
    assert (theta.double() - exact).abs().max() <= 48 * 2.0**-21
    assert (first.double() - exact_first).abs().max() <= 48 * 2.0**-24
    assert (second.double() - exact_second).abs().max() <= 48 * 2.0**-24
    for whole, _ in buffers:
        assert_only_inside_written(whole, size)


@pytest.mark.parametrize("decoupled", [False, True])
def test_adam_update_equals_torch_over_many_steps(
    path: str, device: torch.device, random: Callable[..., torch.Tensor], decoupled: bool
) -> None:
    theta = random(1361)
    first, second = torch.zeros_like(theta), torch.zeros_like(theta)
    parameter = torch.nn.Parameter(theta.clone())
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind([parameter], lr=0.01, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.02)
    one, steps_done = scalar(1.0, device), scalar(0.0, device)
    for _ in range(30):
        noise = random(1361)
        parameter.grad = (parameter.detach() - noise).tanh()
        optimizer.step()
        adam_update(
            theta,
            (theta - noise).tanh(),
            first,
            second,
            steps_done=steps_done,
            lr=scalar(0.01, device),
            scale=one,
            inverse_loss_scale=one,
            weight_decay=0.02,
            betas=(0.9, 0.99),
            eps=1e-6,
            decoupled=decoupled,
        )
        steps_done += 1
    # 30 steps of at most 0.01 each, whose relative error is a few roundings; and the roundings of theta itself.
    torch.testing.assert_close(theta, parameter.detach(), rtol=0, atol=30 * 2.0**-22)


@pytest.mark.parametrize("steps", [0, 1, 9, 499, 100_000])
def test_adam_update_corrects_the_bias_precisely(device: torch.device, steps: int) -> None:
    """1 - 0.999^k has three digits less than fp32 at k = 1 where it is formed by a subtraction in fp32."""
    theta = torch.zeros(33, device=device)
    first, second = torch.zeros_like(theta), torch.zeros_like(theta)
    one = scalar(1.0, device)
    adam_update(
        theta,
        torch.ones_like(theta),
        first,
        second,
        steps_done=scalar(float(steps), device),
        lr=one,
        scale=one,
        inverse_loss_scale=one,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        eps=0.0,
        decoupled=False,
    )
    mean, square = 0.1 / (1 - 0.9 ** (steps + 1)), 0.001 / (1 - 0.999 ** (steps + 1))
    torch.testing.assert_close(theta, torch.full_like(theta, -mean / math.sqrt(square)), rtol=2e-6, atol=0)


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_adam_update_skips_a_nonfinite_step(
    device: torch.device, random: Callable[..., torch.Tensor], found: float
) -> None:
    theta, gradient, first, second = random(1361), random(1361), random(1361), random(1361).abs()
    if found:
        gradient[3] = math.nan
    before = [buffer.clone() for buffer in (theta, first, second)]
    scalars = {name: scalar(0.5, device) for name in ("lr", "scale", "inverse_loss_scale")}
    steps_done = scalar(0.0, device)
    adam_update(
        theta,
        gradient,
        first,
        second,
        steps_done=steps_done,
        **scalars,
        **ADAM_SETTINGS[0],
        found_nonfinite=scalar(found, device),
    )
    for buffer, old in zip((theta, first, second), before, strict=True):
        assert torch.equal(buffer, old) == bool(found)
    unguarded = [old.clone() for old in before]
    adam_update(unguarded[0], gradient, *unguarded[1:], steps_done=steps_done, **scalars, **ADAM_SETTINGS[0])
    if not found:
        assert all(torch.equal(*pair) for pair in zip((theta, first, second), unguarded, strict=True))


# --- find_nonfinite ---


@pytest.mark.quick
@pytest.mark.parametrize("size", [*SIZES, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_find_nonfinite(
    device: torch.device, random: Callable[..., torch.Tensor], size: int, dtype: torch.dtype
) -> None:
    found = scalar(0.0, device)
    values = random(size, dtype=dtype)
    values[-1] = torch.finfo(dtype).max  # finite, though sums and squares of it are not
    values[0] = torch.finfo(dtype).min
    find_nonfinite(values, found)
    assert float(found) == 0
    for bad in (math.nan, math.inf, -math.inf):
        for position in {0, size // 2, size - 1}:
            found.zero_()
            poisoned = values.clone()
            poisoned[position] = bad
            find_nonfinite(poisoned, found)
            assert float(found) == 1
            find_nonfinite(values, found)
            assert float(found) == 1  # it stays noted


def test_find_nonfinite_looks_at_its_own_elements_only(device: torch.device) -> None:
    whole = torch.full((5000,), math.nan, device=device)
    whole[7:1030] = 1.0
    found = scalar(0.0, device)
    find_nonfinite(whole[7:1030], found)
    assert float(found) == 0
    find_nonfinite(whole[7:1031], found)
    assert float(found) == 1


# --- all ---


def test_empty_buffers_are_left_alone(device: torch.device) -> None:
    empty, one = torch.empty(0, device=device), scalar(1.0, device)
    assert interpolate(empty, empty, one, empty) is empty
    scalars = {"lr": one, "scale": one, "inverse_loss_scale": one}
    sgd_update(empty, empty, empty, **scalars, **SETTINGS[0])
    adam_update(empty, empty, empty, empty, steps_done=one, **scalars, **ADAM_SETTINGS[0])
    found = scalar(0.0, device)
    find_nonfinite(empty, found)
    assert float(found) == 0


def test_the_examples_in_the_docstrings(path: str) -> None:
    if path == "gpu":
        pytest.skip("the examples make CPU tensors")
    result = doctest.testmod(operations)
    assert result.attempted == 14
    assert result.failed == 0


GOOD = {"theta": torch.zeros(8), "source": torch.zeros(8), "t": torch.tensor(0.5), "out": torch.zeros(8)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"theta": torch.zeros(8, dtype=torch.float64)}, "theta is float64; pass float32"),
        ({"theta": torch.zeros(2, 4)}, "theta has shape"),
        ({"source": torch.zeros(7)}, r"source has shape \(7,\), needed \[P\] = \(8,\)"),
        ({"source": torch.zeros(16)[::2]}, "source is not contiguous"),
        ({"source": torch.zeros(8, dtype=torch.int32)}, "source is int32; pass float32 or bfloat16 or float16"),
        ({"source": torch.zeros(8, device="meta")}, "source is on meta, theta on cpu"),
        ({"t": 0.5}, "t is float, needed a 0-d tensor"),
        ({"t": torch.zeros(1)}, r"t is shape \(1,\), needed a 0-d tensor"),
        ({"t": torch.tensor(0.5, dtype=torch.float64)}, "t is float64; pass float32"),
        ({"out": torch.zeros(8, dtype=torch.float64)}, "out is float64"),
        ({"out": torch.zeros(9)}, "out has shape"),
    ],
)
def test_interpolate_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        interpolate(**{**GOOD, **change})
    assert "\n" not in str(caught.value)


def refuses(update: Callable[..., None], given: dict[str, Any], message: str) -> None:
    """One line says why, and theta is as it was."""
    theta, one = torch.ones(8), torch.tensor(1.0)
    usual = {"gradient": torch.ones(8), "lr": one, "scale": one, "inverse_loss_scale": one}
    with pytest.raises(ValueError, match=message) as caught:
        update(theta, **{**usual, **given})
    assert "\n" not in str(caught.value)
    assert (theta == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient": torch.zeros(9)}, "gradient has shape"),
        ({"momentum_buffer": torch.zeros(8, dtype=torch.bfloat16)}, "momentum_buffer is bfloat16; pass float32"),
        ({"momentum_buffer": None}, "momentum_buffer is None; pass zeros like theta"),
        ({"momentum": 0.0}, "nesterov needs momentum above 0"),
        ({"lr": 0.1}, "lr is float, needed a 0-d tensor"),
        ({"scale": torch.ones(2)}, "scale is shape"),
        ({"inverse_loss_scale": torch.ones((), dtype=torch.float16)}, "inverse_loss_scale is float16; pass float32"),
        ({"found_nonfinite": torch.tensor(True)}, "found_nonfinite is bool; pass float32"),
    ],
)
def test_sgd_update_refuses_and_changes_nothing(change: dict[str, Any], message: str) -> None:
    refuses(sgd_update, {"momentum_buffer": torch.zeros(8), **SETTINGS[0], **change}, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient": torch.zeros(9)}, "gradient has shape"),
        ({"first_moment": torch.zeros(8, dtype=torch.bfloat16)}, "first_moment is bfloat16; pass float32"),
        ({"second_moment": torch.zeros(7)}, "second_moment has shape"),
        ({"steps_done": 3}, "steps_done is int, needed a 0-d tensor"),
        ({"steps_done": torch.tensor(3)}, "steps_done is int64; pass float32"),
        ({"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\), each must be at least 0 and below 1"),
        ({"betas": (-0.1, 0.9)}, r"betas are"),
        ({"eps": -1e-8}, "eps is -1e-08, it must not be negative"),
    ],
)
def test_adam_update_refuses_and_changes_nothing(change: dict[str, Any], message: str) -> None:
    given = {"first_moment": torch.zeros(8), "second_moment": torch.zeros(8), "steps_done": torch.tensor(1.0)}
    refuses(adam_update, {**given, **ADAM_SETTINGS[0], **change}, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(8, dtype=torch.float64)}, "values is float64"),
        ({"values": torch.zeros(2, 4)}, "values has shape"),
        ({"found": torch.tensor(False)}, "found is bool; pass float32"),
        ({"found": torch.zeros((), device="meta")}, "found is on meta"),
    ],
)
def test_find_nonfinite_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_nonfinite(**{"values": torch.zeros(8), "found": torch.tensor(0.0), **change})
