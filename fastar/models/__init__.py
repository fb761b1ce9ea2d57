"""Architectures and their registry."""

from fastar.models.registry import (
    MODELS,
    build_model,
    model_options,
    option_choices,
    parameter_count,
    require_arch,
)
