"""Training as one rank of a run: check the batch size, join the process group, train, and write the result."""

from __future__ import annotations

from torch import distributed

from pipelines.errors import UserError
from pipelines.formats.run_folder import RunFolder
from pipelines.worker.rank.env import RankEnv
from pipelines.worker.rank.failure import RankMonitor
from pipelines.worker.rank.group import pick_device, process_group
from pipelines.worker.train.trainer import Trainer


def train(run: RunFolder, env: RankEnv, monitor: RankMonitor, kind: type[Trainer]) -> None:
    """Train from the last checkpoint to the last step. Rank 0 writes result.json when every rank is done.

    Args:
        run: run folder.
        env: number of this rank and number of ranks, once for the whole run and once for this host.
        monitor: monitor to which the rank reports its progress.
        kind: class of the trainer.

    Raises:
        UserError: the batch size cannot be divided by the number of ranks, the platform requires GPUs and the host has
            too few GPUs, the process group contains a rank of another run, or the run and its checkpoint have different
            settings.
        LakesightError: shards or checkpoints are damaged, or a loss is not finite.
    """
    file = run.read_run()
    settings = file.config.train
    if settings.batch_size % env.world_size:
        raise UserError(
            "the global batch cannot be divided equally among the ranks",
            where="train.batch_size",
            got=f"batch size {settings.batch_size} for {env.world_size} ranks",
            fix="set train.batch_size to a multiple of the number of ranks",
        )
    monitor.set_timeout(settings.timeout_seconds)
    device = pick_device(file.config.platform, env)
    with process_group(env, device, settings.timeout_seconds):
        trainer = kind.build(run, file, env, monitor, device)
        trainer.train()
        trainer.wait_for_checkpoint()
        distributed.barrier()
        if env.rank == 0:
            trainer.write_result()
