"""Tests that the promotion gate compares metrics on the same rows, and reports every reason for a refusal."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluation_reports import evaluation_report
from hypothesis import given, settings
from hypothesis import strategies as st
from scored_rows import scored_row

from pipelines.config import GateConfig, Trial
from pipelines.driver.evaluate.baselines import best_constants
from pipelines.driver.evaluate.bootstrap import measure
from pipelines.driver.evaluate.gate import apply_gate
from pipelines.driver.evaluate.metrics import ScoredRow
from pipelines.driver.evaluate.run import EvaluationReport
from pipelines.driver.evaluate.scores import SCORES, write_scores

WELL = Trial(failure="", pictures=4, errors=())
TRUTH = ("a red square", "a blue circle", "a green dot", "a white line")


def scored(captions: list[str | None], *, gap: float = 1.0) -> list[ScoredRow]:
    """Return evaluated rows with the given captions. The human captions of the rows repeat the values of TRUTH.

    The captions of the neighbour baseline are right for three of the four values of TRUTH.
    """
    return [
        scored_row(
            row,
            [TRUTH[row % 4]],
            caption,
            neighbour=TRUTH[row % 4] if row % 2 else TRUTH[0],
            loss=2.0,
            blind_loss=2.0 + 4 * gap,
            blank_loss=3.0,
            noise_loss=4.0,
            num_targets=4,
            num_correct=3,
            seconds=0.1,
        )
        for row, caption in enumerate(captions)
    ]


def evaluated(folder: Path, rows: list[ScoredRow], version: str = "2") -> EvaluationReport:
    write_scores(folder / version / SCORES, rows)
    left_out = sum(row.caption is None for row in rows)
    named = {"model_version": version, "scores_hash": version}
    return evaluation_report(folder / version, measure(rows), **named, pictures=len(rows), left_out=left_out)


def good(count: int = 40, wrong: int = 4) -> list[str | None]:
    """Make captions for `count` rows. The number `wrong` says how many captions are wrong."""
    return ["a thing" if row < wrong else TRUTH[row % 4] for row in range(count)]


def test_the_gate_accepts_a_good_model_version_and_reports_every_check(tmp_path: Path) -> None:
    result = apply_gate(GateConfig(), evaluated(tmp_path, scored(good())), None, WELL)
    assert result.reasons == ()
    assert list(result.checks) == ["loads", "errors", "looks", "varied", "constant", "neighbour"]
    assert result.figures["word_f1"].value == pytest.approx(0.94)


def test_the_gate_refuses_a_bad_model_version_and_lists_every_reason(tmp_path: Path) -> None:
    captions: list[str | None] = ["a thing"] * 38 + [None, None]
    champion = evaluated(tmp_path, scored(good()), "1")
    trial = Trial(failure="it does not load in a fresh process: boom", pictures=0, errors=())
    result = apply_gate(GateConfig(), evaluated(tmp_path, scored(captions, gap=0.04)), champion, trial)
    for reason, word in zip(
        result.reasons,
        (
            "boom",
            "share of 0.05",
            "gap of 0.040",
            "1 distinct captions of 38",
            "ignores the picture",
            "nearest neighbour",
            "same 38 rows",
        ),
        strict=True,
    ):
        assert word in reason


@pytest.mark.parametrize(
    ("gate", "trial", "refused"),
    [
        ({}, Trial(failure="", pictures=4, errors=("bad_base64: x",)), ["errors"]),
        ({"max_error_share": 0.25}, Trial(failure="", pictures=4, errors=("bad_base64: x",)), []),
        ({"min_blind_gap": 1.5}, WELL, ["looks"]),
        ({"min_blind_gap": 1.5, "baselines": []}, WELL, ["looks"]),
    ],
)
def test_the_limits_of_the_checks_come_from_the_gate_config(
    tmp_path: Path, gate: dict[str, object], trial: Trial, refused: list[str]
) -> None:
    result = apply_gate(GateConfig.model_validate(gate), evaluated(tmp_path, scored(good())), None, trial)
    assert [name for name, check in result.checks.items() if not check.passed] == refused


def test_a_model_version_that_is_no_better_than_a_baseline_in_the_gate_config_is_refused(
    tmp_path: Path,
) -> None:
    report = evaluated(tmp_path, [replace(row, caption=row.neighbour) for row in scored(good())])
    assert [
        name for name, check in apply_gate(GateConfig(), report, None, WELL).checks.items() if not check.passed
    ] == ["neighbour"]
    assert apply_gate(GateConfig(baselines=("constant",)), report, None, WELL).reasons == ()


def test_the_constant_caption_is_chosen_by_the_metric_of_the_gate(tmp_path: Path) -> None:
    """The model always generates the constant caption that has the best CIDEr, but not the best word F1."""
    truth = ["a cat", "a cat", "a dog on a mat", "a big red dog on a mat", "a dog"] * 8
    rows = [replace(row, references=(truth[row.row],)) for row in scored(["a dog"] * 40)]
    by_f1, by_cider = (best_constants(rows)[name] for name in ("word_f1", "cider"))
    assert by_f1 != by_cider
    report = evaluated(tmp_path, [replace(row, caption=by_cider) for row in rows])
    gate = GateConfig(metric="cider", baselines=("constant",))
    assert apply_gate(gate, report, None, WELL).figures["over_constant"].value == 0
    assert (
        apply_gate(gate.model_copy(update={"metric": "word_f1"}), report, None, WELL).figures["over_constant"].value < 0
    )


def test_a_model_version_with_nearly_equal_captions_is_refused_unless_the_human_captions_are_nearly_equal(
    tmp_path: Path,
) -> None:
    names = [f"{colour} number {n}" for n in range(25) for colour in ("red", "blue", "green", "white")]
    rows = [replace(row, references=(names[row.row],)) for row in scored([*["a red number"] * 96, *names[96:]])]
    said = apply_gate(GateConfig(min_distinct=0.06), evaluated(tmp_path, rows), None, WELL).checks["varied"]
    assert not said.passed
    assert "nearly all the same: 5 distinct captions of 100 (0.05), 100 of the human captions (1)" in said.found
    assert apply_gate(GateConfig(), evaluated(tmp_path, rows), None, WELL).checks["varied"].passed
    same = [replace(row, references=("a red number",)) for row in scored(["a red number"] * 40)]
    assert apply_gate(GateConfig(), evaluated(tmp_path, same), None, WELL).checks["varied"].passed


def test_a_model_version_with_perfect_captions_of_only_three_pictures_is_not_refused(tmp_path: Path) -> None:
    perfect = [replace(row, neighbour=TRUTH[3]) for row in scored(list(TRUTH[:3]))]
    report = evaluated(tmp_path, perfect)
    result = apply_gate(GateConfig(), report, None, WELL)
    assert result.reasons == ()
    # The interval begins at 0: one bootstrap sample in 27 consists only of the row whose text is the constant caption.
    assert result.figures["over_constant"].low == 0
    assert "3 pictures are too few for an interval" in result.checks["constant"].found
    strict = apply_gate(GateConfig(min_pictures=3), report, None, WELL)
    assert [name for name, check in strict.checks.items() if not check.passed] == ["constant"]
    guesses = evaluated(tmp_path, [replace(row, caption=TRUTH[0]) for row in perfect], "3")
    assert {"varied", "constant"} <= {
        name for name, check in apply_gate(GateConfig(), guesses, None, WELL).checks.items() if not check.passed
    }


def test_the_blind_gap_check_fails_if_the_blind_gap_is_missing_or_nan(tmp_path: Path) -> None:
    (row,) = scored(["a red square"])
    alone = apply_gate(GateConfig(), evaluated(tmp_path, [replace(row, blind_loss=None)]), None, WELL)
    assert any("the blind gap is unknown" in reason for reason in alone.reasons)
    broken = apply_gate(GateConfig(), evaluated(tmp_path, scored(good(), gap=math.nan)), None, WELL)
    assert any("a blind gap of nan" in reason for reason in broken.reasons)


def test_a_model_version_and_the_champion_are_compared_only_on_rows_that_both_have_captioned(tmp_path: Path) -> None:
    champion = evaluated(tmp_path, scored(good(60, wrong=0))[20:], "1")
    result = apply_gate(GateConfig(), evaluated(tmp_path, scored(good(40, wrong=0))), champion, WELL)
    assert result.reasons == ()
    assert "on the same 20 rows" in result.checks["champion"].found
    apart = evaluated(tmp_path, scored(good(80))[40:], "3")
    assert (
        "no row has captions of both versions"
        in apply_gate(GateConfig(), evaluated(tmp_path, scored(good())), apart, WELL).reasons[0]
    )


@settings(max_examples=20)
@given(st.lists(st.booleans(), min_size=4, max_size=30))
def test_the_gate_never_finds_a_model_version_worse_than_itself(
    tmp_path_factory: pytest.TempPathFactory, right: list[bool]
) -> None:
    folder = tmp_path_factory.mktemp("same")
    rows = scored([TRUTH[n % 4] if is_right else "a thing" for n, is_right in enumerate(right)])
    result = apply_gate(GateConfig(), evaluated(folder, rows), evaluated(folder, rows, "1"), WELL)
    assert result.checks["champion"].passed
    assert result.figures["over_champion"].value == 0


@pytest.mark.parametrize("metric", ["cider", "word_f1"])
def test_the_gate_refuses_a_version_that_was_evaluated_on_one_picture_and_gives_the_reasons(
    tmp_path: Path, metric: Any
) -> None:
    rows = [replace(row, blind_loss=None) for row in scored(good(1, 0))]
    result = apply_gate(GateConfig(metric=metric), evaluated(tmp_path, rows), None, WELL)
    assert "the split has only one picture" in result.reasons[0]
    undefined = [reason for reason in result.reasons if "no comparison with" in reason]
    assert len(undefined) == (2 if metric == "cider" else 0)


def test_a_baseline_of_the_gate_that_cannot_be_computed_fails_its_check(tmp_path: Path) -> None:
    rows = scored(good())
    rows[3] = replace(rows[3], neighbour=None)
    result = apply_gate(GateConfig(), evaluated(tmp_path, rows), None, WELL)
    (reason,) = result.reasons
    assert reason.startswith("no comparison with the nearest neighbour's caption")
    without = apply_gate(GateConfig(baselines=("constant",)), evaluated(tmp_path / "other", rows), None, WELL)
    assert without.reasons == ()


def test_a_picture_without_a_neighbour_is_the_reason_of_a_refusal_by_this_baseline(tmp_path: Path) -> None:
    rows = scored(good())
    rows[0] = replace(rows[0], neighbour=None)
    checks = apply_gate(GateConfig(baselines=("neighbour",)), evaluated(tmp_path, rows), None, WELL).checks
    assert not checks["neighbour"].passed
    assert "no picture of the training split has the prompt of one" in checks["neighbour"].found
    assert "so few pictures" not in checks["neighbour"].found
