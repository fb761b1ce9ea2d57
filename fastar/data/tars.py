"""Reading tar archives that may be damaged, or made to do harm: in bounded memory, and never for ever."""

import tarfile

# What may stand before a member: Python reads such headers whole, one inside the other.
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


class _Member(tarfile.TarInfo):
    """A member whose headers are checked before they are followed; `_proc_member` is made to be overridden."""

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


class TarArchive(tarfile.TarFile):
    """A tar archive: whatever is wrong with a header is a `tarfile.TarError`, what the disk says an OSError."""

    tarinfo = _Member
    headers = 0

    def next(self) -> tarfile.TarInfo | None:
        try:
            return super().next()
        except (tarfile.TarError, OSError):
            raise
        # ValueError, IndexError, OverflowError, what decompressors raise, and more.
        except Exception as error:
            raise tarfile.ReadError(f"{type(error).__name__}: {error}") from error
