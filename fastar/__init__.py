"""fastar finds star models of neural networks and measures linear mode connectivity."""

__version__ = "0.1.0"
