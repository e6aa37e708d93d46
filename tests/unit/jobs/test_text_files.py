"""Lines of text files: read as `open()` reads them, or refused by name when they are submitted."""

from __future__ import annotations

import bz2
import gzip
import itertools
import lzma
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import fakeredis
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from resilience.store import Store
from rlm_tasks.errors import FileOutsideRoot, InvalidRequest, ItemsUnreadable
from rlm_tasks.jobs import text_files
from rlm_tasks.jobs.file_roots import ANYWHERE, FilesRoot
from rlm_tasks.jobs.items import Files, Lines, source_of
from rlm_tasks.jobs.stored_items import ItemReader, ItemWriter, StoredItems, Unreadable
from rlm_tasks.jobs.text_files import TextFile
from rlm_tasks.operations import code_metrics

ENCODINGS = (
    *("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"),
    *("latin-1", "cp1252", "koi8-r", "shift_jis", "euc_jp", "gb18030", "big5", "cp949"),
)
LETTERS = "ab \t\x00\x0b\x0c\x1c\x85\u2028éß日本語Ċഊ\u0d00਀\U0001f600"
ENDS = ("", "\n", "\r", "\r\n", "\n\n", "\r\r\n")


def stored(
    items: Any, root: FilesRoot = ANYWHERE, most: int = 1 << 24
) -> tuple[ItemReader, Any, int]:
    """Return the reader of a worker, the record of the stored items, and their number."""
    store = Store("redis://fake", client=fakeredis.FakeRedis())
    writer = ItemWriter(store, "index", "blocks", max_item_bytes=most, root=root)
    source, n = source_of(items).write(writer)
    return ItemReader(store, root), source, n


def read(reader: ItemReader, source: StoredItems, n: int, step: int = 1024) -> list[Any]:
    """Return all items, as nodes read them."""
    found: list[Any] = []
    while len(found) < n:
        hi = min(n, len(found) + step)
        found += reader.read(source, "index", "blocks", len(found), hi)
    return found


@st.composite
def texts(draw: st.DrawFn) -> tuple[str, bytes]:
    """Return an encoding and the bytes of a text file."""
    encoding = draw(st.sampled_from(ENCODINGS))
    letters = [each for each in LETTERS if each.encode(encoding, "ignore")]
    line = st.text(st.sampled_from(letters), max_size=6)
    parts = draw(st.lists(st.tuples(line, st.sampled_from(ENDS)), max_size=40))
    return encoding, "".join(itertools.chain(*parts)).encode(encoding)


@given(texts(), st.sampled_from([4, 8, 1 << 20]), st.integers(1, 50))
def test_lines_are_those_of_open(
    tmp_path_factory: pytest.TempPathFactory, file: tuple[str, bytes], piece: int, step: int
) -> None:
    encoding, data = file
    (path := tmp_path_factory.getbasetemp() / "lines-of-open").write_bytes(data)
    kept, text_files.PIECE_BYTES = text_files.PIECE_BYTES, piece
    nul, text_files.NUL_SHARE = text_files.NUL_SHARE, 1.0
    try:
        with path.open(encoding=encoding) as lines:
            wanted = [line.removesuffix("\n") for line in lines]
        assert read(*stored(Lines(path, encoding)), step=step) == wanted
        assert list(Lines(path, encoding)) == wanted
        sample = Lines(path, encoding).sample(Random(0))
        assert (sample.total, [line for _, line in sample.items]) == (len(wanted), wanted)
    finally:
        text_files.PIECE_BYTES, text_files.NUL_SHARE = kept, nul


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    (path := tmp_path / "marked.csv").write_text("id,näme\n1,a\n", encoding="utf-8-sig")

    assert read(*stored(Lines(path))) == ["id,näme", "1,a"]


def test_lines_that_are_no_text_fail_alone(tmp_path: Path) -> None:
    (path := tmp_path / "mixed").write_bytes(b"a\n\xff\xfe\nb\n" + b"c\n" * 3000 + b"caf\xe9")

    reader, source, n = stored(Lines(path))

    found: dict[int, Any] = {}
    at = 0
    while at < n:
        try:
            items = reader.read(source, "index", "blocks", at, n)
            found |= dict(enumerate(items, at))
            at += len(items)
        except Unreadable as unreadable:
            found[at] = type(unreadable.error)
            at = unreadable.until
    assert [(i, each) for i, each in found.items() if not isinstance(each, str)] == [
        (1, UnicodeDecodeError),
        (3003, UnicodeDecodeError),
    ]
    assert len(found) == 3004


# --- files that are refused --------------------------------------------------------------------


def zipped(text: bytes) -> bytes:
    """Return a zip archive of one file."""
    import io

    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        archive.writestr("a.txt", text)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (gzip.compress(b"a\n" * 99), "format is gzip.*gzip.open"),
        (bz2.compress(b"a\n" * 99), "format is bzip2.*bz2.open"),
        (lzma.compress(b"a\n" * 99), "format is xz.*lzma.open"),
        (zstandard.compress(b"a\n" * 99), "format is zstd.*zstandard.open"),
        (zipped(b"a\n" * 99), "format is zip.*unzip"),
        (b"\x7fELF\x02\x01" + bytes(99), "format is ELF"),
        (b"%PDF-1.7\n", "format is PDF"),
        (b"x" * 257 + b"ustar\x00", "format is tar"),
        ("a\nb\n".encode("utf-16"), "utf-16 text, not as utf-8; pass encoding='utf-16'"),
        ("a\nb\n".encode("utf-32"), "utf-32 text, not as utf-8; pass encoding='utf-32'"),
        ("a\nb\n".encode("utf-16-le"), "many NUL bytes"),
        (bytes(5000), "many NUL bytes"),
    ],
    ids=lambda value: "data" if isinstance(value, bytes) else value,  # archives have a time
)
def test_other_formats_are_refused_with_the_way_out(
    tmp_path: Path, data: bytes, words: str
) -> None:
    (path := tmp_path / "data").write_bytes(data)

    for ask in (stored, lambda items: items.sample(Random(0)), list):
        with pytest.raises(InvalidRequest, match=words) as refused:
            ask(Lines(path))
        assert refused.value.field == "items"


@pytest.mark.parametrize(
    ("encoding", "words"),
    [
        ("utf9", "unknown; did you mean .*'utf8'"),
        ("nope", "unknown"),
        (None, "unknown"),
        ("rot13", "no encoding of text"),
        ("base64", "no encoding of text"),
        ("utf-7", "cannot be read one by one"),
        ("iso2022_jp", "cannot be read one by one"),
        ("unicode_escape", "cannot be read one by one"),
        ("cp037", "cannot be read one by one"),
    ],
)
def test_encodings_that_cannot_be_read_are_refused_by_name(
    tmp_path: Path, encoding: Any, words: str
) -> None:
    (path := tmp_path / "lines").write_text("a\nb\n")

    with pytest.raises(InvalidRequest, match=words) as refused:
        stored(Lines(path, encoding))

    assert (refused.value.field, refused.value.value) == ("encoding", encoding)


def make_pipe(path: Path) -> Path:
    """Make a pipe that nobody writes to."""
    os.mkfifo(path)
    return path


def make_locked(path: Path) -> Path:
    """Make a loop of links, which not even root can read."""
    path.symlink_to(path)
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path, "No such file"),
        (lambda path: path.parent, "is a folder"),
        (make_pipe, "is a pipe"),
        (make_locked, "cannot be read"),
        (lambda _: Path("/dev/zero"), "is a device"),
        (lambda path: str(path) + "\x00", "cannot be read"),
        (lambda path: os.fsdecode(bytes(path) + b"\xff"), "not UTF-8"),
        (lambda _: "~no-such-user/file", "cannot be read"),
        (lambda _: 7, "is no path"),
    ],
)
def test_paths_that_are_no_text_file_are_refused_at_once(
    tmp_path: Path, make: Callable[[Path], Any], words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words) as refused:
        stored(Lines(make(tmp_path / "missing")))

    str(refused.value).encode()


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path) -> None:
    (path := tmp_path / "log").write_bytes(b"a\n" * text_files.PIECE_BYTES)

    def read_while_it_grows() -> None:
        with TextFile.opened(path, "utf-8", ANYWHERE) as text, path.open("ab") as writer:
            for _ in text.lengths():
                writer.write(b"more\n")
                writer.flush()

    with pytest.raises(InvalidRequest, match="changes while it is read"):
        read_while_it_grows()


def test_wide_text_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    (path := tmp_path / "cut").write_bytes("a\n".encode("utf-16") + b"x")

    with pytest.raises(InvalidRequest, match="is cut off"):
        stored(Lines(path, "utf-16"))


def test_a_line_over_the_limit_is_named(tmp_path: Path) -> None:
    (path := tmp_path / "long").write_bytes(b"a\n" * 1500 + b"x" * 5000 + b"\na\n")

    with pytest.raises(InvalidRequest, match=r"line 1501 has 5001 bytes.*RLM_MAX_ITEM_BYTES=4000"):
        stored(Lines(path), most=4000)


# --- paths -------------------------------------------------------------------------------------


def test_relative_paths_and_the_home_folder_are_resolved_at_submit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("one\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    for items in (Lines("a.txt"), Lines("~/a.txt"), Lines(Path("a.txt"))):
        _, source, _ = stored(items)
        assert source.path == str(tmp_path / "a.txt")
    for pattern in ("*.txt", "~/*.txt", Path() / "*.txt", "./**/a.*"):
        assert list(Files(pattern)) == [str(tmp_path / "a.txt")]


def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    for ask in (stored, lambda items: items.sample(Random(0))):
        with pytest.raises(InvalidRequest, match="matches no file"):
            ask(Files(tmp_path / "nope" / "*.csv"))
    with pytest.raises(InvalidRequest, match="cannot be read"):
        stored(Files("~no-such-user/*"))


def test_only_files_below_the_root_are_read(tmp_path: Path) -> None:
    (root := tmp_path / "data").mkdir()
    (inside := root / "a.txt").write_text("one\n")
    (outside := tmp_path / "secret.txt").write_text("secret line\n")
    (root / "link.txt").symlink_to(outside)
    below = FilesRoot(str(root))

    assert read(*stored(Lines(inside), below)) == ["one"]
    for items in (
        Lines(outside),
        Lines(root / "link.txt"),
        Lines(root / ".." / "secret.txt"),
        Files(f"{tmp_path}/*.txt"),
        Files(f"{root}/*.txt"),
    ):
        for ask in (
            lambda items: stored(items, below),
            lambda items: items.sample(Random(0), below),
        ):
            with pytest.raises(FileOutsideRoot, match=f"RLM_FILES_ROOT={root}") as refused:
                ask(items)
            assert "secret line" not in str(refused.value)


@pytest.mark.parametrize("reads", ["submit", "worker", "code_metrics"])
def test_a_link_that_takes_the_place_of_a_checked_file_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: str
) -> None:
    (folder := tmp_path / "data" / "sub").mkdir(parents=True)
    (secrets := tmp_path / "secrets").mkdir()
    for each in (folder, secrets):
        (each / "a.py").write_text("x = 123456\n")
        os.utime(each / "a.py", (1, 1))
    below = FilesRoot(str(tmp_path / "data"))
    reader, source, _ = stored(Lines(folder / "a.py"), below)
    checked = FilesRoot.checked

    def swaps(root: FilesRoot, path: str | Path) -> Path:
        resolved = checked(root, path)
        if not folder.is_symlink():
            folder.rename(tmp_path / "data" / "before")
            folder.symlink_to(secrets)
        return resolved

    monkeypatch.setattr(FilesRoot, "checked", swaps)
    monkeypatch.setattr(code_metrics, "_root", [below])
    read_in = {
        "submit": lambda: stored(Lines(folder / "a.py"), below),
        "worker": lambda: reader.read(source, "index", "blocks", 0, 1),
        "code_metrics": lambda: code_metrics.measure_file(str(folder / "a.py")),
    }
    with pytest.raises((FileOutsideRoot, Unreadable), match="RLM_FILES_ROOT"):
        read_in[reads]()


def test_a_worker_reads_no_file_outside_of_its_root(tmp_path: Path) -> None:
    (path := tmp_path / "secret.txt").write_text("secret line\n")
    reader, source, _ = stored(Lines(path))
    reader.root = FilesRoot(str(tmp_path / "data"))

    with pytest.raises(Unreadable, match="RLM_FILES_ROOT") as unreadable:
        reader.read(source, "index", "blocks", 0, 1)

    assert isinstance(unreadable.value.error, FileOutsideRoot)
    assert "secret line" not in str(unreadable.value.error)


# --- lines that are read again -----------------------------------------------------------------


def test_lines_are_read_again_by_their_numbers(tmp_path: Path) -> None:
    (path := tmp_path / "mended").write_bytes(b"a\r\nb\rc\n\nlast\xff")

    def lines_at(*indexes: int) -> list[str]:
        with TextFile.opened(path, "utf-8", ANYWHERE) as text:
            return text.lines_at(indexes)

    assert lines_at(0, 2, 3) == ["a", "c", ""]
    with pytest.raises(ItemsUnreadable, match="line 5, is no utf-8 text"):
        lines_at(0, 4)
    with pytest.raises(ItemsUnreadable, match="has 5 lines now, and line 9 failed"):
        lines_at(0, 8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.write_text("x\n" * 20), "has changed since the job was submitted"),
        (lambda path: path.unlink(), "cannot be read: No such file"),
    ],
)
def test_a_changed_or_missing_file_fails_all_items_with_one_error(
    tmp_path: Path, change: Callable[[Path], Any], words: str
) -> None:
    (path := tmp_path / "lines").write_text("a\n" * 5000)
    reader, source, n = stored(Lines(path))
    change(path)

    with pytest.raises(Unreadable) as unreadable:
        reader.read(source, "index", "blocks", 7, n)

    assert unreadable.value.until > n
    assert isinstance(unreadable.value.error, ItemsUnreadable)
    assert f"{path} {words}" in str(unreadable.value.error)
    assert "retry_failed(reread=True)" in str(unreadable.value.error)
