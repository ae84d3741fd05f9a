"""Files and places that all readers share: large tables, byte order marks, and where pictures are looked for."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest
from support import one_line_error

from qwenvl.evaluation.items import DataError, Places
from qwenvl.evaluation.readers.files import rows


def test_a_large_table_is_not_in_memory_at_once(tmp_path: Path) -> None:
    """Protects who runs MMBench, whose 200 MB of pictures in base64 once took 1.4 GB: rows are read in turn."""
    path = tmp_path / "large.tsv"
    path.write_text("index\timage\n" + "".join(f"{k}\t{'A' * 10_000}\u72d7\n" for k in range(1000)), encoding="utf-8")
    tracemalloc.start()
    try:
        count = sum(1 for _ in rows(path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 1000
    assert peak < path.stat().st_size / 4


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_tables_as_spreadsheets_write_them(tmp_path: Path, mark: str, end: str) -> None:
    """A byte order mark and Windows line ends are no part of the fields; quoted fields may have tabs and lines."""
    path = tmp_path / "table.tsv"
    fields = 'index\tquestion\n1\t"two\tor ""three""?"\n\n2\t"a\nb"\n'
    path.write_bytes((mark + fields.replace("\n", end)).encode())
    assert [row for _, row in rows(path)] == [
        {"index": "1", "question": 'two\tor "three"?'},
        {"index": "2", "question": f"a{end}b"},
    ]


def test_tables_that_cannot_be_read(tmp_path: Path) -> None:
    """A file that is gone, and one in another encoding, are one line, also where that is seen after some rows."""
    with one_line_error(DataError, "cannot read", "none.tsv"):
        list(rows(tmp_path / "none.tsv"))
    path = tmp_path / "table.tsv"
    path.write_bytes(b"index\n" + b"1\n" * 100_000 + "\u00e9\n".encode("latin-1"))
    with one_line_error(DataError, "not a table in UTF-8"):
        list(rows(path))


def test_pictures_are_looked_for_in_order(tmp_path: Path) -> None:
    """The first place that has a picture wins; of one that is nowhere, the first place is told; names may be odd."""
    root = tmp_path / "all data [1] (\u72d7)"
    places = Places(root, "refcoco+")
    for name in ("a.jpg", "in/a.jpg", "refcoco+/a.jpg", "refcoco+/in/a.jpg"):  # each is before those that are there
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert places.picture("a.jpg", ("in",)) == path
    assert places.picture("b.jpg", ("in",)) == root / "refcoco+/in/b.jpg"
    assert places.picture("data/b.jpg") == root / "b.jpg"
    above = tmp_path / "data" / "b.jpg"
    above.parent.mkdir()
    above.touch()
    assert places.picture("data/b.jpg") == above
    assert places.picture(os.fspath(above), ("in",)) == above
