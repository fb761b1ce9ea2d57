"""The options of all commands: one table, from which each command takes its own."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastar.errors import FastarError
from fastar.runtime import ranks
from fastar.runtime.user_code import check_reference

if TYPE_CHECKING:
    from fastar.config import Settings
    from fastar.launch.jobs import Launcher
    from fastar.runtime.progress import Progress

# Run folders that the command works on: the traceback of a defect is kept there.
run_folders: list[Path] = []
_SETTING = re.compile(r"[a-z_]+(\.[a-z_]+)*=")


@dataclass(frozen=True)
class Option:
    """An option: the type of its value (bool: a flag), the value's name in the help, the help, the setting that it
    gives, and its value where it is not given."""

    type: Any
    metavar: str | None
    help: str
    setting: str | None = None
    default: Any = None

    def parameter(self, name: str) -> inspect.Parameter:
        """The parameter of a command that typer makes the option of."""
        flags = [f"--{name.replace('_', '-')}", *(["-q"] if name == "quiet" else [])]
        text = self.help if self.setting is None else f"{self.help.rstrip('.')} ({self.setting})."
        option = typer.Option(*flags, help=text, metavar=self.metavar, show_default=self.default is not None)
        default = False if self.type is bool else self.default
        annotation = Annotated[self.type if default is not None else self.type | None, option]  # type: ignore[valid-type]
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


OPTIONS = {
    "dataset": Option(str, "NAME", "digits, fashion-mnist, mnist, cifar10, cifar100, imagenet or imagefolder."),
    "name": Option(str, "NAME", "Name of your --dataset imagefolder.", "dataset.own_name"),
    "arch": Option(str, "NAME", "Architecture, such as mlp, resnet18 or wrn22. A wrong name lists them all."),
    "sources": Option(int, "N", "Number of source models.", "sources.number"),
    "heldout": Option(int, "N", "Number of held-out models.", "sources.heldout"),
    "out": Option(Path, "DIR", "Run folder. Default: runs/DATASET-ARCH-seedSEED."),
    "config": Option(Path, "FILE", "YAML file of settings, or the name of a shipped one."),
    "scale": Option(str, "smoke|small|full", "Run a smaller version: seconds, or minutes on a CPU.", default="full"),
    "data_root": Option(Path, "DIR", "Folder of the raw data.", "dataset.root"),
    "val_share": Option(float, "SHARE", "Share for testing of class folders that have no val/.", "dataset.val_share"),
    "validation": Option(float, "SHARE", "Share of training images kept for validation.", "dataset.validation"),
    "on_nonfinite": Option(
        str, "stop|retry", "When a loss is not finite: stop, or go back and retry.", "train.on_nonfinite"
    ),
    "bn_batches": Option(int, "N", "Batch-norm statistics from N batches. Default: all.", "evaluation.bn_batches"),
    "points": Option(int, "N", "Equispaced values of t, ends included.", "evaluation.points", default=11),
    "gpu_memory": Option(str, "SIZE", "The most memory of the GPU that is taken, such as 40GB.", "gpu_memory"),
    "only": Option(str, "A-B", "Only these: numbers from 0, sources before heldouts, such as 3-7."),
    "launcher": Option(str, "local|slurm|ray", "Spread it: local:4, over 4 processes here; slurm; ray."),
    "dry_run": Option(bool, None, "With --launcher: print what would be started, and start nothing."),
    "sbatch": Option(list[str], "KEY=VALUE", "With --launcher slurm: an option of sbatch; may be repeated."),
    "measured_by": Option(int, "N", "Processes that measure, though some come later; 0: end once the star is trained."),
    "profile": Option(int, "N", "Time N steps of the star's training, part by part, into OUT/profile."),
    "images_per_second": Option(float, "SPEED", "Speed of training, instead of measuring it here."),
    "model": Option(str, "MODULE:FUNCTION", "Your own network: a function that returns it; MODULE may be a file."),
    "model_args": Option(list[str], "KEY=VALUE", "Arguments of --model, or settings of --arch; may be repeated."),
    "data": Option(str, "MODULE:FUNCTION", "Your own data: a function that returns (train, test)."),
    "loss": Option(str, "NAME", "cross_entropy, mse, bce, lm, or your own MODULE:FUNCTION.", "loss"),
    "metrics": Option(str, "NAMES", "Metrics beside the loss, joined by commas.", "metrics"),
    "sources_from": Option(str, "FILES", "Checkpoints that are the sources, such as 'ckpts/*.pt'.", "sources.folder"),
    "heldout_from": Option(str, "FILES", "Checkpoints that are the held-out models.", "sources.heldout_folder"),
    "input_shape": Option(str, "2x3x32x32", "With --model, without data: the shape of its input."),
    "allow_partial": Option(bool, None, "Leave in place what cannot be proven to move.", "matching.allow_partial"),
    "certify": Option(bool, None, "Show by numbers why each axis that stays has to; or what was missed."),
    "to": Option(str, "mean|star|pairwise", "To their mean (the default), to --centre, or each to each."),
    "centre": Option(Path, "FILE", "The checkpoint that all are matched to, such as a star."),
    "average": Option(Path, "FILE", "Write the average of the permuted ones here (.safetensors)."),
    "rounds": Option(int, "N", "With --to mean: the most passes over all.", default=20),
    "permutations": Option(Path, "FILE", "A run's matchings.safetensors: take its permutations, match nothing."),
    "most": Option(int, "K", "Networks of the largest average.", default=19),
    "repetitions": Option(int, "R", "Sequences of draws.", default=10),
    "radii": Option(str, "SHARES", "Radii, as shares of the star's norm, joined by commas.", default="0.1,0.2,0.4,0.8"),
    "draws": Option(int, "N", "Directions for each radius.", default=3),
    "by_filter": Option(bool, None, "Perturb each filter by its own norm."),
    "radius": Option(float, "SHARE", "Radius of a ball around the star, as a share of its norm.", default=0.1),
    "epochs": Option(int, "N", "Epochs of each bend. Default: as many as the star's."),
    "models": Option(int, "N", "The most sources, and the most heldouts; more are drawn from.", default=12),
    "star_of_one": Option(bool, None, "Compare with a star of the first source alone; train it where it is missing."),
    "margin": Option(float, "SHARE", "Margin around the networks, as a share of their extent.", default=0.2),
    "split": Option(str, "NAME", "Measure on this split alone, such as test."),
    "corruptions": Option(bool, None, "Also measure on images with eight corruptions at five severities."),
    "ood": Option(str, "NAMES", "Also tell test images from another data set's, or noise, gaussian, phase, blocks."),
    "swag": Option(bool, None, "Add SWA and SWAG, of one more training, which the run folder keeps."),
    "student": Option(bool, None, "Add a student of the ensemble: one network, trained once."),
    "permutation": Option(str, "sort|matching|exact", "How theta is permuted to phi. Default: matching."),
    "of": Option(str, "gap|barrier", "What eps is compared with. Default: the squared gap."),
    "adversarial": Option(bool, None, "Add the theta that no permutation brings near."),
    "seed": Option(int, "N", "Seed of all that is drawn.", default=0),
    "seeds": Option(int, "N", "Stars of each point, from different seeds (star.seed).", default=1),
    "gpus": Option(int, "N", "GPUs of a node, each with a process of its own.", default=1),
    "nodes": Option(int, "N", "Nodes that share the run folder.", default=1),
    "plan": Option(bool, None, "Train nothing: say what the largest point takes, and how many trainings there are."),
    "picture": Option(Path, "FILE", "Write the curves to this PNG."),
    "html": Option(bool, None, "Write one HTML page, to FILE where that is given, and draw nothing."),
    "list": Option(bool, None, "List what there is."),
    "json": Option(bool, None, "Print results as JSON on stdout, and nothing else there."),
    "quiet": Option(bool, None, "No progress."),
}
LAUNCH = ("launcher", "dry_run", "sbatch")
TASK = ("model", "model_args", "data", "loss", "metrics")
RUN = (
    *("dataset", "name", "arch", "sources", "heldout", "out", "config", "scale", "data_root", "val_share"),
    *("validation", "on_nonfinite", "bn_batches", "gpu_memory", *TASK, "sources_from", "heldout_from", "allow_partial"),
)
CHECKPOINTS = ("dataset", "name", "arch", *TASK, "input_shape", "allow_partial")
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change.")]


@dataclass(frozen=True)
class Given:
    """The values of a command's options, by their names.

    Args:
        ending: closed when the command ends: what it holds until then.
    """

    options: Mapping[str, Any]
    ending: ExitStack = field(default_factory=ExitStack)

    def __getitem__(self, name: str) -> Any:
        return self.options[name]

    @property
    def json(self) -> bool:
        """Results are printed as JSON."""
        return bool(self.options.get("json"))

    def changes(self, overrides: Sequence[str] = ()) -> dict[str, object]:
        """Settings by their dotted keys: those of options, and `key=value` over them."""
        from fastar.config import flatten, parse_overrides

        named = {option.setting: self.options.get(name) for name, option in OPTIONS.items() if option.setting}
        for one in self.options.get("model_args") or ():
            if not one.partition("=")[0] or "=" not in one:
                raise FastarError(f"--model-args {one}: write key=value, such as width=64")
        arguments = parse_overrides(f"model.{one}" for one in self.options.get("model_args") or ())
        return {
            **{key: value for key, value in named.items() if value is not None and value is not False},
            **flatten(arguments),
            **flatten(parse_overrides(overrides)),
        }

    def arguments(self, names: Sequence[str], overrides: Sequence[str] | None) -> list[str]:
        """Those of the options `names` that were given, and `key=value` settings, as a command line has them."""
        found = list[str]()
        for name in names:
            value = self.options[name]
            if value is not None and value is not False and value != OPTIONS[name].default:
                flag = f"--{name.replace('_', '-')}"
                for one in value if isinstance(value, list | tuple) else [value]:
                    found += [flag] if one is True else [flag, str(one)]
        return [*found, *(overrides or ())]

    def launcher(self) -> Launcher | None:
        """The launcher that was asked for."""
        text = self["launcher"]
        wanting = [name for name in ("dry_run", "sbatch") if self[name]]
        if text is None and wanting:
            raise FastarError(f"--{wanting[0].replace('_', '-')}: give a --launcher, such as slurm")
        if text is None:
            return None
        from fastar.launch.jobs import Launcher

        launcher = Launcher.read(text)
        if ranks.launched():
            raise FastarError(f"--launcher {text}: starts processes of its own: give it without torchrun")
        if self["sbatch"] and launcher.name != "slurm":
            raise FastarError(f"--sbatch: is for --launcher slurm; leave it out with --launcher {text}")
        return launcher

    def either(self, named: str, own: str) -> str | None:
        """The value of one of two options that say the same."""
        if self[named] is not None and self[own] is not None:
            raise FastarError(f"--{named} and --{own} both say what it is: leave one out")
        if self[own] is not None:
            check_reference(self[own], f"--{own}")
        return self[named] or self[own]

    def settings(self, overrides: Sequence[str] | None) -> Settings:
        """The settings of a run."""
        from fastar.config import load_settings

        changes = self.changes(overrides or ())
        for option, setting in (("sources_from", "sources.number"), ("heldout_from", "sources.heldout")):
            if self[option] is not None and setting not in changes:  # all that are there
                from fastar.experiments.reuse import matching_paths

                changes[setting] = len(matching_paths(Path(self[option])))
                if not changes[setting]:
                    named = f"--{option.replace('_', '-')} {self[option]}"
                    raise FastarError(f"{named}: no checkpoint (.safetensors, .pt, .pth, .ckpt, .bin) there")
        return load_settings(
            dataset=self.either("dataset", "data"),
            arch=self.either("arch", "model"),
            file=self["config"],
            scale=self["scale"],
            values=changes,
        )

    def run_folder(self, settings: Settings) -> Path:
        """The folder of a run. Without --out, it is named by what was named on the command line."""
        folder: Path | None = self["out"]
        if folder is None:
            dataset, arch = self.either("dataset", "data"), self.either("arch", "model")
            named = [None if dataset is None else settings.dataset.label, arch]
            config = self["config"]
            parts = [] if config is None else [config.stem, *(part for part in named if part)]
            folder = _default_run_folder(settings, recipe="-".join(parts) or None, scale=self["scale"])
        run_folders.append(folder)
        return folder

    def progress(self) -> Progress:
        """The terminal's progress; none where it is not wanted, and on ranks beside the first."""
        from fastar.runtime.progress import SILENT, TerminalProgress

        silent = self.json or self.options.get("quiet") or not ranks.is_first()
        return SILENT if silent else TerminalProgress()


def _default_run_folder(settings: Settings, *, recipe: str | None, scale: str) -> Path:
    """`runs/<dataset>-<arch>-seed<seed>`, or for a configuration that was named `runs/<its name>-seed<seed>`; a scale
    other than the full one is named too."""
    name = re.sub(r"[^\w.-]+", "_", recipe or f"{settings.dataset.label}-{settings.model.arch}")
    return Path("runs") / "-".join([name, *([] if scale == "full" else [scale]), f"seed{settings.seed}"])


def takes(*names: str, **others: str | Option) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options `names`: it is called with a `Given` of them, and with its own arguments.

    Args:
        others: options that are others here; only their help, where a text is given.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        arguments = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        options = {name: OPTIONS[name] for name in names}
        for name, other in others.items():
            options[name] = replace(options[name], help=other) if isinstance(other, str) else other

        @functools.wraps(function)
        def command(**given: Any) -> None:
            shared = {name: given.pop(name) for name in names}
            with ExitStack() as ending:
                function(Given(shared, ending), **given)

        parameters = [
            *(one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in arguments),
            *(option.parameter(name) for name, option in options.items()),
        ]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {one.name: one.annotation for one in parameters}
        return command

    return decorate


def paths_and_settings(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Files, and `key=value` settings, which a file that is there is not."""
    settings = [word for word in words if _SETTING.match(word) and not Path(word).exists()]
    return [Path(word) for word in words if word not in settings], settings
