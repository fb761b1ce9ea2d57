"""The paper's theory in numbers: a certificate without data, and two-layer networks. NumPy in float64."""
