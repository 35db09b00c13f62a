"""Tests of self-critical training: its reward (CIDEr-D), its advantages, its gradient, and its resumption."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_rank import Killed, open_group_of_one, train
from pycocoevalcap.cider.cider import Cider as CocoCider
from safetensors.torch import load_file
from tiny_runs import tiny_model_config, tiny_run, write_run, write_shards
from torch.nn import functional as F

from pipelines.config.train import CiderObjectiveConfig, TrainConfig
from pipelines.driver.train.run import reference_documents
from pipelines.worker.data.batches import Collator, RowOrder
from pipelines.worker.rank.metrics import MeanSinceLog
from pipelines.worker.train.self_critical import CaptionSampler, advantages, sampled_rows
from vlm import text
from vlm.batch import IGNORE
from vlm.factory import build_model
from vlm.text.cider import END, Cider, rewarded_words
from vlm.training.objective import token_loss

WORDS = ["a", "dog", "cat", "on", "the", "red", "mat", "runs"]
ORDER = RowOrder(rank=0, world_size=1, batch_size=4, seed=3)
STAGES: Any = [
    {"steps": 6, "groups": [{"pattern": ".*", "lr": 3e-3}]},
    {"steps": 6, "groups": [{"pattern": ".*", "lr": 1e-3}], "objective": {"kind": "cider", "samples": 3}},
]
NAMES = ("train/loss", "train/cider", "train/contrastive")
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=9)


@given(st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=2, max_size=6))
@settings(max_examples=25)
def test_cider_from_stored_document_frequencies_equals_the_cider_of_pycocoevalcap(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[list[str], list[list[str]]]]
) -> None:
    path = tmp_path_factory.mktemp("cider") / "cider.json"
    Cider.count(references for _, references in rows).save(path)
    truth = {number: [" ".join(words) for words in references] for number, (_, references) in enumerate(rows)}
    found = {number: [" ".join(words)] for number, (words, _) in enumerate(rows)}
    _, expected = CocoCider().compute_score(truth, found)
    loaded = Cider.load(path)
    assert [loaded.score(*row) for row in rows] == pytest.approx(list(expected), abs=1e-9)


def test_an_advantage_is_the_reward_minus_the_mean_reward_of_all_other_samples_of_the_picture() -> None:
    rng = random.Random(0)
    rewards = [rng.random() for _ in range(5)]
    expected = [r - sum(rewards[:i] + rewards[i + 1 :]) / 4 for i, r in enumerate(rewards)]
    assert advantages(rewards) == pytest.approx(expected)
    assert advantages([0.7] * 3) == pytest.approx([0, 0, 0])


@pytest.fixture
def sampled(tmp_path: Path) -> Any:
    """Return a function that returns model, tokenizer, CIDEr, rows and sampled captions (as batch parts) of step 2."""
    shards = write_shards(tmp_path / "shards", rows=9, texts=3)
    config = tiny_model_config()
    tokenizer = text.learn(config.text, shards.texts())
    torch.manual_seed(0)
    model = build_model(config, tokenizer.vocab_size)

    def sample(rows_at_once: int | None = None, order: RowOrder = ORDER) -> Any:
        cider, collator = Cider.count(reference_documents(shards)), Collator(tokenizer, config)
        sampler = CaptionSampler(
            model,
            tokenizer,
            collator,
            cider,
            CiderObjectiveConfig(kind="cider", samples=3),
            settings=TrainConfig(rows_at_once=rows_at_once),
            reward=MeanSinceLog(),
        )
        rows = sampled_rows(shards, 2, order, None)
        return model, tokenizer, cider, rows, sampler.sample(rows)

    return sample


def test_the_gradient_of_self_critical_training_equals_a_naively_computed_policy_gradient(sampled: Any) -> None:
    model, tokenizer, cider, rows, [batch] = sampled()
    model.eval()
    torch.autograd.backward(token_loss(model(batch), batch))
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    assert batch.rows_per_picture == 3
    assert len(batch.pixels_PHWC) == 4
    assert len(batch.tokens_BT) == 12
    for number, row in enumerate(rows):
        logprobs, rewards = [], []
        for index in range(3 * number, 3 * number + 3):
            labels_T = batch.labels_BT[index]
            targets = labels_T[labels_T != IGNORE]
            single = type(batch)(
                batch.pixels_PHWC[number : number + 1],
                batch.tokens_BT[index : index + 1],
                labels_T[None],
                batch.prefix_lengths_B[index : index + 1],
            )
            logprobs.append(-F.cross_entropy(model(single), targets, reduction="sum"))
            complete = int(targets[-1]) == tokenizer.eos_id
            said = tokenizer.decode(targets[: len(targets) - complete].tolist())
            rewards.append(cider.score(rewarded_words(said, complete=complete), row.references))
        for k, logprob in enumerate(logprobs):
            baseline = (sum(rewards) - rewards[k]) / 2
            (-(rewards[k] - baseline) * logprob).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_sampled_caption_depends_only_on_its_row_and_not_on_the_rank_or_the_part_of_the_batch(sampled: Any) -> None:
    def captions(parts: Any) -> list[list[int]]:
        return [labels[labels != IGNORE].tolist() for part in parts for labels in part.labels_BT]

    whole = captions(sampled()[-1])
    assert len({tuple(ids) for ids in whole}) > 3
    assert captions(sampled(rows_at_once=3)[-1]) == whole
    halves = [sampled(order=ORDER | {"rank": rank, "world_size": 2})[-1] for rank in range(2)]
    assert [ids for half in halves for ids in captions(half)] == whole


def test_a_sampled_caption_without_an_end_token_gets_a_lower_reward() -> None:
    references = [rewarded_words("a dog on the mat")]
    cider = Cider.count([references, [rewarded_words("a red cat runs")]])
    assert references[0][-1] == END
    cut, complete = (
        cider.score(rewarded_words("a dog on the mat", complete=done), references) for done in (False, True)
    )
    assert cut < complete == pytest.approx(10)


@pytest.fixture
def group_of_one() -> Iterator[None]:
    with open_group_of_one():
        yield


@pytest.mark.usefixtures("group_of_one")
def test_a_run_with_a_contrastive_loss_and_a_cider_stage_resumes_bit_for_bit(tmp_path: Path) -> None:
    shards = [write_shards(tmp_path / name, rows=9, texts=2) for name in ("train", "val")]

    def make_run(name: str) -> Any:
        settings: Any = {"checkpoint_every": 3, "validate_every": 12, "keep_checkpoints": 9, "contrastive": 0.5}
        config = tiny_run(steps=12, stages=STAGES, **settings)
        run = write_run(tmp_path / name, config, *shards)
        Cider.count(reference_documents(shards[0])).save(run.cider)
        return run

    whole, broken = make_run("whole"), make_run("broken")
    train(whole)
    with pytest.raises(Killed):
        train(broken, 10)
    train(broken)
    expected, found = (load_file(run.checkpoint(12) / "model.safetensors") for run in (whole, broken))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    before = load_file(whole.checkpoint(6) / "model.safetensors")
    assert any(not torch.equal(tensor, before[name]) for name, tensor in expected.items())
    logged = [[{k: v for k, v in m.values.items() if k in NAMES} for m in run.read_metrics()]
              for run in (whole, broken)]  # fmt: skip
    assert logged[0] == logged[1]
    assert [sorted(values) for values in logged[0]] == 3 * [["train/contrastive", "train/loss"]] + 3 * [["train/cider"]]


def test_a_training_stage_that_rewards_cider_is_refused_with_sharded_weights_or_with_a_single_sample() -> None:
    with pytest.raises(ValueError, match="objective cider and parallel fsdp exclude each other"):
        tiny_run(steps=12, stages=STAGES, parallel="fsdp")
    single = [STAGES[0], STAGES[1] | {"objective": {"kind": "cider", "samples": 1}}]
    with pytest.raises(ValueError, match="samples"):
        tiny_run(steps=12, stages=single)
