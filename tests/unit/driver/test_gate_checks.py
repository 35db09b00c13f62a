"""The promotion gate compares metrics on the same rows, and reports every reason for a refusal."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config import GateConfig, Trial
from pipelines.driver.evaluate.bootstrap import measure
from pipelines.driver.evaluate.gate import apply_gate
from pipelines.driver.evaluate.metrics import ScoredRow
from pipelines.driver.evaluate.run import EvaluationReport
from pipelines.driver.evaluate.scores import SCORES, write_scores
from vlm.text.words import TOKENISATION

WELL = Trial(failure="", pictures=4, errors=())
TRUTH = ("a red square", "a blue circle", "a green dot", "a white line")


def scored(captions: list[str | None], *, gap: float = 1.0) -> list[ScoredRow]:
    """Make scored rows with four kinds of references.

    The captions of the neighbour baseline are right for three of the four kinds.
    """
    return [
        ScoredRow(
            row=row,
            image_id=f"x/{row}",
            prompt="",
            references=(TRUTH[row % 4],),
            caption=caption,
            neighbour=TRUTH[row % 4] if row % 2 else TRUTH[0],
            loss=2.0,
            blind_loss=2.0 + 4 * gap,
            blank_loss=3.0,
            noise_loss=4.0,
            num_targets=4,
            num_correct=3,
            num_tokens=4,
            seconds=0.1,
            mean_logprob=-0.5,
            brightness=100.0,
            contrast=40.0,
        )
        for row, caption in enumerate(captions)
    ]


def evaluated(folder: Path, rows: list[ScoredRow], version: str = "2") -> EvaluationReport:
    write_scores(folder / version / SCORES, rows)
    return EvaluationReport(
        model_name="m",
        model_version=version,
        run_id="r",
        source="s",
        split="test",
        dataset_version=0,
        scores_hash=version,
        pictures=len(rows),
        left_out=sum(row.caption is None for row in rows),
        tokenisation=TOKENISATION,
        metrics=measure(rows),
        columns=(),
        slices={},
        folder=folder / version,
        gallery=folder,
        gallery_png=folder,
        figures_png=folder,
        reused=False,
        seconds=1.0,
    )


def good(count: int = 40, wrong: int = 4) -> list[str | None]:
    """Make captions for `count` rows. The first `wrong` captions are wrong, and all other captions are right."""
    return ["a thing" if row < wrong else TRUTH[row % 4] for row in range(count)]


def test_a_good_model_version_passes_and_every_check_is_reported(tmp_path: Path) -> None:
    result = apply_gate(GateConfig(), evaluated(tmp_path, scored(good())), None, WELL)
    assert result.reasons == ()
    assert list(result.checks) == ["loads", "errors", "looks", "constant", "neighbour"]
    assert result.figures["word_f1"].value == pytest.approx(0.94)


def test_a_bad_model_version_is_refused_with_every_reason(tmp_path: Path) -> None:
    captions: list[str | None] = ["a thing"] * 38 + [None, None]
    champion = evaluated(tmp_path, scored(good()), "1")
    trial = Trial(failure="it does not load in a fresh process: boom", pictures=0, errors=())
    result = apply_gate(GateConfig(), evaluated(tmp_path, scored(captions, gap=0.04)), champion, trial)
    for reason, word in zip(
        result.reasons,
        ("boom", "share of 0.05", "gap of 0.040", "ignores the picture", "nearest neighbour", "same 38 rows"),
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


def test_a_model_version_that_is_no_better_than_a_baseline_is_refused_if_the_gate_config_names_the_baseline(
    tmp_path: Path,
) -> None:
    report = evaluated(tmp_path, [replace(row, caption=row.neighbour) for row in scored(good())])
    assert [
        name for name, check in apply_gate(GateConfig(), report, None, WELL).checks.items() if not check.passed
    ] == ["neighbour"]
    assert apply_gate(GateConfig(baselines=("constant",)), report, None, WELL).reasons == ()


def test_the_blind_gap_check_fails_if_the_blind_gap_is_missing_or_nan(tmp_path: Path) -> None:
    (row,) = scored(["a red square"])
    alone = apply_gate(GateConfig(), evaluated(tmp_path, [replace(row, blind_loss=None)]), None, WELL)
    assert any("the blind gap is unknown" in reason for reason in alone.reasons)
    broken = apply_gate(GateConfig(), evaluated(tmp_path, scored(good(), gap=math.nan)), None, WELL)
    assert any("a blind gap of nan" in reason for reason in broken.reasons)


def test_a_model_version_and_the_champion_are_compared_on_the_rows_that_both_captioned(tmp_path: Path) -> None:
    champion = evaluated(tmp_path, scored(good(60, wrong=0))[20:], "1")
    result = apply_gate(GateConfig(), evaluated(tmp_path, scored(good(40, wrong=0))), champion, WELL)
    assert result.reasons == ()
    assert "on the same 20 rows" in result.checks["champion"].found
    apart = evaluated(tmp_path, scored(good(80))[40:], "3")
    assert "no common rows" in apply_gate(GateConfig(), evaluated(tmp_path, scored(good())), apart, WELL).reasons[0]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.booleans(), min_size=4, max_size=30))
def test_the_gate_never_finds_a_model_version_worse_than_itself(
    tmp_path_factory: pytest.TempPathFactory, right: list[bool]
) -> None:
    folder = tmp_path_factory.mktemp("same")
    rows = scored([TRUTH[n % 4] if is_right else "a thing" for n, is_right in enumerate(right)])
    result = apply_gate(GateConfig(), evaluated(folder, rows), evaluated(folder, rows, "1"), WELL)
    assert result.checks["champion"].passed
    assert result.figures["over_champion"].value == 0
