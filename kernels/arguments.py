"""Arguments that operations share: what an update is given, and the next point, which it can write on the way."""

from typing import NamedTuple

import torch

from .checks import FLOATS, check_scalar, check_store, check_vector


class NextPoint(NamedTuple):
    """out = (1 - t) theta + t source for the theta that an update leaves; fields as in `operations.interpolate`.

    source: [P], or with `index` a store [N, P]. t: fp32 0-d. out: [P], the working weights, in their dtype.
    """

    source: torch.Tensor
    t: torch.Tensor
    out: torch.Tensor
    index: torch.Tensor | None = None

    def check(self, where: str, theta: torch.Tensor) -> None:
        """Raise ValueError unless the fields fit theta [P]."""
        check_vector(where, "out", self.out, like=theta, dtypes=FLOATS)
        check_scalar(where, "t", self.t, like=theta)
        if self.index is None:
            check_vector(where, "source", self.source, like=theta, dtypes=FLOATS)
        else:
            check_store(where, "source", self.source, like=theta, dtypes=FLOATS)
            check_scalar(where, "index", self.index, like=theta, dtype=torch.int64)


class Given(NamedTuple):
    """The arguments that all updates of theta [P] share; fields as in `operations.sgd_update`."""

    gradient: torch.Tensor
    lr: torch.Tensor
    scale: torch.Tensor
    inverse_loss_scale: torch.Tensor
    weight_decay: float
    found_nonfinite: torch.Tensor | None
    next_point: NextPoint | None

    def check(self, where: str, theta: torch.Tensor) -> None:
        """Raise ValueError unless theta is a flat buffer and the fields fit it."""
        check_vector(where, "theta", theta, like=theta)
        check_vector(where, "gradient", self.gradient, like=theta, dtypes=FLOATS)
        for name in ("lr", "scale", "inverse_loss_scale", "found_nonfinite"):
            value = getattr(self, name)
            if value is not None or name != "found_nonfinite":
                check_scalar(where, name, value, like=theta)
        if self.next_point is not None:
            self.next_point.check(f"{where}, next_point", theta)
