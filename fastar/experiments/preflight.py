"""What can be said against a run before its data are written, which may take hours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from fastar import data
from fastar.config import parse_bytes, validate
from fastar.errors import FastarError
from fastar.experiments.facts import data_facts
from fastar.experiments.plan import Plan, check_fits
from fastar.experiments.session import Session, new_session
from fastar.flat import check_kernels
from fastar.models import build_model
from fastar.runs import RunFolder
from fastar.runtime.memory import cap_gpu
from fastar.training import check_batch, resolve_precision

REFUSED = 2


def use_device(context: Session) -> None:
    """Make sure that the run's device can do what the settings ask for. This is where a GPU is first touched.

    Raises:
        FastarError: kernels or a precision that are not to be had.
    """
    settings = context.settings
    check_kernels(context.device)
    resolve_precision(settings.train.precision, context.device)
    if settings.gpu_memory is not None and context.device.type == "cuda":
        cap_gpu(context.device, parse_bytes(settings.gpu_memory))


def use_device_early(context: Session) -> None:
    """`use_device`, unless writers of data have to be forked first: they must not inherit a GPU that is in use."""
    if context.device.type == "cpu" or torch.cuda.is_initialized() or is_written(context):
        use_device(context)


def check_network(context: Session) -> None:
    """Build the run's network once, on the CPU and for any number of classes, which only the files may know.

    Raises:
        FastarError: an architecture that is not known, or does not take these images or settings.
    """
    model = context.settings.model
    build_model(model.arch, input_shape=context.data.image, classes=2, seed=0, **model.options)


def is_written(context: Session) -> bool:
    """Whether the data set's files are there."""
    chosen = context.settings.dataset
    return data.is_finished(chosen.directory.expanduser() / chosen.label)


def prepare_data(context: Session) -> Plan:
    """Write the data where they are not there yet, once all that can be said against the run has been said.

    Returns:
        The plan of the run, by the files that are there then.

    Raises:
        FastarError: the run does not fit, by the counts that are published or those of the raw files' names, or by
            what was written; data that cannot be had.
    """
    if not is_written(context):
        check_beforehand(context)
    _ = context.data.files
    use_device(context)
    return check_fits(context)


def check_beforehand(context: Session) -> None:
    """Check device and sizes before data are written. Of sets of one size on a GPU that is not in use yet only the
    batch size is asked: they are written in less time than the rest takes.

    Raises:
        FastarError: the run cannot go on.
    """
    chosen = context.settings.dataset
    if chosen.spec.train is None and not chosen.spec.variable_size:
        return  # how many images there are is known when they are written
    if chosen.name == "imagefolder":
        if chosen.root is None:
            return  # there is nothing to write them from
        if data.is_packed(chosen.root.expanduser(), val_share=chosen.val_share):
            context.progress.line("whether the run fits is checked when the data are written: archives are not counted")
            return
    if context.device.type == "cpu" or torch.cuda.is_initialized():
        _check(context)
    elif chosen.spec.variable_size:
        _check_elsewhere(context)
    else:
        check_batch(context.settings.train, data_facts(context).train)


def _check(context: Session) -> None:
    # Another context: what published counts say of the classes is not yet known of the files.
    fresh = new_session(context.settings, context.run)
    use_device(fresh)
    check_fits(fresh)


def _check_elsewhere(context: Session) -> None:
    """In a process of its own, which may touch the GPU; not a forked one, since CUDA has counted its devices here."""
    given = {"settings": context.settings.model_dump(mode="json"), "run": str(context.run.path)}
    command = [sys.executable, "-m", "fastar.experiments.preflight"]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True)
    said = done.stderr.strip().splitlines()
    if done.returncode == REFUSED and said:
        raise FastarError(said[-1])
    if done.returncode != 0:
        why = said[-1] if said else f"exit code {done.returncode}"
        context.progress.line(f"whether the run fits is checked when the data are written, not before ({why})")


def _main() -> int:
    given = json.load(sys.stdin)
    try:
        _check(new_session(validate(given["settings"]), RunFolder(Path(given["run"]))))
    except FastarError as error:
        print(error, file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(_main())
