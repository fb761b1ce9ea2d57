"""Architectures and their registry; networks of users are in `user_network`."""

from fastar.models.registry import (
    MODELS,
    build_model,
    model_options,
    option_choices,
    parameter_count,
    require_arch,
)
