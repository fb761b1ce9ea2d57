"""Modules whose parameters are views of flat buffers."""

from typing import Literal

import torch
from torch import nn

from fastar.errors import FastarError
from fastar.flat.layout import FlatLayout
from fastar.kernels import NextPoint, interpolate

GradientMode = Literal["gather", "views"]


class _BoundModule:
    """A module whose parameters are views of two section buffers, with gradient buffers of the same form."""

    def __init__(
        self,
        module: nn.Module,
        layout: FlatLayout,
        sections: tuple[torch.Tensor, torch.Tensor],
        gradients: tuple[torch.Tensor, torch.Tensor],
        mode: GradientMode | None,
    ):
        if mode not in (None, "gather", "views"):
            raise FastarError(f"gradient={mode!r} is not a way to collect gradients; use 'gather', 'views' or None")
        self.module = module
        self.layout = layout
        self.gradient_mode: GradientMode = mode or default_gradient_mode(sections[0].device)
        named = dict(module.named_parameters())
        self._parameters = [named[entry.name] for entry in layout.entries]
        views = layout.section_views(*sections)
        self._views = [views[entry.name] for entry in layout.entries]
        self._gradients = gradients
        gradient_views = layout.section_views(*gradients)
        self._gradient_views = [gradient_views[entry.name] for entry in layout.entries]
        with torch.no_grad():
            for parameter, view in zip(self._parameters, self._views, strict=True):
                parameter.grad = None
                parameter.data = view
        if self.gradient_mode == "views":
            self._bind_gradients()

    def clear_gradient(self) -> None:
        """Make the next backward start from zero gradients."""
        if self.gradient_mode == "views":
            for gradient in self._gradients:
                gradient.zero_()
            self._bind_gradients()
        else:
            for parameter in self._parameters:
                parameter.grad = None

    def assert_aliased(self) -> None:
        """Raise FastarError, naming the parameter, where one is no longer a view of the buffer.

        Moving or casting the module, or loading with `assign=True`, replaces parameters; `load_state_dict` does not.
        """
        named = dict(self.module.named_parameters())
        for entry, parameter, view in zip(self.layout.entries, self._parameters, self._views, strict=True):
            current = named.get(entry.name)
            if current is not parameter or current.data_ptr() != view.data_ptr() or current.stride() != view.stride():
                raise FastarError(
                    f"parameter {entry.name} left its flat buffer (the module was moved, cast or reassigned); "
                    "move the module before making it flat, and load state dicts without assign=True"
                )

    def _collect(self) -> None:
        """Bring every parameter's gradient into the gradient buffers; one that has none counts as zero."""
        if self.gradient_mode == "gather" and all(parameter.grad is None for parameter in self._parameters):
            raise FastarError("no parameter has a gradient; run backward first, and collect once per backward")
        destinations, gradients = [], []
        for entry, parameter, view in zip(self.layout.entries, self._parameters, self._gradient_views, strict=True):
            if not parameter.requires_grad:
                # An update over the flat buffer would move it all the same: momentum, weight decay.
                raise FastarError(f"parameter {entry.name} is frozen; flat training moves all parameters: unfreeze it")
            gradient = parameter.grad
            if gradient is view:
                continue
            if gradient is None:
                view.zero_()
                continue
            destinations.append(view)
            gradients.append(gradient)
        # One launch for many tensors, if they are of one dtype.
        for dtype in {view.dtype for view in destinations}:
            alike = [(view, one) for view, one in zip(destinations, gradients, strict=True) if view.dtype == dtype]
            torch._foreach_copy_([view for view, _ in alike], [one for _, one in alike])
        if self.gradient_mode == "views":
            self._bind_gradients()
        else:
            for parameter in self._parameters:
                parameter.grad = None

    def _bind_gradients(self) -> None:
        for parameter, view in zip(self._parameters, self._gradient_views, strict=True):
            parameter.grad = view


class FlatParameters(_BoundModule):
    """A module whose parameters are views of one buffer [P]: to train it in place, to save it, to use it as theta.

    `buffer` holds the values, with zeros as padding, on the module's device. Its gradient arrives in `gradient` [P] by
    `collect_gradient()` after backward, in one of two ways: "gather" lets autograd make `.grad` afresh and copies it,
    "views" keeps `.grad` as views of `gradient` (None: what is faster on the device). The module goes on working under
    torch's own optimizers, over its parameters or over the one parameter of `as_parameter()`.

    Raises FastarError for a module with no parameters, on several devices, or whose distinct parameters share memory.
    """

    def __init__(
        self, module: nn.Module, *, dtype: torch.dtype = torch.float32, gradient: GradientMode | None = None
    ) -> None:
        layout = FlatLayout.from_module(module)
        device = _device_of(module)
        self.buffer = layout.flatten(_parameters_of(module), torch.zeros(layout.numel, dtype=dtype, device=device))
        self.gradient = torch.zeros_like(self.buffer)
        self._as_parameter: nn.Parameter | None = None
        super().__init__(module, layout, _split(self.buffer, layout), _split(self.gradient, layout), gradient)

    def collect_gradient(self) -> torch.Tensor:
        """After backward: the gradient [P], always the same buffer, valid until the next collection or clearing."""
        self._collect()
        if self._as_parameter is not None:
            self._as_parameter.grad = self.gradient
        return self.gradient

    def as_parameter(self) -> nn.Parameter:
        """The buffer as one nn.Parameter, to hand to a torch optimizer; `collect_gradient()` sets its `.grad`."""
        if self._as_parameter is None:
            self._as_parameter = nn.Parameter(self.buffer)
        return self._as_parameter


class WorkingWeights(_BoundModule):
    """A module whose parameters are working copies of a master theta [P] that the caller keeps.

    `matrices` [layout.matrices] is in `dtype`, `vectors` [P - layout.matrices] in fp32; for fp32 both are sections of
    one buffer. They start as `module`'s values. Run the module under autocast where dtype is bf16 or fp16: the matrices
    need no casts there; biases do, which autocast caches, so leave its region between steps.
    """

    def __init__(
        self,
        layout: FlatLayout,
        module: nn.Module,
        dtype: torch.dtype = torch.float32,
        *,
        gradient: GradientMode | None = None,
    ) -> None:
        layout.check_compatible(FlatLayout.from_module(module))
        device = _device_of(module)
        self._whole: torch.Tensor | None = None
        if dtype == torch.float32:
            self._whole = torch.zeros(layout.numel, device=device, dtype=torch.float32)
            self.matrices, self.vectors = _split(self._whole, layout)
            self._joined_gradient = torch.zeros_like(self._whole)
            gradients = _split(self._joined_gradient, layout)
        else:
            self.matrices = torch.zeros(layout.matrices, dtype=dtype, device=device)
            self.vectors = torch.zeros(layout.numel - layout.matrices, device=device, dtype=torch.float32)
            gradients = (torch.zeros_like(self.matrices), torch.zeros_like(self.vectors))
        self.matrices_gradient, self.vectors_gradient = gradients
        values = _parameters_of(module)
        with torch.no_grad():
            for name, view in layout.section_views(self.matrices, self.vectors).items():
                view.copy_(values[name])
        super().__init__(module, layout, (self.matrices, self.vectors), gradients, gradient)

    def sections(self, buffer: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The parts of a master-like `buffer` [P] (or [N, P]) that go with the parts of `collect_gradient()`."""
        if self._whole is not None:
            return (buffer,)
        boundary = self.layout.matrices
        return tuple(part for part in (buffer[..., :boundary], buffer[..., boundary:]) if part.shape[-1])

    def write(self, theta: torch.Tensor) -> None:
        """The working weights become theta [P], fp32, rounded to their dtypes."""
        for working, master in zip(self._working_sections(), self.sections(theta), strict=True):
            working.copy_(master)

    def interpolate(
        self, theta: torch.Tensor, source: torch.Tensor, t: torch.Tensor, *, index: torch.Tensor | None = None
    ) -> None:
        """The working weights become (1 - t) theta + t source; arguments as in `kernels.interpolate`."""
        parts = zip(self._working_sections(), self.sections(theta), self.sections(source), strict=True)
        for working, master, other in parts:
            interpolate(master, other, t, working, index=index)

    def next_points(
        self, source: torch.Tensor, t: torch.Tensor, *, index: torch.Tensor | None = None
    ) -> tuple[NextPoint, ...]:
        """`interpolate` for an update to do: a point to write for each part of `collect_gradient()`."""
        parts = zip(self._working_sections(), self.sections(source), strict=True)
        return tuple(NextPoint(other, t, working, index) for working, other in parts)

    def values(self) -> tuple[torch.Tensor, ...]:
        """The working weights themselves, in the parts of `collect_gradient()`."""
        return self._working_sections()

    def collect_gradient(self) -> tuple[torch.Tensor, ...]:
        """After backward: the gradient, one part [P] in fp32, else (matrices in `dtype`, vectors in fp32).

        Empty parts are left out; `sections` cuts theta and a momentum buffer alike.
        """
        self._collect()
        if self._whole is not None:
            return (self._joined_gradient,)
        return tuple(part for part in self._gradients if part.numel())

    def _working_sections(self) -> tuple[torch.Tensor, ...]:
        if self._whole is not None:
            return (self._whole,)
        return tuple(part for part in (self.matrices, self.vectors) if part.numel())


def default_gradient_mode(device: torch.device) -> GradientMode:
    """How gradients reach the flat buffer fastest on `device`.

    On a CPU, "views" changed forward and backward by -5 to +11 % (medians over two residual networks and two MLPs on a
    busy machine; minima 0 to +10 %), because autograd adds into them instead of handing over new ones. With the copy
    that "gather" makes and the zeroing that "views" needs counted, minima are 0 to 2 % apart, in favour of "gather". On
    CUDA it is "gather" by counting launches, not yet by measurement: one copy of all, or an addition per parameter.
    """
    return "gather"


def _split(buffer: torch.Tensor, layout: FlatLayout) -> tuple[torch.Tensor, torch.Tensor]:
    return buffer[: layout.matrices], buffer[layout.matrices :]


def _parameters_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def _device_of(module: nn.Module) -> torch.device:
    """The one device of the parameters; also refuses what cannot become views of one buffer."""
    named = dict(module.named_parameters())
    (first_name, first), *_ = named.items()
    starts: dict[int, str] = {}
    for name, parameter in named.items():
        if parameter.device != first.device:
            raise FastarError(
                f"parameter {name} is on {parameter.device}, {first_name} on {first.device}; "
                "move the module to one device"
            )
        if parameter.numel() == 0 or parameter.device.type == "meta":
            continue
        other = starts.setdefault(parameter.data_ptr(), name)
        if other != name:
            raise FastarError(f"parameters {other} and {name} share memory; tie them by using one nn.Parameter twice")
    return first.device
