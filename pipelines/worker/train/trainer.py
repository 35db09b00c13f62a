"""Trainer of one rank, which builds the model, resumes from the last checkpoint, and trains.

The training loop is `vlm.training.loop.fit`. This module supplies the training loop with batches. After each training
step, this module checks whether the settings of the run require metrics, a validation or a checkpoint at this step. A
checkpoint contains the state that one step passes to the next step: the weights, the optimizer state, and the number of
the next step. The number of a step determines the rows, the learning rate and the random numbers of the step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule

from pipelines.config.train import ObjectiveConfig
from pipelines.formats.run_folder import CaptionSample, CaptionSamples, Result, RunFile, RunFolder, write_json
from pipelines.formats.shards import Shards
from pipelines.worker.data.augment import Augmenter
from pipelines.worker.data.batches import Collator, RowOrder, map_ahead, rows_of_step, training_batches
from pipelines.worker.data.prefetch import prefetch_to_device
from pipelines.worker.data.shard_cache import ShardCopier
from pipelines.worker.rank.env import RankEnv
from pipelines.worker.rank.failure import RankMonitor
from pipelines.worker.rank.group import check_group, divide_cores
from pipelines.worker.rank.metrics import FileWriter, MeanSinceLog, Stopwatch, write_metrics
from pipelines.worker.rank.profile import profile_steps
from pipelines.worker.rank.relay import ProgressRelay, wait_together
from pipelines.worker.rank.usage import measure_usage, throughput
from pipelines.worker.score import validation_cider
from pipelines.worker.train.checkpoints import (
    CheckpointWriter,
    MetricHistory,
    best_checkpoint,
    check_settings,
    find_common_checkpoint,
    find_training_state,
)
from pipelines.worker.train.initial_weights import ModelBuilder
from pipelines.worker.train.self_critical import CaptionSampler, sampled_rows
from pipelines.worker.train.slices import CheckpointSlices, slices_of
from pipelines.worker.train.stages import Stage, advise_on_rates, check_patterns, plan_stages, stage_at
from pipelines.worker.train.validation import caption_samples, name_pictures, validate
from vlm import text
from vlm.batch import Batch
from vlm.captioner import Captioner
from vlm.layers.block import compile_blocks, recompute_blocks
from vlm.model import VisionLanguageModel
from vlm.text.base import Tokenizer
from vlm.text.cider import Cider
from vlm.training.loop import NotFiniteError, StepReport, fit, mixed_precision
from vlm.training.optim import averaged_weights, swap_average, update_average
from vlm.training.parallel import global_sum, wrap_ddp
from vlm.training.state import load_state

log = logging.getLogger(__name__)


@dataclass
class Trainer:
    """Training state of one rank, with methods for training steps and for the work after each step."""

    run: RunFolder
    file: RunFile
    env: RankEnv
    monitor: RankMonitor
    device: torch.device
    resume_step: int
    model: VisionLanguageModel
    optimizer: torch.optim.Optimizer
    tokenizer: Tokenizer
    builder: ModelBuilder
    train_shards: Shards
    validate_shards: Shards
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    loss: MeanSinceLog = field(default_factory=MeanSinceLog)
    reward: MeanSinceLog = field(default_factory=MeanSinceLog)

    def __post_init__(self) -> None:
        self.collator = Collator(self.tokenizer, self.file.config.model)
        self.files = FileWriter()
        self.checkpoints = CheckpointWriter(self.run, self.file, self.files)
        self.history = MetricHistory(self.run, self.file.config.train, self.resume_step)
        self.done = self.resume_step
        self.sharded = isinstance(self.model, FSDPModule)
        limit = self.file.config.platform.cache_gib * 2**30
        settings = self.file.config.train
        self.augmenter = Augmenter(settings.augment, settings.seed) if settings.augment else None
        self.copier = ShardCopier(self.copied_shards(), limit)

    @classmethod
    def build(cls, run: RunFolder, file: RunFile, env: RankEnv, monitor: RankMonitor, device: torch.device) -> Trainer:
        """Build the trainer of a rank. All ranks get the same model: a new model, or the model of a checkpoint."""
        divide_cores(check_group(run, device))
        checkpoint = find_common_checkpoint(run, env.rank, device)
        if checkpoint:
            check_settings(checkpoint, file)
        settings = file.config.train
        tokenizer = text.load(run.tokenizer)
        builder = ModelBuilder(file.config.model, settings, tokenizer)
        torch.set_float32_matmul_precision("high" if settings.precision == "tf32" else "highest")
        torch.manual_seed(settings.seed)
        model = builder.model(device)
        monitor.report_progress()
        stages = plan_stages(settings)
        check_patterns(stages, [name for name, _ in model.named_parameters()])
        state, resume_step = find_training_state(checkpoint, settings)
        if checkpoint:
            builder.load(checkpoint, model)
        if settings.recompute_blocks:
            recompute_blocks(model)
        if settings.compile_blocks:
            compile_blocks(model)
        stage = stage_at(stages, resume_step)
        optimizer = stage.start(model, settings)
        if state and resume_step > stage.first:
            load_state(state, model, optimizer)
            swap_average(optimizer)
        monitor.report_step(resume_step)
        log.info(
            "training on %d ranks, this rank on %s, from step %d to %d",
            *(env.world_size, device, resume_step, settings.steps),
        )
        return cls(
            run=run,
            file=file,
            env=env,
            monitor=monitor,
            device=device,
            resume_step=resume_step,
            model=model,
            optimizer=optimizer,
            tokenizer=tokenizer,
            builder=builder,
            train_shards=Shards.open(run.shard_folder(file.train_shards)),
            validate_shards=Shards.open(run.shard_folder(file.validate_shards)),
        )

    def copied_shards(self) -> tuple[Shards, ...]:
        """Return the shards whose files are copied to this host if `platform.cache_gib` is set."""
        return self.train_shards, self.validate_shards

    def train(self) -> None:
        """Take the remaining steps, stage by stage, until the last step or until training stops early."""
        settings = self.file.config.train
        if self.file.config.platform.cache_gib:
            self.copier.start()
        steps = settings.profile_steps if self.env.rank == 0 else 0
        with profile_steps(self.run.profile, steps, self.device) as self.stepped:
            for stage in plan_stages(settings):
                if self.history.ends_training:
                    break
                if stage.first > self.resume_step:
                    swap_average(self.optimizer)  # the next stage starts from the averaged weights
                    self.optimizer = stage.start(self.model, settings)
                if stage.end > self.resume_step:
                    self._train_stage(stage, range(max(stage.first, self.resume_step), stage.end))
        if self.collator.num_truncated:
            log.warning("%d texts were longer than the model's context and were truncated", self.collator.num_truncated)

    def _train_stage(self, stage: Stage, steps: range) -> None:
        settings = self.file.config.train
        batches, learns_texts = self._batches(stage.objective, steps), stage.objective.kind == "texts"
        self.stopwatch.start()
        try:
            fit(
                wrap_ddp(self.model, self.device),
                self.optimizer,
                takewhile(lambda _: not self.history.ends_training, batches),
                start=steps.start,
                lr_schedule=lambda step: stage.lr_of(step, settings),
                grad_clip=settings.optimizer.grad_clip,
                seed=settings.seed,
                rank=self.env.rank,
                device=self.device,
                bf16=settings.precision == "bf16",
                on_step=partial(self.after_step, stage),
                label_smoothing=settings.label_smoothing if learns_texts else 0.0,
                contrastive=settings.contrastive if learns_texts else 0.0,
            )
        except NotFiniteError as error:
            raise self.with_pictures(error) from error

    def batches(self, steps: range) -> Iterator[list[Batch]]:
        """Return this rank's batches of the given steps, in the form that the training loop `fit` expects."""
        settings = self.file.config.train
        return training_batches(
            self.train_shards,
            self.collator,
            steps=steps,
            **self.row_order(),
            rows_at_once=settings.rows_at_once,
            workers=settings.loader_workers,
            augmenter=self.augmenter,
            pinned=self.device.type == "cuda",
        )

    def _batches(self, objective: ObjectiveConfig, steps: range) -> Iterator[list[Batch]]:
        """Return the batches of a stage, made from training texts or from captions sampled before each step."""
        settings, order = self.file.config.train, self.row_order()
        if objective.kind == "cider":
            cider = Cider.load(self.run.cider)
            sampler = CaptionSampler(
                self.model, self.tokenizer, self.collator, cider, objective, settings=settings, reward=self.reward
            )
            rows = partial(sampled_rows, self.train_shards, order=order, augmenter=self.augmenter)
            return map(sampler.sample, self.stopwatch.time_waits(map_ahead(rows, steps, settings.loader_workers)))
        return prefetch_to_device(self.stopwatch.time_waits(self.batches(steps)), self.device)

    def row_order(self) -> RowOrder:
        """Return the arguments of `training_batches` and `rows_of_step` that determine the rows of this rank."""
        settings, env = self.file.config.train, self.env
        return RowOrder(rank=env.rank, world_size=env.world_size, batch_size=settings.batch_size, seed=settings.seed)

    def with_pictures(self, error: NotFiniteError) -> NotFiniteError:
        """Return the error with the replay command. If a training step failed, also name this rank's pictures."""
        got = error.got
        if not error.in_validation:
            rows, _, _ = rows_of_step(self.train_shards, error.step, **self.row_order())
            got += f"; pictures of rank {self.env.rank}: {name_pictures([row.image_id for row in rows])}"
        command = (
            f"`lakesight train --replay-step {error.step}` with the options of this run shows the loss of each picture"
        )
        fix = f"{advise_on_rates(error.fix, self.file.config.train)}; {command}"
        named = NotFiniteError(error.what, where=error.where, got=got, fix=fix)
        named.step, named.on_other_rank, named.in_validation = error.step, error.on_other_rank, error.in_validation
        return named

    def after_step(self, stage: Stage, report: StepReport) -> None:
        """Report the step.

        Write metrics, validate, caption samples and save a checkpoint, each only if the settings of the run require the
        action at this step.

        All ranks take part in validation. Only rank 0 writes metrics, samples and checkpoints. If the model is sharded,
        all ranks take part in writing a checkpoint.
        """
        settings, done = self.file.config.train, report.step + 1
        if settings.optimizer.ema_decay:
            update_average(self.optimizer, settings.optimizer.ema_decay, report.step - stage.first)
        last, is_rank_0 = done == settings.steps, self.env.rank == 0
        self.done = done
        self.stopwatch.stop(settings.batch_size, report.tokens)
        self.loss.add(report.loss, report.tokens)
        self.monitor.report_step(done)
        self.checkpoints.check()
        self.copier.check()
        values, validation = dict[str, float](), dict[str, float]()
        load: dict[str, tuple[float, ...]] = {}
        scores = settings.score_every is not None and (last or done % settings.score_every == 0)
        saves = done in (settings.steps, settings.register_) or done % settings.checkpoint_every == 0
        if last or scores or done % settings.validate_every == 0:
            with averaged_weights(self.optimizer):
                validation = self._validate(report.step)
                saves |= self.history.add(validation)
                last = last or self.history.ends_training
                captioned = self._caption(done, scores=scores or (last and settings.score_every is not None))
            saves |= self.history.add(captioned)
            last = last or self.history.ends_training
            validation |= captioned
        if last or done % settings.log_every == 0:
            values |= self._mean_since_log(stage) | {"lr": report.lr, "grad_norm": report.grad_norm}
            values |= throughput(
                self.stopwatch.lap(), self.file.config, self.tokenizer.vocab_size, self.env.world_size, self.device
            )
            if report.contrastive is not None:
                values["contrastive"] = report.contrastive
            if report.router is not None:
                values |= {"router_balance": report.router.balance, "router_z": report.router.z}
                load = report.router.load
            values = {f"train/{name}": value for name, value in values.items()} | measure_usage(self.device)
        values |= validation
        if is_rank_0 and values:
            write_metrics(self.files, self.run.metrics(done), done, values, load)
            log.info("step %d of %d: %s", done, settings.steps, ", ".join(f"{k} {v:.4g}" for k, v in values.items()))
        if saves := saves or last:
            self.loss.restart()
            self.reward.restart()
            self.wait_for_checkpoint()
            if is_rank_0 or self.sharded:
                self._save(done, last=last)
        self.stepped()
        self.stopwatch.start()

    def wait_for_checkpoint(self) -> None:
        """Wait until the last checkpoint is written. All ranks call this method."""
        wait_together(self.checkpoints.wait, self.monitor.report_progress, self.device, self.env.rank)

    def _save(self, done: int, *, last: bool) -> None:
        """Copy the training state, and start to write the checkpoint, or this rank's slice of a sharded checkpoint."""
        with averaged_weights(self.optimizer):
            copy = self.builder.copy(self.model, self.optimizer, done)
        if not self.sharded:
            self.checkpoints.save(done, partial(self.builder.write, copy=copy, last=last))
            return
        timeout = self.file.config.train.timeout_seconds
        slices = CheckpointSlices(slices_of(self.run, done), self.env.world_size, timeout)
        if self.env.rank:
            self.checkpoints.start(partial(slices.write, self.env.rank, copy))
            return

        def write(folder: Path) -> None:
            slices.write(0, copy)
            self.builder.write_joined(folder, slices, done)

        self.checkpoints.save(done, write)

    def write_result(self) -> None:
        """Write result.json.

        Call this method after all ranks have finished and the last checkpoint and metrics are written.
        """
        *_, last = self.run.read_metrics(after=self.done - 1 - self.file.config.train.log_every)
        best = best_checkpoint(self.run, self.file.config.train.best_by)
        assert best, "the last step is always validated and has a checkpoint"
        result = Result(
            status="ok",
            step=self.done,
            world_size=self.env.world_size,
            checkpoint=str(self.run.finished_checkpoints()[-1]),
            best_checkpoint=str(best),
            metrics=last.values,
            seconds=self.stopwatch.total,
        )
        write_json(self.run.result, result)

    def _mean_since_log(self, stage: Stage) -> dict[str, float]:
        """Return the mean loss or, in a stage that rewards CIDEr, the mean CIDEr-D of the sampled captions."""
        if stage.objective.kind == "texts":
            return {"loss": self.loss.take()}
        self.loss.restart()  # the loss is weighted by advantages, so it is not a useful metric
        reward = torch.tensor(self.reward.take(), dtype=torch.float64, device=self.device)
        return {"cider": float(global_sum(reward)) / self.env.world_size}

    def _validate(self, step: int) -> dict[str, float]:
        settings = self.file.config.train
        rows = settings.batch_size // self.env.world_size
        with mixed_precision(self.device, bf16=settings.precision == "bf16"):
            found = self.compute_validation(step, min(rows, settings.rows_at_once or rows))
        self._free_gathered_weights()
        return found

    def compute_validation(self, step: int, batch_size: int) -> dict[str, float]:
        """Compute the validation metrics after a step. All ranks call this method and get the same values."""
        return validate(
            self.model,
            self.validate_shards,
            self.collator,
            step=step,
            num_rows=self.file.config.train.validate_rows,
            batch_size=batch_size,
            rank=self.env.rank,
            world_size=self.env.world_size,
            report_progress=self.monitor.report_progress,
        )

    def sample(self, model: VisionLanguageModel, count: int) -> tuple[CaptionSample, ...]:
        """Generate the samples that are logged at a validation."""
        return caption_samples(model, self.tokenizer, self.validate_shards, count)

    def _caption(self, done: int, *, scores: bool) -> dict[str, float]:
        """Write sample captions on rank 0. Return `val/cider` if the step is scored, with the same value on every rank.

        All ranks call this method. The ranks of a sharded model generate the same captions together, because each rank
        has only a part of the weights.
        """
        settings, model = self.file.config.train, self.model
        cider = torch.zeros((), dtype=torch.float64, device=self.device)
        relay = ProgressRelay(self.monitor.report_progress, self.device, sharded=self.sharded)
        if self.env.rank and not self.sharded:
            relay.follow()
        else:
            precision = mixed_precision(self.device, bf16=settings.precision == "bf16")
            with precision, relay.reporting(model.decoder):
                samples = self.sample(model, settings.caption_samples)
                if scores:
                    model.eval()
                    captioner = Captioner(model, self.tokenizer)
                    cider += validation_cider(captioner, self.validate_shards, settings.validate_rows)
                    model.train()
        self._free_gathered_weights()
        if self.env.rank == 0:
            self.files.write(self.run.samples(done), CaptionSamples(step=done, samples=samples))
        return (
            {"val/cider": float(global_sum(cider if self.env.rank == 0 else torch.zeros_like(cider)))} if scores else {}
        )

    def _free_gathered_weights(self) -> None:
        """Free the weights that FSDP keeps until a backward pass, so that no training step uses these old weights."""
        if isinstance(self.model, FSDPModule):
            self.model.reshard()
