"""Networks on other images than their own test images: corrupted ones, and ones of no class."""
