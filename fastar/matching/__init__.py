"""Matching: permutation groups derived from any model's graph, and weight matching over them."""

from fastar.matching.derive import derive_symmetry
from fastar.matching.permutations import Permutations
from fastar.matching.symmetry import Group, Member, Symmetry
from fastar.matching.verify import verify_symmetry

__all__ = ["Group", "Member", "Permutations", "Symmetry", "derive_symmetry", "verify_symmetry"]
