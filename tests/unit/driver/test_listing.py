"""Tests of the listing of a source: each entry is read or passed over with a reason; names are no patterns."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from without_permission import without_permission

from pipelines.config import DataConfig
from pipelines.driver.ingest.ledger import items_table
from pipelines.driver.ingest.sources.files import (
    NO_ACCESS,
    Listing,
    SourceFile,
    count_tasks,
    list_files,
    list_plain_files,
    open_files,
    range_bytes,
)
from pipelines.driver.ingest.sources.lines import read_layouts
from pipelines.driver.ingest.sources.parquet import _require_columns
from pipelines.driver.ingest.sources.source import SourceRows
from pipelines.driver.ingest.sources.walk import PASSED_OVER, expand_braces
from pipelines.driver.ingest.totals import describe_passed_over
from pipelines.errors import UserError
from pipelines.executor.ingest.records.record import Problem
from pipelines.executor.ingest.splits import split_of_file
from pipelines.executor.texts.records import FILES, text_records

SUFFIXES = (".csv", ".csv.gz")


def listing(path: Path | str, suffixes: tuple[str, ...] = SUFFIXES, **data: Any) -> Listing:
    """List the files of a source."""
    source = {"kind": "csv", "path": str(path)} | data.pop("source", {})
    return list_files(DataConfig.model_validate({"source": source} | data), suffixes)


def reasons(found: Listing) -> dict[str, str]:
    return {entry.relative: entry.reason for entry in found.passed_over}


def write(folder: Path, files: Mapping[str, str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def test_every_entry_of_the_input_folder_is_either_read_or_reported_as_passed_over_with_a_reason(
    tmp_path: Path,
) -> None:
    names = ["a.csv", "_shop.csv", "B.CSV", "sub/deep/c.csv.gz", "_sub/d.csv", "year=2024/e.csv", "shop[1].csv"]
    others = {
        "empty.csv": ("", "empty"),
        ".hidden.csv": ("x", "hidden"),
        ".git/x.csv": ("x", "hidden"),
        "_delta_log/0.csv": ("x", "hidden"),
        "_SUCCESS": ("x", "marker"),
        "_committed_7": ("x", "marker"),
        "a.csv.crc": ("x", "marker"),
        "note.txt": ("x", "other_kind"),
        "c.csv.zip": ("x", "other_kind"),
    }
    write(tmp_path, dict.fromkeys(names, "x") | {name: content for name, (content, _) in others.items()})
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "nowhere.csv").symlink_to(tmp_path / "gone.csv")
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    found = listing(tmp_path)
    assert sorted(file.path for file in found.files) == sorted(str(tmp_path / name) for name in names)
    expected = {name: reason for name, (_, reason) in others.items() if "/" not in name}
    expected |= {".git/": "hidden", "_delta_log/": "hidden"}
    assert reasons(found) == expected | dict.fromkeys(("pipe.csv", "nowhere.csv", "sub/up/"), "not_regular")
    assert set(reasons(found).values()) <= PASSED_OVER.keys()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_folders_without_read_permission_are_passed_over_and_files_without_it_are_listed_as_unreadable(
    tmp_path: Path,
) -> None:
    write(tmp_path, {"a.csv": "x", "closed/b.csv": "x"})
    (tmp_path / "closed").chmod(0)
    (tmp_path / "a.csv").chmod(0)
    found = listing(tmp_path)
    (tmp_path / "closed").chmod(0o700)
    assert reasons(found) == {"closed/": "no_access"}
    assert [file.state for file in found.files] == [NO_ACCESS]


def test_a_file_that_the_driver_may_not_read_is_refused_and_stored_as_not_accessible(tmp_path: Path) -> None:
    write(tmp_path, {"a.csv": "x", "b.csv": "x"})
    first, second = listing(tmp_path).files
    second = second._replace(accessible=False)
    layouts = read_layouts([first, second], lambda _, layout: layout)
    assert [layout.problem for layout in layouts] == [None, "Permission denied"]

    def load(files: list[SourceFile]) -> SourceRows:
        rows: Any = [{"path": os.fsencode(file.path), "file": file.name} for file in files]
        return SourceRows(rows, partial(text_records, rows="line", max_chars=100))

    source = open_files("x", Listing([first, second], []), items_table([]), load)
    assert isinstance(source.pending, pa.Table)
    assert source.pending["state"].to_pylist() == [first.state, NO_ACCESS]
    assert source.rows is not None
    batch = pa.RecordBatch.from_pylist(source.rows.frame, FILES)
    problems = {record.file: record.problem for record in source.rows.read(iter([batch]))}
    assert problems == {"a.csv": None, "b.csv": Problem("unreadable_file", "Permission denied")}


def test_the_columns_of_a_parquet_source_are_looked_up_in_files_that_the_driver_may_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": ["x"], "caption": ["y"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": ["x"], "text": ["y"]}), tmp_path / "b.parquet")
    config = DataConfig.model_validate(
        {"source": {"kind": "parquet", "path": str(tmp_path), "columns": {"image": "image", "text": "text"}}}
    )
    first, second = list_files(config, (".parquet",)).files
    with without_permission(tmp_path / "a.parquet"), pytest.raises(PermissionError):
        _require_columns(config, [first])
    with without_permission(tmp_path / "a.parquet"):
        _require_columns(config, [first._replace(accessible=False)])
    with pytest.raises(UserError, match="no column text"):
        _require_columns(config, [first, second._replace(accessible=False)])


def test_a_file_that_the_input_path_names_directly_is_read_even_if_its_name_has_an_unknown_suffix(
    tmp_path: Path,
) -> None:
    for name in (".hidden", "_metadata", "rows.txt", "a.csv.zip"):
        write(tmp_path, {name: "x"})
        assert [file.name for file in listing(tmp_path / name).files] == [name]


def test_a_file_without_a_split_in_its_name_is_passed_over_if_file_names_decide_the_split(tmp_path: Path) -> None:
    write(tmp_path, {"train.csv": "x", "captions.csv": "x"})
    found = listing(tmp_path, split={"kind": "file"})
    assert [file.name for file in found.files] == ["train.csv"]
    assert reasons(found) == {"captions.csv": "no_split"}


def test_a_listed_file_is_named_with_its_folder_if_only_the_folder_name_contains_the_split(tmp_path: Path) -> None:
    write(tmp_path, {"data/train/0.csv": "x", "test/val.csv": "x", "other/1.csv": "x"})
    found = listing(tmp_path, split={"kind": "file"})
    assert [(file.name, split_of_file(file.name)) for file in found.files] == [
        ("data/train/0.csv", "train"),
        ("val.csv", "val"),
    ]
    assert reasons(found) == {"other/1.csv": "no_split"}
    assert [file.name for file in listing(tmp_path).files] == ["0.csv", "1.csv", "val.csv"]


@settings(max_examples=40)
@given(st.text(st.sampled_from("a[]{},*?!#%:;+&= ~\\'\"\u00e9e\u0301\n-^$"), min_size=1, max_size=12))
def test_wildcards_in_the_name_of_a_listed_file_are_taken_literally(name: str) -> None:
    with TemporaryDirectory() as folder:
        write(Path(folder), {"other.csv": "x"})
        file = Path(folder, f"{name}.csv")
        file.write_text("x")
        assert [found.path for found in listing(file).files] == [str(file)]
        (Path(folder) / f"d{name}").mkdir()
        inside = Path(folder, f"d{name}", f"{name}.csv")
        inside.write_text("x")
        assert [found.path for found in listing(inside.parent).files] == [str(inside)]
        assert {found.path for found in listing(folder).files} == {str(p) for p in Path(folder).rglob("*.csv")}


def test_a_file_whose_name_is_not_utf_8_is_listed_and_its_name_can_be_stored(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.csv")).write_text("x")
    [file] = listing(tmp_path).files
    assert (file.name, file.item) == ("caf\\xe9.csv", f"file:{tmp_path}/caf\\xe9.csv")
    assert Path(file.path).read_text() == "x"


def test_a_path_with_wildcards_is_a_pattern_only_if_no_file_or_folder_has_exactly_this_path(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, {f"in [1]/{name}": "x" for name in ("a1.csv", "a2.csv", "b1.csv", "c/d/1.csv", "a.txt")})
    with caplog.at_level("INFO"):
        found = listing(tmp_path / "in [1]" / "a*")
    assert [file.name for file in found.files] == ["a1.csv", "a2.csv"]
    assert reasons(found) == {"a.txt": "other_kind"}
    assert any(str(tmp_path / "in [1]" / "a1.csv") in message for message in caplog.messages)
    assert [file.name for file in listing(tmp_path / "in [1]" / "{b,c}*").files] == ["b1.csv", "1.csv"]
    assert [file.name for file in listing(tmp_path / "in [1]" / "[!a]*" / "**" / "*.csv").files] == ["1.csv"]


def test_braces_in_an_input_path_are_expanded_as_spark_expands_them() -> None:
    assert set(expand_braces("a{b,c{d,e}}f")) == {"abf", "acdf", "acef"}
    assert expand_braces("a{b}") == ["a{b}"]


def test_the_names_of_partition_folders_become_column_values(tmp_path: Path) -> None:
    path = "plain/day=2024-01-01/of=a%2Fb c/none=__HIVE_DEFAULT_PARTITION__/a=b=c/x.csv"
    write(tmp_path, {path: "x", "y.csv": "x"})
    by_name = {file.name: dict(file.partition) for file in listing(tmp_path).files}
    assert by_name == {"x.csv": {"day": "2024-01-01", "of": "a/b c", "none": None, "a": "b=c"}, "y.csv": {}}


def test_the_ledger_entry_of_a_file_is_the_same_as_in_earlier_versions_of_lakesight(tmp_path: Path) -> None:
    write(tmp_path, {"a b.csv": "xyz"})
    os.utime(tmp_path / "a b.csv", ns=(0, 1_700_000_000_123_456_789))
    [file] = listing(tmp_path).files
    assert (file.item, file.state) == (f"file:{tmp_path}/a b.csv", "3 bytes, 2023-11-14T22:13:20.123000Z")
    config = DataConfig.model_validate({"source": {"kind": "webdataset", "path": str(tmp_path / "sub" / "..")}})
    [file] = list_plain_files(config, (".csv",)).files
    assert (file.item, file.state) == (f"{tmp_path}/a b.csv", "3 bytes, 2023-11-14T22:13:20.123456Z")


def test_an_input_url_that_the_package_for_its_scheme_refuses_is_a_user_error() -> None:
    registry = pytest.importorskip("fsspec.registry")

    class Refusing(registry.get_filesystem_class("memory")):  # type: ignore[misc]
        def isfile(self, path: str) -> bool:
            raise LookupError(f"no repository\nis named {path}")

    registry.register_implementation("refusing", Refusing, clobber=True)
    config = DataConfig.model_validate({"source": {"kind": "csv", "path": "refusing://datasets/x"}})
    with pytest.raises(UserError, match=r"the input cannot be read.*Got: LookupError: no repository is named refusing"):
        list_plain_files(config, (".csv",))


def test_files_are_listed_from_a_url_of_a_local_folder_or_of_an_object_store(tmp_path: Path) -> None:
    write(tmp_path, {"a.csv": "x"})
    for url in (f"file:{tmp_path}", f"file://{tmp_path}/a.csv"):
        assert [file.path for file in listing(url).files] == [str(tmp_path / "a.csv")]
    memory = pytest.importorskip("fsspec").filesystem("memory")
    for name in ("a.csv", "_x.csv", "sub/k=v/b.csv", ".cache/c.csv", "_SUCCESS", "none.csv"):
        memory.pipe(f"/lake/{name}", b"" if name == "none.csv" else b"x")
    found = listing("memory://lake")
    assert [file.path for file in found.files] == [f"memory:///lake/{n}" for n in ("_x.csv", "a.csv", "sub/k=v/b.csv")]
    assert found.files[-1].partition == {"k": "v"}
    assert reasons(found) == {".cache/": "hidden", "_SUCCESS": "marker", "none.csv": "empty"}
    assert [file.name for file in listing("memory://lake/a.csv").files] == ["a.csv"]
    assert [file.name for file in listing("memory://lake/*.csv").files] == ["_x.csv", "a.csv"]


@contextmanager
def web_server(headers: dict[str, str], content: bytes = b"file_name,text") -> Iterator[str]:
    """Serve one file with the given headers on loopback, and yield its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/a.csv"
        server.shutdown()


def test_a_file_of_a_web_server_has_another_state_after_each_change_that_the_server_reports() -> None:
    pytest.importorskip("aiohttp")
    headers = {"Content-Length": "14"}
    with web_server(headers) as url:

        def state(**changed: str) -> tuple[str, str]:
            headers.update({name.replace("_", "-"): value for name, value in changed.items()})
            [file] = (found := listing(url)).files
            assert not found.passed_over
            return file.state, open_files("shop", found, items_table([]), load=None).ingest_id

        assert state() != state(), "without a time or a checksum, each ingest reads the file"
        first = state(ETag='"1"', Last_Modified="Mon, 14 Jan 2030 22:13:20 GMT")
        assert first == state()
        assert first[0].endswith('Mon, 14 Jan 2030 22:13:20 GMT, "1"')
        for changed in ({"ETag": '"2"'}, {"Last_Modified": "Mon, 14 Jan 2030 22:13:21 GMT"}):
            before = state()
            after = state(**changed)
            assert (before[0] != after[0], before[1] != after[1]) == (True, True)


def test_a_file_of_a_web_server_that_does_not_send_the_size_is_an_error_and_not_an_empty_file() -> None:
    pytest.importorskip("aiohttp")
    with (
        web_server({"ETag": '"1"'}) as url,
        pytest.raises(UserError, match="the server does not send the size of a file"),
    ):
        listing(url)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "no input"),
        ("gone", "no such file or folder"),
        ("gone/*", "no such file or folder"),
        ("none.csv", "no files, or only empty ones"),
        ("nosuchstorage://bucket/a", "nosuchstorage:// cannot be opened.*install"),
        ("memory://nothing/a.csv", "no such file or folder"),
        ("other", r"a.txt \(other_kind\).*expected files ending in .csv"),
    ],
)
def test_a_path_without_input_is_an_error_that_names_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"none.csv": "", "other/a.txt": "x"})
    with pytest.raises(UserError, match=message):
        listing(path)


def test_parquet_files_of_a_delta_table_are_refused_because_the_table_decides_which_rows_exist(tmp_path: Path) -> None:
    write(tmp_path, {"t/a.parquet": "x", "t/_delta_log/0.json": "x"})
    with pytest.raises(UserError, match=r"deleted rows.*kind=table"):
        listing(tmp_path, (".parquet",), source={"kind": "parquet"})


def test_a_report_counts_all_files_that_were_passed_over_but_names_at_most_a_thousand(tmp_path: Path) -> None:
    write(tmp_path, {f"{n:04}.txt": "x" for n in range(1_200)} | {"a.csv": "x", "z.csv": ""})
    fields = describe_passed_over(listing(tmp_path).passed_over)
    assert fields["passed_over_count"] == {"other_kind": 1_200, "empty": 1}
    assert sum(map(len, fields["passed_over"].values())) == 1_000


@given(st.integers(0, 2**50))
def test_an_input_is_read_by_32_tasks_unless_a_task_would_read_less_than_4_or_more_than_32_megabytes(size: int) -> None:
    per_task = range_bytes(size)
    assert 4 * 2**20 <= per_task <= 32 * 2**20
    assert 32 <= size / per_task < 33 or per_task in (4 * 2**20, 32 * 2**20)


def test_each_core_of_a_cluster_gets_two_tasks_of_small_files_that_are_read_as_wholes() -> None:
    files = [SourceFile(f"/{n}.tar", f"{n}.tar", 5 * 2**20, 0, f"{n}.tar", True, {}) for n in range(500)]
    assert [count_tasks(files, cores) for cores in (2, 100, 400)] == [78, 200, 500]
