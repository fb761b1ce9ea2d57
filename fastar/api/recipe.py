"""`fastar.Recipe`: how networks and their star are trained, matched and measured."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from fastar.config import Settings, validate
from fastar.config.load import explained
from fastar.config.settings import (
    CheckpointSettings,
    EvaluationSettings,
    LoggingSettings,
    MatchingSettings,
    SourcesSettings,
    StarSettings,
    TrainSettings,
)
from fastar.errors import FastarError


class Recipe(TrainSettings):
    """The settings of a run: those of `train` by their names, and the other sections.

    Raises:
        FastarError: an unknown name, or a value out of range.

    Example:
        >>> import fastar
        >>> recipe = fastar.Recipe(epochs=50, batch_size=128, lr=0.1, star={"match_every_epochs": 2})
        >>> recipe.epochs, recipe.star.match_every_epochs
        (50, 2)
    """

    star: StarSettings = StarSettings()
    matching: MatchingSettings = MatchingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    sources: SourcesSettings = SourcesSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    logging: LoggingSettings = LoggingSettings()
    limit: int | None = None
    """Train on this many samples instead of all."""
    validation: float = 0.0
    """Share of the training samples that is kept out of training, and measured on."""
    seed: int = 0
    device: str = "auto"
    gpu_memory: str | None = None
    workers: int = 2

    def __init__(self, **settings: Any):
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise FastarError(f"Recipe: {explained(error, type(self))}") from error

    def settings(self, dataset: str, model: str, loss: str) -> Settings:
        """The same as the settings of a whole run."""
        own = {name: getattr(self, name) for name in TrainSettings.model_fields}
        rest = self.model_dump(exclude={*own, "limit", "validation"})
        return validate(
            {
                "dataset": {"name": dataset, "limit": self.limit, "validation": self.validation},
                "model": {"arch": model},
                "train": own,
                "loss": loss,
                **rest,
            },
            "the recipe",
        )
