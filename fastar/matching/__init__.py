"""Matching: permutation groups derived from any model's graph, and weight matching over them."""

from fastar.matching.activations import match_activations
from fastar.matching.assignment import solve_assignment, solver_name
from fastar.matching.derive import derive_symmetry
from fastar.matching.permutations import Permutations
from fastar.matching.settings import ByActivations, match_by_settings, match_modules
from fastar.matching.symmetry import Group, Member, Symmetry
from fastar.matching.verify import verify_symmetry
from fastar.matching.weights import MatchResult, match, match_weights, working_bytes

__all__ = [
    "ByActivations",
    "Group",
    "MatchResult",
    "Member",
    "Permutations",
    "Symmetry",
    "derive_symmetry",
    "match",
    "match_activations",
    "match_by_settings",
    "match_modules",
    "match_weights",
    "solve_assignment",
    "solver_name",
    "verify_symmetry",
    "working_bytes",
]
