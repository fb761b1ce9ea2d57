"""Reading tar archives that may be damaged, or made to do harm: in bounded memory, and never for ever."""

import tarfile
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from pathlib import Path

# Headers that may stand before a member: Python reads them whole, one inside the other.
_HEADERS = 16
_HEADER_BYTES = 1 << 16
_EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
_LARGEST = 1 << 60  # no file is larger, and the system knows no place beyond 2^63
_MEMBERS = 1000  # of an archive that is read whole; the official ones have 20
_PIECE = 1 << 20


class _Member(tarfile.TarInfo):
    """A member whose headers are checked before they are followed; `_proc_member` is made to be overridden."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Member":
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        # Taken for the end of the archive by tarfile, where others have been read before: what follows would be lost.
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"a damaged header at byte {archive.offset:,}: {error}") from error

    def _proc_member(self, archive: "TarArchive") -> tarfile.TarInfo:
        archive.headers = archive.headers + 1 if self.type in _EXTENDED else 0
        if archive.headers > _HEADERS:
            raise tarfile.ReadError(f"more than {_HEADERS} headers before one member")
        if self.type in _EXTENDED and self.size > _HEADER_BYTES:
            raise tarfile.ReadError(f"a name of {self.size:,} bytes")
        self._check()
        member: _Member = super()._proc_member(archive)  # type: ignore[misc]
        member._check()  # what the headers before it say of it
        return member

    def _check(self) -> None:
        if not 0 <= self.size <= _LARGEST:
            raise tarfile.ReadError("a size that no file has")
        if self.type == tarfile.GNUTYPE_SPARSE:
            self._refuse_sparse()

    def _refuse_sparse(self, *_: object) -> None:
        raise tarfile.ReadError("a sparse file, of which the official archives have none")

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse


@contextmanager
def _only_tar_errors() -> Iterator[None]:
    """Inside, all but what the disk says is a `tarfile.TarError`: ValueError, IndexError, OverflowError, the errors
    that each decompressor has of its own, and more."""
    try:
        yield
    except (tarfile.TarError, OSError):
        raise
    except Exception as error:
        raise tarfile.ReadError(f"{type(error).__name__}: {error}") from error


class TarArchive(tarfile.TarFile):
    """A tar archive: whatever is wrong with a header is a `tarfile.TarError`, what the disk says an OSError."""

    tarinfo = _Member
    headers = 0

    def next(self) -> tarfile.TarInfo | None:
        with _only_tar_errors():
            return super().next()

    def check_end(self) -> None:
        """Raise ReadError where more than padding lies behind the end: a header of zeros is taken for it."""
        assert self.fileobj is not None
        self.fileobj.seek(self.offset)
        if self.fileobj.read(_PIECE).strip(b"\0") or self.fileobj.read(1):
            raise tarfile.ReadError(f"it goes on behind its end at byte {self.offset:,}")


def read_members(
    path: Path, wanted: Container[str], most: int, name_of: Callable[[str], str] = str
) -> dict[str, bytes]:
    """The members whose `name_of` their name is `wanted`, of an archive that may be compressed.

    It is read to its end, where decompressors compare checksums.

    Raises:
        tarfile.TarError: damaged, or it holds more than `most` bytes.
        OSError: it cannot be read, or a checksum differs.
    """
    contents = {}
    with _only_tar_errors(), TarArchive.open(path, encoding="utf-8") as archive:
        for number, member in enumerate(archive):
            if number == _MEMBERS or member.offset_data + member.size > most:
                raise tarfile.ReadError(f"it holds more than {_MEMBERS} members or {most:,} bytes")
            name = name_of(member.name)
            stream = archive.extractfile(member) if member.isfile() and name in wanted else None
            if stream is not None:
                contents[name] = stream.read()
        packed = archive.fileobj
        assert packed is not None
        while len(packed.read(_PIECE)) > 0:
            if packed.tell() > most:
                raise tarfile.ReadError(f"it holds more than {most:,} bytes")
    return contents
