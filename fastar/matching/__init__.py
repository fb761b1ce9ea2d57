"""Matching: which permutation brings networks together, by weights, activations or Sinkhorn; of many."""

from fastar.matching.activation.match_activations import comparing_bytes, correlate_units, match_activations
from fastar.matching.activation.statistics import ActivationCache, SourceActivations, UnitActivations, cache_bytes
from fastar.matching.assignment import solve_assignment, solver_name
from fastar.matching.many import ManyResult, To, average, match_many
from fastar.matching.methods import EXAMPLE_BATCHES, Examples, GiveExamples, match
from fastar.matching.sinkhorn import match_sinkhorn
from fastar.matching.weight.match_weights import MatchResult, match_weights, matching_threads, working_bytes

__all__ = [
    "EXAMPLE_BATCHES",
    "ActivationCache",
    "Examples",
    "GiveExamples",
    "ManyResult",
    "MatchResult",
    "SourceActivations",
    "To",
    "UnitActivations",
    "average",
    "cache_bytes",
    "comparing_bytes",
    "correlate_units",
    "match",
    "match_activations",
    "match_many",
    "match_sinkhorn",
    "match_weights",
    "matching_threads",
    "solve_assignment",
    "solver_name",
    "working_bytes",
]
