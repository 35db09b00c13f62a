"""One rank's work: meet the others, build the model, go on from the last checkpoint, train, report.

The loop itself is `vlm.training.loop.fit`; this module gives it batches and does what is due after each step. The
checkpoint holds all that is carried from step to step: weights, optimizer, and the number of the next step, from which
the samples, the learning rate and every random number follow.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.fsdp import FSDPModule

from pipelines.errors import UserError
from pipelines.formats.run_folder import CaptionSamples, Result, RunDir, RunFile, step_of, write_json
from pipelines.formats.shards import Shards
from pipelines.worker.data.augment import Augmenter
from pipelines.worker.data.batches import Collator, training_batches
from pipelines.worker.data.prefetch import copied_ahead
from pipelines.worker.data.shard_cache import ShardCopier
from pipelines.worker.rank.env import Place
from pipelines.worker.rank.failure import Watch
from pipelines.worker.rank.group import meet, pick_device, process_group
from pipelines.worker.rank.metrics import Stopwatch, write_metrics
from pipelines.worker.rank.profile import profiled
from pipelines.worker.rank.usage import usage
from pipelines.worker.train.checkpoints import CheckpointWriter, agree, best_checkpoint, refuse_other_science
from pipelines.worker.train.initial_weights import Start
from pipelines.worker.train.stages import Stage, plan, stage_at
from pipelines.worker.train.validation import caption_samples, validate
from vlm import text
from vlm.checkpoint import model_weights
from vlm.config.size import flops_per_sample, peak_flops
from vlm.layers.block import compile_blocks, recompute_blocks
from vlm.model import VisionLanguageModel
from vlm.text.base import Tokenizer
from vlm.training.loop import StepReport, fit, mixed_precision
from vlm.training.optim import averaged_weights, swap_average, update_average
from vlm.training.parallel import full_tensor, shard_parameters, wrap_ddp
from vlm.training.state import load_state

log = logging.getLogger(__name__)


def train(run: RunDir, place: Place, watch: Watch) -> None:
    """Train from the last checkpoint to the end; rank 0 writes result.json when every rank is done.

    Raises:
        UserError: the ranks cannot share the batch, have no GPU where the platform promises one, or are not of one run.
        LakesightError: damaged shards or checkpoint, a loss that is not finite.
    """
    file = run.read_run()
    settings = file.config.train
    if settings.batch_size % place.world_size:
        raise UserError(
            "the global batch cannot be shared among the ranks",
            where="train.batch_size",
            got=f"{settings.batch_size} rows for {place.world_size} ranks",
            fix="choose a multiple of the number of ranks",
        )
    watch.allow(settings.timeout_seconds)
    device = pick_device(file.config.platform, place)
    with process_group(device, settings.timeout_seconds):
        learner = Learner.build(run, file, place, watch, device)
        learner.learn()
        learner.checkpoints.wait()
        distributed.barrier()
        if place.rank == 0:
            learner.finish()


@dataclass
class Learner:
    """A rank with its model: learns, and does what is due after each step."""

    run: RunDir
    file: RunFile
    place: Place
    watch: Watch
    device: torch.device
    start: int
    model: VisionLanguageModel
    optimizer: torch.optim.Optimizer
    tokenizer: Tokenizer
    origin: Start
    train_shards: Shards
    validate_shards: Shards
    stopwatch: Stopwatch = field(default_factory=Stopwatch)

    def __post_init__(self) -> None:
        self.collator = Collator(self.tokenizer, self.file.config.model)
        self.checkpoints = CheckpointWriter(self.run, self.file)
        self.sharded = isinstance(self.model, FSDPModule)
        limit = self.file.config.platform.cache_gib * 2**30
        self.copier = ShardCopier([self.train_shards, self.validate_shards], limit)

    @classmethod
    def build(cls, run: RunDir, file: RunFile, place: Place, watch: Watch, device: torch.device) -> Learner:
        """The same model on every rank, fresh from the seed or as the last checkpoint left it."""
        meet(run, device)
        checkpoint = agree(run, place.rank, device)
        if checkpoint:
            refuse_other_science(checkpoint, file)
        settings = file.config.train
        tokenizer = text.load(run.tokenizer)
        origin = Start(file.config.model, settings, tokenizer)
        torch.set_float32_matmul_precision("high" if settings.precision == "tf32" else "highest")
        torch.manual_seed(settings.seed)
        model = origin.model(device)
        watch.alive()
        start = step_of(checkpoint) if checkpoint else 0
        if checkpoint:
            origin.fill(checkpoint, model)
        if settings.recompute_blocks:
            recompute_blocks(model)
        if settings.compile_blocks:
            compile_blocks(model)
        if settings.parallel == "fsdp":
            shard_parameters(model)
        stage = stage_at(plan(settings), start)
        optimizer = stage.begin(model, settings)
        if checkpoint and start > stage.first:
            load_state(checkpoint, model, optimizer)
            swap_average(optimizer)
        watch.at(start)
        log.info("%d ranks, this one on %s: from step %d to %d", place.world_size, device, start, settings.steps)
        learned, held_out = Shards.open(Path(file.train_shards)), Shards.open(Path(file.validate_shards))
        return cls(run, file, place, watch, device, start, model, optimizer, tokenizer, origin, learned, held_out)

    def learn(self) -> None:
        """Take every step that is left, stage by stage."""
        settings = self.file.config.train
        if self.file.config.platform.cache_gib:
            self.copier.start()
        steps = settings.profile_steps if self.place.rank == 0 else 0
        with profiled(self.run.profile, steps, self.device) as self.stepped:
            for stage in plan(settings):
                if stage.first > self.start:
                    swap_average(self.optimizer)  # the next stage goes on from what the last one has come to
                    self.optimizer = stage.begin(self.model, settings)
                if stage.end > self.start:
                    self._learn(stage, range(max(stage.first, self.start), stage.end))
        if self.collator.cut:
            log.warning("%d texts did not fit the context and were cut", self.collator.cut)

    def _learn(self, stage: Stage, steps: range) -> None:
        settings = self.file.config.train
        batches = training_batches(
            self.train_shards,
            self.collator,
            steps=steps,
            rank=self.place.rank,
            world_size=self.place.world_size,
            batch_size=settings.batch_size,
            seed=settings.seed,
            rows_at_once=settings.rows_at_once,
            workers=settings.loader_workers,
            augmenter=Augmenter(settings.augment, settings.seed) if settings.augment else None,
            pinned=self.device.type == "cuda",
        )
        self.stopwatch.start()
        fit(
            wrap_ddp(self.model, self.device),
            self.optimizer,
            copied_ahead(self.stopwatch.waiting(batches), self.device),
            start=steps.start,
            lr_schedule=lambda step: stage.lr_of(step, settings),
            grad_clip=settings.optimizer.grad_clip,
            seed=settings.seed,
            rank=self.place.rank,
            device=self.device,
            bf16=settings.precision == "bf16",
            on_step=partial(self.after_step, stage),
        )

    def after_step(self, stage: Stage, report: StepReport) -> None:
        """Heartbeat, metrics, validation, captions, checkpoint. Rank 0 writes the files that belong to the run."""
        settings, done = self.file.config.train, report.step + 1
        if settings.optimizer.ema_decay:
            update_average(self.optimizer, settings.optimizer.ema_decay, report.step - stage.first)
        last, leads = done == settings.steps, self.place.rank == 0
        self.stopwatch.stop(settings.batch_size, report.tokens)
        self.watch.at(done)
        self.checkpoints.check()
        self.copier.check()
        values: dict[str, float] = {}
        load: dict[str, tuple[float, ...]] = {}
        if last or done % settings.log_every == 0:
            values |= {"loss": report.loss, "lr": report.lr, "grad_norm": report.grad_norm, **self._speed()}
            if report.router is not None:
                values |= {"router_balance": report.router.balance, "router_z": report.router.z}
                load = report.router.load
            values = {f"train/{name}": value for name, value in values.items()} | usage(self.device)
        if last or done % settings.validate_every == 0:
            with averaged_weights(self.optimizer):
                values |= self._validate()
                self._write_samples(done)
        if leads and values:
            write_metrics(self.run, done, values, load)
            log.info("step %d of %d: %s", done, settings.steps, ", ".join(f"{k} {v:.4g}" for k, v in values.items()))
        if (leads or self.sharded) and (last or done % settings.checkpoint_every == 0):
            with averaged_weights(self.optimizer):
                write = self.origin.copy(self.model, self.optimizer, done, last=last)
            if leads:
                self.checkpoints.save(done, write)
        self.stepped()
        self.stopwatch.start()

    def finish(self) -> None:
        """Write result.json: every rank is done, the last checkpoint and the last metrics are in their places."""
        *_, last = self.run.read_metrics()
        best = best_checkpoint(self.run)
        assert best, "the last step has a checkpoint and is validated"
        result = Result(
            status="ok",
            step=self.file.config.train.steps,
            world_size=self.place.world_size,
            checkpoint=str(self.run.finished_checkpoints()[-1]),
            best_checkpoint=str(best),
            metrics=last.values,
            seconds=self.stopwatch.total,
        )
        write_json(self.run.result, result)

    def _speed(self) -> dict[str, float]:
        """Rates since the last lap, tflops_per_second of all ranks, and mfu: its share of what the GPUs can."""
        rates = self.stopwatch.lap()
        text = round(rates["tokens_per_second"] / rates["samples_per_second"])
        forward = flops_per_sample(self.file.config.model, self.tokenizer.vocab_size, text)
        flops = 3 * forward * rates["samples_per_second"]
        peak = peak_flops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        bf16 = self.file.config.train.precision == "bf16"
        mfu = {"mfu": flops / (peak * self.place.world_size)} if peak and bf16 else {}
        return {**rates, "tflops_per_second": flops / 1e12, **mfu}

    def _validate(self) -> dict[str, float]:
        settings = self.file.config.train
        rows = settings.batch_size // self.place.world_size
        with mixed_precision(self.device, bf16=settings.precision == "bf16"):
            found = validate(
                self.model,
                self.validate_shards,
                self.collator,
                num_rows=settings.validate_rows,
                batch_size=min(rows, settings.rows_at_once or rows),
                rank=self.place.rank,
                world_size=self.place.world_size,
                alive=self.watch.alive,
            )
        if isinstance(self.model, FSDPModule):
            # It keeps what it has gathered until a backward pass: the next step would use these weights, not its own.
            self.model.reshard()
        return found

    def _write_samples(self, done: int) -> None:
        """Rank 0's captions; of a model in slices it makes a whole copy, for which every rank is needed."""
        settings, model = self.file.config.train, self.model
        if self.sharded:
            weights = {name: full_tensor(tensor) for name, tensor in model_weights(model).items()}
            if self.place.rank == 0:
                model = self.origin.plain(weights, self.device)
        if self.place.rank == 0:
            with mixed_precision(self.device, bf16=settings.precision == "bf16"):
                samples = caption_samples(model, self.tokenizer, self.validate_shards, settings.caption_samples)
            write_json(self.run.samples(done), CaptionSamples(step=done, samples=samples))
