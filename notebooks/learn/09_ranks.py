# Databricks notebook source
# MAGIC %md
# MAGIC # 9. From one process to ranks: the same losses
# MAGIC
# MAGIC One computer is too slow for a large model, so several processes train the model together. Each of these
# MAGIC processes is a *rank*. In *data-parallel* training, every rank has the whole model and reads a part of the rows.
# MAGIC If data-parallel training is done right, 2 or 8 ranks learn **the same** as one rank, only faster. This notebook
# MAGIC shows why, shows a mistake that nobody notices, and then starts real processes and compares their losses.

# COMMAND ----------

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.nn import functional as F

plt.rcParams.update({"figure.figsize": (4, 2.6), "figure.constrained_layout.use": True, "font.size": 9})
torch.manual_seed(0)  # the same random numbers in each run
torch.set_num_threads(1)  # our tensors are small, and one thread is fastest for them

# COMMAND ----------

# MAGIC %md
# MAGIC ## Half the rows, the same gradient
# MAGIC
# MAGIC A *gradient* says for each weight in which direction the loss grows. A training step computes the gradient of
# MAGIC the loss over a batch of rows, and moves each weight a little in the opposite direction.
# MAGIC
# MAGIC The loss is a mean over rows, so the gradient is a mean over rows too. Suppose that two ranks each compute the
# MAGIC gradient of one half of the batch. Then the mean of the two gradients is the gradient of the whole batch. We
# MAGIC check this with a small linear layer. `torch.autograd.grad` returns the gradient of a loss without a training
# MAGIC step.

# COMMAND ----------

layer = torch.nn.Linear(8, 4)
x, y = torch.randn(32, 8), torch.randint(4, (32,))


def gradient(loss):
    return torch.autograd.grad(loss, layer.weight)[0]


whole = gradient(F.cross_entropy(layer(x), y))
halves = [gradient(F.cross_entropy(layer(x[part]), y[part])) for part in (slice(0, 16), slice(16, 32))]
difference = (whole - (halves[0] + halves[1]) / 2).abs().max().item()
print(f"mean of two halves differs by {difference:.0e}")
assert difference < 1e-6

# COMMAND ----------

# MAGIC %md
# MAGIC The exchange of gradients is called *all-reduce*: every rank gives its gradient, and every rank gets the mean.
# MAGIC Then all ranks make the same step. All ranks began with the same weights, so they always have the same weights.
# MAGIC Here is how 24 rows of a batch are divided among 1, 2 and 3 ranks:

# COMMAND ----------

figure, axes = plt.subplots(figsize=(4, 1.7))
parts_of = [np.repeat(np.arange(ranks), 24 // ranks) for ranks in (1, 2, 3)]
axes.imshow(parts_of, cmap="Set2", aspect="auto", vmin=0, vmax=7)
for row, ranks in enumerate((1, 2, 3)):
    for rank in range(ranks):
        axes.text((rank + 0.5) * 24 / ranks - 0.5, row, f"rank {rank}", ha="center", va="center", fontsize=9)
axes.set(xlabel="row of the batch", xticks=(0, 8, 12, 16, 23))
axes.set_yticks(range(3), ["1 rank", "2 ranks", "3 ranks"])
assert all(np.bincount(parts).tolist() == [24 // ranks] * ranks for ranks, parts in enumerate(parts_of, 1))

# COMMAND ----------

# MAGIC %md
# MAGIC ## The mistake: captions of different lengths
# MAGIC
# MAGIC Our loss is not a mean over *rows* but over *tokens*. Suppose that the captions of rank 0 have 300 tokens in
# MAGIC all, and the captions of rank 1 have only 100 tokens. If each rank computes its own mean and we average the two
# MAGIC means, a token of rank 1 counts three times as much as a token of rank 0. No error appears, but the model learns
# MAGIC something different with each number of ranks.
# MAGIC
# MAGIC The library divides the *sum* of the losses by the number of tokens **of all ranks**. We compare this method
# MAGIC with the mean of the two means. For each method, the output shows the largest error in the gradient, divided by
# MAGIC the largest number in the right gradient.

# COMMAND ----------

tokens_x, tokens_y = torch.randn(400, 8), torch.randint(4, (400,))
parts = (slice(0, 300), slice(300, 400))
whole = gradient(F.cross_entropy(layer(tokens_x), tokens_y))

own_means = [gradient(F.cross_entropy(layer(tokens_x[part]), tokens_y[part])) for part in parts]
wrong = (own_means[0] + own_means[1]) / 2

sums = [gradient(F.cross_entropy(layer(tokens_x[part]), tokens_y[part], reduction="sum")) for part in parts]
right = (sums[0] + sums[1]) / 400

size = whole.abs().max().item()
error_wrong = (wrong - whole).abs().max().item() / size
error_right = (right - whole).abs().max().item() / size
print(f"mean of means:         {error_wrong:.0%} off")
print(f"sum over all / tokens: {error_right:.4%} off")
assert error_wrong > 0.02
assert error_right < 1e-5

plt.figure(figsize=(4.2, 2))
plt.barh(["rank 0,\n300 tokens", "rank 1,\n100 tokens"], [0.5 / 300, 0.5 / 100])
plt.gca().invert_yaxis()
plt.axvline(1 / 400, color="black", linestyle="--", label="right weight, 1/400")
plt.xlabel("weight of one token in the mean of means")
plt.legend(fontsize=8)

# COMMAND ----------

# MAGIC %md
# MAGIC ## Real processes
# MAGIC
# MAGIC Now we start real ranks. A rank is a Python program like any other. Two environment variables tell the program
# MAGIC its own number (`RANK`) and the number of ranks (`WORLD_SIZE`). The program below uses the training loop of the
# MAGIC library:
# MAGIC
# MAGIC * `init_process_group` connects the ranks. A file tells each rank the addresses of the others. All messages
# MAGIC   stay inside this computer. `gloo` is the part of PyTorch through which processes on CPUs exchange numbers.
# MAGIC * `wrap_ddp` wraps the model in PyTorch's *DDP*, which does the all-reduce during `loss.backward()`.
# MAGIC * Each step has a *global batch* of 24 rows. With two ranks, rank 0 takes rows 0 to 11 and rank 1 takes rows 12
# MAGIC   to 23.
# MAGIC * `fit` is the same loop that notebooks 4 to 8 use.
# MAGIC
# MAGIC Each rank is a process of its own, so Python must start each rank from a file. The program is therefore a text
# MAGIC in this notebook, and a later cell writes the text to a file. In the text `CONFIG`, `&blocks` gives a name to
# MAGIC some settings, and `*blocks` repeats these settings at another place.

# COMMAND ----------

PROGRAM = '''
import json, os, sys
import numpy as np, torch
from torch import distributed
import vlm
from pipelines.formats.shards import Row
from pipelines.scenes import draw, random_scene
from pipelines.worker.data.batches import Collator
from vlm.image import to_pixels
from vlm.training.loop import fit
from vlm.training.optim import build_adamw
from vlm.training.parallel import wrap_ddp

rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.set_num_threads(1)
if ranks > 1:
    distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=ranks)

rng = np.random.default_rng(0)
scenes = [random_scene(rng) for _ in range(240)]
captioner = vlm.build(sys.argv[2], [scene.caption for scene in scenes])
model, collator = captioner.model, Collator(captioner.tokenizer, captioner.model.config)
rows = [Row(str(n), to_pixels(draw(scene, rng), model.config.image), [("", scene.caption)])
        for n, scene in enumerate(scenes)]

BATCH, STEPS = 24, 30
order = np.random.default_rng(1)

def batches():
    for _ in range(STEPS):
        chosen = order.choice(len(rows), BATCH, replace=False)  # the same choice on every rank
        mine = [rows[n] for n in np.split(chosen, ranks)[rank]]
        yield [collator.collate(mine, [row.texts[0] for row in mine])]

losses, tokens = [], []

def on_step(report):
    losses.append(report.loss)
    tokens.append(report.tokens)

fit(wrap_ddp(model, torch.device("cpu")), build_adamw(model, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01), batches(),
    start=0, lr_schedule=lambda step: 3e-3, grad_clip=1.0, seed=0, rank=rank, device=torch.device("cpu"), bf16=False,
    on_step=on_step)
checksum = sum(float(parameter.detach().double().abs().sum()) for parameter in model.parameters())
print(json.dumps({"losses": losses, "tokens": tokens, "checksum": checksum}))
if ranks > 1:
    distributed.destroy_process_group()
'''

CONFIG = """
image: {size: 32}
text: {kind: bpe, vocab_size: 320}
vision:
  stem: {kind: patch, patch_size: 8}
  transformer: &blocks
    width: 32
    depth: 1
    attention: {num_heads: 4, num_kv_heads: 4, head_dim: 8}
    mlp: {kind: plain, mlp_width: 64}
decoder: {context: 64, transformer: *blocks}
generation: {max_new_tokens: 24}
"""

# COMMAND ----------

# MAGIC %md
# MAGIC We run the program with 1, 2 and 3 ranks, and collect what each rank prints.

# COMMAND ----------

def start(ranks):
    """Run the program in `ranks` processes, and return what each rank reports."""
    with tempfile.TemporaryDirectory() as folder:
        program, config = Path(folder) / "rank.py", Path(folder) / "model.yml"
        program.write_text(PROGRAM)
        config.write_text(CONFIG)
        processes = []
        for rank in range(ranks):
            variables = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(ranks), "TORCH_CPP_LOG_LEVEL": "ERROR"}
            variables["GLOO_SOCKET_IFNAME"] = "lo" if sys.platform == "linux" else "lo0"  # only inside this computer
            variables["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
            command = [sys.executable, str(program), str(Path(folder) / "meeting"), str(config)]
            processes.append(subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True))
        try:
            outputs = [process.communicate(timeout=150)[0] for process in processes]
        finally:  # if a rank fails, the other ranks must not wait for it
            for process in processes:
                process.kill()
        assert all(process.returncode == 0 for process in processes)
        return [json.loads(output.splitlines()[-1]) for output in outputs]


reports = {ranks: start(ranks) for ranks in (1, 2, 3)}
print("step   1 rank    2 ranks   3 ranks")
for step in (0, 10, 20, 29):
    print(f"{step:>4}", "".join(f"{reports[ranks][0]['losses'][step]:10.6f}" for ranks in (1, 2, 3)))

# COMMAND ----------

# MAGIC %md
# MAGIC The three runs print the same losses. The losses are not equal bit for bit: each addition is rounded, and two or
# MAGIC three ranks add the same numbers in another order than one rank. The right panel shows how small the differences
# MAGIC are. Where a curve touches the bottom, there is no difference at all.

# COMMAND ----------

curves = {ranks: np.array(found[0]["losses"]) for ranks, found in reports.items()}
figure, axes = plt.subplots(1, 2, figsize=(4.2, 2.6))
for (ranks, losses), style in zip(curves.items(), ("-", "--", ":"), strict=True):
    axes[0].plot(losses, style, linewidth=4 - ranks, label=f"{ranks} rank{'s' * (ranks > 1)}")
axes[0].set(xlabel="training step", ylabel="loss")
axes[0].legend(fontsize=8)
for ranks in (2, 3):
    axes[1].plot(np.abs(curves[ranks] - curves[1]) + 1e-9, label=f"{ranks} ranks")
axes[1].set(xlabel="training step", yscale="log", ylim=(1e-9, 1))
axes[1].set_title("difference to 1 rank", fontsize=9)
axes[1].legend(fontsize=8)

worst = max(np.abs(curves[ranks] - curves[1]).max() for ranks in (2, 3))
print(f"largest difference of a loss: {worst:.0e}")
assert worst < 1e-3
assert curves[1][-1] < 3.5 < 5 < curves[1][0]  # the model learns
for found in reports.values():  # all ranks of a run report the same losses, and end with the same weights
    assert all(report == found[0] for report in found)
assert reports[1][0]["tokens"] == reports[2][0]["tokens"] == reports[3][0]["tokens"]

# COMMAND ----------

# MAGIC %md
# MAGIC ## From here to a cluster
# MAGIC
# MAGIC On Databricks, the same loop runs on several machines. *TorchDistributor*, a part of Spark, starts the ranks
# MAGIC on the machines of the cluster, and gives each rank its `RANK` and `WORLD_SIZE`. The ranks read their rows
# MAGIC from files (*shards*), train with `fit`, and save the model from time to time (*checkpoints*). On one laptop,
# MAGIC `lakesight train` starts its ranks in the way that you have just seen.
# MAGIC
# MAGIC ## What you have seen
# MAGIC
# MAGIC * The gradient of a batch is the mean of the gradients of its parts, if every *token* counts the same.
# MAGIC * All-reduce makes all ranks take the same step, so they keep the same weights.
# MAGIC * One, two and three real processes learn the same, up to rounding.
# MAGIC
# MAGIC ## Exercises
# MAGIC
# MAGIC **1.** Show with three numbers that the order of an addition matters to a computer.
# MAGIC
# MAGIC <details><summary>Solution</summary>
# MAGIC
# MAGIC ```python
# MAGIC assert (0.1 + 0.2) + 0.3 != 0.1 + (0.2 + 0.3)
# MAGIC ```
# MAGIC
# MAGIC </details>
# MAGIC
# MAGIC **2.** With 8 ranks, a global batch of 256 rows and 10,000 training rows: how many rows does a rank see in a
# MAGIC step, and after how many steps have the ranks seen every row once?
# MAGIC
# MAGIC <details><summary>Solution</summary>
# MAGIC
# MAGIC ```python
# MAGIC assert 256 // 8 == 32
# MAGIC assert -(-10_000 // 256) == 40
# MAGIC ```
# MAGIC
# MAGIC The number of steps depends on the global batch, not on the number of ranks.
# MAGIC
# MAGIC </details>
# MAGIC
# MAGIC **3.** What happens if the ranks start from *different* weights, and exchange nothing except gradients? Try this
# MAGIC with two linear layers and ten steps.
# MAGIC
# MAGIC <details><summary>Solution</summary>
# MAGIC
# MAGIC ```python
# MAGIC one, two = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)
# MAGIC first = (one.weight - two.weight).abs().max().item()
# MAGIC for _ in range(10):
# MAGIC     pair = [torch.autograd.grad(F.cross_entropy(each(x), y), each.weight)[0] for each in (one, two)]
# MAGIC     for each in (one, two):
# MAGIC         each.weight.data -= 0.1 * (pair[0] + pair[1]) / 2
# MAGIC last = (one.weight - two.weight).abs().max().item()
# MAGIC assert abs(first - last) < 1e-5
# MAGIC ```
# MAGIC
# MAGIC Both layers make equal steps from different weights, so the weights stay different, and the mean gradient fits
# MAGIC neither layer. DDP therefore copies the weights of rank 0 to all ranks at the start.
# MAGIC
# MAGIC </details>
# MAGIC
# MAGIC **Next:** you have built every part. Run `make demo` to see all parts together, from pictures in a table to
# MAGIC captions in a table. The README then shows how to use your own pictures.
