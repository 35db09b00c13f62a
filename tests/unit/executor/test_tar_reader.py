"""Tests of the tar reader: the reader finds the same members as tarfile, and handles damaged or huge headers."""

from __future__ import annotations

import io
import tarfile
import tracemalloc
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.executor.ingest.records.tar import HEADER_BYTES, Member, TarReader

NAMES = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=150).filter(
    lambda name: name.strip(".") != ""
)


def read(content: bytes) -> list[tuple[Member, bytes]]:
    reader = TarReader(io.BytesIO(content))
    return [(member, b"" if member.problem else reader.read(member)) for member in reader if member]


def pack(*headers: bytes) -> bytes:
    return b"".join(headers) + bytes(1_024)


def header(name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"", **attributes: object) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content)
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


@settings(max_examples=60)
@given(
    st.dictionaries(NAMES, st.binary(max_size=1_200), max_size=4),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_the_reader_finds_the_members_that_tarfile_has_written(members: dict[str, bytes], form: int) -> None:
    file = io.BytesIO()
    written = {}
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            try:
                tar.addfile(info, io.BytesIO(content))
            except ValueError:  # the old tar format has no space for a long name
                continue
            written[name] = content
    found = {member.name: content for member, content in read(file.getvalue())}
    assert found == written


def test_the_content_of_a_tar_member_is_skipped_if_it_is_not_read() -> None:
    reader = TarReader(io.BytesIO(pack(header("a", content=b"a" * 700), header("b", content=b"b"))))
    assert [member and member.name for member in reader] == ["a", "b", None]


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_a_huge_extended_tar_header_is_a_problem_of_its_member_and_is_not_kept_in_memory(kind: bytes) -> None:
    huge = header("x", kind, bytes(HEADER_BYTES + 1) * 40)
    content = pack(header("a", content=b"a"), huge, header("b", content=b"b"), header("c", content=b"c"))
    tracemalloc.start()
    found = {member.name: member.problem for member, _ in read(content)}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == {
        "a": None,
        "b": f"an extended header of {40 * (HEADER_BYTES + 1)} bytes; at most 1048576 are allowed",
        "c": None,
    }
    assert peak < 8 * 2**20


@pytest.mark.parametrize(
    "record", [b"9 a=b", b"0 a=b\n", b"-5 a=b\n", b"999999 path=x\n", b"x path=y\n", b"9 path x\n"]
)
def test_a_damaged_extended_tar_header_is_a_problem_of_its_member_only(record: bytes) -> None:
    [(member, _), (after, _)] = read(pack(header("x", tarfile.XHDTYPE, record), header("a"), header("b")))
    assert member.problem == "a damaged extended header"
    assert after == Member("b", 0)


@pytest.mark.parametrize("size", [2**63, 2**40, -1])
def test_a_tar_member_whose_header_states_an_impossible_size_is_reported_as_damaged(size: int) -> None:
    reader = TarReader(io.BytesIO(pack(header("a", content=b"a"), header("b", size=size))))
    assert next(iter(reader)) == Member("a", 1)
    with pytest.raises(tarfile.ReadError, match=r"inside a member|bytes"):
        list(reader)


def test_the_size_in_an_extended_tar_header_takes_precedence_over_the_size_in_the_plain_header() -> None:
    large = header("x", tarfile.XHDTYPE, b"12 size=700\n")
    [(first, content), (second, _)] = read(pack(large, header("a") + b"a" * 700 + bytes(324), header("b")))
    assert (first, content, second.name) == (Member("a", 700), b"a" * 700, "b")


def test_thousands_of_extended_headers_are_read_without_recursion() -> None:
    names = header("x", tarfile.GNUTYPE_LONGNAME, b"n.jpg\0") * 5_000
    assert read(pack(names, header("a", content=b"a"))) == [(Member("n.jpg", 1), b"a")]


def test_a_sparse_member_is_reported_as_a_problem_and_the_next_member_is_read() -> None:
    sparse = bytearray(header("s", tarfile.GNUTYPE_SPARSE, bytes(512)))
    old = header("x", tarfile.XHDTYPE, b"22 GNU.sparse.major=1\n") + header("t", content=bytes(512))
    found = {member.name: member.problem for member, _ in read(pack(bytes(sparse), old, header("a", content=b"a")))}
    assert found == {"s": "a sparse file, not a plain file", "t": "a sparse file, not a plain file", "a": None}


@settings(max_examples=150)
@given(st.binary(max_size=40), st.integers(0, 4_000))
def test_reading_damaged_tar_bytes_raises_no_error_other_than_a_tar_error(noise: bytes, at: int) -> None:
    content = bytearray(
        pack(header("a.jpg", content=b"a" * 600), header("x", tarfile.XHDTYPE, b"9 a=b\n"), header("b.jpg"))
    )
    content[at : at + len(noise)] = noise
    with suppress(tarfile.TarError):
        read(bytes(content))
