"""The permutation groups of a network that is named, and the certificate that they are all there are."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastar.config import dataset_spec, load_settings
from fastar.errors import FastarError
from fastar.experiments.files.given_files import Named, shape_of, zeros
from fastar.experiments.session import Session, new_session
from fastar.experiments.user_task import PYTHON, Given
from fastar.runs import RunFolder
from fastar.runtime.progress import SILENT, Progress
from fastar.runtime.user_code import check_reference, is_reference
from fastar.symmetry import Symmetry, certify, derive_symmetry

# Classes of a data set whose files say how many there are: the groups do not depend on the number.
CLASSES = 1000
# A certificate takes at most so many times as long as the derivation and its proof.
TIMES = 3


def show_symmetry(arch: str, named: Named, *, certified: bool = False, progress: Progress = SILENT) -> dict[str, Any]:
    """The groups of a network, what holds the rest, and with `certified` the certificate.

    Args:
        arch: a registered architecture, for the images of `named.dataset`, or `module:function`.

    Raises:
        FastarError: options that contradict each other, a network that cannot be built, traced or proven.
    """
    session = _session_of(arch, named, progress)
    if not certified:
        return _shown(arch, session.network.symmetry)
    model, inputs = session.network.build(seed=0, device="cpu"), session.network.example(2)
    example = inputs if isinstance(inputs, tuple | Mapping) else (inputs,)
    began = time.process_time()
    symmetry = derive_symmetry(model, example, allow_partial=session.settings.matching.allow_partial)
    took = time.process_time() - began
    certificate = certify(model, symmetry, example, seconds=TIMES * took)
    return {**_shown(arch, symmetry), "certificate": certificate.as_dict(), "lines": certificate.lines()}


def _session_of(arch: str, named: Named, progress: Progress) -> Session:
    own = is_reference(arch)
    if own:
        check_reference(arch, "MODEL")
    elif named.input_shape is not None:
        raise FastarError("--input-shape belongs to MODULE:FUNCTION; fastar's own architectures take --dataset")
    elif named.dataset is None:
        raise FastarError(f"{arch}: say for which images: --dataset NAME, such as cifar10")
    settings = load_settings(dataset=named.dataset or PYTHON, arch=arch, values=named.changes)
    example = None if named.input_shape is None else zeros(shape_of(named.input_shape))
    classes = CLASSES if named.dataset is not None and dataset_spec(named.dataset).variable_size else None
    given = Given(example=example, no_data=named.dataset is None)
    return new_session(settings, RunFolder(Path(".")), progress, classes=classes, given=given)


def _shown(arch: str, symmetry: Symmetry) -> dict[str, Any]:
    groups = []
    for group in symmetry.groups:
        axes = [f"{member.tensor} axis {member.axis}" for member in group.members if member.tensor not in symmetry.tied]
        groups.append(
            {"name": group.name, "units": group.size, "blocks": group.parent, "axes": list(dict.fromkeys(axes))}
        )
    return {"network": arch, "groups": groups, "left": list(symmetry.frozen)}
