"""Losses, accuracies and barriers of many models over the same data."""

from fastar.evaluation.batch_norm import re_estimate
from fastar.evaluation.losses import Measured, evaluate_rows
from fastar.evaluation.paths import Endpoint, PathLosses, Segment, barrier, barrier_gaps, evaluate_paths
