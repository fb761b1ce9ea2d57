"""Settings of a run: typed, strict YAML plus `key=value` overrides. Imports no torch, so that it is instant."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fastar.config.datasets import DATASETS, DatasetSpec, dataset_spec, variable_size_names
from fastar.config.recipes import config_path, merge, read_recipe, read_yaml, recipe_path, shortened
from fastar.config.renamed import renewed
from fastar.config.scales import scaled
from fastar.errors import FastarError

# Architectures whose parameters depend on the side of the images.
OF_ONE_SIDE = ("mlp", "vit")

# Anything larger is a slip: torch or Python does not take the size, or it never ends.
MOST = 10**9
Positive = Annotated[int, Field(ge=1, le=MOST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
UpToAMillion = Annotated[int, Field(ge=1, le=10**6)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str) -> int:
    """`40GB` (10^9), `40GiB` (2^30), `512MB` as bytes.

    >>> parse_bytes("1.5GB")
    1500000000

    Raises:
        FastarError: not a size.
    """
    number = text.strip().rstrip("BKMGTIbkmgti ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        size = float(number) * UNITS[unit]
    except (ValueError, KeyError):
        raise FastarError(f"{text!r} is not a size; write it as 40GB, 40GiB or 512MB") from None
    if not 0 < size < float("inf"):
        raise FastarError(f"{text!r}: a size must be above 0")
    return int(size)


def _with_home(path: Path) -> Path:
    try:
        path.expanduser()
    except RuntimeError:
        raise ValueError("there is no such home folder; write the path out") from None
    return path


Folder = Annotated[Path, AfterValidator(_with_home)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DatasetSettings(_Section):
    """Which images, and where they are."""

    name: str
    root: Folder | None = None
    """Folder of the raw data; None looks where the dataset is usually found."""
    directory: Folder = Path(os.environ.get("FASTAR_DATA", "~/.cache/fastar/data"))
    """Folder of the .beton files, shared by runs."""
    limit: Positive | None = None
    """Train on this many images (class-balanced) instead of all."""
    validation: BelowOne = 0.0
    """Keep this share of the training images out of training (0.1: a tenth), and measure losses, accuracies and
    barriers on them too. Drawn so that each class keeps its share, by the dataset's name alone: the same images in
    every run, whatever its seed. They are taken first; `limit` then chooses among the rest. What pixels are normalised
    with stays the file's."""
    own_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = None
    """Of imagefolder: what your set is called; its files lie in a folder of that name."""
    val_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Of imagefolder, where `root` is one folder of class folders: this share of each class is for testing, chosen by a
    hash of CLASS/FILE, whatever the seed. None: the images lie in train/ and val/, or the files are written already."""
    resolution: Positive | None = None
    """Of imagenet and imagefolder, as all below: side of the images in training and evaluation; None is 224."""
    crop: Literal["random-resized", "resize256-crop224"] = "random-resized"
    """What training cuts out, at whatever resolution: 8 to 100 % of the area, or (the paper's wording) a square of
    224/256 of the shorter side. Evaluation takes that square from the centre."""
    order: Literal["random", "pages"] = "random"
    """pages, for files larger than memory: in windows of half a gigabyte, each read once an epoch. Files are written in
    a shuffled order, so every window mixes all classes."""
    encoding: Literal["rn50", "rn18", "jpeg"] | None = None
    """How the files are written where they are not there yet: longer side at most 500, 400 or 512 pixels, 50 %, 10 % or
    all as JPEG, the rest raw (larger, and faster to load). None: as they are, or rn50."""
    exif: Literal["ignore", "apply"] | None = None
    """When the files are written: apply turns images as their EXIF orientation says, ignore keeps them as they are
    stored, as torchvision does. None: as the files are, or ignore."""
    threads: Positive | None = None
    """Threads that decode; None is one per CPU."""

    @property
    def spec(self) -> DatasetSpec:
        """The set's fixed facts."""
        return dataset_spec(self.name)

    @property
    def label(self) -> str:
        """What the set is called: the name of its folder, and in a run's."""
        return self.own_name or self.name

    @property
    def side(self) -> int:
        """Of the square images of a set of any size."""
        return self.resolution or 224

    @model_validator(mode="after")
    def _consistent(self) -> DatasetSettings:
        if (self.own_name is not None) != (self.name == "imagefolder"):
            raise ValueError(
                "imagefolder needs a name of its own: give --name NAME (dataset.own_name)"
                if self.own_name is None
                else f"own_name={self.own_name!r} is for --dataset imagefolder, not for {self.name}; leave it out"
            )
        if self.own_name in DATASETS:
            raise ValueError(f"own_name={self.own_name!r} is another dataset's name; choose one of your own")
        if self.val_share is not None and self.name != "imagefolder":
            raise ValueError(f"val_share belongs to imagefolder; {self.name} has test images of its own: leave it out")
        for key in ("resolution", "crop", "order", "encoding", "exif", "threads"):
            if not self.spec.variable_size and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} belongs to {' and '.join(variable_size_names())}; {self.name} has images of one size"
                )
        return self


class ModelSettings(_Section):
    """Architecture and its own settings (`width`, `depth`, ...), which the architecture checks."""

    model_config = ConfigDict(extra="allow", frozen=True)
    arch: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class TrainSettings(_Section):
    """The recipe of a regular model; the star model uses the same (paper, appendix B.1)."""

    epochs: UpToAMillion = 20
    batch_size: UpToAMillion = 128
    lr: PositiveFloat = 0.1
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """adam adds weight_decay * theta to the gradient, adamw shrinks theta by lr * weight_decay instead."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of sgd, as is nesterov."""
    nesterov: bool = True
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """Of adam and adamw, as is eps."""
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5e-4
    decay_1d: bool = True
    """Whether biases and batch-norm's scales and shifts decay too, as in the paper."""
    gradient_clip: PositiveFloat | None = None
    """The largest L2 norm of the gradient over all parameters; a longer one is scaled down to it before the optimizer
    takes it (and before weight decay). Of a star: the gradient with respect to the star. None: as it is."""
    label_smoothing: BelowOne = 0.0
    """Of the loss that is trained on; losses that are measured are not smoothed."""
    schedule: Literal["cosine", "linear", "step", "constant", "onecycle"] = "cosine"
    """After the warm-up: half a cosine to 0, a straight line to 0, times `gamma` at `milestones`, or as it is. onecycle
    has no warm-up: half a cosine up to `lr` and one down, as torch's OneCycleLR (momentum stays)."""
    pct_start: Fraction = 0.3
    """Of onecycle: the share of all steps in which the learning rate rises."""
    div_factor: PositiveFloat = 25.0
    """Of onecycle: it begins at `lr` / `div_factor` and ends at that / `final_div_factor`."""
    final_div_factor: PositiveFloat = 1e4
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    milestones: tuple[Positive, ...] = ()
    """Epochs after which the step schedule multiplies the learning rate by `gamma`."""
    gamma: PositiveFloat = 0.1
    resolutions: tuple[tuple[Count, Positive], ...] = ()
    """Progressive resizing: [epoch, side] pairs between which the side of the training images grows in a line, rounded
    to multiples of 32: [[11, 160], [13, 192]]. Empty: `dataset.resolution` throughout."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on a GPU that has it, else fp32. fp16 (with loss scaling) needs a GPU. bf16 on a CPU that computes in
    it (avx512_bf16, AMX, ARM's; `fastar doctor` says so) can halve a convolutional step, weights and images being
    channels-last; elsewhere it is emulated, and slower than fp32."""
    drop_last: bool = True
    """Leave out the short last batch of an epoch (the order is drawn anew each epoch)."""
    compile: bool = False
    """Run the network through torch.compile (needs a C++ compiler). Tested on CPUs; not yet run on a GPU."""
    graph: bool = False
    """Replay each step as one CUDA graph. Not yet run on a GPU: compare a short run's losses with graph=false."""

    on_nonfinite: Literal["stop", "retry"] = "stop"
    """What to do when a loss, or theta after an epoch, is not finite. retry: go back to the last checkpoint, or the
    beginning, with other random draws; three times at most."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainSettings:
        if self.schedule == "step" and not self.milestones:
            raise ValueError("schedule=step needs milestones, such as milestones=[100, 150]")
        if self.schedule != "step" and self.milestones:
            raise ValueError("milestones belong to schedule=step: set schedule=step or leave milestones out")
        if self.schedule == "onecycle" and self.warmup_epochs:
            raise ValueError("schedule=onecycle rises by itself (pct_start): leave warmup_epochs out")
        for key in ("pct_start", "div_factor", "final_div_factor"):
            if self.schedule != "onecycle" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} belongs to schedule=onecycle: set that or leave {key} out")
        if self.warmup_epochs >= self.epochs:
            raise ValueError("warmup_epochs must be below epochs")
        if self.optimizer == "sgd" and self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum above 0: set nesterov=false or raise momentum")
        epochs = [epoch for epoch, _ in self.resolutions]
        if epochs != sorted(set(epochs)):
            raise ValueError("resolutions must name their epochs in rising order, such as [[11, 160], [13, 192]]")
        if any(side % 32 for _, side in self.resolutions):
            raise ValueError("resolutions must be multiples of 32, such as [[11, 160], [13, 192]]")
        return self


class SourcesSettings(_Section):
    """The source models Z and the held-out models H."""

    number: Positive = 10
    heldout: Count = 3
    folder: Folder | None = None
    """Take the sources from this folder of checkpoints instead of training them."""
    store: Literal["auto", "device", "host", "file"] = "auto"
    """Where the star's training keeps them. auto: on the device if they fill at most half of its free memory, else in
    the host's (pinned) likewise, else in a file in the run folder."""


class StarSettings(_Section):
    """Algorithm 1: how t is drawn, how often sources are matched, and what differs from `train`."""

    t: Literal["uniform", "beta", "constant"] = "uniform"
    alpha: PositiveFloat = 2.0
    beta: PositiveFloat = 2.0
    value: Fraction = 0.5
    """t itself where t=constant."""
    match_every_epochs: Count = 1
    """Match sources at the start of every such epoch, the first included; 0 never matches."""
    epochs: UpToAMillion | None = None
    """None: as many as `train.epochs`."""
    lr: PositiveFloat | None = None


class SinkhornSettings(_Section):
    """Matching by gradient on doubly stochastic matrices (appendix D.3), for `matching.method=sinkhorn`."""

    objective: Literal["l2", "mid", "random"] = "l2"
    """l2: the distance of the weights. mid, random: the loss on training batches half way between the two networks, or
    at a random point of the path."""
    steps: Positive = 100
    """Steps of Adam for each source."""
    lr: PositiveFloat = 0.1
    iterations: Positive = 20
    """Of the Sinkhorn operator: rows and columns normalised so often."""
    temperature: PositiveFloat = 1.0
    """The logits are divided by it: the lower, the harder the matrices."""
    noise: NotNegative = 0.01
    """Of the logits that the search starts from."""


class MatchingSettings(_Section):
    """How sources are matched to the star, and models to each other."""

    method: Literal["weight", "activation", "sinkhorn", "none"] = "weight"
    """weight: coordinate descent on the weights. activation: correlations of activations on a few training batches.
    sinkhorn: gradients. none: models stay as they are, and no symmetry is derived: for networks without one."""
    sinkhorn: SinkhornSettings = SinkhornSettings()
    solver: Literal["auto", "lapjv", "scipy"] = "auto"
    start: Literal["auto", "identity", "backward", "activations"] = "auto"
    """Where the descent of `method=weight` begins.

    - auto: last epoch's permutations; where there are none, as backward.
    - identity: last epoch's permutations; where there are none, the units as they are.
    - backward: from the output backwards, and from last epoch's permutations; the better end is kept.
    - activations: correlations on a few training batches, and last epoch's permutations; the better end is kept.
    """
    restarts: Positive = 1
    """Descents, each in another order of the groups; the best objective is kept."""
    perturbations: Count = 0
    """Times that the end is perturbed and descends again (iterated local search); the better end is kept."""
    max_sweeps: Positive = 100
    chunk: Positive | None = None
    """Sources that are matched together: fewer take less memory. None: one a thread on a CPU; what fits on a GPU."""

    @property
    def by_activations(self) -> bool:
        """Whether what units do is looked at: by the method, or for the start of weight matching."""
        return self.method == "activation" or (self.method == "weight" and self.start == "activations")


class EvaluationSettings(_Section):
    """Barriers (eq. 10) and what is measured around them."""

    points: Annotated[int, Field(ge=2, le=MOST)] = 11
    """Equispaced values of t, ends included."""
    batch_norm: Literal["population", "reference"] = "population"
    """From one pass over the train set, shuffled and augmented as in training. population: every image counts the
    same, at every point. reference: the paper's code, a moving average at inner points, the models' own statistics at
    the ends."""
    match: bool = True
    """Match the ends of every path; false, and `matching.method=none`, measure them as they are."""
    regular_pairs: Positive = 10
    """Pairs of regular models to measure, drawn at random from Z and H; all of them where there are fewer."""
    star_sources: Positive | None = None
    """Measure the paths from the star to so many sources, drawn at random; None: to all."""
    limit: Positive | None = None
    """Measure train losses on so many training images (class-balanced), and validation losses on at most so many of
    those that `dataset.validation` keeps; None: on all that were trained on, and all that were kept."""
    test_limit: Positive | None = None
    """Measure test losses on so many test images (class-balanced); None: on all."""
    bn_batches: Positive | None = None
    """Re-estimate batch-norm statistics from so many training batches; None: from all. What that changes in a loss is
    measured at one point, against eight times as many batches, and said."""
    batch_size: UpToAMillion = 250
    graph: bool = False
    """Replay the work of each batch as one CUDA graph. Not yet run on a GPU."""


class CheckpointSettings(_Section):
    """When a model in training is saved; the same command goes on from there to the same bits."""

    epochs: Count = 1
    """At the end of every so many epochs; 0 at none."""
    seconds: NotNegative = 10.0
    """But not within so many seconds of the last one: small networks' epochs are shorter than the disk's answer."""
    minutes: NotNegative = 10.0
    """Within an epoch, every so many minutes; 0 never."""


class LoggingSettings(_Section):
    """Where each epoch's figures are shown while a run goes on, beside `log.jsonl`."""

    tensorboard: bool = True
    """As files for `tensorboard --logdir RUN`, in the run folder."""
    wandb: str | None = None
    """Also sent to this project of Weights & Biases (needs `pip install wandb`)."""


class Settings(_Section):
    """Everything that determines a run."""

    dataset: DatasetSettings
    model: ModelSettings
    train: TrainSettings = TrainSettings()
    sources: SourcesSettings = SourcesSettings()
    star: StarSettings = StarSettings()
    matching: MatchingSettings = MatchingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    logging: LoggingSettings = LoggingSettings()
    seed: Annotated[int, Field(ge=0)] = 0
    device: str = "auto"
    gpu_memory: str | None = None
    """Take at most so much of the GPU, such as 40GB: more is refused, as if the GPU were a smaller one."""
    workers: Positive = 2
    """Processes for writing data, threads for loading and for assignments."""

    @field_validator("gpu_memory")
    @classmethod
    def _a_size(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                parse_bytes(value)
            except FastarError as error:
                raise ValueError(str(error)) from error
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.train.resolutions and not self.dataset.spec.variable_size:
            raise ValueError(
                f"train.resolutions needs images of any size ({', '.join(variable_size_names())}), those of "
                f"{self.dataset.name} have one: leave it out"
            )
        if self.train.resolutions and self.model.arch in OF_ONE_SIDE:
            raise ValueError(
                f"train.resolutions changes the side of the images, and {self.model.arch} has parameters for one side "
                "alone: leave it out"
            )
        return self

    @property
    def star_matched_every(self) -> int:
        """Epochs from one matching of the sources to the next; 0: they are never matched."""
        return 0 if self.matching.method == "none" else self.star.match_every_epochs

    @property
    def ends_matched(self) -> bool:
        """Whether evaluation matches the ends of paths."""
        return self.evaluation.match and self.matching.method != "none"

    def to_yaml(self) -> str:
        """The settings as YAML that `load_settings` reads back to the same settings."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """`["train.lr=0.1", "seed=3"]` as nested settings; values are YAML.

    >>> parse_overrides(["train.lr=0.1", "train.milestones=[100, 150]"])
    {'train': {'lr': 0.1, 'milestones': [100, 150]}}
    """
    nested: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise FastarError(f"{override!r} is not a setting: write key=value, such as train.lr=0.05")
        try:
            # A path may be any bytes; given escaped, as YAML writes them, or as they are.
            value = text if any("\ud800" <= c <= "\udfff" for c in text) else read_yaml(text)
        except FastarError as error:
            raise FastarError(f"{shortened(override)!r}: the value is not valid YAML ({error})") from error
        place = nested
        *sections, name = key.split(".")
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise FastarError(f"{override!r}: {section} is set to a value by an earlier override")
        place[name] = value
    return renewed(nested)


def as_override(key: str, value: object) -> str:
    """`key=value` that `parse_overrides` reads back to just this value, whatever characters it has.

    >>> as_override("dataset.root", "a #b")
    "dataset.root='a #b'"
    """
    plain = str(value) if isinstance(value, Path) else value
    text = yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=10**9).strip()
    return f"{key}={text.removesuffix('...').strip()}"


def load_settings(
    *,
    dataset: str | None = None,
    arch: str | None = None,
    file: Path | None = None,
    scale: str = "full",
    overrides: Iterable[str] = (),
) -> Settings:
    """Resolve settings: a file (given, or the one shipped for dataset and architecture), its scale, then the overrides.

    Args:
        file: of settings, or the name of a shipped configuration.
        scale: `smoke`, `small` or `full` (`fastar.config.scales`); overrides are taken as they are.

    Raises:
        FastarError: unreadable file, unknown key (the nearest valid one is named), or value out of range.
    """
    changes = parse_overrides(overrides)
    if file is not None:
        content = read_recipe(recipe_path(file))
    else:
        if dataset is None:
            raise FastarError("no dataset: give --dataset NAME or --config FILE")
        arch = arch or dataset_spec(dataset).arch
        path = config_path(dataset, arch)
        content = read_recipe(path) if path else {}
    named: dict[str, Any] = {}
    if dataset is not None:
        named["dataset"] = {"name": dataset}
    if arch is not None:
        named["model"] = {"arch": arch}
        model = content.get("model")
        if isinstance(model, Mapping) and model.get("arch", arch) != arch:  # its width would not fit
            content = {**content, "model": {}}
    content = merge(content, named)
    if scale != "full":
        validate(
            merge(content, changes), source=str(file or "settings")
        )  # what is wrong is said of the file, not of the scale
        sections = {
            name: one.model_dump(mode="json") for name, one in _defaults().items() if isinstance(one, BaseModel)
        }
        content = scaled(content, scale, defaults=sections)
    return validate(merge(content, changes), source=str(file or "settings"))


def _defaults() -> dict[str, Any]:
    """Of every section and setting at the top; undefined where one is required."""
    return {name: field.get_default(call_default_factory=True) for name, field in Settings.model_fields.items()}


def validate(content: Mapping[str, Any], source: str = "settings") -> Settings:
    """Typed settings from nested mappings.

    Raises:
        FastarError: one line naming the first wrong key, what was expected, and the nearest valid key.
    """
    try:
        return Settings.model_validate(content)
    except ValidationError as error:
        raise FastarError(f"{source}: {_explain(error)}") from error


def matching_settings(values: Mapping[str, Any]) -> MatchingSettings:
    """The section `matching` alone, from its keys.

    Raises:
        FastarError: one line naming the first wrong key, as `validate`.
    """
    try:
        return MatchingSettings.model_validate(renewed({"matching": values})["matching"])
    except ValidationError as error:
        raise FastarError(_explain(error, "matching")) from error


def _explain(error: ValidationError, *section: str) -> str:
    """The first error as one line; unknown keys come first, since a typo often also leaves a key missing."""
    errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first = errors[0]
    parts = [*section, *(str(part) for part in first["loc"])]
    key = ".".join(parts)
    if first["type"] == "extra_forbidden":
        valid = _valid_keys(parts[:-1])
        elsewhere = {name.rpartition(".")[2]: name for name in reversed(_all_keys())}  # train.lr before star.lr
        near = [".".join([*parts[:-1], name]) for name in difflib.get_close_matches(parts[-1], valid, n=1)]
        near = near or [elsewhere[name] for name in difflib.get_close_matches(parts[-1], elsewhere, n=1)]
        hint = f"did you mean {near[0]}? " if near else ""
        return f"unknown key {key}: {hint}valid here: {', '.join(valid)}"
    if first["type"] == "missing":
        return f"{key} is missing"
    if first["type"] == "model_type":
        keys = ", ".join(f"{key}.{name}" for name in _valid_keys(parts))
        return f"{key}={shortened(repr(first['input']))}: {key} is a section of settings: {keys}"
    message = first["msg"].removeprefix("Value error, ")
    if not key:  # of several sections together: the message names the key
        return message
    shown = "" if isinstance(first["input"], Mapping | BaseModel) else f"={shortened(repr(first['input']))}"
    return f"{key}{shown}: {message[0].lower()}{message[1:]}"


def _valid_keys(section: list[str]) -> list[str]:
    model: type[BaseModel] = Settings
    for name in section:
        field = model.model_fields.get(name)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return []
        model = field.annotation
    return list(model.model_fields)


def _all_keys() -> list[str]:
    return [*Settings.model_fields, *(f"{s}.{k}" for s in Settings.model_fields for k in _valid_keys([s]))]
