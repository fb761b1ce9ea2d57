"""Losses and metrics of a task: what is taken of a network's outputs and a batch's targets."""

from fastar.losses.loss import LOSSES, Loss, LossChoice, find_loss
from fastar.losses.metrics import Metric, MetricChoice, Totals
from fastar.losses.outputs import prediction
from fastar.losses.targets import Parts, repeated, sample_count, split_of
