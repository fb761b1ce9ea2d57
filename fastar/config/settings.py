"""The settings of a run: their types, defaults and meanings. Imports no torch, so that it is instant."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from fastar.config.datasets import DATASETS, DatasetSpec, dataset_spec, variable_size_names
from fastar.config.train_settings import StarSettings, TrainSettings
from fastar.config.types import (
    CROSS,
    MOST,
    BelowOne,
    Count,
    Folder,
    NotNegative,
    Pairs,
    Positive,
    PositiveFloat,
    Section,
    Size,
    UpToAMillion,
)

# Architectures whose parameters depend on the side of the images.
OF_ONE_SIDE = ("mlp", "vit")
DATA_FOLDER = "~/.cache/fastar/data"


def cache_folder() -> Path | None:
    """The folder of what any process can make again, and is kept to save time (FASTAR_CACHE); None: nothing is kept."""
    chosen = os.environ.get("FASTAR_CACHE") or "~/.cache/fastar"
    return None if chosen == "off" else Path(chosen).expanduser()


class DatasetSettings(Section):
    """The images, and their files."""

    name: str
    """The data set: digits, cifar10, ... (`--dataset`), or the function that returns your own, `module:function`
    (`--data`)."""
    root: Folder | None = None
    """Folder of the raw data. null: the usual places are searched."""
    directory: Folder = Path(os.environ.get("FASTAR_DATA", DATA_FOLDER))
    """Folder of the .beton files, shared by runs. The variable FASTAR_DATA is another default."""
    limit: Positive | None = None
    """Train on this many images (class-balanced) instead of all."""
    validation: BelowOne = 0.0
    """Share of the training images that is kept out of training (0.1: a tenth). Losses, accuracies and barriers are
    measured on them too. Each class keeps its share. The dataset's name alone determines the images: they are the same
    in every run, whatever its seed. `limit` chooses among the rest. The normalisation of pixels does not change."""
    flip: Literal["random", "alternate"] = "random"
    """Mirroring of training images (cifar10, cifar100 and sets of images of any size; others are not mirrored).

    - random: each image with probability 1/2, drawn anew in each epoch.
    - alternate: drawn in the first epoch; each later one mirrors the images that the one before did not
      (arXiv:2404.00498, section 3.6).
    """
    own_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = None
    """imagefolder only: the name of your set, and of the folder of its files (`--name`)."""
    val_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """imagefolder only, where `root` holds class folders alone: the share of each class that is for testing. A hash of
    CLASS/FILE chooses, whatever the seed. null: the images lie in train/ and val/, or the files are written already."""
    resolution: Positive | None = None
    """Sets of images of any size only (imagenet, imagefolder), as all below: their side in pixels. null: 224."""
    crop: Literal["random-resized", "resize256-crop224"] = "random-resized"
    """The part of an image that training takes. random-resized: 8 to 100 % of the area. resize256-crop224 (the paper's
    wording): a square of 224/256 of the shorter side. Evaluation takes that square from the centre."""
    order: Literal["random", "pages"] = "random"
    """Order of the training images. pages, for files larger than memory: in windows of half a gigabyte, each read once
    an epoch. Files are written in a shuffled order, so every window mixes all classes."""
    encoding: Literal["rn50", "rn18", "jpeg"] | None = None
    """Form of the images in files that are yet to be written. Raw ones are larger, and faster to load.

    - null: as the files are, or rn50.
    - rn50: longer side at most 500 pixels, half of them as JPEG.
    - rn18: 400 pixels, a tenth as JPEG.
    - jpeg: 512 pixels, all as JPEG.
    """
    exif: Literal["ignore", "apply"] | None = None
    """EXIF orientation of images in files that are yet to be written. apply: they are turned as it says. ignore: they
    stay as they are stored, as with torchvision. null: as the files are, or ignore."""
    threads: Positive | None = None
    """Threads that decode. null: one for each CPU."""

    @property
    def spec(self) -> DatasetSpec:
        """The set's fixed facts."""
        return dataset_spec(self.name)

    @property
    def label(self) -> str:
        """The set's name: of its folder, and in a run's."""
        return self.own_name or self.name

    @property
    def side(self) -> int:
        """The side of square images, of a set of images of any size."""
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
        if self.flip == "alternate" and not (self.spec.variable_size or self.spec.augmentation.flip):
            raise ValueError(f"flip=alternate is of images that are mirrored in training; {self.name}'s are not")
        for key in ("resolution", "crop", "order", "encoding", "exif", "threads"):
            if not self.spec.variable_size and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} belongs to {' and '.join(variable_size_names())}; {self.name} has images of one size"
                )
        return self


class ModelSettings(Section):
    """Architecture and its own settings (`width`, `depth`, ...), which the architecture checks."""

    model_config = ConfigDict(extra="allow", frozen=True)
    arch: str
    """The architecture: mlp, resnet18, ... (`--arch`), or the function that builds your own network, `module:function`
    (`--model`); the other keys of this section are its arguments."""

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class SourcesSettings(Section):
    """The source models Z and the held-out models H."""

    number: Positive = 10
    """Source models that the star is trained with."""
    heldout: Count = 3
    """Held-out models that only barriers are measured to."""
    folder: Folder | None = None
    """Folder of checkpoints that are the sources, or a pattern of their files, such as 'ckpts/*.pt'. null: they are
    trained."""
    heldout_folder: Folder | None = None
    """The same of the held-out models."""
    store: Literal["auto", "device", "host", "file"] = "auto"
    """Memory that holds them while the star is trained. auto: the device's if they fill at most half of what is free,
    else the host's (pinned) likewise, else a file in the run folder."""

    def of_kind(self, kind: str) -> tuple[int, Path | None]:
        """The number of sources or heldouts, and where they are given."""
        return (self.number, self.folder) if kind == "source" else (self.heldout, self.heldout_folder)

    def trained(self) -> dict[str, int]:
        """The numbers of sources and of heldouts by kind, without those that are given."""
        of_kind = {kind: self.of_kind(kind) for kind in ("source", "heldout")}
        return {kind: number for kind, (number, folder) in of_kind.items() if folder is None}


class SinkhornSettings(Section):
    """Matching by gradient on doubly stochastic matrices (appendix D.3), for `matching.method=sinkhorn`."""

    objective: Literal["l2", "mid", "random"] = "l2"
    """The objective. l2: the distance of the weights. mid: the loss on training batches half way between the two
    networks. random: that loss at a random point of the path."""
    steps: Positive = 100
    """Steps of Adam for each source."""
    lr: PositiveFloat = 0.1
    """Learning rate of Adam."""
    iterations: Positive = 20
    """Normalisations of rows and columns in the Sinkhorn operator."""
    temperature: PositiveFloat = 1.0
    """Divisor of the logits: the lower, the harder the matrices."""
    noise: NotNegative = 0.01
    """Noise of the logits that the search starts from."""


class MatchingSettings(Section):
    """Matching of sources to the star, and of models to each other."""

    method: Literal["weight", "activation", "sinkhorn", "none"] = "weight"
    """The way to find permutations.

    - weight: coordinate descent on the weights.
    - activation: correlations of activations on a few training batches.
    - sinkhorn: gradients.
    - none: models stay as they are, and no symmetry is derived. For networks without one.
    """
    sinkhorn: SinkhornSettings = SinkhornSettings()
    solver: Literal["auto", "lapjv", "scipy"] = "auto"
    """Solver of assignments. auto: lapjv where it is installed."""
    start: Literal["auto", "identity", "backward", "activations"] = "auto"
    """Start of the descent of `method=weight`.

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
    """The most sweeps of a descent; it ends before where nothing changes any more."""
    allow_partial: bool = False
    """Hold in place the units of operations whose symmetry cannot be proven, and go on. false: say which, and stop."""
    chunk: Positive | None = None
    """Sources that are matched together: fewer take less memory. null: on a CPU all of a small network, of a large one
    one a thread; on a GPU what fits."""

    def recorded(self) -> dict[str, Any]:
        """All that permutations depend on, as it is recorded; what older versions did not know only where it is set."""
        unset = set() if self.allow_partial else {"allow_partial"}
        return self.model_dump(mode="json", exclude={"chunk", *unset})

    @property
    def by_activations(self) -> bool:
        """Activations are needed: by the method, or for the start of weight matching."""
        return self.method == "activation" or (self.method == "weight" and self.start == "activations")


class EvaluationSettings(Section):
    """Barriers (eq. 10) and what is measured around them."""

    points: Annotated[int, Field(ge=2, le=MOST)] = 11
    """Equispaced values of t on each path, ends included."""
    batch_norm: Literal["population", "reference"] = "population"
    """Batch-norm statistics on paths, from one pass over the train set, shuffled and augmented as in training.
    population: every image counts the same, at every point. reference (the paper's code): a moving average at inner
    points, the models' own statistics at the ends."""
    match: bool = True
    """Match the ends of every path. false, and `matching.method=none`: measure them as they are."""
    regular_pairs: Pairs = 10
    """Pairs of regular models to measure. A number: drawn at random from Z and H, all where there are fewer. cross (the
    paper): each source, at t = 0, with each heldout. cross:5x3: 5 sources and 3 heldouts, drawn at random."""
    star_sources: Positive | None = None
    """Sources that paths from the star are measured to, drawn at random. null: all."""
    limit: Positive | None = None
    """Training images that train losses are measured on (class-balanced), and the most that validation losses are
    measured on. null: all that were trained on, and all that `dataset.validation` keeps."""
    test_limit: Positive | None = None
    """Test images that test losses are measured on (class-balanced). null: all."""
    bn_batches: Positive | None = None
    """Training batches that batch-norm statistics are taken from. null: all. The change of a loss by it is measured at
    one point, against eight times as many batches, and reported."""
    batch_size: UpToAMillion = 250
    """Images of a batch in evaluation."""
    graph: bool = False
    """Replay the work of each batch as one CUDA graph. Not yet run on a GPU."""

    @property
    def cross(self) -> tuple[int | None, int | None] | None:
        """Numbers of sources and heldouts (None: all) of which each pair is measured; None: pairs drawn at random."""
        found = CROSS.fullmatch(str(self.regular_pairs))
        return None if found is None else (int(found[1]) if found[1] else None, int(found[2]) if found[2] else None)


class CheckpointSettings(Section):
    """Times at which a model in training is saved. The same command goes on from there to the same bits."""

    epochs: Count = 1
    """Save at the end of every so many epochs. 0: of none."""
    seconds: NotNegative = 10.0
    """The least seconds between two: epochs of small networks are shorter than the disk's answer."""
    minutes: NotNegative = 10.0
    """Save within an epoch, every so many minutes. 0: never."""


class LoggingSettings(Section):
    """Live metrics of each epoch, beside `log.jsonl`."""

    tensorboard: bool = True
    """Write files for `tensorboard --logdir RUN` into the run folder."""
    wandb: str | None = None
    """Project of Weights & Biases that they are sent to (needs `pip install wandb`). null: not sent."""


def _listed(value: Any) -> Any:
    """`accuracy,top5` as a list."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


class Settings(Section):
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
    loss: str = "cross_entropy"
    """The loss: cross_entropy, mse, bce (several labels), lm (next token), or a function f(outputs, batch) -> [batch]
    named as `module:function` (`--loss`). It is trained on, measured along paths, and matched on by Sinkhorn."""
    metrics: Annotated[tuple[str, ...], BeforeValidator(_listed)] | None = None
    """Metrics beside it: accuracy, top5, label_accuracy, token_accuracy, mae, rmse, perplexity, or `module:function`.
    null: accuracy of cross_entropy, rmse of mse, label_accuracy of bce, perplexity of lm."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed that all random choices derive from."""
    device: str = "auto"
    """cpu, cuda, cuda:1 or auto: a GPU where there is one."""
    gpu_memory: Size | None = None
    """The most memory of the GPU that is taken, such as 40GB. More is refused, as on a smaller GPU."""
    workers: Positive = 2
    """Processes that write data; threads that load, and that solve assignments."""

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if isinstance(self.evaluation.regular_pairs, str) and not self.sources.heldout:
            raise ValueError(
                f"evaluation.regular_pairs={self.evaluation.regular_pairs} pairs sources with heldouts, and "
                "there are no heldouts; give some (sources.heldout), or a number of pairs"
            )
        if self.train.resolutions and not self.dataset.spec.variable_size:
            raise ValueError(
                f"train.resolutions needs images of any size ({', '.join(variable_size_names())}), those of "
                f"{self.dataset.name} have one: leave it out"
            )
        if self.train.label_smoothing and self.loss != "cross_entropy":
            raise ValueError(f"train.label_smoothing belongs to cross_entropy, the loss is {self.loss}: leave it out")
        if self.train.resolutions and self.model.arch in OF_ONE_SIDE:
            raise ValueError(
                f"train.resolutions changes the side of the images, and {self.model.arch} has parameters for one side "
                "alone: leave it out"
            )
        return self

    @property
    def names_code(self) -> bool:
        """Network, data, loss or a metric is a user's function, named as `module:function`."""
        return any(":" in name for name in (self.dataset.name, self.model.arch, self.loss, *(self.metrics or ())))

    @property
    def star_epochs(self) -> int:
        """Epochs of the star's training."""
        return self.star.epochs or self.train.epochs

    @property
    def star_lr(self) -> float:
        """The learning rate of the star's training."""
        return self.star.lr or self.train.lr

    @property
    def star_train(self) -> TrainSettings:
        """`train`, with the schedule of the star's training."""
        if self.star.schedule is None:
            return self.train
        return self.train.model_copy(update={"schedule": self.star.schedule, "milestones": ()})

    @property
    def star_matched_every(self) -> int:
        """Epochs from one matching of the sources to the next; 0: they are never matched."""
        return 0 if self.matching.method == "none" else self.star.match_every_epochs

    @property
    def ends_matched(self) -> bool:
        """Evaluation matches the ends of paths."""
        return self.evaluation.match and self.matching.method != "none"

    def to_yaml(self) -> str:
        """The settings as YAML that `load_settings` reads back to the same settings."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
