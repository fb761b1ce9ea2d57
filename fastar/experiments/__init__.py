"""Whole experiments as recipes over the rooms below; no numerics of their own."""
