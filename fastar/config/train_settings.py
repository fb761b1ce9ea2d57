"""The recipe of a training (batches, optimizer, schedule, precision), and what a star has of its own. Imports no torch,
so that it is instant."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fastar.config.types import BelowOne, Count, Fraction, NotNegative, Positive, PositiveFloat, Section, UpToAMillion


class TrainSettings(Section):
    """The recipe of a regular model; the star model uses the same (paper, appendix B.1)."""

    epochs: UpToAMillion = 20
    """Passes over the training images."""
    batch_size: UpToAMillion = 128
    """Images of a step."""
    lr: PositiveFloat = 0.1
    """The largest learning rate of the schedule."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """adam adds weight_decay * theta to the gradient; adamw shrinks theta by lr * weight_decay instead."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """sgd only: share of the last step's direction."""
    nesterov: bool = True
    """sgd only: Nesterov's momentum."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """adam and adamw only: decay of the mean of gradients, and of that of their squares."""
    eps: PositiveFloat = 1e-8
    """adam and adamw only: added to the root of the second mean."""
    weight_decay: NotNegative = 5e-4
    """Strength of the pull towards 0."""
    decay_1d: bool = True
    """Decay biases, and batch-norm's scales and shifts, too (as in the paper)."""
    gradient_clip: PositiveFloat | None = None
    """The largest L2 norm of the gradient over all parameters. A longer one is scaled down to it, before weight decay.
    For a star it is the gradient with respect to the star. null: no limit."""
    label_smoothing: BelowOne = 0.0
    """Label smoothing of the training loss. Losses that are measured have none."""
    schedule: Literal["cosine", "linear", "step", "constant", "onecycle"] = "cosine"
    """The learning rate after the warm-up.

    - cosine: half a cosine to 0.
    - linear: a straight line to 0.
    - step: times `gamma` at `milestones`.
    - constant: stays `lr`.
    - onecycle: half a cosine up to `lr` and one down, as torch's OneCycleLR (momentum stays); it has no warm-up.
    """
    pct_start: Fraction = 0.3
    """onecycle only: the share of all steps in which the learning rate rises."""
    div_factor: PositiveFloat = 25.0
    """onecycle only: the first learning rate is `lr` / `div_factor`."""
    final_div_factor: PositiveFloat = 1e4
    """onecycle only: the last learning rate is the first / `final_div_factor`."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Epochs in which the learning rate rises from 0 to `lr` in a line."""
    milestones: tuple[Positive, ...] = ()
    """step only: epochs after which the learning rate is multiplied by `gamma`."""
    gamma: PositiveFloat = 0.1
    """step only: factor of the learning rate."""
    resolutions: tuple[tuple[Count, Positive], ...] = ()
    """Progressive resizing: pairs [epoch, side], such as [[11, 160], [13, 192]]. The side of the training images grows
    between them in a line, rounded to multiples of 32. Empty: `dataset.resolution` throughout."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the forward and the backward pass.

    - auto: bf16 on a GPU that has it, else fp32.
    - fp16: with loss scaling; needs a GPU.
    - bf16: on a CPU that computes in it (`fastar doctor` says so) it can halve a convolutional step, weights and images
      being channels-last; elsewhere it is emulated, and slower than fp32.
    """
    drop_last: bool = True
    """Leave out the short last batch of an epoch. The order is drawn anew each epoch."""
    compile: bool | Literal["auto"] = False
    """Run the network through torch.compile (needs a C++ compiler). Tested on CPUs; not yet run on a GPU. auto: where a
    trial of some steps on the GPU is faster for the whole training, compiling included; on a CPU false."""
    graph: bool | Literal["auto"] = False
    """Replay each step as one CUDA graph. Not yet run on a GPU: compare a short run's losses with graph=false. auto:
    where a trial of some steps is faster; on a CPU false."""
    sync_batch_norm: bool = False
    """On several ranks (torchrun), normalise a batch by the statistics of all of its samples, as one rank would. false:
    each rank normalises its samples by their own, and the first rank's running statistics are kept."""
    on_nonfinite: Literal["stop", "retry"] = "stop"
    """Reaction to a loss, or to parameters after an epoch, that are not finite. retry: go back to the last checkpoint,
    or to the beginning, with other random draws; three times at most. Where the data themselves hold such numbers it
    stops, and names the sample."""

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


class StarSettings(Section):
    """Algorithm 1: where the star starts, how t is drawn, how often sources are matched, what differs from `train`."""

    start: Literal["random", "mean", "source"] = "random"
    """Parameters that the star starts with. Near its sources it is trained in a fraction of the epochs, at a lower
    learning rate (`star.epochs`, `star.lr`).

    - random: those of a new network, as in the paper.
    - mean: the mean of the sources, matched to the first of them; where sources are never matched, as they are.
    - source: those of the first source.
    """
    t: Literal["uniform", "beta", "constant"] = "uniform"
    """Distribution of t, the place on the path from the star (0) to a source (1)."""
    alpha: PositiveFloat = 2.0
    """t=beta only: first parameter of the beta distribution."""
    beta: PositiveFloat = 2.0
    """t=beta only: second parameter of the beta distribution."""
    value: Fraction = 0.5
    """t=constant only: t itself."""
    draws: Literal["shared", "each"] = "shared"
    """Draws of (source, t) on several ranks (torchrun).

    - shared: one for a step, the same on all ranks, as one rank would draw; each rank holds all sources.
    - each: one for each rank, a gradient of less variance; each rank holds and matches its share of the sources alone.
    """
    mu: NotNegative = 0.0
    """Weight of the star's own loss: the objective is (L_path + mu L_star) / (1 + mu). 1: the modified objective of the
    paper's table 2. A step then takes about twice the time. 0: the path's loss alone."""
    seed: Count = 0
    """Another star of the same sources for each number: its initialisation, draws and data order derive from it."""
    match_every_epochs: Count = 1
    """Match the sources every so many epochs, from the first on. 0: never."""
    epochs: UpToAMillion | None = None
    """Epochs of the star. null: `train.epochs`."""
    lr: PositiveFloat | None = None
    """Learning rate of the star. null: `train.lr`."""
    schedule: Literal["cosine", "linear"] | None = None
    """Schedule of the star's learning rate, over its epochs. null: `train.schedule`; its `milestones` stay those of
    `train.epochs`."""

    def recorded(self) -> dict[str, Any]:
        """All that a star depends on, as it is recorded; what older versions did not know only where it is set."""
        new = ("start", "schedule", "draws")
        unset = {name for name in new if getattr(self, name) == type(self).model_fields[name].default}
        return self.model_dump(mode="json", exclude=unset)
