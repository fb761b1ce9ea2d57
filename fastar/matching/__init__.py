"""Matching: which permutation brings networks together, by weights, activations or Sinkhorn; of one or of many."""

from fastar.matching.activation.activation_cache import ActivationCache, SourceActivations, cache_bytes
from fastar.matching.activation.statistics import UnitActivations
from fastar.matching.assignment import solve_assignment, solver_name
from fastar.matching.many import ManyResult, To, average, match_many
from fastar.matching.methods import EXAMPLE_BATCHES, METHODS, Method, match, matching_threads
from fastar.matching.request import Examples, GiveExamples, MatchResult, Request
