"""Tests that results do not depend on the number of ranks, on how a batch is divided, or on how weights are sharded.

Starting ranks takes longer than training a tiny run, so one launch of ranks trains several runs one after another.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from processes import torchrun
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file
from tiny_runs import runs_in, tiny_run, write_run, write_shards

from pipelines.driver.train.run import reference_documents
from pipelines.formats.run_folder import Metrics, RunFolder, write_json
from vlm import text
from vlm.checkpoint import load_model, save_model
from vlm.factory import build_model
from vlm.text.cider import Cider

pytestmark = pytest.mark.xdist_group("parallel")  # one process runs these tests, because they share runs

COPIES = "lakesight-shards-*"
AUGMENT = {"scale": [0.5, 1.0], "flip": 0.5, "brightness": 0.3, "contrast": 0.3, "saturation": 0.3}
EXPERTS = {"kind": "moe", "num_experts": 4, "expert": {"kind": "plain", "mlp_width": 16}, "balance_weight": 0.5}
STATE_FILES = {"training.json", "training.safetensors", "files.json", "run.json"}
ADAPTED = {"head", *(f"blocks.0.{name}" for name in ("attention.qkv", "attention.out", "mlp.up", "mlp.out"))}


class Launched(NamedTuple):
    """Folders of the finished runs, and the temporary folder of the ranks that trained the runs.

    Attributes:
        one_rank: runs `alone`, `routed` and `rewarded`, trained on one rank.
        two_ranks: runs `ddp`, `parts`, `fsdp`, `plain`, `contrastive`, `routed`, `rewarded` and `adapted`, trained on
            two ranks.
        copied_by_one_rank: local copies of shards in the folder `temporary`, directly after the training on one rank.
    """

    one_rank: dict[str, RunFolder]
    two_ranks: dict[str, RunFolder]
    base: Path
    temporary: Path
    copied_by_one_rank: list[Path]


def launch(runs: dict[str, RunFolder], ranks: int) -> dict[str, RunFolder]:
    """Train the given runs in turn, each on the given number of ranks."""
    ended = torchrun(list(runs.values()), ranks, "train_runs_in_turn")
    assert ended.returncode == 0, ended.stdout
    return runs


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    folder = tmp_path_factory.mktemp("parallel")
    (temporary := folder / "temporary").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        make_run = runs_in(folder, patch)
        settings: dict[str, Any] = {
            "model": without_random_numbers(),
            "steps": 10,
            "log_every": 1,
            "checkpoint_every": 5,
            "augment": AUGMENT,
            "optimizer": {"warmup_steps": 2, "ema_decay": 0.5},
        }
        alone = make_run("alone", ranks=1, **settings)
        one_rank = {name: make(folder, ranks=1) for name, make in SHARED.items()}
        launch(one_rank | {"alone": alone}, 1)
        copied = list(temporary.glob(COPIES))
        two_ranks = {
            "ddp": make_run("ddp", **settings),
            "parts": make_run("parts", rows_at_once=1, recompute_blocks=True, cache_gib=1, **settings),
            "fsdp": make_run("fsdp", parallel="fsdp", **settings),
            "plain": make_run("plain", **settings | {"augment": None}),
            "contrastive": make_run("contrastive", contrastive=1.0, **settings | {"augment": None}),
            "adapted": make_run("adapted", **adapter_settings(save_base(folder / "base"))),
        }
        two_ranks |= {name: make(folder, ranks=2) for name, make in SHARED.items()}
        launch(two_ranks, 2)
    return Launched(one_rank | {"alone": alone}, two_ranks, folder / "base", temporary, copied)


def without_random_numbers() -> dict[str, Any]:
    """Return the tiny model's config without dropout and stochastic depth, because each rank would drop different
    values."""
    model = tiny_run().model.model_dump()
    for part in (model["vision"], model["decoder"]):
        part["transformer"] |= {"dropout": 0.0, "stochastic_depth": 0.0}
    return model


def routed_run(folder: Path, ranks: int) -> RunFolder:
    """Write a run of six steps that trains a tiny mixture of experts without randomness."""
    model = without_random_numbers()
    for part in (model["vision"], model["decoder"]):
        part["transformer"] |= {"mlp": EXPERTS}
    config = tiny_run(steps=6, ranks=ranks, model=model, log_every=2)
    # The texts differ in length, so that the ranks get different numbers of tokens.
    shards = write_shards(folder / f"routed-shards-{ranks}", rows=12, texts=3)
    return write_run(folder / f"routed-{ranks}", config, shards, shards)


def rewarded_run(folder: Path, ranks: int) -> RunFolder:
    """Write a run of eight steps; in the last three steps, training rewards the CIDEr of sampled captions."""
    shards = write_shards(folder / f"rewarded-shards-{ranks}", rows=12, texts=3)
    every = [{"pattern": ".*", "lr": 1e-2}]
    stages = [{"steps": 5, "groups": every}, {"steps": 3, "groups": every, "objective": {"kind": "cider"}}]
    config = tiny_run(steps=8, ranks=ranks, model=without_random_numbers(), stages=stages, log_every=1)
    run = write_run(folder / f"rewarded-{ranks}", config, shards, shards)
    Cider.count(reference_documents(shards)).save(run.cider)
    return run


SHARED = {"routed": routed_run, "rewarded": rewarded_run}
"""Runs that are trained both on one rank and on two ranks: a dict from name to the function that writes the run."""


def save_base(folder: Path) -> Path:
    """Save a tiny model with random weights, as the base of a run that trains an adapter."""
    config = tiny_run().model
    tokenizer = text.learn(config.text, ())
    torch.manual_seed(0)
    save_model(folder, build_model(config, tokenizer.vocab_size), tokenizer)
    return folder


def adapter_settings(base: Path) -> dict[str, Any]:
    return {
        "start_from": str(base),
        "adapter": {"pattern": "decoder.*", "rank": 4},
        "precision": "bf16",
        "optimizer": {"lr": 0.02, "warmup_steps": 2},
        "steps": 30,
        "validate_every": 30,
        "checkpoint_every": 15,
    }


def losses(run: RunFolder) -> list[float]:
    return [m.values["train/loss"] for m in run.read_metrics() if "train/loss" in m.values]


def test_neither_more_ranks_nor_smaller_microbatches_nor_fsdp_change_the_losses_by_more_than_rounding(
    launched: Launched,
) -> None:
    alone = launched.one_rank["alone"]
    ddp, parts, fsdp, plain = (launched.two_ranks[name] for name in ("ddp", "parts", "fsdp", "plain"))
    assert not launched.copied_by_one_rank
    assert losses(alone) == pytest.approx(losses(ddp), rel=1e-6)
    assert losses(parts) == pytest.approx(losses(ddp), rel=1e-6)
    assert losses(fsdp) == pytest.approx(losses(ddp), rel=1e-5)
    assert losses(plain) != pytest.approx(losses(ddp), rel=1e-3), "without augmentation the losses differ"
    assert list(fsdp.read_samples()) == list(ddp.read_samples())
    averages = [load_file(run.checkpoint(10) / "model.safetensors") for run in (fsdp, ddp)]
    for name, average in averages[0].items():
        torch.testing.assert_close(average, averages[1][name], rtol=1e-4, atol=1e-6)
    assert list(launched.temporary.glob(f"{COPIES}/lock")), "the run with cache_gib copied its shards"


@pytest.mark.matrix
def test_a_training_with_ddp_can_be_continued_with_fsdp_and_vice_versa(launched: Launched, tmp_path: Path) -> None:
    ddp, fsdp = launched.two_ranks["ddp"], launched.two_ranks["fsdp"]
    crossed = {
        other: back_at_half(run, tmp_path / f"from-{run.path.name}", other)
        for run, other in ((ddp, "fsdp"), (fsdp, "ddp"))
    }
    for run in launch(crossed, 2).values():
        assert losses(run) == pytest.approx(losses(ddp), rel=1e-5)


def back_at_half(run: RunFolder, folder: Path, parallel: str) -> RunFolder:
    """Copy a finished run, reset the copy to its first checkpoint, and change its setting `train.parallel`."""
    half = RunFolder(folder)
    shutil.copytree(run.path, half.path)
    half.result.unlink(missing_ok=True)
    shutil.rmtree(half.checkpoint(10))
    file = half.read_run()
    train = file.config.train.model_copy(update={"parallel": parallel})
    write_json(half.run_file, file.model_copy(update={"config": file.config.model_copy(update={"train": train})}))
    for step in range(6, 11):
        half.metrics(step).unlink()
    return half


def test_an_adapter_is_trained_on_two_ranks_and_merged_into_the_saved_model(launched: Launched) -> None:
    run = launched.two_ranks["adapted"]
    assert losses(run)[-1] < 0.8 * losses(run)[0]
    before, last = run.finished_checkpoints()
    assert {path.name for path in before.iterdir()} == {"adapter.json", "adapter.safetensors", *STATE_FILES}
    base, tuned = (load_model(folder)[0].state_dict() for folder in (launched.base, last))
    moved = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert moved == {f"decoder.{name}.weight" for name in ADAPTED}


def test_a_mixture_of_experts_has_the_same_metrics_and_weights_on_one_rank_and_on_two_ranks(launched: Launched) -> None:
    runs = [launched.one_rank["routed"], launched.two_ranks["routed"]]
    logged: list[list[Metrics]] = [list(run.read_metrics()) for run in runs]
    assert [step.step for step in logged[0]] == [2, 4, 6]
    for alone, together in zip(*logged, strict=True):
        assert set(alone.expert_load) == {"encoder.blocks.0", "decoder.blocks.0"}
        assert together.expert_load.keys() == alone.expert_load.keys()
        for layer, load in alone.expert_load.items():
            assert sum(load) == pytest.approx(1)
            assert together.expert_load[layer] == pytest.approx(load)
        for name in ("train/loss", "train/router_balance", "train/router_z", "train/grad_norm"):
            assert together.values[name] == pytest.approx(alone.values[name], rel=1e-4), name
    weights = [load_arrays(run.checkpoint(6) / "model.safetensors") for run in runs]
    for name, expected in weights[0].items():
        assert weights[1][name] == pytest.approx(expected, abs=1e-4), name


def test_self_critical_training_computes_the_same_steps_on_one_rank_as_on_two_ranks(launched: Launched) -> None:
    runs = [launched.one_rank["rewarded"], launched.two_ranks["rewarded"]]
    alone, together = ([m.values for m in run.read_metrics() if "train/cider" in m.values] for run in runs)
    assert len(alone) == 3
    for one, two in zip(alone, together, strict=True):
        for name in ("train/cider", "train/grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-4), name
    weights = [load_arrays(run.checkpoint(8) / "model.safetensors") for run in runs]
    for name, expected in weights[0].items():
        assert weights[1][name] == pytest.approx(expected, abs=1e-4), name


def test_the_contrastive_loss_trains_on_two_ranks_and_changes_what_the_model_learns(launched: Launched) -> None:
    plain, contrastive = launched.two_ranks["plain"], launched.two_ranks["contrastive"]
    logged = [m.values["train/contrastive"] for m in contrastive.read_metrics()]
    assert len(logged) == 10
    assert logged[-1] < logged[0]
    assert losses(contrastive)[0] == pytest.approx(losses(plain)[0], rel=1e-6)
    assert losses(contrastive)[-1] != pytest.approx(losses(plain)[-1], rel=1e-6)
