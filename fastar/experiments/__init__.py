"""Whole experiments as recipes over the rooms below; no numerics of their own."""

from fastar.experiments.reuse import finished_results
from fastar.experiments.whole_run import train_star
