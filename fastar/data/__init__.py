"""Data: from raw files to .beton files, and from those to batches on the device. The only importer of FFCV."""
