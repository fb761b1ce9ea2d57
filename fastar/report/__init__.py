"""Tables and pictures of results, runs and recipes."""
