"""Memory, disk and hours of a run: `fastar plan`, and the checks that a run begins with."""

from fastar.experiments.plan.planning import plan_run
from fastar.experiments.plan.preflight import check_network, check_ranks, prepare_data, use_device
