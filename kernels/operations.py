"""The public operations: their formulas, their checks, and the choice of path."""

from collections.abc import Callable
from importlib import import_module
from typing import Any, cast

import torch

from . import reference
from .arguments import Given
from .checks import FLOATS, check_scalar, check_vector
from .dispatch import backend


def interpolate(theta: torch.Tensor, source: torch.Tensor, t: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = (1 - t) theta + t source, in fp32 with one rounding at the store (Algorithm 1, the point on the path).

    theta: fp32 [P]. source: fp32, bf16 or fp16 [P]. t: fp32 0-d, on the device. out: fp32, bf16 or fp16 [P], may be
    theta itself; returned. In fp32, t = 0 gives theta and t = 1 the source bit for bit, and a source equal to theta
    gives theta at every t. Computed as theta + t (source - theta) for t < 1/2 and from the other end for the rest.

    Raises ValueError for wrong devices, dtypes, shapes or strides.

    >>> theta, source = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])
    >>> interpolate(theta, source, torch.tensor(0.25), torch.empty(2))
    tensor([1.5000, 1.0000])
    """
    where = "interpolate"
    check_vector(where, "theta", theta, like=theta)
    check_vector(where, "source", source, like=theta, dtypes=FLOATS)
    check_vector(where, "out", out, like=theta, dtypes=FLOATS)
    check_scalar(where, "t", t, like=theta)
    if theta.numel():
        _path(theta, "interpolation", reference.interpolate)(theta, source, t, out)
    return out


def sgd_update(
    theta: torch.Tensor,
    gradient: torch.Tensor,
    momentum_buffer: torch.Tensor | None,
    *,
    lr: torch.Tensor,
    scale: torch.Tensor,
    inverse_loss_scale: torch.Tensor,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    found_nonfinite: torch.Tensor | None = None,
) -> None:
    """One pass of SGD over the star parameters, in place (Algorithm 1, the update; torch.optim.SGD with dampening 0).

        v     = scale * inverse_loss_scale * gradient + weight_decay * theta
        buf   = momentum * buf + v
        theta = theta - lr * (v + momentum * buf if nesterov else buf)

    theta, momentum_buffer: fp32 [P], updated; the buffer starts as zeros (with momentum 0 it is left alone, or None).
    gradient: fp32, bf16 or fp16 [P], unchanged. lr, scale (1 - t; 1 in
    regular training), inverse_loss_scale: fp32 0-d tensors on the device. Weight decay is not scaled by 1 - t.
    found_nonfinite: fp32 0-d; where it is not zero neither theta nor the buffer changes, so that a step whose scaled
    loss overflowed is skipped without a host synchronisation.

    Raises ValueError for wrong devices, dtypes, shapes or strides, and for Nesterov without momentum.

    >>> theta, buf, one = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor(1.0)
    >>> scalars = dict(lr=torch.tensor(0.1), scale=one / 2, inverse_loss_scale=one)
    >>> sgd_update(theta, torch.tensor([4.0]), buf, **scalars, weight_decay=0.5, momentum=0.5, nesterov=True)
    >>> theta, buf  # v = 0.5 * 4 + 0.5 * 1 = 2.5; buf = 0.5 * 2 + 2.5 = 3.5; theta = 1 - 0.1 * (2.5 + 0.5 * 3.5)
    (tensor([0.5750]), tensor([3.5000]))
    """
    where = "sgd_update"
    given = Given(gradient, lr, scale, inverse_loss_scale, float(weight_decay), found_nonfinite)
    given.check(where, theta)
    if momentum_buffer is not None:
        check_vector(where, "momentum_buffer", momentum_buffer, like=theta)
    elif momentum != 0:
        raise ValueError(f"{where}: momentum is {momentum} but momentum_buffer is None; pass zeros like theta")
    if nesterov and momentum == 0:
        raise ValueError(f"{where}: nesterov needs momentum above 0; set momentum or nesterov=False")
    if theta.numel():
        buffer = momentum_buffer if momentum != 0 else None
        _path(theta, "star_update", reference.sgd_update)(theta, given, buffer, float(momentum), bool(nesterov))


def adam_update(
    theta: torch.Tensor,
    gradient: torch.Tensor,
    first_moment: torch.Tensor,
    second_moment: torch.Tensor,
    *,
    steps_done: torch.Tensor,
    lr: torch.Tensor,
    scale: torch.Tensor,
    inverse_loss_scale: torch.Tensor,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    decoupled: bool,
    found_nonfinite: torch.Tensor | None = None,
) -> None:
    """One pass of Adam (L2 decay) or, `decoupled`, AdamW over the star parameters, in place (torch.optim.Adam, AdamW).

        v     = scale * inverse_loss_scale * gradient (+ weight_decay * theta unless decoupled)
        m     = beta1 * m + (1 - beta1) * v
        s     = beta2 * s + (1 - beta2) * v^2
        theta = theta (* (1 - lr * weight_decay) if decoupled)
                - lr * m / (1 - beta1^k) / (sqrt(s / (1 - beta2^k)) + eps),    k = steps_done + 1

    first_moment (m), second_moment (s): fp32 [P], updated, zeros at first. steps_done: fp32 0-d on the device, the
    steps taken before this one; the caller counts it up after the update of all parts, and not for a skipped step.
    The rest as in `sgd_update`; weight decay is not scaled by 1 - t.

    Raises ValueError for wrong devices, dtypes, shapes or strides, betas outside [0, 1), or a negative eps.

    >>> theta, m, s = torch.tensor([1.0]), torch.zeros(1), torch.zeros(1)
    >>> scalars = dict(lr=torch.tensor(0.1), scale=torch.tensor(1.0), inverse_loss_scale=torch.tensor(1.0))
    >>> settings = dict(weight_decay=0.5, betas=(0.5, 0.75), eps=0.0, decoupled=True)
    >>> adam_update(theta, torch.tensor([4.0]), m, s, steps_done=torch.tensor(0.0), **scalars, **settings)
    >>> theta, m, s  # m = 0.5 * 4; s = 0.25 * 16; theta = 1 - 0.1 * 0.5 - 0.1 * (2 / 0.5) / sqrt(4 / 0.25)
    (tensor([0.8500]), tensor([2.]), tensor([4.]))
    """
    where = "adam_update"
    given = Given(gradient, lr, scale, inverse_loss_scale, float(weight_decay), found_nonfinite)
    given.check(where, theta)
    check_vector(where, "first_moment", first_moment, like=theta)
    check_vector(where, "second_moment", second_moment, like=theta)
    check_scalar(where, "steps_done", steps_done, like=theta)
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"{where}: betas are {betas}, each must be at least 0 and below 1")
    if eps < 0:
        raise ValueError(f"{where}: eps is {eps}, it must not be negative")
    if theta.numel():
        own = (float(betas[0]), float(betas[1])), float(eps), bool(decoupled)
        _path(theta, "adam", reference.adam_update)(theta, given, first_moment, second_moment, steps_done, *own)


def find_nonfinite(values: torch.Tensor, found: torch.Tensor) -> None:
    """Set `found` to 1 where `values` holds NaN or an infinity; else leave it, so that several buffers can be searched.

    values: fp32, bf16 or fp16 [P]. found: fp32 0-d on the device, zeroed by the caller beforehand; the host does not
    wait. Raises ValueError for wrong devices, dtypes, shapes or strides.

    >>> found = torch.tensor(0.0)
    >>> for values in (torch.tensor([1.0, float("inf")]), torch.tensor([2.0])):
    ...     find_nonfinite(values, found)
    >>> found
    tensor(1.)
    """
    where = "find_nonfinite"
    check_vector(where, "values", values, like=values, dtypes=FLOATS)
    check_scalar(where, "found", found, like=values)
    if values.numel():
        # In one pass, without a mask; NaN becomes both. 30 to 50 times as fast as isfinite().all() or a norm on a CPU.
        low, high = torch.aminmax(values)
        found.masked_fill_(~(torch.isfinite(low) & torch.isfinite(high)), 1.0)


def _path(theta: torch.Tensor, module: str, plain: Callable[..., None]) -> Callable[..., None]:
    """`plain`, or the Triton launcher of `module`: imported only here, so that importing fastar needs no Triton."""
    if backend(theta.device) == "reference":
        return plain
    return cast(Any, import_module(f".{module}", __package__)).launch
