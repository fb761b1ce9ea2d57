"""Matching: permutation groups derived from any model's graph, and methods that match networks over them."""

from fastar.matching.activations import comparing_bytes, correlate_units, match_activations
from fastar.matching.assignment import solve_assignment, solver_name
from fastar.matching.derive import derive_symmetry
from fastar.matching.forwards import on_device
from fastar.matching.many import ManyResult, To, average, match_many
from fastar.matching.methods import Examples, GiveExamples, match_by_settings
from fastar.matching.modules import symmetry_by_settings
from fastar.matching.permutations import Permutations
from fastar.matching.same import check_same_function
from fastar.matching.seen import KeptActivations, SeenSources, UnitActivations, kept_bytes
from fastar.matching.sinkhorn import match_sinkhorn
from fastar.matching.spec import PermutationSpec, Span
from fastar.matching.symmetry import Group, Member, Symmetry, without_groups
from fastar.matching.trials import ExampleInputs
from fastar.matching.verify import verify_symmetry
from fastar.matching.weights import MatchResult, match, match_weights, matching_threads, working_bytes

__all__ = [
    "ExampleInputs",
    "Examples",
    "GiveExamples",
    "Group",
    "KeptActivations",
    "ManyResult",
    "MatchResult",
    "Member",
    "PermutationSpec",
    "Permutations",
    "SeenSources",
    "Span",
    "Symmetry",
    "To",
    "UnitActivations",
    "average",
    "check_same_function",
    "comparing_bytes",
    "correlate_units",
    "derive_symmetry",
    "kept_bytes",
    "match",
    "match_activations",
    "match_by_settings",
    "match_many",
    "match_sinkhorn",
    "match_weights",
    "matching_threads",
    "on_device",
    "solve_assignment",
    "solver_name",
    "symmetry_by_settings",
    "verify_symmetry",
    "without_groups",
    "working_bytes",
]
