"""The graph of a model's forward pass (torch.export), or an error that says why there is none."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sysconfig
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils._pytree import tree_leaves

from fastar.errors import FastarError, first_line
from fastar.flat import forward
from fastar.flat.forward import arguments_of
from fastar.flat.state_check import copied
from fastar.symmetry.random_network import ExampleInputs, without_cache

# Words of torch, in its several kinds of errors, for a forward pass that needs the value of a tensor.
_VALUES = ("data-dependent", "data dependent", "GuardOnDataDependent", "unbacked")
# torch.export's words for an output that is no tensor, tuple, list, mapping, nor registered as one.
_RETURNED = re.compile(r"Found <class '([^']+)'> in output, which is not a known type")


def trace(model: nn.Module, example_inputs: ExampleInputs, name: str) -> torch.export.ExportedProgram:
    """A functional graph of ATen operations, with linear, convolution and normalisation kept whole.

    Raises:
        FastarError: the model does not run on the inputs, branches on values, or cannot be traced; says where.
    """
    arguments, keywords = arguments_of(example_inputs)
    twin = without_cache(copied(model).eval())
    try:
        with _quiet(), _hooks_kept(), torch.no_grad():
            program = torch.export.export(twin, arguments, keywords).run_decompositions({})
    except Exception as error:
        # torch.export raises many kinds of errors, also from the model's own code; what tells them apart is whether
        # the model itself runs.
        raise FastarError(f"cannot trace {name}{_why(model, arguments, keywords, error)}") from error
    for node in program.graph.nodes:
        tensors = (one for one in tree_leaves(node.meta.get("val")) if isinstance(one, Tensor))
        if any(not isinstance(size, int) for one in tensors for size in one.shape):
            raise FastarError(
                f"cannot trace {name} with torch.export to find its permutation groups: the size of {node.target} "
                f"(node {node.name}) depends on values of tensors; change that part, or write its groups down as a "
                "PermutationSpec"
            )
    return program


def _why(model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], error: Exception) -> str:
    """The rest of the message: the kind of error, its place, and what to do."""
    try:
        with _quiet(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            copied(model).eval()(*arguments, **keywords)
    except Exception as own:  # as above
        raise FastarError(
            f"cannot trace {type(model).__name__}: it does not run on the example inputs: {first_line(own)}"
            f"{_place(own)}; give what its forward takes"
        ) from own
    text, begun = f"{type(error).__name__} {error}", " with torch.export to find its permutation groups: "
    returned = _RETURNED.search(text)
    if returned is not None:
        return (
            f"{begun}it returns a {returned[1].rpartition('.')[2]}, whose tensors torch.export does not see; leave it "
            "out (of Hugging Face's caches: use_cache=False in the example inputs)"
        )
    on_values = any(one in text for one in _VALUES)
    remedy = "its forward must not branch on values: change it" if on_values else "change that part"
    return f"{begun}{first_line(error)}{_place(error)}; {remedy}, or write its groups down as a PermutationSpec"


def _place(error: BaseException) -> str:
    """The line of the user's code that an error of tracing came from, as far as its traceback shows."""
    inside = os.path.dirname(torch.__file__), os.path.dirname(__file__), forward.__file__, "<"
    library = sysconfig.get_paths()["stdlib"]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(inside)
        and ("site-packages" in frame.filename or not frame.filename.startswith(library))
    ]
    return f" ({frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name})" if frames else ""


@contextlib.contextmanager
def _hooks_kept() -> Iterator[None]:
    """Take away what is left of a failed export: torch 2.11 forgets a hook that then sees every buffer that any
    module of the process registers, and with which no architecture is known by its name (`cache.record_of`)."""
    registered = hooks._global_buffer_registration_hooks
    before = set(registered)
    try:
        yield
    finally:
        for key in set(registered) - before:
            del registered[key]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, nothing is warned of, logged or printed to stderr: a failure is told by its error, and torch would print
    pages of its own traceback before. Whoever set TORCH_LOGS asked for them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if os.environ.get("TORCH_LOGS"):
            yield
            return
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                yield
        finally:
            logging.disable(before)
