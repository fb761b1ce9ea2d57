"""Reading all of a finished dataset again, for whoever asks whether it is still what was written."""

from pathlib import Path

import numpy as np

from fastar.data.ffcv.checksums import checksums_path, kept_checksums, stored_images, take_checksums
from fastar.data.ffcv.folder import SPLITS, Files, check_unchanged, open_metadata
from fastar.data.ffcv.format import check_beton
from fastar.data.ffcv.verify import ContentDigest
from fastar.data.files import DatasetFiles
from fastar.data.images import ImageFiles
from fastar.errors import FastarError
from fastar.runtime.progress import SILENT, Progress


def verify_folder(folder: Path, progress: Progress = SILENT) -> list[str]:
    """One line for each thing in a finished dataset's folder that is damaged; none: all is as it was written.

    Reads the metadata, both files to the last image, and the checksums. Where the metadata are damaged nothing says
    what the files must be, and that is the only line.
    """
    try:
        files = open_metadata(Path(folder), DatasetFiles, ImageFiles)
    except FastarError as error:
        return [str(error)]
    return [line for split in SPLITS for line in _damages(files, split, progress)]


def _damages(files: Files, split: str, progress: Progress) -> list[str]:
    path, again = files.path(split), f"delete {files.folder} and write it again"
    description, content = f"checking {files.name} {split}", files.metadata["content"][split]
    found = []
    try:
        if not path.exists():
            return [f"{path}: missing; {again}"]
        labels = check_beton(path, files.layout(split))
        if not isinstance(files, ImageFiles):
            digest = ContentDigest()
            with progress.task(description, len(labels), "images") as advance:
                for position, (_, image) in enumerate(stored_images(path, files.layout(split))):
                    digest.update(np.frombuffer(image, np.uint8), labels[position : position + 1])
                    advance()
            if digest.hexdigest() != content:
                found.append(f"{path}: its images or labels are not those that were written; {again}")
        else:
            now = take_checksums(path, files.layout(split), labels, progress, description)
            kept = kept_checksums(path, content)
            if kept is None and checksums_path(path).exists():
                found.append(f"{checksums_path(path)}: damaged; delete it, and the next run makes it again")
            if kept is not None and (bad := np.flatnonzero(now.images != kept.images)).size:
                found.append(
                    f"{path}: {len(bad)} of {len(labels)} images are not what was written (first: sample {bad[0]}); "
                    f"{again}"
                )
            elif now.content != content or (kept is not None and now.tables != kept.tables):
                found.append(f"{path}: its images, labels or tables are not those that were written; {again}")
        if not found:
            check_unchanged(files, split)
    except FastarError as error:
        found.append(str(error))
    return found
