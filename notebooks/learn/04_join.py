# Databricks notebook source
# MAGIC %md
# MAGIC # 4. Join them: a model that describes pictures
# MAGIC
# MAGIC Notebook 1 turned a picture into a sequence of vectors. Notebook 3 trained a decoder that writes. This notebook
# MAGIC joins an encoder and a decoder into a *vision-language model*. The notebook also shows a common trap: a
# MAGIC vision-language model can have a low loss, write perfect sentences, and **ignore the picture completely**. You
# MAGIC will see how a single number reveals this.

# COMMAND ----------

import math
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import torch

import vlm

plt.rcParams.update({"figure.figsize": (4, 2.6), "figure.constrained_layout.use": True, "font.size": 9})
torch.manual_seed(0)  # the same random numbers in each run
torch.set_num_threads(1)  # our tensors are small, and one thread is fastest for them

# COMMAND ----------

# MAGIC %md
# MAGIC ## Pictures with captions
# MAGIC
# MAGIC We draw 1,600 scenes. Each scene has one of 6 colours, 3 shapes and 5 locations, so there are 90 different
# MAGIC captions. We keep 100 scenes away from training, to measure on pictures that the model has never seen.

# COMMAND ----------

from pipelines.scenes import COLOURS, Scene, SceneObject, draw

SHAPES = ("circle", "square", "star")
PLACES = ("in the top left corner", "in the top right corner", "in the middle",
          "in the bottom left corner", "in the bottom right corner")  # fmt: skip
rng = np.random.default_rng(0)


def random_scene():
    thing = SceneObject("large", str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)))
    return Scene((thing,), str(rng.choice(PLACES)))


scenes = [random_scene() for _ in range(1600)]
pictures = [draw(scene, rng) for scene in scenes]
captions = [scene.caption for scene in scenes]

figure, axes = plt.subplots(1, 3, figsize=(4, 2))
for axis, picture, caption in zip(axes, pictures, captions, strict=False):
    axis.imshow(picture)
    axis.set(xticks=[], yticks=[])
    axis.set_title(textwrap.fill(caption, 16), fontsize=8)

# COMMAND ----------

# MAGIC %md
# MAGIC ## The whole model
# MAGIC
# MAGIC The model has four parts, and you know two of them:
# MAGIC
# MAGIC 1. The **encoder** turns a picture, scaled to 32 x 32 pixels, into 16 vectors, one for each patch of 8 x 8
# MAGIC    pixels.
# MAGIC 2. The **projector**, a linear layer, translates the vectors of the encoder into the "language" of the decoder:
# MAGIC    the space of its token embeddings.
# MAGIC 3. The **fusion** puts the 16 vectors in front of the text. A place in the sequence with a picture vector is
# MAGIC    called an *image slot*.
# MAGIC 4. The **decoder** reads slots and text as one sequence, and predicts the next token.
# MAGIC
# MAGIC A config describes the whole model. The tokenizer (`kind: bpe`) learns frequent pieces of words from the
# MAGIC captions, so a caption needs far fewer tokens than characters.

# COMMAND ----------

attention = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 16}
config = {
    "image": {"size": 32},
    "text": {"kind": "bpe", "vocab_size": 340},
    "vision": {
        "stem": {"kind": "patch", "patch_size": 8},
        "transformer": {
            "width": 64, "depth": 1, "attention": attention, "mlp": {"kind": "plain", "mlp_width": 128},
        },
    },
    "projector": {"kind": "linear"},
    "decoder": {
        "context": 48,
        "transformer": {
            "width": 64, "depth": 2, "attention": attention, "mlp": {"kind": "gated", "mlp_width": 128},
            "position": {"kind": "rotary"},
        },
    },
    "generation": {"max_new_tokens": 24},
}  # fmt: skip

captioner = vlm.build(config, captions)
model, tokenizer = captioner.model, captioner.tokenizer
print(f"{sum(p.numel() for p in model.parameters()):,} weights")
pieces = " |".join(tokenizer.decode([i]) for i in tokenizer.encode(captions[0]))
print(textwrap.fill(f"tokens: {pieces}", 38))

# COMMAND ----------

# MAGIC %md
# MAGIC We follow one picture through the parts of the model, and print the shape of each tensor. A `Row` has an id, the
# MAGIC pixels of a picture, and pairs of a prompt and a caption. Here the prompts are empty. `Collator` builds the
# MAGIC sequence: 16 slots, a start token, and the caption. A slot has no token, so its id is -1. The *labels* are what
# MAGIC the model must predict at each position: the next token of the caption, or -100 at positions where the model has
# MAGIC nothing to predict. The model computes logits only for labels that are not -100: 7 tokens of the caption and an
# MAGIC end token, each with a score for all 340 tokens.

# COMMAND ----------

from pipelines.formats.shards import Row
from pipelines.worker.data.batches import Collator
from vlm.image import to_pixels

collator = Collator(tokenizer, model.config)
rows = [
    Row(str(number), to_pixels(picture, model.config.image), [("", caption)])
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True))
]


def make_batch(numbers):
    chosen = [rows[number] for number in numbers]
    return collator.collate(chosen, [row.texts[0] for row in chosen])


one = make_batch([0])
features = model.encode(one.pixels_PHWC)
sequence, _ = model.embed(one.tokens_BT, features)
print("pixels           ", tuple(one.pixels_PHWC.shape))
print("picture vectors  ", tuple(features.shape))
print("whole sequence   ", tuple(sequence.shape))
print("logits of targets", tuple(model(one).shape))
print("ids   ", one.tokens_BT[0, 14:20].tolist())
print("labels", one.labels_BT[0, 14:20].tolist())
assert torch.equal(sequence[0, :16], features[0])  # the slots hold the vectors of the picture

# COMMAND ----------

# MAGIC %md
# MAGIC ## What a blind writer can reach
# MAGIC
# MAGIC Imagine a writer who has read all captions but has never seen a picture. The writer knows the grammar
# MAGIC perfectly, but has to guess which of the 90 captions is right. The best guess gives each caption the share
# MAGIC 1/90, so the loss of a whole caption is log 90 = 4.5. This loss is divided among the tokens of the caption, so
# MAGIC the loss for *each token* is low, although the writer sees nothing. We call this loss for each token the *blind
# MAGIC floor*: no writer without a picture can reach a lower loss. The sentences of such a writer are perfect, but have
# MAGIC nothing to do with the picture.

# COMMAND ----------

tokens_of_caption = np.mean([len(tokenizer.encode(caption)) + 1 for caption in captions])  # + 1: the end token
blind_floor = math.log(6 * 3 * 5) / tokens_of_caption
print(f"{tokens_of_caption:.1f} tokens per caption")
print(f"blind floor: {blind_floor:.2f} for each token")
assert math.isclose(math.log(90), 4.5, abs_tol=0.01)

# COMMAND ----------

# MAGIC %md
# MAGIC ## The blind gap
# MAGIC
# MAGIC How do we notice a blind model? Show the model a **wrong** picture, from another row, and compare the losses:
# MAGIC
# MAGIC > blind gap = loss with wrong pictures - loss with the right pictures
# MAGIC
# MAGIC The loss of a model that uses its pictures gets much worse with wrong pictures. The loss of a blind model does
# MAGIC not change, so its gap is zero, *however low its loss is*. The library computes both losses with `blind_losses`:
# MAGIC for each row, two sums over its tokens, and the number of tokens. We measure both losses every 20 steps of
# MAGIC training.
# MAGIC
# MAGIC `fit` is the training loop of the library: the three steps of notebook 1. We provide a list of batches for each
# MAGIC step, here a list of one batch. After each step, `fit` calls `on_step`. The settings `rank`, `device` and `bf16`
# MAGIC are for larger machines. `build_adamw` makes the optimizer of notebook 3; you can ignore its setting `betas`.
# MAGIC The learning rate rises during the first 20 steps and then falls slowly (`schedule`), because careful first and
# MAGIC last steps give better models. `roll(1, 0)` moves each picture to the next row, so that every caption gets a
# MAGIC wrong picture.
# MAGIC
# MAGIC We train twice. The second model gets pictures that do not belong to the captions, so it can learn nothing from
# MAGIC the pictures. This second model shows how the curves of a blind model look.

# COMMAND ----------

from vlm.config import CosineScheduleConfig
from vlm.training.loop import fit
from vlm.training.objective import blind_losses
from vlm.training.optim import build_adamw, schedule

test = make_batch(range(1500, 1600))


def train(captioner, steps, right_pictures):
    """Train a model, and return (step, loss, loss with wrong pictures) on unseen rows, every 20 steps."""
    model, history = captioner.model, []
    order = np.random.default_rng(1)
    optimizer = build_adamw(model, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.01)

    def batches():
        for _ in range(steps):
            batch = make_batch(order.choice(1500, 32, replace=False))
            yield [batch if right_pictures else batch.with_pixels(batch.pixels_PHWC.roll(1, 0))]

    def on_step(report):
        if report.step % 20 == 0 or report.step == steps - 1:
            model.eval()
            right, wrong, tokens = blind_losses(model, test, test.pixels_PHWC.roll(1, 0))
            history.append((report.step, float(right.sum() / tokens.sum()), float(wrong.sum() / tokens.sum())))
            model.train()

    rate = CosineScheduleConfig()
    fit(
        model, optimizer, batches(), start=0, grad_clip=1.0, seed=0, rank=0, device=torch.device("cpu"), bf16=False,
        lr_schedule=lambda step: 4e-3 * schedule(rate, step, steps=steps, warmup_steps=20), on_step=on_step,
    )  # fmt: skip
    model.eval()
    return np.array(history)


seeing = train(captioner, 340, right_pictures=True)
blind_captioner = vlm.build(config, captions)
blind = train(blind_captioner, 160, right_pictures=False)

# COMMAND ----------

# MAGIC %md
# MAGIC At the start, the loss is 5.7, which is above the top of both panels. In the first 60 steps, the loss falls
# MAGIC steeply, because the models learn grammar. The steep fall ends at the dashed line, the best loss of a blind
# MAGIC writer. **Up to this point, both models look the same**. Then the left model discovers that the picture helps.
# MAGIC The two curves separate, and the blue curve leaves the panel. The distance between the two curves is the blind
# MAGIC gap. In the right panel, the orange curve hides the blue one.

# COMMAND ----------

figure, axes = plt.subplots(1, 2, figsize=(4.2, 2.8), sharey=True)
for axis, history, title in zip(axes, (seeing, blind), ("right pictures", "nothing to see"), strict=True):
    axis.plot(history[:, 0], history[:, 2], label="wrong picture")
    axis.plot(history[:, 0], history[:, 1], label="right picture")
    axis.axhline(blind_floor, color="grey", linestyle="--", label="blind writer")
    axis.set(title=title, xlabel="training step", ylim=(0, 2.2))
axes[0].set_ylabel("loss on unseen rows")
axes[1].legend(fontsize=8)

early = seeing[:, 0] == 60
gap_early = (seeing[early, 2] - seeing[early, 1]).item()
gap = seeing[-1, 2] - seeing[-1, 1]
gap_blind = blind[-1, 2] - blind[-1, 1]
print(f"gap after 60 steps: {gap_early:.2f} (loss {seeing[early, 1].item():.2f})")
print(f"gap at the end:     {gap:.2f} (loss {seeing[-1, 1]:.2f})")
print(f"gap of blind model: {gap_blind:.2f} (loss {blind[-1, 1]:.2f})")
assert abs(gap_early) < 0.1  # the loss has fallen from 5.7, and the model still sees nothing
assert gap > 0.4
assert seeing[-1, 1] < blind_floor - 0.1  # better than any blind writer can be
assert abs(gap_blind) < 0.05
assert blind[-1, 1] > blind_floor - 0.02

# COMMAND ----------

# MAGIC %md
# MAGIC Lakesight measures this gap in every training, and refuses to put a model into use if its gap is too small.
# MAGIC The next cell shows captions of both models for pictures that neither model has seen in training. The blind
# MAGIC model always writes the likeliest sentence, which is right for about one picture in 90. From one *sentence*
# MAGIC alone, you could not tell which model is blind.

# COMMAND ----------

shown = list(range(1500, 1504))
seen = captioner.caption([pictures[number] for number in shown])
guessed = blind_captioner.caption([pictures[number] for number in shown])
figure, axes = plt.subplots(2, 2, figsize=(4, 5))
for axis, number, a, b in zip(axes.flat, shown, seen, guessed, strict=True):
    axis.imshow(pictures[number])
    axis.set(xticks=[], yticks=[])
    text = f"sees: {a.caption}\nblind: {b.caption}"
    axis.set_title(text.replace(" in the", "\n  in the"), fontsize=8, loc="left")

exact = np.mean([r.caption == c for r, c in zip(captioner.caption(pictures[1500:]), captions[1500:], strict=True)])
exact_blind = np.mean(
    [r.caption == c for r, c in zip(blind_captioner.caption(pictures[1500:]), captions[1500:], strict=True)]
)
print(f"exactly right captions: {exact:.0%} of 100")
print(f"by the blind model:     {exact_blind:.0%} of 100")
assert exact > 0.2 > exact_blind

# COMMAND ----------

# MAGIC %md
# MAGIC ## Where does it look?
# MAGIC
# MAGIC The attention of notebook 2 shows where the model looks. `captioner.attention` follows the shares of attention
# MAGIC from each written word back to the patches of the picture. Bright patches were read most. The map shows where
# MAGIC the model reads, not why: a bright patch may hold only the edge of the thing.

# COMMAND ----------

best = next(n for n, r in enumerate(captioner.caption(pictures[1500:])) if r.caption == captions[1500 + n])
picture = pictures[1500 + best]
words = captioner.attention(picture).words()
words = [(word, patches) for word, patches in words if word in (*COLOURS, *SHAPES, "middle", "top", "bottom")][:3]
figure, axes = plt.subplots(1, 1 + len(words), figsize=(4, 1.5))
axes[0].imshow(picture)
axes[0].set_title("picture", fontsize=9)
for axis, (word, patches) in zip(axes[1:], words, strict=True):
    axis.imshow(picture.convert("L"), cmap="gray", extent=(0, 4, 4, 0))
    axis.imshow(patches, cmap="magma", alpha=0.6, extent=(0, 4, 4, 0))
    axis.set_title(word, fontsize=9)
for axis in axes:
    axis.set(xticks=[], yticks=[])

# COMMAND ----------

# MAGIC %md
# MAGIC ## What you have seen
# MAGIC
# MAGIC * A vision-language model consists of encoder, projector, fusion and decoder. Picture vectors have places in the
# MAGIC   sequence, as words have.
# MAGIC * A low loss and good grammar do not prove that a model sees. A blind gap above zero proves that the model
# MAGIC   sees.
# MAGIC * A model learns the language first and the pictures later. If training stops too early, the model is blind.
# MAGIC
# MAGIC ## Exercises
# MAGIC
# MAGIC **1.** Assume that all captions name the same place, and have as many tokens as now. What would the blind floor
# MAGIC be with 6 colours and 3 shapes?
# MAGIC
# MAGIC <details><summary>Solution</summary>
# MAGIC
# MAGIC ```python
# MAGIC assert math.log(6 * 3) / tokens_of_caption < blind_floor
# MAGIC ```
# MAGIC
# MAGIC The blind floor would be 0.30, because there is less to guess. With only three different captions, the blind
# MAGIC floor would be 0.11, so even a loss near zero does not prove that a model sees.
# MAGIC
# MAGIC </details>
# MAGIC
# MAGIC **2.** Measure the blind gap of the trained model with *grey* pictures instead of wrong ones.
# MAGIC
# MAGIC <details><summary>Solution</summary>
# MAGIC
# MAGIC ```python
# MAGIC grey = torch.full_like(test.pixels_PHWC, 128)
# MAGIC right, empty, tokens = blind_losses(captioner.model, test, grey)
# MAGIC assert float((empty - right).sum() / tokens.sum()) > 0.2
# MAGIC ```
# MAGIC
# MAGIC The gap is large too. Lakesight uses pictures of other rows. A grey picture looks unlike all training pictures,
# MAGIC so a model may fail on a grey picture for this reason alone.
# MAGIC
# MAGIC </details>
# MAGIC
# MAGIC **3.** Ask the model which of two captions fits a picture better. `captioner.logprobs` takes three lists:
# MAGIC pictures, prompts (here empty) and captions. The `total` of a result is the logarithm of the caption's share.
# MAGIC
# MAGIC <details><summary>Solution</summary>
# MAGIC
# MAGIC ```python
# MAGIC thing = next(colour for colour in COLOURS if colour in captions[1500 + best])
# MAGIC wrong = captions[1500 + best].replace(thing, "green" if thing != "green" else "red")
# MAGIC right_score, wrong_score = captioner.logprobs([picture] * 2, ["", ""], [captions[1500 + best], wrong])
# MAGIC assert right_score.total > wrong_score.total
# MAGIC ```
# MAGIC
# MAGIC </details>
# MAGIC
# MAGIC **Next:** the MLPs hold most of the weights. In [5. Mixture of experts](05_experts.py), a layer has many MLPs,
# MAGIC and uses only a few of them for each token.
