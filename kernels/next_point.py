"""The next step's point on a path, which an update can write while it has theta at hand."""

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
