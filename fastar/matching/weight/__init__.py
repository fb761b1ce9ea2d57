"""Matching by weights."""
