"""Tests of object hallucination (CHAIR): word lists, the metrics, and when a stored report has the metrics."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from evaluation_reports import evaluation_report
from hypothesis import given, settings
from hypothesis import strategies as st
from scored_rows import scored_row

from jobs.evaluate import open_object_words
from jobs.log_evaluation import LOGGED_METRICS, figures_by_column
from pipelines.config import load_run
from pipelines.driver.evaluate.bootstrap import measure
from pipelines.driver.evaluate.gallery import GalleryRow, ModelCaption
from pipelines.driver.evaluate.hallucination import ObjectWords, hallucination_metrics, read_object_words
from pipelines.driver.evaluate.metrics import ScoredRow, tokenisation_of
from pipelines.driver.evaluate.run import DEFINITIONS, EvaluationReport, RequestedMetrics, _write_pages
from pipelines.driver.evaluate.table import report_rows
from pipelines.driver.ingest.ledger import hash_rules
from pipelines.errors import UserError
from vlm.text.words import TOKENISATION

WORD_LIST = """# objects of the test

dog, dogs, puppy
hot dog, hot dogs
Fire hydrant
caf\u00e9,
\u72ac, \u5b50\u72ac
"""


def scored(rows: list[tuple[str, list[str], str | None]]) -> list[ScoredRow]:
    """Return rows with the given image_ids, references and captions."""
    return [
        scored_row(row, references, caption, image_id=image_id, prompt=str(row))
        for row, (image_id, references, caption) in enumerate(rows)
    ]


ROWS = scored(
    [
        ("a", ["a puppy on grass", "an animal"], "two dogs and a dog"),
        ("b", ["a fire hydrant"], "a hot dog, a dog near the fire hydrant"),
        ("c", ["a street"], "an empty street"),
        ("d", ["what is here?"], "a dog"),
        ("d", ["a dog"], None),
        ("e", ["a road"], None),
    ]
)
"""The captions have 6 mentions, of which 2 are hallucinated (both in row `b`)."""


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> ObjectWords:
    file = tmp_path_factory.mktemp("list") / "objects.txt"
    file.write_text(WORD_LIST, encoding="utf-8")
    return read_object_words(file)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A DOG, two puppies and a puppy", ["dog", "dog"]),
        ("hot dogs for hot dogs' dog", ["hot dog", "hot dog", "dog"]),
        ("a fire; hydrant", ["fire hydrant"]),
        ("a hydrant on fire in a hotdog", []),
        ("un cafe\u0301", ["caf\u00e9"]),
        ("\u4e00\u53ea\u5b50\u72ac\u548c\u72ac", ["\u72ac", "\u72ac"]),
        ("", []),
    ],
)
def test_mentions_are_found_by_unicode_words_and_only_the_longest_phrase_at_each_place_counts(
    objects: ObjectWords, text: str, expected: list[str]
) -> None:
    assert objects.mentions(text) == expected


@settings(max_examples=40)
@given(
    phrases=st.sets(st.lists(st.sampled_from("xyz"), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4),
    text=st.lists(st.sampled_from("wxyz"), max_size=12),
)
def test_the_mentions_in_random_texts_equal_the_matches_of_a_regular_expression(
    phrases: set[tuple[str, ...]], text: list[str]
) -> None:
    names = {phrase: " ".join(phrase) for phrase in phrases}
    longest_first = sorted(names.values(), key=len, reverse=True)
    expected = re.findall(rf"\b(?:{'|'.join(longest_first)})\b", " ".join(text))
    assert ObjectWords(names, max(map(len, phrases))).mentions(" ".join(text)) == expected


def test_chair_counts_mentions_of_objects_that_no_human_text_of_the_picture_mentions(objects: ObjectWords) -> None:
    """Row `d` mentions a dog that is in the human text of another prompt of the same picture."""
    metrics = measure(ROWS, further=hallucination_metrics(ROWS, objects))
    assert metrics["chair_i"].value == pytest.approx(2 / 6)
    assert metrics["chair_s"].value == pytest.approx(1 / 4)
    assert metrics["object_mentions"].value == pytest.approx(6 / 4)
    for name in ("chair_i", "chair_s", "object_mentions"):
        assert metrics[name].low < metrics[name].value < metrics[name].high
        assert tokenisation_of(name) == TOKENISATION


@settings(max_examples=20)
@given(times=st.lists(st.integers(0, 3), min_size=4, max_size=4).filter(any))
def test_a_bootstrap_sample_gives_the_same_metrics_as_a_split_in_which_rows_are_repeated(
    objects: ObjectWords, times: list[int]
) -> None:
    weighted = hallucination_metrics(ROWS, objects)
    repeated = [item for item, count in zip(ROWS[:4], times, strict=True) for _ in range(count)]
    captions = hallucination_metrics([*repeated, *ROWS[4:]], objects)
    for name, metric in weighted.items():
        expected = captions[name](np.ones((1, len(repeated)))) if name in captions else np.zeros(1)
        assert metric(np.array([times], float)) == pytest.approx(expected), name


def test_chair_i_is_missing_if_no_caption_mentions_an_object(objects: ObjectWords) -> None:
    rows = scored([("a", ["a dog"], "nothing"), ("b", ["a dog"], "")])
    metrics = measure(rows, further=hallucination_metrics(rows, objects))
    assert "chair_i" not in metrics
    assert (metrics["chair_s"].value, metrics["object_mentions"].value) == (0, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "objects.txt. Got: No such file or directory. Fix: set data.object_words"),
        (b"dog, \xff", "Got: bytes that are not UTF-8"),
        (b"# dog\n\n ,\n", "Got: no object. Fix: write one object per line"),
        (b"dog, Puppy\nwolf, puppy\n", "Got: line 2 lists 'puppy' under 'wolf', but 'puppy' already stands for 'dog'"),
    ],
)
def test_an_invalid_or_missing_word_list_is_refused_and_the_error_names_the_problem(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    file = tmp_path / "objects.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)):
        open_object_words(load_run("demo", overrides=[f"data.object_words={file}"]))


def test_a_word_list_of_objects_is_optional_and_does_not_change_the_hash_of_the_ingest_rules() -> None:
    plain, listed = load_run("demo"), load_run("demo", overrides=["data.object_words=objects.txt"])
    assert open_object_words(plain) is None
    assert hash_rules(plain.data) == hash_rules(listed.data)
    assert plain.data.hashed_settings() == listed.data.model_copy(update={"object_words": None}).hashed_settings()
    assert "object_words" not in plain.data.hashed_settings()


def report(folder: Path, requested: RequestedMetrics) -> EvaluationReport:
    objects = requested.objects.digest() if requested.objects else ""
    metrics = measure(ROWS, further=requested.functions(ROWS))
    return evaluation_report(folder, metrics, definitions=DEFINITIONS, object_words=objects)


def test_a_stored_report_is_reused_unless_it_lacks_the_metrics_of_the_word_list(
    tmp_path: Path, objects: ObjectWords
) -> None:
    plain, listed = RequestedMetrics((), False, None), RequestedMetrics((), False, objects)
    other = RequestedMetrics((), False, ObjectWords({("cat",): "cat"}, 1))
    before, after = report(tmp_path, plain), report(tmp_path, listed)
    assert plain.included_in(before)
    assert plain.included_in(after)
    assert listed.included_in(after)
    assert not listed.included_in(before)
    assert not other.included_in(after)
    assert listed.merged_with(before) == listed
    earlier = EvaluationReport.model_validate(before.model_dump(exclude={"object_words"}))
    assert plain.included_in(earlier)
    assert not {"chair_i", "chair_s", "object_mentions"} & before.metrics.keys()
    assert before.metrics.items() <= after.metrics.items()


def test_the_metrics_of_invented_objects_are_on_the_page_and_in_the_tables_and_in_mlflow(
    tmp_path: Path, objects: ObjectWords
) -> None:
    after = report(tmp_path, RequestedMetrics((), False, objects))
    _write_pages(after, [GalleryRow("b", None, "", "", (ModelCaption.of_row("Model", ROWS[1]),), ("sample",))])
    page = after.gallery.read_text(encoding="utf-8")
    assert "CHAIRi" in page
    assert "CHAIRs" in page
    assert {"chair_i", "chair_s", "object_mentions"} <= set(figures_by_column(after)["metric"])
    assert {"chair_i", "chair_s"} <= set(LOGGED_METRICS)
    rows = {row["metric"]: row for row in report_rows(after, "")}
    assert rows["chair_i"]["value"] == pytest.approx(1 / 3)
    assert rows["chair_i"]["tokenisation"] == TOKENISATION
