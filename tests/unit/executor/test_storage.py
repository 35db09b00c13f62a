"""Tests of the distinction between a damaged file and a fault of the machine, the network, the storage or a token.

A damaged file is refused and not read again until it changes. A fault must fail the Spark task instead, so that the
next ingest reads the file.
"""

from __future__ import annotations

import errno
import os
import ssl
from collections.abc import Callable, Iterator
from gzip import BadGzipFile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pytest
import requests
from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.memory import MemoryFileSystem
from parquet_ranges import read_path

from pipelines.executor.ingest.records.jsonl import jsonl_records
from pipelines.executor.ingest.records.lines import RANGE, WHOLE, Layout
from pipelines.executor.ingest.records.pictures import urls
from pipelines.executor.ingest.records.pictures.root import PictureRoot, picture_records, read_picture_column
from pipelines.executor.ingest.records.record import Problem, Record
from pipelines.executor.ingest.records.webdataset import tar_records
from pipelines.executor.ingest.storage import StorageFault, describe_damage, open_binary


def read_lines(path: str) -> list[Record]:
    row = {"path": os.fsencode(path), "file": "x", "start": 0, "end": WHOLE, "layout": 0, "partition": "{}"}
    return list(jsonl_records(iter([pa.RecordBatch.from_pylist([row], RANGE)]), [Layout()], 10**6))


def read_tar(path: str) -> list[Record]:
    columns = {"path": [os.fsencode(path)], "file": ["x"]}
    return list(tar_records(iter([pa.RecordBatch.from_pydict(columns)]), ("jpg",), (), max_bytes=10**6))


def read_parquet(path: str) -> list[Record]:
    return read_path(path, size=9)


READERS = [read_lines, read_tar, read_parquet]
REFUSALS: list[Exception] = [
    FSTimeoutError(),  # any time-out in fsspec, with an empty text
    TimeoutError("Your socket connection to the server was not read from or written to"),  # s3fs
    PermissionError("The provided token has expired."),  # s3fs
    OSError(errno.EINVAL, "Bad Request"),  # s3fs: the answer to a request with an expired token has no text
    OSError("Forbidden: bucket/a\nInvalid Credentials"),  # gcsfs
    OSError("Failure"),  # paramiko
    PermissionError(errno.EACCES, "Permission denied"),  # paramiko
    EOFError(),  # paramiko and ftplib: the connection has ended
    RuntimeError("Unable to locate credentials"),  # the classes of botocore, google-auth and azure are no OSError
]
"""Errors of client libraries for a fault of the network, the storage or a token that a single file may cause too."""
OUTAGES: list[Exception] = [
    ssl.SSLError(2, "[SSL] record layer failure"),  # 2 is also the number of ENOENT
    requests.exceptions.ProxyError(),  # gcsfs
    requests.exceptions.ConnectionError("connection refused"),
    OSError(errno.EBUSY, "Please reduce your request rate"),  # s3fs
]
"""Errors of client libraries that no single file causes."""
FAULTS = REFUSALS + OUTAGES


class FaultyStore(MemoryFileSystem):  # type: ignore[misc]
    """Storage that raises an error when a file is opened or read."""

    protocol = ("faulty", "gs")
    error: ClassVar[Exception]
    fails_at: ClassVar[str]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.replace("faulty://", "/").replace("gs://", "/")))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if self.fails_at == "open":
            raise self.error
        opened = super()._open(path, mode, **options)
        opened.read = self._fail
        return opened

    def _fail(self, *_: int) -> bytes:
        raise self.error


@pytest.fixture(params=["open", "read"])
def fail(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Exception], None]]:
    """Yield a function that sets the error of a storage with the schemes faulty:// and gs://."""

    def set_error(error: Exception) -> None:
        monkeypatch.setattr(FaultyStore, "error", error, raising=False)

    MemoryFileSystem().pipe("/folder/x", b"content of a file")
    for scheme in FaultyStore.protocol:
        fsspec.register_implementation(scheme, FaultyStore, clobber=True)
    monkeypatch.setattr(FaultyStore, "fails_at", request.param, raising=False)
    urls._store.cache_clear()
    yield set_error
    urls._store.cache_clear()


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("error", FAULTS, ids=repr)
def test_a_fault_of_a_storage_fails_the_task_and_refuses_no_file(
    read: Callable[[str], list[Record]], error: Exception, fail: Callable[[Exception], None]
) -> None:
    fail(error)
    with pytest.raises(StorageFault, match=f"faulty://folder/x cannot be read: {type(error).__name__}"):
        read("faulty://folder/x")


@pytest.mark.parametrize("error", FAULTS, ids=repr)
def test_a_fault_of_an_object_store_fails_the_ingest_of_rows_with_pictures_and_refuses_no_row(
    error: Exception, fail: Callable[[Exception], None]
) -> None:
    fail(error)
    with pytest.raises(StorageFault, match=f"gs://folder/x cannot be read: {type(error).__name__}"):
        PictureRoot("gs://folder", 100).read("x")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FileNotFoundError("folder/x"), "missing_field"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "folder/x"), "missing_field"),  # adlfs
        (OSError(errno.ENAMETOOLONG, "Your key is too long"), "unreadable_file"),  # s3fs
        (IsADirectoryError("folder/x"), "unreadable_file"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), "unreadable_file"),
    ],
    ids=repr,
)
def test_an_error_of_one_picture_in_an_object_store_refuses_one_row(
    error: Exception, reason: str, fail: Callable[[Exception], None]
) -> None:
    fail(error)
    found = PictureRoot("gs://folder", 100).read("x")
    assert isinstance(found, Problem)
    assert found.reason == reason


class ForbiddingStore(MemoryFileSystem):  # type: ignore[misc]
    """Storage that refuses some pictures with the error of an expired token. `expires_after` is a number of reads."""

    protocol = ("s3",)
    expires_after: ClassVar[int]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.replace("s3://", "/")))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        type(self).expires_after -= 1
        if "forbidden" in path or self.expires_after < 0:
            raise PermissionError("Access Denied")
        return super()._open(path, mode, **options)


def read_rows(
    names: list[str], monkeypatch: pytest.MonkeyPatch, *, expires_after: int = 10_000, is_replay: bool = False
) -> list[str | None]:
    """Read pictures from a store that forbids some of them. For each row, return the reason of a refusal, or None."""
    monkeypatch.setattr(ForbiddingStore, "expires_after", expires_after, raising=False)
    fsspec.register_implementation("s3", ForbiddingStore, clobber=True)
    urls._store.cache_clear()
    MemoryFileSystem().pipe({f"/folder/{name}": b"x" for name in names})
    records = (Record("f", {"image": name}) for name in names)
    batches = iter([pa.RecordBatch.from_pydict({"path": [b"f"]})])
    found = list(picture_records(batches, lambda _: records, "s3://folder", "image", 100, is_replay=is_replay))
    assert [record.fields["image"] for record in found] == names
    assert all(("forbidden" in name) == bool(record.problem) for name, record in zip(names, found, strict=True))
    return [record.problem.reason if record.problem else None for record in found]


@pytest.mark.parametrize("names", [["a", "forbidden"], ["forbidden", "a"], ["a", *["forbidden"] * 40, "b"]])
def test_a_forbidden_picture_of_an_object_store_refuses_one_row_if_another_picture_can_be_read_later(
    names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(read_rows(names, monkeypatch)) == {"unreadable_file", None}


def test_a_replay_refuses_a_forbidden_picture_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_rows(["forbidden"], monkeypatch, is_replay=True) == ["unreadable_file"]


def test_a_forbidden_picture_is_refused_if_a_picture_of_another_folder_can_be_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ForbiddingStore, "expires_after", 10_000, raising=False)
    fsspec.register_implementation("s3", ForbiddingStore, clobber=True)
    urls._store.cache_clear()
    MemoryFileSystem().pipe({"/top/1/a": b"x", "/top/2/forbidden": b"x"})
    batches = [pa.RecordBatch.from_pydict({"path": [f"s3://top/{n}/rows.csv".encode()]}) for n in (1, 2)]
    names = iter(["a", "forbidden"])

    def read(parts: Iterator[pa.RecordBatch]) -> Iterator[Record]:
        return (Record("f", {"image": next(names)}) for _ in parts)

    found = list(picture_records(iter(batches), read, ".", "image", 100, base="s3://top"))
    assert [record.problem.reason if record.problem else None for record in found] == [None, "unreadable_file"]


@pytest.mark.parametrize("expires_after", [0, 1, 3])
def test_an_expired_token_of_an_object_store_fails_the_task(
    expires_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageFault, match="Access Denied"):
        read_rows(["a", "b", "c", "d"], monkeypatch, expires_after=expires_after)
    with pytest.raises(StorageFault, match="Access Denied"):
        read_rows([f"{n}" for n in range(200)], monkeypatch, expires_after=expires_after)


def captioned(name: str) -> str:
    """Return the problem of a row of a captioning job whose picture cannot be read."""
    batch = pa.RecordBatch.from_pydict({"image": [name]})
    [read] = read_picture_column(iter([batch]), PictureRoot("gs://folder", 100))
    [problem] = read["problem"].to_pylist()
    return str(problem)


@pytest.mark.parametrize("error", REFUSALS, ids=repr)
def test_a_captioning_job_continues_after_a_fault_that_a_single_picture_may_cause_and_stores_it_as_unreadable(
    error: Exception, fail: Callable[[Exception], None]
) -> None:
    fail(error)
    assert captioned("x").startswith(f"unreadable_file: gs://folder/x cannot be read: {type(error).__name__}")


@pytest.mark.parametrize("error", OUTAGES, ids=repr)
def test_a_captioning_job_fails_if_no_picture_of_an_object_store_can_be_read(
    error: Exception, fail: Callable[[Exception], None]
) -> None:
    fail(error)
    with pytest.raises(StorageFault):
        captioned("x")


@pytest.mark.parametrize("read", READERS)
def test_a_missing_or_damaged_file_at_a_url_becomes_one_refused_row(read: Callable[[str], list[Record]]) -> None:
    MemoryFileSystem().pipe("/folder/x", b"\x1f\x8b\x08 not compressed")
    for path in ("memory://folder/none", "memory://folder/x"):
        [record] = read(path)
        assert record.problem is not None
        assert record.problem.reason == "unreadable_file"


@pytest.mark.parametrize(
    ("error", "is_damage"),
    [
        (OSError("Couldn't deserialize thrift: TProtocolException"), True),  # Arrow
        (OSError("Invalid data stream"), True),  # bz2
        (BadGzipFile("CRC check failed"), True),
        (OSError(errno.EINVAL, "Invalid argument"), True),  # a seek in a damaged local file
        (PermissionError(errno.EACCES, "Permission denied", "/a"), False),
        (PermissionError(errno.EPERM, "Operation not permitted", "/a"), False),
        (FileNotFoundError("bucket/a"), True),
        (OSError(errno.EIO, "Input/output error"), False),
        *((error, False) for error in (FSTimeoutError(), ConnectionError("reset"), ssl.SSLError(1, "record layer"))),
        (requests.exceptions.ConnectionError("refused"), False),
        (StorageFault("s3://bucket/a cannot be read"), False),
    ],
    ids=repr,
)
def test_an_error_without_a_code_is_damage_only_if_a_parser_raises_it(error: Exception, is_damage: bool) -> None:
    assert (describe_damage(error) is not None) == is_damage


@pytest.mark.parametrize("kind", [str, Path])
def test_a_missing_file_is_damage_only_if_its_folder_has_another_entry(tmp_path: Path, kind: type) -> None:
    with pytest.raises(FileNotFoundError) as error:
        os.open(kind(tmp_path / "a.png"), os.O_RDONLY)
    assert describe_damage(error.value) is None, "the drive of the folder is probably not mounted"
    (tmp_path / "b.png").touch()
    assert describe_damage(error.value) == "No such file or directory"


@pytest.mark.parametrize("read", READERS)
def test_a_file_in_a_missing_or_empty_folder_fails_the_task_because_the_drive_is_probably_not_mounted(
    read: Callable[[str], list[Record]], tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError):
        read(str(tmp_path / "drive" / "x"))
    (tmp_path / "drive").mkdir()
    with pytest.raises(FileNotFoundError):
        read(str(tmp_path / "drive" / "x"))
    (tmp_path / "drive" / "other").touch()
    [record] = read(str(tmp_path / "drive" / "x"))
    assert record.problem is not None
    assert "No such file" in record.problem.detail


@pytest.fixture
def server() -> Iterator[str]:
    """Run a web server whose answer has the status that the path names, such as /404."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(int(self.path.strip("/")))
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_only_the_status_of_a_missing_file_makes_a_file_on_a_web_server_count_as_missing(server: str) -> None:
    pytest.importorskip("aiohttp")
    for status in ("404", "410"):
        [record] = read_lines(f"{server}/{status}")
        assert record.problem is not None
    for status in ("403", "500", "503"):  # fsspec raises FileNotFoundError for each status
        with pytest.raises(StorageFault, match=f"{server}/{status} cannot be read"):
            read_lines(f"{server}/{status}")
    with pytest.raises(StorageFault):
        read_lines("http://127.0.0.1:9/a.jsonl")


def test_a_file_at_a_url_is_read_like_a_local_file(tmp_path: Path) -> None:
    content = bytes(range(256))
    (tmp_path / "x").write_bytes(content)
    with open_binary((tmp_path / "x").as_uri()) as file:
        assert (file.read(3), file.tell()) == (content[:3], 3)
        assert (file.seek(-6, os.SEEK_END), file.read()) == (250, content[250:])
        buffer = bytearray(10)
        assert (file.seek(4), file.readinto(buffer), bytes(buffer)) == (4, 10, content[4:14])  # type: ignore[attr-defined]
        with pytest.raises(OSError, match="Invalid argument") as error:
            file.seek(-1)
        assert describe_damage(error.value) == "Invalid argument"
