"""Checks of arguments, done before anything is allocated or launched. Each raises ValueError with one line."""

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_vector(
    where: str,
    name: str,
    tensor: torch.Tensor,
    *,
    like: torch.Tensor,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
) -> None:
    """`tensor` is contiguous, of the shape [P] and on the device of `like`, and of one of `dtypes`."""
    _check_device_and_dtype(where, name, tensor, like.device, dtypes)
    if tensor.shape != like.shape or tensor.dim() != 1:
        raise ValueError(
            f"{where}: {name} has shape {tuple(tensor.shape)}, needed [P] = ({like.numel()},); "
            "pass flat buffers of one layout"
        )
    if tensor.numel() > 1 and tensor.stride(0) != 1:
        raise ValueError(f"{where}: {name} is not contiguous; pass a slice of a flat buffer, or its .contiguous() copy")


def check_scalar(where: str, name: str, tensor: torch.Tensor, *, like: torch.Tensor) -> None:
    """`tensor` is a 0-d fp32 tensor on the device of `like`."""
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != 0:
        given = f"shape {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ValueError(
            f"{where}: {name} is {given}, needed a 0-d tensor; pass torch.tensor(value, device={like.device})"
        )
    _check_device_and_dtype(where, name, tensor, like.device, (torch.float32,))


def _check_device_and_dtype(
    where: str, name: str, tensor: torch.Tensor, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    if tensor.device != device:
        raise ValueError(f"{where}: {name} is on {tensor.device}, theta on {device}; move them to one device")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{where}: {name} is {str(tensor.dtype).removeprefix('torch.')}; pass {allowed}")
