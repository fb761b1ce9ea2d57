"""Names of model files: their endings, models in several files, Hugging Face folders. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from fastar.errors import FastarError
from fastar.runtime.json_files import read_object

SAFETENSORS = ".safetensors"
PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pth.tar")
INDEX = ".index.json"
# Names of the model in a Hugging Face folder; the first one that is there is read.
IN_FOLDERS = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}")


def suffix_of(path: Path) -> str | None:
    """The ending by which `path` is read, None for a name that is no model file's."""
    name = path.name
    found = [ending for ending in (SAFETENSORS, *PICKLES, INDEX) if name.endswith(ending) and name != ending]
    return max(found, key=len, default=None)


def stem_of(path: Path) -> str:
    """A model's name without the ending by which it is read; a folder's name as it is."""
    name = path.name.removesuffix(INDEX)
    return name.removesuffix(suffix_of(Path(name)) or "")


def is_checkpoint(path: Path) -> bool:
    """Tell by its name whether `path` is a single file that `load_checkpoint` reads."""
    return suffix_of(path) not in (None, INDEX)


def require_file(path: Path) -> None:
    """Raise FastarError unless `path` is a regular file: opening a pipe would wait for ever."""
    if not path.is_file():
        why = " (it is no regular file)" if path.exists() and not path.is_dir() else ""
        raise FastarError(f"{path}: no such checkpoint{why}")


def checkpoint_files(path: Path) -> list[Path]:
    """The files that `load_checkpoint(path)` reads: one, or those of a folder or of an index of shards.

    Raises:
        FastarError: a folder without a model, or an index that cannot be read.
    """
    if path.is_dir():
        inside = models_in(path)
        if not inside:
            raise FastarError(f"{path}: no such checkpoint: a folder with none of {', '.join(IN_FOLDERS)}")
        return checkpoint_files(path / inside[0])
    if suffix_of(path) == INDEX:
        return [path, *(path.with_name(file) for file in shards_of(path))]
    return [path]


def models_in(folder: Path) -> list[str]:
    """The model files that a Hugging Face folder holds; they are of one model, and the first is read."""
    return [name for name in IN_FOLDERS if (folder / name).is_file()]


def shards_of(index: Path) -> dict[str, list[str]]:
    """The files beside `index` (`*.index.json`) that hold a model together: name of the file -> names of its tensors.

    Raises:
        FastarError: unreadable, or it names files elsewhere.
    """
    require_file(index)
    try:
        shards: dict[str, list[str]] = {}
        for name, file in read_object(index)["weight_map"].items():
            if Path(file).name != file or suffix_of(Path(file)) in (None, INDEX):
                raise ValueError(f"{name!r} lies in {file!r}, which is no checkpoint beside it")
            shards.setdefault(file, []).append(name)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise FastarError(f"{index}: not a readable index of a model's files ({error}); restore it") from error
    return shards
