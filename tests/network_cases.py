"""Networks of users by their names."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from fastar.config import load_settings
from fastar.experiments.files.given_files import shape_of
from fastar.experiments.session import new_session
from fastar.experiments.user_task import PYTHON, Given
from fastar.flat.forward import Batch
from fastar.runs import RunFolder
from fastar.runtime.user_code import check_reference


def own_model(reference: str, input_shape: str | None = None) -> tuple[nn.Module, Batch]:
    """The network that `reference` makes, and its example inputs, as commands on checkpoints find them."""
    check_reference(reference, "--model")
    example = None if input_shape is None else torch.zeros(shape_of(input_shape))
    settings = load_settings(dataset=PYTHON, arch=reference, values={"device": "cpu"})
    session = new_session(settings, RunFolder(Path()), given=Given(example=example, no_data=True))
    network = session.network
    return network.build(), network.example(2)
