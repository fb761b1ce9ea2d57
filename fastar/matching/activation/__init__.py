"""Matching by activations."""
