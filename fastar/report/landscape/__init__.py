"""Tables and pictures of the loss between networks of a run."""
