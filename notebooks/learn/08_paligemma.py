# Databricks notebook source
# MAGIC %md
# MAGIC # 8. PaliGemma's prefix mask, and boxes on a picture
# MAGIC
# MAGIC A caption answers no question. PaliGemma, a published vision-language model, reads a *prompt*. For the prompt
# MAGIC "detect cat", the answer is the place of the cat. For "what shape is it?", the answer is the shape. Two ideas
# MAGIC make this work, and both are in the library:
# MAGIC
# MAGIC * A **prefix mask**: picture and prompt may look at each other in both directions. Only the answer has a
# MAGIC   causal mask.
# MAGIC * **Location tokens**: a place is written as text, with 1,024 extra tokens from `<loc0000>` to `<loc1023>`.
# MAGIC
# MAGIC We draw the mask, show what the mask changes, and train a small model that answers two questions about a
# MAGIC picture.

# COMMAND ----------

import tempfile
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Rectangle

import vlm

plt.rcParams.update({"figure.figsize": (4, 2.6), "figure.constrained_layout.use": True, "font.size": 9})
torch.manual_seed(0)  # the same random numbers in each run
torch.set_num_threads(1)  # our tensors are small, and one thread is fastest for them

# COMMAND ----------

# MAGIC %md
# MAGIC ## Three masks
# MAGIC
# MAGIC A mask says which position (row) may look at which other position (column), see notebook 2. The library makes
# MAGIC all masks from one row of marks. A mark of 1 means: *earlier positions must not look here*. For each position,
# MAGIC we sum all marks up to this position. A position may look at every position whose sum is not larger than its
# MAGIC own sum. For example, the marks 0 0 1 1 have the sums 0 0 1 2. Therefore positions 0 and 1 look at each other,
# MAGIC position 2 looks at positions 0 to 2, and position 3 looks at all positions.
# MAGIC
# MAGIC Our sequence has 4 picture slots, 3 tokens of prompt, and 3 tokens of answer. The sequence has no padding, so
# MAGIC all positions are `valid`. Blue means that looking is allowed. The orange lines mark the end of the prompt.

# COMMAND ----------

from vlm.layers.mask import attention_mask, prefix_marks

T, PREFIX = 10, 7
names = ["picture"] * 4 + ["prompt"] * 3 + ["answer"] * 3
marks = {
    "causal": torch.ones(1, T, dtype=torch.long),
    "prefix": prefix_marks(torch.tensor([PREFIX]), T),
    "full": torch.zeros(1, T, dtype=torch.long),
}
valid = torch.ones(1, T, dtype=torch.bool)
masks = {name: attention_mask(valid, each)[0, 0] for name, each in marks.items()}

figure, axes = plt.subplots(1, 3, figsize=(4.2, 1.9))
for axis, (name, mask) in zip(axes, masks.items(), strict=True):
    axis.imshow(mask, cmap="Blues", vmin=0, vmax=1.4)
    axis.set_title(name, fontsize=9)
    axis.axhline(PREFIX - 0.5, color="tab:orange")
    axis.axvline(PREFIX - 0.5, color="tab:orange")
    axis.set(xticks=[], yticks=[])
axes[0].set_yticks([1.5, 5, 8], ["picture", "prompt", "answer"], fontsize=8)
print("marks of the prefix mask:")
print(marks["prefix"][0].tolist())
assert masks["prefix"][:PREFIX, :PREFIX].all()  # the prefix sees all of itself
assert not masks["prefix"][:, PREFIX:].triu(1 - PREFIX)[:PREFIX].any()  # the prefix sees nothing of the answer
assert torch.equal(masks["prefix"][PREFIX:, PREFIX:], masks["causal"][PREFIX:, PREFIX:])  # the answer has a causal mask

# COMMAND ----------

# MAGIC %md
# MAGIC ## Pictures with questions
# MAGIC
# MAGIC Each scene has one thing. We ask two questions about the thing: "detect" asks for the box around the thing, and
# MAGIC "what shape is it?" asks for the shape. A box is four numbers: top, left, bottom, right. PaliGemma divides each
# MAGIC side of the picture into 1,024 steps, whatever the picture's size, and counts the four numbers in steps. Our
# MAGIC pictures are small, so we round to 16 larger steps of 4 pixels. One larger step has the length of 64 of
# MAGIC PaliGemma's steps. After the box, the answer names the thing in the box, here always as `thing`.

# COMMAND ----------

from pipelines.scenes import COLOURS, LOCATIONS, Scene, SceneObject, draw

SHAPES = ("circle", "square", "star")
rng = np.random.default_rng(0)


def find(picture, colour):
    """Return the box (top, left, bottom, right) of the pixels of a colour."""
    near = np.abs(np.array(picture).astype(int) - np.array(COLOURS[colour])).sum(axis=2) < 70
    down, across = np.flatnonzero(near.any(axis=1)), np.flatnonzero(near.any(axis=0))
    return int(down[0]), int(across[0]), int(down[-1]) + 1, int(across[-1]) + 1


def to_tokens(box):
    """Write a box of a 64 x 64 picture as four location tokens, rounded to 16 steps."""
    return "".join(f"<loc{min(1023, round(edge / 4) * 64):04d}>" for edge in box)


things = [SceneObject("large", str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))) for _ in range(1600)]
pictures = [draw(Scene((thing,), str(rng.choice(list(LOCATIONS)))), rng) for thing in things]
boxes = [find(picture, thing.colour) for picture, thing in zip(pictures, things, strict=True)]
dialogues = [  # two pairs (prompt, answer) for each picture
    [("detect", f"{to_tokens(box)} thing"), ("what shape is it?", thing.shape)]
    for thing, box in zip(things, boxes, strict=True)
]
for prompt, answer in dialogues[0]:
    print(f"{prompt} ->")
    print(textwrap.fill(answer, 38))

# COMMAND ----------

# MAGIC %md
# MAGIC ## A tokenizer with places
# MAGIC
# MAGIC PaliGemma's tokenizer is a file, `tokenizer.json`. With the library `tokenizers`, we write a small file of the
# MAGIC same kind: frequent pieces of words, three control tokens (padding, start and end), and the 1,024 location
# MAGIC tokens. You need not understand every line of the next cell. The cell makes a tokenizer in which each
# MAGIC `<loc....>` is one token. `parse_regions` turns the text of an answer back into boxes.

# COMMAND ----------

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from vlm.text.regions import parse_regions

backend = Tokenizer(models.BPE())
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
backend.decoder = decoders.ByteLevel()
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
texts = {text for pairs in dialogues for prompt, answer in pairs for text in (prompt, answer.split(">")[-1])}
backend.train_from_iterator(sorted(texts) * 50, trainer)
backend.add_special_tokens(["<pad>", "<bos>", "<eos>"])
backend.add_tokens([f"<loc{number:04d}>" for number in range(1024)])
path = Path(tempfile.mkdtemp()) / "tokenizer.json"
backend.save(str(path))

(region,) = parse_regions(dialogues[0][0][1])
print("tokens:", *backend.encode(dialogues[0][0][1]).tokens[:4], sep="\n  ")
print("label:", region.label)
print("top, left, bottom, right:", region[:4], sep="\n  ")

# COMMAND ----------

# MAGIC %md
# MAGIC ## The model
# MAGIC
# MAGIC We use the model of notebook 4, with `mask: {kind: prefix}`. Before training, we check what the mask does. We
# MAGIC change the last token of the *prompt*. A position notices this change if the position's vector after the last
# MAGIC block changes. Positions that notice the change are blue in the plot. The picture comes before the prompt. With
# MAGIC a causal mask, the positions of the picture therefore cannot notice the question. With a prefix mask, they
# MAGIC notice the question: the model reads the picture *with the question in mind*.

# COMMAND ----------

from pipelines.formats.shards import Row
from pipelines.worker.data.batches import Collator
from vlm.batch import Batch
from vlm.image import to_pixels


def build(mask):
    attention = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 16}
    blocks = {"width": 64, "depth": 1, "attention": attention, "mlp": {"kind": "plain", "mlp_width": 128}}
    text = {"kind": "json", "path": str(path), "vocab_size": backend.get_vocab_size()}
    return vlm.build(
        {
            "image": {"size": 32},
            "text": {**text, "bos": "<bos>", "eos": "<eos>", "pad": "<pad>"},
            "vision": {"stem": {"kind": "patch", "patch_size": 8}, "transformer": blocks},
            "decoder": {
                "context": 48,
                "tie_embeddings": True,
                "transformer": {**blocks, "depth": 2, "position": {"kind": "rotary"}},
            },
            "mask": {"kind": mask},
            "generation": {"max_new_tokens": 8},
        }
    )


captioner = build("prefix")
model, tokenizer = captioner.model, captioner.tokenizer
collator = Collator(tokenizer, model.config)
rows = [
    Row(str(n), to_pixels(picture, model.config.image), pair)
    for n, (picture, pair) in enumerate(zip(pictures, dialogues, strict=True))
]


def noticed(model):
    """Return which positions change when the last token of the prompt changes."""
    batch = collator.collate(rows[:1], rows[0].texts[:1])
    last = int(batch.prefix_lengths_B[0]) - 1
    changed = batch.tokens_BT.clone()
    changed[0, last] = 5
    other = Batch(batch.pixels_PHWC, changed, batch.labels_BT, batch.prefix_lengths_B)
    with torch.no_grad():
        difference = (model.hidden_states(batch) - model.hidden_states(other)).abs().amax(dim=2)[0]
    return (difference > 1e-6), last


rows_of_plot = {}
for kind, each in (("causal", build("causal").model), ("prefix", model)):
    changed, last = noticed(each)
    rows_of_plot[kind] = changed
    print(f"{kind}: {int(changed[:16].sum())} of 16 slots notice it")
plt.figure(figsize=(4.2, 1.5))
plt.imshow(torch.stack(list(rows_of_plot.values())), cmap="Blues", aspect="auto", vmin=0, vmax=1.4)
plt.yticks([0, 1], list(rows_of_plot))
plt.axvline(15.5, color="tab:orange")
plt.xlabel("position (left of the line: the picture)")
assert rows_of_plot["causal"][:last].sum() == 0
assert rows_of_plot["prefix"][:last].all()

# COMMAND ----------

# MAGIC %md
# MAGIC ## Train, and measure with IoU
# MAGIC
# MAGIC A box is rarely exactly right. *Intersection over union* (IoU) measures how well two boxes agree: the area that
# MAGIC both boxes cover, divided by the area that at least one of the boxes covers. IoU is 1 for equal boxes and 0 for
# MAGIC boxes that do not touch. As a control, we also compare each box with the box of *another* picture. For a model
# MAGIC that always gives the same box, both comparisons would give the same IoU. Even a perfect model stays below 1,
# MAGIC because the boxes in its answers are rounded.

# COMMAND ----------

from vlm.config import CosineScheduleConfig
from vlm.training.loop import fit
from vlm.training.optim import build_adamw, schedule


def iou(a, b):
    height = min(a[2], b[2]) - max(a[0], b[0])
    width = min(a[3], b[3]) - max(a[1], b[1])
    both = max(0, height) * max(0, width)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def to_loc(box):
    return [16 * edge for edge in box]  # a pixel of a 64 x 64 picture is 16 of 1,024 steps


STEPS, order, losses = 480, np.random.default_rng(1), []


def batches():
    for _ in range(STEPS):
        chosen = [rows[n] for n in order.choice(1500, 32, replace=False)]
        yield [collator.collate(chosen, [row.texts[order.integers(2)] for row in chosen])]


fit(
    model, build_adamw(model, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.01), batches(), start=0, grad_clip=1.0, seed=0,
    lr_schedule=lambda step: 4e-3 * schedule(CosineScheduleConfig(), step, steps=STEPS, warmup_steps=20), rank=0,
    device=torch.device("cpu"), bf16=False, on_step=lambda report: losses.append(report.loss),
)  # fmt: skip
model.eval()


def ask(prompt):
    """Ask a question about each of the 100 pictures that training has not seen."""
    return [found.caption for found in captioner.caption(pictures[1500:], prompt)]


found = [parse_regions(text) for text in ask("detect")]
true = [to_loc(box) for box in boxes[1500:]]
scores = [iou(each[0], box) if each else 0.0 for each, box in zip(found, true, strict=True)]
control = [iou(each[0], box) if each else 0.0 for each, box in zip(found, true[1:] + true[:1], strict=True)]
shapes = np.mean([text == thing.shape for text, thing in zip(ask("what shape is it?"), things[1500:], strict=True)])
print(f"IoU with the thing in the picture: {np.mean(scores):.2f}")
print(f"IoU with another picture's thing: {np.mean(control):.2f}")
print(f"correct shapes: {shapes:.0%}")
print(f"correct by a random guess: {1 / len(SHAPES):.0%}")
assert np.mean(scores) > 0.3
assert np.mean(scores) > 2 * np.mean(control)
assert shapes > 0.6

plt.figure(figsize=(4, 2.2))
plt.plot(losses)
plt.xlabel("training step")
plt.ylabel("loss")

# COMMAND ----------

# MAGIC %md
# MAGIC ## Boxes on pictures
# MAGIC
# MAGIC We ask both questions about each picture. `to_box` turns steps into pixels of the original picture. The function
# MAGIC takes into account how the picture was resized for the model.

# COMMAND ----------

from vlm.image import compute_resize
from vlm.text.regions import to_box

figure, axes = plt.subplots(2, 2, figsize=(4, 4.6))
for axis, picture in zip(axes.flat, pictures[1500:], strict=False):
    answers = {prompt: captioner.caption([picture], prompt)[0].caption for prompt, _ in dialogues[0]}
    axis.imshow(picture)
    axis.set_title(answers["what shape is it?"], fontsize=9)
    axis.set(xticks=[], yticks=[])
    for region in parse_regions(answers["detect"]):
        left, top, right, bottom = to_box(region, compute_resize(*picture.size, model.config.image))
        size = (right - left, bottom - top)
        axis.add_patch(Rectangle((left - 0.5, top - 0.5), *size, fill=False, edgecolor="black", linewidth=2))

# COMMAND ----------

# MAGIC %md
# MAGIC ## What you have seen
# MAGIC
# MAGIC * One row of marks makes causal, prefix and full masks.
# MAGIC * With a prefix mask, the picture is read with the question in mind. With a causal mask, the picture is read
# MAGIC   without the question.
# MAGIC * The model writes a place in the same way as a word. No new layer is needed, only new tokens.
# MAGIC
# MAGIC The published PaliGemma is loaded with `vlm.load(folder)`, and `lakesight ask` draws its boxes.
# MAGIC
# MAGIC ## Exercises
# MAGIC
# MAGIC **1.** A picture has 640 x 480 pixels and is stretched to the input square. Which box in pixels is
# MAGIC `<loc0256><loc0000><loc0512><loc0512>`?
# MAGIC
# MAGIC <details><summary>Solution</summary>
# MAGIC
# MAGIC ```python
# MAGIC (region,) = parse_regions("<loc0256><loc0000><loc0512><loc0512> cat")
# MAGIC box = to_box(region, compute_resize(640, 480, model.config.image))
# MAGIC assert box == (0, 120, 320, 240)  # left, top, right, bottom
# MAGIC ```
# MAGIC
# MAGIC The numbers come in the order top, left, bottom, right. A quarter of 480 is 120.
# MAGIC
# MAGIC </details>
# MAGIC
# MAGIC **2.** Write the marks of a sequence with a *second* question after the first answer. Picture and first question
# MAGIC have 4 positions, which all see each other. The first answer and the second question have 5 positions with a
# MAGIC causal mask.
# MAGIC
# MAGIC <details><summary>Solution</summary>
# MAGIC
# MAGIC ```python
# MAGIC marks_of_two = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
# MAGIC mask = attention_mask(torch.ones(1, 9, dtype=torch.bool), marks_of_two)[0, 0]
# MAGIC assert mask[:4, :4].all()
# MAGIC assert torch.equal(mask[4:], torch.ones(9, 9, dtype=torch.bool).tril()[4:])
# MAGIC ```
# MAGIC
# MAGIC </details>
# MAGIC
# MAGIC **3.** What is the IoU of two squares of side 10 if one is moved by 5 to the right?
# MAGIC
# MAGIC <details><summary>Solution</summary>
# MAGIC
# MAGIC ```python
# MAGIC assert abs(iou((0, 0, 10, 10), (0, 5, 10, 15)) - 1 / 3) < 1e-9
# MAGIC ```
# MAGIC
# MAGIC The squares share half a square, and the union of the squares is one and a half squares. IoU is a strict
# MAGIC measure.
# MAGIC
# MAGIC </details>
# MAGIC
# MAGIC **Next:** every training so far ran in one process. [9. From one process to ranks](09_ranks.py) trains in
# MAGIC several processes, with the same losses.
