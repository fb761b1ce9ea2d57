""".beton files: the only importer of FFCV."""
