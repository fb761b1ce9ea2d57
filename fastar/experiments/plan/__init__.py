"""Memory, disk and hours of a run: `fastar plan`, and the checks that a run begins with."""

from fastar.experiments.plan.planning import plan_run
from fastar.experiments.plan.preflight import check_network, prepare_data, prepare_ranks, use_device
