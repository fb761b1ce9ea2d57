"""Read by every Python process that `tools/rehearse.py` starts: gives it the simulated GPU before it imports torch."""

import simulated_cuda  # noqa: F401
