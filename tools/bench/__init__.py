"""What the scripts in tools/ share: cases timed in turns, one JSON line each, and what is timed."""

from bench.lines import CannotRun, claim, failing_alone, failure, line, where
from bench.problem import EPOCH, Problem, add_problem_arguments, matching_threads, problem_of
from bench.timing import Case, Timing, built_when_run, in_one_graph, quantiles, ratio, time_in_turns, timed
from bench.work import gpu_work, profile, profiler_sees_gpu

__all__ = [
    "EPOCH",
    "CannotRun",
    "Case",
    "Problem",
    "Timing",
    "add_problem_arguments",
    "built_when_run",
    "claim",
    "failing_alone",
    "failure",
    "gpu_work",
    "in_one_graph",
    "line",
    "matching_threads",
    "problem_of",
    "profile",
    "profiler_sees_gpu",
    "quantiles",
    "ratio",
    "time_in_turns",
    "timed",
    "where",
]
