"""Run folders and the files in them: who holds one, what it keeps, where it stands. Imports no torch.

What needs torch, reading and writing models, is `fastar.runs.model_files`.
"""

from fastar.runs.atomic import delete, files_below, remove_if_empty, write_atomically, write_json
from fastar.runs.folder import (
    CHECKPOINT,
    IN_TRAINING,
    LAST_GOOD,
    RETRY,
    RunFolder,
    remove_checkpoints,
    run_folders_below,
)
from fastar.runs.lock import hold, is_held, read_holder
from fastar.runs.model_names import checkpoint_files, is_checkpoint, stem_of
from fastar.runs.provenance import commit, versions
from fastar.runs.run_log import RunLog
from fastar.runs.safetensors_file import read_metadata, stored_digest
