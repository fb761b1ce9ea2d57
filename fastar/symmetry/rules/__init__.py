"""Rules for operations: which axes of inputs and outputs move together."""
