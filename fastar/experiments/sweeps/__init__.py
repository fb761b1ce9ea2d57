"""Several runs that differ in one setting, with what is the same in them trained once."""

from fastar.experiments.sweeps.whole_sweep import plan_sweep, sweep
