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
_BEHIND = 1 << 26  # bytes behind the last member: archives are filled up to some thousands


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
            member = super().next()
            if member is None:
                self._check_end()
            return member
        except (tarfile.TarError, OSError):
            raise
        # ValueError, IndexError, OverflowError, what decompressors raise, and more.
        except Exception as error:
            raise tarfile.ReadError(f"{type(error).__name__}: {error}") from error

    def _check_end(self) -> None:
        """Python takes a damaged header for the archive's end, and what follows would be lost without a word."""
        assert self.fileobj is not None
        self.fileobj.seek(self.offset)
        if self.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"a damaged header at byte {self.offset:,}")

    def finish(self) -> None:
        """Read on, behind the last member, to the end of the gzip stream, where its checksum stands.

        Raises:
            tarfile.TarError: the stream is damaged.
            OSError: as the disk says, or of gzip.
        """
        assert self.fileobj is not None
        left = _BEHIND
        try:
            while left > 0 and (padding := self.fileobj.read(1 << 20)):
                left -= len(padding)
        except OSError:
            raise
        except Exception as error:  # EOFError, zlib.error and what other decompressors raise
            raise tarfile.ReadError(f"{type(error).__name__}: {error}") from error
        if left <= 0:
            raise tarfile.ReadError("it goes on far behind its last file")
