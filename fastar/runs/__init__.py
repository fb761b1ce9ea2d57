"""Run folders and the files in them: who holds one, what it keeps, where it stands."""

from fastar.runs.folder import (
    CHECKPOINT,
    IN_TRAINING,
    LAST_GOOD,
    RETRY,
    RunFolder,
    commit,
    default_run_folder,
    remove_checkpoints,
    remove_if_empty,
    versions,
)

__all__ = [
    "CHECKPOINT",
    "IN_TRAINING",
    "LAST_GOOD",
    "RETRY",
    "RunFolder",
    "commit",
    "default_run_folder",
    "remove_checkpoints",
    "remove_if_empty",
    "versions",
]
