"""Functions that check that killed and restarted ranks compute exactly the same as uninterrupted ranks."""

from __future__ import annotations

import re

from processes import torchrun
from rank_faults import Fault

from pipelines.formats.run_folder import RunFolder, write_json

MEASURED = re.compile("per_second|data_wait|system/")
"""Pattern of the metrics that differ between two runs with equal configs, because these metrics are measurements."""


def require_exact_resume(whole: RunFolder, broken: RunFolder, *, step: int, ranks: int = 2) -> None:
    """Train two equal runs, one of them killed at a step and started again, and compare the results.

    The results are the last checkpoints, the metrics except measurements, and the sample captions.
    """
    done = torchrun(whole, ranks)
    assert done.returncode == 0, done.stdout
    write_json(broken.path / "fault.json", Fault(kind="kill", rank=ranks - 1, step=step))
    assert torchrun(broken, ranks, "rank_faults").returncode != 0
    assert (broken.path / "struck.json").exists()
    assert not broken.result.exists()
    done = torchrun(broken, ranks)
    assert done.returncode == 0, done.stdout
    assert re.search(r"from step [1-9]\d* to", broken.log(0).read_text())
    last = whole.finished_checkpoints()[-1].name
    for name in ("model.safetensors", "training.safetensors"):
        assert (whole.checkpoints / last / name).read_bytes() == (broken.checkpoints / last / name).read_bytes()
    assert computed(whole) == computed(broken)
    assert list(whole.read_samples()) == list(broken.read_samples())


def computed(run: RunFolder) -> list[tuple[int, dict[str, float]]]:
    """Return the metrics of each step, without the metrics that match `MEASURED`."""
    return [
        (m.step, {name: value for name, value in m.values.items() if not MEASURED.search(name)})
        for m in run.read_metrics()
    ]
