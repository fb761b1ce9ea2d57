"""The `fastar` command: its parts, and how it ends. Everything else is imported when a command needs it."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from fastar._version import __version__
from fastar.cli import after, geometry, match, several_runs, show, theory, train
from fastar.cli.failure import failure
from fastar.cli.options import run_folders
from fastar.errors import FastarError, OldName, UserCodeError
from fastar.runtime import ranks
from fastar.runtime.signals import EXIT_INTERRUPTED, Stopped, signals_stop
from fastar.runtime.standard_streams import forgiving, say, streams
from fastar.runtime.user_code import users_traceback

COMMANDS = {
    "train-star": train.train_star,
    "plan": train.plan,
    "sweep": several_runs.sweep,
    "train-sources": train.train_sources,
    "match": match.match,
    "match-many": match.match_many,
    "barrier": match.barrier,
    "symmetry": match.symmetry,
    "uncertainty": after.uncertainty,
    "fuse": after.fuse,
    "perturb": after.perturb,
    "distances": after.distances,
    "graph": geometry.graph,
    "plane": geometry.plane,
    "curve": geometry.curve,
    "theory": theory.theory,
    "reproduce": several_runs.reproduce,
    "report": show.report,
    "runs": show.runs,
    "verify": show.verify,
    "configs": show.configs,
    "doctor": show.doctor,
}
app = typer.Typer(
    name="fastar",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""
Find **star models** of neural networks and measure linear mode connectivity.

A star model is linearly connected, at low loss, to every one of N independently trained source networks, and to
networks it has never seen, once their hidden units are permuted to match. (Do Deep Neural Network Solutions Form a
Star Domain?, ICLR 2025.)

Start with

    fastar train-star --dataset digits

It trains 30 sources, 5 heldouts and a star model in about a minute, measures the barriers between them, and prints a
table and the path of a picture. It needs no data from anywhere.

Every setting of a run is a key of its YAML configuration (`configs/`). Give any of them as `key=value` after the
options, such as `train.epochs=30 model.width=32 star.t=beta`. Whatever is in the run folder and matches is reused: the
same command goes on where it was stopped, to the same result. `fastar runs` lists runs and where they stand.

Exit codes:

- 0: done.
- 1: something does not fit (`plan`), is damaged (`verify`) or does not work (`doctor`).
- 2: bad input, or output that cannot be written. One line on stderr says what to do; above it, the traceback of an
  error in your own function.
- 70: a defect of fastar. One line says where its traceback is.
- 75: stopped by SIGTERM or SIGUSR1; what was being trained is saved.
- 130: stopped by Ctrl-C, likewise. A second Ctrl-C stops at once.
""",
)
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def _version(value: bool) -> None:
    if value:
        print(f"fastar {__version__}")
        raise typer.Exit


# Commands that several ranks can do.
OF_RANKS = ("train-star", "train-sources")


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if ranks.launched() and context.invoked_subcommand not in OF_RANKS:
        raise FastarError(f"{context.invoked_subcommand} is of one process: give it without torchrun")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Errors meant for users become one line on stderr and exit code 2; defects one that says
    where the traceback is, and exit code 70."""
    with streams():
        sys.exit(_outcome(arguments))


@contextmanager
def _old_names_said() -> Iterator[None]:
    """Inside, an old name of a setting is one line on stderr; other warnings are shown as ever."""
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        if issubclass(category, OldName):
            say(f"fastar: {message}")
        else:
            shown(message, category, *rest)

    with warnings.catch_warnings():
        warnings.simplefilter("always", OldName)
        warnings.showwarning = show  # type: ignore[assignment]  # of its arguments, all are passed on
        yield


def _outcome(arguments: list[str] | None) -> int:
    """The exit code of the command that `arguments` call."""
    run_folders.clear()
    try:
        # torchrun hands Ctrl-C on to ranks that have it from the terminal already.
        with signals_stop(once=ranks.launched()), _old_names_said(), ranks.joined():
            result: Any = app(args=arguments, standalone_mode=False)
            sys.stdout.flush()  # what cannot be written is an error of this command
    except Stopped as stopped:
        if ranks.speaks():
            say(f"fastar: {stopped}")
        return stopped.code
    except (KeyboardInterrupt, typer.Abort):
        result = EXIT_INTERRUPTED
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001  # the last to see it; panics of libraries in Rust are no Exception
        if hasattr(error, "format_message"):  # typer's own complaints about options
            message = error.format_message()
            if not message:  # `fastar` alone: the help has been printed
                return 0
            error = FastarError(f"{message} (see `fastar --help`)")
        line, code = failure(error, next((run for run in run_folders if os.path.isfile(run / "config.yaml")), None))
        if ranks.speaks():
            if isinstance(error, UserCodeError):
                print(users_traceback(error), end="", file=forgiving(sys.stderr))
            say(f"fastar: {line}")
        return code
    if result == EXIT_INTERRUPTED:  # typer makes this of Ctrl-C, older ones an Abort
        say("fastar: interrupted; run it again to go on from what is finished")
    return result if isinstance(result, int) else 0
