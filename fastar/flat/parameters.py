"""Modules whose parameters are views of flat buffers."""

import torch
from torch import nn

from fastar.errors import FastarError
from fastar.flat.layout import FlatLayout
from fastar.kernels import backend, interpolate

# Numbers behind the last part of a gradient, which a sum over ranks takes along (`with_spare`).
SPARE = 2


class _BoundModule:
    """A module whose parameters become views of two section buffers, with their values, and gradient buffers of the
    same form."""

    def __init__(
        self,
        module: nn.Module,
        layout: FlatLayout,
        sections: tuple[torch.Tensor, torch.Tensor],
        gradients: tuple[torch.Tensor, torch.Tensor],
    ):
        self.module = module
        self.layout = layout
        named = dict(module.named_parameters())
        self._parameters = [named[entry.name] for entry in layout.entries]
        views = layout.section_views(*sections)
        gradient_views = layout.section_views(*gradients)
        self._gradient_views = [gradient_views[entry.name] for entry in layout.entries]
        with torch.no_grad():
            for entry, parameter in zip(layout.entries, self._parameters, strict=True):
                parameter.grad = None
                parameter.data = views[entry.name].copy_(parameter)

    def _collect(self) -> None:
        """Copy every parameter's gradient into the gradient buffers and drop it; one that has none counts as zero.

        Autograd makes gradients afresh. Keeping `.grad` as views of the buffers saves this copy, but then they must be
        zeroed, and autograd adds into them: the same time to 2 % on a CPU, and on a GPU more than is saved: in bf16 8
        bytes a parameter (zeros, then a sum) for 4, and a launch for each tensor.
        """
        if all(parameter.grad is None for parameter in self._parameters):
            raise FastarError("no parameter has a gradient; run backward first, and collect once per backward")
        destinations, gradients = [], []
        for entry, parameter, view in zip(self.layout.entries, self._parameters, self._gradient_views, strict=True):
            if not parameter.requires_grad:
                # An update over the flat buffer would move it all the same: momentum, weight decay.
                raise FastarError(f"parameter {entry.name} is frozen; flat training moves all parameters: unfreeze it")
            if parameter.grad is None:
                view.zero_()
                continue
            destinations.append(view)
            gradients.append(parameter.grad)
        # One launch for many tensors, if they are of one dtype.
        for dtype in {view.dtype for view in destinations}:
            alike = [(view, one) for view, one in zip(destinations, gradients, strict=True) if view.dtype == dtype]
            torch._foreach_copy_([view for view, _ in alike], [one for _, one in alike])
        for parameter in self._parameters:
            parameter.grad = None


class FlatParameters(_BoundModule):
    """A module whose parameters are views of one buffer [P]: to train it in place, to save it, to use it as theta.

    `buffer` holds the values in fp32, with zeros as padding, on the module's device. The module goes on working under
    torch's own optimizers. It must stay on its device and keep its parameters: `load_state_dict` does, without
    `assign=True`.

    Raises:
        FastarError: a module with no parameters, on several devices, or whose distinct parameters share memory.
    """

    def __init__(self, module: nn.Module) -> None:
        layout = FlatLayout.from_module(module)
        (self.buffer,), sections = _zeros(layout, torch.float32, _device_of(module))
        (self.gradient,), gradients = _zeros(layout, torch.float32, self.buffer.device, spare=SPARE)
        super().__init__(module, layout, sections, gradients)

    def collect_gradient(self) -> torch.Tensor:
        """After backward: the gradient [P], always the same buffer, valid until the next collection."""
        self._collect()
        return self.gradient


class WorkingWeights(_BoundModule):
    """A module whose parameters are working copies of a master theta [P] that the caller keeps.

    Matrices [layout.matrices] are in `dtype`, vectors [P - layout.matrices] in fp32; for fp32 both are sections of one
    buffer. They start as `module`'s values. Run the module under autocast where dtype is bf16 or fp16: the matrices
    need no casts there; biases do, which autocast caches, so leave its region between steps. `values` are the weights
    themselves, in the parts of `collect_gradient()`.
    """

    def __init__(self, layout: FlatLayout, module: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        if layout != FlatLayout.from_module(module):
            raise ValueError(f"the layout is not of this {type(module).__name__}")
        device = _device_of(module)
        self._one_buffer = dtype == torch.float32
        self.values, sections = _zeros(layout, dtype, device)
        self._gradients, gradients = _zeros(layout, dtype, device, spare=SPARE)
        super().__init__(module, layout, sections, gradients)

    def sections(self, buffer: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The parts of a master-like `buffer` [P] (or [N, P]) that go with the parts of `collect_gradient()`."""
        if self._one_buffer:
            return (buffer,)
        boundary = self.layout.matrices
        return tuple(part for part in (buffer[..., :boundary], buffer[..., boundary:]) if part.shape[-1])

    def write(self, theta: torch.Tensor) -> None:
        """The working weights become theta [P], fp32, rounded to their dtypes."""
        for working, master in zip(self.values, self.sections(theta), strict=True):
            working.copy_(master)

    def interpolate(self, theta: torch.Tensor, source: torch.Tensor, t: torch.Tensor) -> None:
        """The working weights become (1 - t) theta + t source, both [P]; t [] fp32."""
        for working, master, other in zip(self.values, self.sections(theta), self.sections(source), strict=True):
            interpolate(master, other, t, working)

    def collect_gradient(self) -> tuple[torch.Tensor, ...]:
        """After backward: the gradient, one part [P] in fp32, else (matrices in `dtype`, vectors in fp32).

        Empty parts are left out; `sections` cuts theta and a momentum buffer alike.
        """
        self._collect()
        return self._gradients


def with_spare(part: torch.Tensor) -> torch.Tensor:
    """The last part [n] of a gradient with what lies behind it, [n + SPARE]; the same memory."""
    return part.as_strided((len(part) + SPARE,), (1,))


def check_kernels(device: torch.device) -> None:
    """Choose the path that fused operations on `device` take, before work begins; on a GPU by a trial launch.

    Raises:
        FastarError: FASTAR_KERNELS names no path, or one that cannot run here.
    """
    try:
        backend(device)
    except ValueError as error:
        raise FastarError(str(error)) from error


def _zeros(
    layout: FlatLayout, dtype: torch.dtype, device: torch.device, spare: int = 0
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, torch.Tensor]]:
    """Buffers of zeros, and the sections of matrices in `dtype` and of vectors in fp32: one for both in fp32, else one
    for each that holds something. `spare` zeros lie behind the last."""
    if dtype == torch.float32:
        whole = torch.zeros(layout.numel + spare, device=device, dtype=torch.float32)[: layout.numel]
        return (whole,), (whole[: layout.matrices], whole[layout.matrices :])
    vectors = torch.zeros(layout.numel - layout.matrices + spare, device=device, dtype=torch.float32)
    vectors = vectors[: layout.numel - layout.matrices]
    matrices = torch.zeros(layout.matrices, device=device, dtype=dtype)
    return tuple(part for part in (matrices, vectors) if part.numel()), (matrices, vectors)


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
