"""Raw data as every reader hands it over: indexables of (image, label)."""

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fastar.errors import FastarError

# All that Pillow is asked for: others reach for programs and libraries of their own (EPS for Ghostscript).
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")


class UnusableImage(FastarError):
    """One image that cannot be used: `where` it is, the `reason` alone, and what to do."""

    def __init__(self, where: str, reason: str, advice: str):
        super().__init__(f"{where}: {reason}; {advice}")
        self.where, self.reason, self.advice = where, reason, advice

    def __reduce__(self) -> tuple[type["UnusableImage"], tuple[str, str, str]]:
        return type(self), (self.where, self.reason, self.advice)  # it is sent between processes


@contextmanager
def readable(where: Path) -> Iterator[None]:
    """Inside, a file or folder that the system refuses is one line."""
    try:
        if os.path.isdir(where):
            os.stat(os.path.join(where, "."))  # Python 3.13 takes what may not be entered for empty
        yield
    except OSError as error:
        raise FastarError(
            f"{error.filename or where}: cannot be read ({error.strerror or error}); check it and its permissions"
        ) from error


def is_image(stream: IO[bytes]) -> bool:
    """Tell whether `stream` begins as one of the image formats that are read."""
    try:
        with Image.open(stream, formats=FORMATS):
            return True
    except Image.DecompressionBombError:
        return True  # too large a one, which decoding says
    except Exception:  # noqa: BLE001 (whatever it is that Pillow does not understand, it is no image)
        return False


def decode_image(file: Path | BinaryIO, where: str, *, mode: str = "RGB", upright: bool = False) -> np.ndarray:
    """An image file as uint8 [H, W, 3], or [H, W, 1] with mode L; others are converted, and PNG may be called JPEG.

    With `upright` it is turned as its EXIF orientation says; without, the orientation is ignored.

    Raises:
        UnusableImage: it is not an image, cut off, or not of 8 bits.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.mode.startswith(("I", "F")):
                raise UnusableImage(where, f"{image.mode} pixels are not 8-bit", "convert the image")
            if upright:
                ImageOps.exif_transpose(image, in_place=True)
            return np.atleast_3d(np.array(image if image.mode == mode else image.convert(mode)))
    except UnusableImage:
        raise
    # Pillow's decoders raise more than OSError on damaged files: SyntaxError (PNG), ValueError, struct.error.
    except Exception as error:
        raise UnusableImage(where, f"cannot be read as an image ({_cause(error)})", "replace or remove it") from error


def _cause(error: Exception) -> str:
    """Without the path, or the address of an object in memory, that Pillow and the system put into their messages."""
    if isinstance(error, UnidentifiedImageError):
        return "cannot identify image file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())


class ArraySplit:
    """A split held in memory: images uint8 [n, H, W, C], labels int64 [n] in 0..len(classes)-1."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], origin: str):
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(f"images must be uint8 [n, H, W, C], not {images.dtype} {list(images.shape)}")
        if len(images) != len(labels):
            raise FastarError(f"{origin}: {len(images)} images but {len(labels)} labels; get the data again")
        if len(images) == 0:
            raise FastarError(f"{origin}: holds no images; get the data again")
        self.images = np.ascontiguousarray(images)
        self.labels = np.ascontiguousarray(labels, dtype=np.int64)
        self.classes = classes
        self.origin = origin
        bad = np.flatnonzero((self.labels < 0) | (self.labels >= len(classes)))
        if len(bad):
            raise FastarError(
                f"{self.where(int(bad[0]))}: label {self.labels[bad[0]]} is outside 0..{len(classes) - 1}; "
                "the file is damaged or of another dataset"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.labels[index])

    def where(self, index: int) -> str:
        """The origin of sample `index`, for messages."""
        return f"{self.origin}, sample {index}"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of images, labels and classes."""
        digest = hashlib.sha256(repr((self.images.shape, self.classes)).encode())
        digest.update(self.images.data)
        digest.update(self.labels.astype("<i8").data)
        return digest.hexdigest()


class Picture(NamedTuple):
    """One image, as a process of its own can decode it: a file, or `size` bytes from `offset` on of an archive."""

    path: str
    where: str
    upright: bool = False
    offset: int = 0
    size: int | None = None

    def decode(self, mode: str = "RGB") -> np.ndarray:
        """See `decode_image`; FastarError where an archive ends before."""
        if self.size is None:
            return decode_image(Path(self.path), self.where, mode=mode, upright=self.upright)
        with readable(Path(self.path)), open(self.path, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            name = self.where.removeprefix(f"{self.path}/")
            raise FastarError(f"{self.path}: is cut off inside {name}; get it again")
        return decode_image(io.BytesIO(content), self.where, mode=mode, upright=self.upright)


class ImageSplit:
    """Images in files, or inside an uncompressed archive, decoded when they are asked for.

    Args:
        origin: the folder or archive.
        names: of the images below it.
        labels: int64 [n], their classes, known without decoding an image.
        places: int64 [n, 2], offset and size of each image inside the archive; None: `origin` is a folder.
        mode: Pillow's name of the pixels that images are decoded to, RGB or L.
        content: the digest covers the content of the files too.
    """

    upright = False
    """Images are turned as their EXIF orientation says."""

    def __init__(
        self,
        origin: Path,
        classes: tuple[str, ...],
        names: list[str],
        labels: np.ndarray,
        places: np.ndarray | None = None,
        *,
        mode: str = "RGB",
        content: bool = False,
    ):
        self.origin, self.classes, self.names, self.labels, self.places = origin, classes, names, labels, places
        self.mode, self.content = mode, content

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """(image uint8 [H, W, C], label); FastarError names the file that cannot be decoded."""
        return self.picture(index).decode(self.mode), int(self.labels[index])

    def picture(self, index: int) -> Picture:
        """The image, not decoded yet."""
        where = self.where(index)
        if self.places is None:
            return Picture(where, where, self.upright)
        offset, size = self.places[index].tolist()
        return Picture(str(self.origin), where, self.upright, offset, size)

    def where(self, index: int) -> str:
        return f"{self.origin}/{self.names[index]}"

    @cached_property
    def digest(self) -> str:
        """SHA-256 over classes and each image's name, label and bytes (-1: not to be had; such may be left out).

        Reading every byte of ImageNet would take an hour; names and sizes tell one set of files from another.
        """
        digest = hashlib.sha256(repr(self.classes).encode())
        for index, (name, label) in enumerate(zip(self.names, self.labels.tolist(), strict=True)):
            size, content = self._size_and_content(index)
            digest.update(f"{name}\0{label}\0{size}\0".encode("utf-8", "surrogateescape"))
            digest.update(content)
        return digest.hexdigest()

    def _size_and_content(self, index: int) -> tuple[int, bytes]:
        """The bytes of image `index`, and of their content what the digest covers."""
        if self.places is not None:
            return int(self.places[index, 1]), b""
        path = Path(self.where(index))
        if self.content:
            with readable(path):
                content = path.read_bytes()
            return len(content), content
        try:
            return os.stat(path).st_size, b""
        except OSError:
            return -1, b""


RawSplit = ArraySplit | ImageSplit


@dataclass(frozen=True)
class RawDataset:
    """Both splits, the kind of format they were found in, and where."""

    train: RawSplit
    test: RawSplit
    kind: str
    where: Path | None
    note: str | None = None
    """Line that its reader has for the user."""
    files: tuple[Path, ...] = ()
    """The files that were read, where they have official names."""

    @property
    def digest(self) -> str:
        """SHA-256 over both splits' content. Formats that hold the same arrays have the same digest."""
        return hashlib.sha256(f"{self.train.digest} {self.test.digest}".encode()).hexdigest()
