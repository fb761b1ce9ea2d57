"""The loss between networks of a finished run: the graph of all pairs, planes through three, trained curves."""
