"""Matching: which permutation brings networks together, by weights, activations or Sinkhorn; of many."""

from fastar.matching.activation.match_activations import comparing_bytes, correlate_units, match_activations
from fastar.matching.activation.statistics import KeptActivations, SeenSources, UnitActivations, kept_bytes
from fastar.matching.assignment import solve_assignment, solver_name
from fastar.matching.many import ManyResult, To, average, match_many
from fastar.matching.methods import EXAMPLE_BATCHES, Examples, GiveExamples, match_by_settings
from fastar.matching.sinkhorn import match_sinkhorn
from fastar.matching.weight.match_weights import MatchResult, match, match_weights, matching_threads, working_bytes

__all__ = [
    "EXAMPLE_BATCHES",
    "Examples",
    "GiveExamples",
    "KeptActivations",
    "ManyResult",
    "MatchResult",
    "SeenSources",
    "To",
    "UnitActivations",
    "average",
    "comparing_bytes",
    "correlate_units",
    "kept_bytes",
    "match",
    "match_activations",
    "match_by_settings",
    "match_many",
    "match_sinkhorn",
    "match_weights",
    "matching_threads",
    "solve_assignment",
    "solver_name",
    "working_bytes",
]
