"""Text files whose lines are items: the readable ones, their encodings, and where lines begin.

`Lines` checks and indexes a file here when a job is submitted; workers read blocks of its lines.
A file is read as `open()` reads it: a line ends with LF, CR or CR LF.  A file that cannot be read
so is refused with the reason.  Begin with `TextFile.opened`.
"""

from __future__ import annotations

import codecs
import difflib
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from encodings import aliases
from pathlib import Path
from typing import BinaryIO

from rlm_tasks.errors import InvalidRequest, ItemsUnreadable
from rlm_tasks.jobs.file_roots import FilesRoot

HEAD_BYTES = 65_536
"""Bytes at the start of a file by which its kind is known."""
PIECE_BYTES = 1 << 20
"""Bytes that are read at once when a file is indexed; a multiple of each encoding's width."""
NUL_SHARE = 0.1
"""A file with a larger share of NUL bytes is not text in an encoding of bytes."""

_COMPRESSED = 'decompress it first ({}), or pass (line.rstrip("\\n") for line in {}) as items'
_MAGIC = {
    b"\x1f\x8b": ("gzip", _COMPRESSED.format("gunzip -k", 'gzip.open(path, "rt")')),
    **dict.fromkeys(
        (b"BZh%d1AY&SY" % level for level in range(1, 10)),
        ("bzip2", _COMPRESSED.format("bunzip2 -k", 'bz2.open(path, "rt")')),
    ),
    b"\xfd7zXZ\x00": ("xz", _COMPRESSED.format("unxz -k", 'lzma.open(path, "rt")')),
    b"\x28\xb5\x2f\xfd": ("zstd", _COMPRESSED.format("unzstd", 'zstandard.open(path, "rt")')),
    b"\x04\x22\x4d\x18": ("lz4", "decompress it first (unlz4)"),
    b"\x1f\x9d": ("compress (.Z)", "decompress it first (uncompress -k)"),
    b"PK\x03\x04": ("zip", "unpack it first (unzip); of an .xlsx file export a CSV file"),
    b"PK\x05\x06": ("zip", "it is empty; pass a text file"),
    b"7z\xbc\xaf\x27\x1c": ("7z", "unpack it first (7z x)"),
    b"Rar!\x1a\x07": ("rar", "unpack it first (unrar x)"),
    b"PAR1\x15": ("Parquet", "pass pandas.read_parquet(path).to_dict('records') as items"),
    b"ARROW1\x00\x00": ("Arrow", "pass pandas.read_feather(path).to_dict('records') as items"),
    b"SQLite format 3\x00": ("SQLite", "pass the rows of a query as items"),
    b"%PDF-": ("PDF", "pass its path as an item, and extract its text in the operation"),
    b"\x89PNG": ("PNG", "pass its path as an item"),
    b"\xff\xd8\xff": ("JPEG", "pass its path as an item"),
    b"\x7fELF": ("ELF", "it is a program; pass a text file"),
    b"\x89HDF": ("HDF5", "pass its rows as items"),
    b"Obj\x01": ("Avro", "pass its records as items"),
    b"\x93NUMPY": ("NumPy", "pass numpy.load(path).tolist() as items"),
    b"\xd0\xcf\x11\xe0": ("an old Microsoft Office file", "export it as text"),
    b"\x80\x04\x95": ("pickle", "pass its contents as items"),
    b"\x80\x05\x95": ("pickle", "pass its contents as items"),
}
"""The first bytes of files that are no text: the format, and how to read it all the same."""
_TAR = b"ustar"  # at byte 257
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_WIDE = {"utf-16-le": 2, "utf-16-be": 2, "utf-32-le": 4, "utf-32-be": 4}
_BY_BOM = {
    "utf-16": {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"},
    "utf-32": {codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be"},
    "utf-16-le": {codecs.BOM_UTF16_LE: "utf-16-le"},
    "utf-16-be": {codecs.BOM_UTF16_BE: "utf-16-be"},
    "utf-32-le": {codecs.BOM_UTF32_LE: "utf-32-le"},
    "utf-32-be": {codecs.BOM_UTF32_BE: "utf-32-be"},
    "utf-8": {codecs.BOM_UTF8: "utf-8"},
    "utf-8-sig": {codecs.BOM_UTF8: "utf-8"},
}
_WITHOUT_BOM = {"utf-16": "utf-16-le", "utf-32": "utf-32-le", "utf-8-sig": "utf-8"}
_ESCAPES = ("unicode_escape", "unicode-escape", "raw_unicode_escape", "raw-unicode-escape")
_STATEFUL = ("iso2022", "hz", "utf-7", "idna", "punycode", "undefined", *_ESCAPES)
"""Encodings in which a line cannot be decoded without those before it."""


# --- lines -------------------------------------------------------------------------------------


def line_lengths(data: bytes, encoding: str) -> list[int]:
    """Return the length in bytes of each line, its line end included."""
    width = _WIDE.get(encoding, 1)
    if width == 1:
        return [len(line) for line in data.splitlines(keepends=True)]
    return [width * len(line) for line in _narrow(data, encoding, width).splitlines(keepends=True)]


def decoded_lines(data: bytes, encoding: str) -> list[str]:
    """Return whole lines as texts without line ends.  Raises UnicodeDecodeError."""
    text = data.decode(encoding)
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return lines


def _narrow(data: bytes, encoding: str, width: int) -> bytes:
    r"""Return one byte for each unit of a wide encoding, which is "\n" or "\r" where the unit is.

    A unit whose other bytes are not all 0 is no line end: those bytes are added as 0xFF.
    """
    low = 0 if encoding.endswith("le") else width - 1
    planes = [data[at::width] for at in range(width)]
    count = len(planes[-1])
    narrow = int.from_bytes(planes[low][:count], "little")
    for at, plane in enumerate(planes):
        if at != low:
            narrow |= int.from_bytes(plane[:count].translate(_NOT_ZERO), "little")
    return narrow.to_bytes(count, "little")


_NOT_ZERO = b"\x00" + b"\xff" * 255


# --- files -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TextFile:
    """A text file that can be read, open for reading."""

    path: Path
    encoding: str  # the codec that decodes any of its lines
    begin: int  # bytes before the first line: a byte order mark
    size: int  # bytes
    modified_ns: int
    file: BinaryIO

    @classmethod
    @contextmanager
    def opened(
        cls, path: str | os.PathLike[str], encoding: str, root: FilesRoot
    ) -> Iterator[TextFile]:
        """Open a file that can be read as lines.  Raises InvalidRequest with the reason."""
        name, found = _codec_name(encoding), Path(storable_path(path))
        try:
            resolved = root.checked(found.expanduser())
            kind = resolved.stat().st_mode
            if not stat.S_ISREG(kind):
                raise _refused(found, f"is {_kind_of(kind)}; pass the path of a text file")
            file = root.open(resolved)
        except InvalidRequest:
            raise
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL in a name
            raise _refused(found, f"cannot be read: {_reason(error)}; {GIVE}") from None
        with file:
            yield cls._checked(resolved, name, file)

    @classmethod
    def _checked(cls, path: Path, name: str, file: BinaryIO) -> TextFile:
        """Return an open file when its start shows text in its encoding."""
        try:
            about, head = os.fstat(file.fileno()), file.read(HEAD_BYTES)
        except OSError as error:
            raise _refused(path, f"cannot be read: {_reason(error)}; {GIVE}") from None
        _refuse_other_formats(path, head)
        codec, begin = _codec_of(path, name, head)
        if (about.st_size - begin) % _WIDE.get(codec, 1):
            raise _refused(
                path, f"is cut off: {about.st_size} bytes are no {codec} text; copy it again"
            )
        file.seek(begin)
        return cls(path, codec, begin, about.st_size, about.st_mtime_ns, file)

    def lengths(self) -> Iterator[list[int]]:
        """Yield the lengths in bytes of all lines with their line ends, some at a time.

        Raises InvalidRequest when the file grows or changes meanwhile.
        """
        width = _WIDE.get(self.encoding, 1)
        begun = 0  # bytes of a line whose end is in a later piece
        at = self.begin
        while piece := self._read(PIECE_BYTES):
            while _ends_with(piece, "\r", self.encoding) and (more := self._read(width)):
                piece += more  # "\r\n" is one line end
            at += len(piece)
            if at > self.size:
                break
            lengths = line_lengths(piece, self.encoding)
            lengths[0] += begun
            ended = any(_ends_with(piece, end, self.encoding) for end in "\r\n")
            begun = 0 if ended else lengths.pop()
            yield lengths
        if begun:
            yield [begun]
        about = os.fstat(self.file.fileno())
        if at != self.size or (about.st_size, about.st_mtime_ns) != (self.size, self.modified_ns):
            raise _refused(
                self.path,
                "changes while it is read; submit when nothing writes to it, or pass a copy",
            )

    def lines_at(self, indexes: Sequence[int]) -> list[str]:
        """Return some lines by their numbers, which are in order and begin at 0.

        Raises ItemsUnreadable for a line that is no text, or that the file does not have.
        """
        places, at, number = [], self.begin, 0
        wanted = iter([*indexes, -1])
        index = next(wanted)
        for lengths in self.lengths():
            for length in lengths:
                if number == index:
                    places.append((at, length))
                    index = next(wanted)
                at, number = at + length, number + 1
        if index >= 0:
            raise ItemsUnreadable(
                str(self.path),
                f"has {number} lines now, and line {index + 1} failed",
                "submit the file as a new job",
            )
        lines = []
        for index, (place, length) in zip(indexes, places, strict=True):
            self.file.seek(place)
            try:
                lines += decoded_lines(self._read(length), self.encoding)
            except UnicodeDecodeError as error:
                raise ItemsUnreadable(
                    f"{self.path}, line {index + 1},",
                    f"is no {self.encoding} text ({error.reason})",
                    "mend it, then call retry_failed(reread=True) again",
                ) from None
        return lines

    def _read(self, size: int) -> bytes:
        try:
            return self.file.read(size)
        except OSError as error:
            raise _refused(self.path, f"cannot be read: {_reason(error)}; {GIVE}") from None


def _ends_with(data: bytes, end: str, encoding: str) -> bool:
    encoded = end.encode(encoding)
    return data.endswith(encoded) and not len(data) % len(encoded)


def _refused(path: Path, advice: str) -> InvalidRequest:
    return InvalidRequest("items", str(path), advice)


GIVE = "give the path of a file that this process may read"


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def storable_path(path: str | os.PathLike[str]) -> str:
    """Return a path as text that can be stored.  Raises InvalidRequest."""
    try:
        text = os.fsdecode(path)
    except TypeError:
        raise InvalidRequest("items", path, "is no path; pass a string or a pathlib.Path") from None
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest("items", text, "its name is not UTF-8; rename the file") from None
    return text


def _kind_of(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a folder"
    if stat.S_ISFIFO(mode):
        return "a pipe, which can be read only once"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


def _refuse_other_formats(path: Path, head: bytes) -> None:
    """Raise InvalidRequest for compressed and binary files."""
    for magic, (name, advice) in _MAGIC.items():
        if head.startswith(magic):
            raise _refused(path, f"is no text, its format is {name}; {advice}")
    if head[257:262] == _TAR:
        raise _refused(path, "is no text, its format is tar; unpack it first (tar xf)")


# --- encodings ---------------------------------------------------------------------------------


def _codec_name(encoding: str) -> str:
    """Return Python's name of an encoding.  Raises InvalidRequest for one that cannot be read."""
    try:
        codec = codecs.lookup(encoding)
    except (LookupError, TypeError, ValueError):
        known = sorted({*aliases.aliases, *aliases.aliases.values()})
        near = difflib.get_close_matches(str(encoding).lower().replace("-", "_"), known, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "for example 'utf-8'."
        raise InvalidRequest(
            "encoding", encoding, f"unknown; {hint} Use a name of Python's codecs"
        ) from None
    if not getattr(codec, "_is_text_encoding", True):
        raise InvalidRequest("encoding", encoding, "is no encoding of text; use one, as 'utf-8'")
    if codec.name not in _BY_BOM and not _cuts_at_bytes(codec.name):
        raise InvalidRequest(
            "encoding",
            encoding,
            "its lines cannot be read one by one; convert the file first (iconv -t UTF-8)",
        )
    return codec.name


def _cuts_at_bytes(codec: str) -> bool:
    """Whether the bytes 0A and 0D are line ends in an encoding, and nothing else is."""
    if codec.startswith(_STATEFUL):
        return False
    ends = [byte for byte in range(256) if bytes([byte]).decode(codec, "ignore") in ("\n", "\r")]
    return ends == [0x0A, 0x0D] and "\n\r".encode(codec) == b"\n\r"


def _codec_of(path: Path, name: str, head: bytes) -> tuple[str, int]:
    """Return the codec of any line, and the length of the file's byte order mark.

    Raises InvalidRequest when the file's start shows another encoding.
    """
    for bom, codec in _BY_BOM.get(name, {}).items():
        if head.startswith(bom):
            return codec, len(bom)
    codec = _WITHOUT_BOM.get(name, name)
    if codec in _WIDE:
        return codec, 0
    for bom, other in _BOMS:
        if head.startswith(bom):
            raise _refused(path, f"begins as {other} text, not as {name}; pass encoding={other!r}")
    if head.count(0) > NUL_SHARE * len(head):
        raise _refused(
            path, "has many NUL bytes: it is no text, or UTF-16; then pass encoding='utf-16'"
        )
    return codec, 0
