"""The arguments that all updates of theta share."""

from typing import Any, NamedTuple

import torch

from .checks import FLOATS, check_scalar, check_vector


class Given(NamedTuple):
    """The arguments that all updates of theta [P] share; fields as in `operations.sgd_update`."""

    gradient: torch.Tensor
    lr: torch.Tensor
    scale: torch.Tensor
    inverse_loss_scale: torch.Tensor
    weight_decay: float
    found_nonfinite: torch.Tensor | None

    def check(self, where: str, theta: torch.Tensor) -> None:
        """Raise ValueError unless theta is a flat buffer and the fields fit it."""
        check_vector(where, "theta", theta, like=theta)
        check_vector(where, "gradient", self.gradient, like=theta, dtypes=FLOATS)
        for name in ("lr", "scale", "inverse_loss_scale", "found_nonfinite"):
            value = getattr(self, name)
            if value is not None or name != "found_nonfinite":
                check_scalar(where, name, value, like=theta)

    def to_kernel(self, theta: torch.Tensor) -> dict[str, Any]:
        """The arguments of a Triton kernel; a stand-in where one compiled without `found_nonfinite` never looks."""
        found = self.found_nonfinite
        return {
            "theta_ptr": theta,
            "gradient_ptr": self.gradient,
            "lr_ptr": self.lr,
            "scale_ptr": self.scale,
            "inverse_loss_scale_ptr": self.inverse_loss_scale,
            "found_nonfinite_ptr": self.lr if found is None else found,
            "numel": theta.numel(),
            "weight_decay": self.weight_decay,
            "GUARDED": found is not None,
            # Named, because Triton's default changes with its version.
            "enable_fp_fusion": True,
        }
