# Databricks notebook source
# MAGIC %md
# MAGIC # 7. Frozen towers and a projector
# MAGIC
# MAGIC Training a large encoder and a large decoder from nothing needs millions of pictures. Others have trained such
# MAGIC parts and published the weights: a *vision transformer* (ViT) that knows pictures, and GPT-2, a decoder that
# MAGIC knows English. Such parts are called *towers*. The two towers were never trained together. The cheapest way to a
# MAGIC vision-language model is to join two towers with a small projector, and to train **only the projector**. The
# MAGIC towers stay *frozen*: their weights never change.
# MAGIC
# MAGIC This notebook shows that a trained projector is enough, and how much a trained encoder adds. The notebook needs
# MAGIC no download. Instead of published towers, we use two small towers that we first train separately.

# COMMAND ----------

import textwrap

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import vlm

plt.rcParams.update({"figure.figsize": (4, 2.6), "figure.constrained_layout.use": True, "font.size": 9})
torch.manual_seed(0)  # the same random numbers in each run
torch.set_num_threads(1)  # our tensors are small, and one thread is fastest for them

# COMMAND ----------

# MAGIC %md
# MAGIC ## Data and model
# MAGIC
# MAGIC The scenes are as in notebook 4: each scene has one thing, with one of 6 colours, 3 shapes and 5 places. The
# MAGIC config has the parts of ViT and GPT-2 in small sizes: learned positions, biases (a constant that is added to
# MAGIC each sum), and an MLP with GELU. GELU is a smooth function that sets numbers far below zero to nearly zero. With
# MAGIC `tie_embeddings`, the decoder's head uses the table of embeddings as its weights. The projector is an MLP.

# COMMAND ----------

from pipelines.formats.shards import Row
from pipelines.scenes import COLOURS, Scene, SceneObject, draw
from pipelines.worker.data.batches import Collator
from vlm.image import to_pixels

SHAPES = ("circle", "square", "star")
PLACES = ("in the top left corner", "in the top right corner", "in the middle",
          "in the bottom left corner", "in the bottom right corner")  # fmt: skip
rng = np.random.default_rng(0)
facts = np.stack([rng.integers(n, size=1600) for n in (len(COLOURS), len(SHAPES), len(PLACES))], axis=1)
scenes = [Scene((SceneObject("large", list(COLOURS)[c], SHAPES[s]),), PLACES[p]) for c, s, p in facts]
pictures = [draw(scene, rng) for scene in scenes]
captions = [scene.caption for scene in scenes]

attention = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 16, "bias": True}
mlp = {"kind": "plain", "mlp_width": 128}
config = {
    "image": {"size": 32},
    "text": {"kind": "bpe", "vocab_size": 340},
    "vision": {
        "stem": {"kind": "patch", "patch_size": 8},
        "transformer": {"width": 64, "depth": 1, "attention": attention, "mlp": mlp},
    },
    "projector": {"kind": "mlp", "mlp_width": 128},
    "decoder": {
        "context": 48,
        "tie_embeddings": True,
        "transformer": {
            "width": 64, "depth": 2, "attention": attention, "mlp": {**mlp, "activation": "gelu_tanh"},
        },
    },
    "generation": {"max_new_tokens": 24},
}  # fmt: skip
towers = vlm.build(config, captions)
tokenizer = towers.tokenizer
collator = Collator(tokenizer, towers.model.config)
rows = [
    Row(str(n), to_pixels(picture, towers.model.config.image), [("", caption)])
    for n, (picture, caption) in enumerate(zip(pictures, captions, strict=True))
]


def make_batch(numbers):
    chosen = [rows[number] for number in numbers]
    return collator.collate(chosen, [row.texts[0] for row in chosen])


test = make_batch(range(1500, 1600))

# COMMAND ----------

# MAGIC %md
# MAGIC ## Tower 1: an encoder that has seen pictures, but no text
# MAGIC
# MAGIC A published ViT has usually learned to sort pictures into classes. Our encoder learns to choose one of 6
# MAGIC colours, 3 shapes and 5 places. The encoder never sees words: each colour, shape and place is only a number. The
# MAGIC linear layer that computes the 14 scores is thrown away afterwards.

# COMMAND ----------

encoder = towers.model.encoder
classifier = nn.Linear(64, 6 + 3 + 5)
optimizer = torch.optim.AdamW([*encoder.parameters(), *classifier.parameters()], lr=3e-3)
pixels = torch.tensor(np.stack([row.pixels for row in rows]))
labels = torch.tensor(facts)


def look(numbers):
    """Return the scores of colour, shape and place."""
    normal = (pixels[numbers].permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    return classifier(encoder(normal).mean(dim=1)).split([6, 3, 5], dim=1)


for step in range(300):
    numbers = torch.randint(1500, (48,))
    loss = sum(F.cross_entropy(scores, labels[numbers, n]) for n, scores in enumerate(look(numbers)))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

with torch.no_grad():
    unseen = torch.arange(1500, 1600)
    right = [(scores.argmax(1) == labels[unseen, n]).float().mean().item() for n, scores in enumerate(look(unseen))]
for name, share in zip(("colour", "shape", "place"), right, strict=True):
    print(f"{name:<6} right on unseen pictures: {share:.0%}")
assert right[0] > 0.8
assert right[2] > 0.6

# COMMAND ----------

# MAGIC %md
# MAGIC ## Tower 2: a decoder that has read texts, but seen no picture
# MAGIC
# MAGIC GPT-2 has read so much that it *uses the preceding text*: after a page about cats, GPT-2 continues to write
# MAGIC about cats. The projector depends on exactly this skill of the decoder, because the picture vectors come before
# MAGIC the text. No projector can help a decoder that has learned to ignore the beginning of its sequence.
# MAGIC
# MAGIC Our decoder therefore learns from notes that are followed by a caption. A note has 16 words in any order. Each
# MAGIC of the caption's words for colour, shape and place occurs twice. All other words, at least half of the 16, are
# MAGIC "and". Later, the 16 picture vectors replace these 16 words, and most picture vectors show only background. For
# MAGIC example, the note `and star and purple middle and ...` comes before the caption `a large purple star in the
# MAGIC middle`. The output shows the notes without "and".

# COMMAND ----------

decoder = towers.model.decoder
filler = tokenizer.encode(" and")[:1]
sentences = [[tokenizer.bos_id, *tokenizer.encode(caption), tokenizer.eos_id] for caption in captions]
longest = max(len(sentence) for sentence in sentences)


def notes_of(number):
    """Return 16 tokens: the words of the colour, the shape and the place, each twice, among fillers, in any order."""
    c, s, p = facts[number]
    words = [list(COLOURS)[c], SHAPES[s], *PLACES[p].split()[2:]]
    found = [token for word in words if word != "corner" for token in tokenizer.encode(f" {word}")[:1]] * 2
    return rng.permutation((found + filler * 16)[:16])


def logits_of(tokens):
    return decoder.logits(decoder(decoder.embed(tokens), mask=None))


optimizer = torch.optim.AdamW(decoder.parameters(), lr=4e-3)
for step in range(400):
    tokens = torch.full((32, 16 + longest), tokenizer.eos_id)
    for row, number in enumerate(rng.integers(1500, size=32)):
        tokens[row, :16] = torch.tensor(notes_of(number))
        tokens[row, 16 : 16 + len(sentences[number])] = torch.tensor(sentences[number])
    loss = F.cross_entropy(logits_of(tokens)[:, 16:-1].flatten(0, 1), tokens[:, 17:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def continue_notes(notes):
    """Let the decoder write the sentence that follows some notes."""
    tokens = [*notes, tokenizer.bos_id]
    while len(tokens) < 40 and tokens[-1] != tokenizer.eos_id:
        with torch.no_grad():
            tokens.append(int(logits_of(torch.tensor([tokens]))[0, -1].argmax()))
    return tokenizer.decode(tokens[17:])


for number in (1500, 1501):
    notes = notes_of(number).tolist()
    words = tokenizer.decode([token for token in notes if token not in filler]).strip()
    for shown in (f"notes: {words}", f"-> {continue_notes(notes)}"):
        print(textwrap.fill(shown, 38, subsequent_indent="   "))
written = np.mean([continue_notes(notes_of(number).tolist()) == captions[number] for number in range(1500, 1530)])
print(f"right sentence for {written:.0%} of 30 notes")
assert written > 0.5

# COMMAND ----------

# MAGIC %md
# MAGIC ## Freeze the towers
# MAGIC
# MAGIC `set_trainable` takes patterns of weight names (regular expressions), each with a learning rate, and freezes
# MAGIC all other weights. Any rate above zero will do here. Only the projector can still be trained, and it is a small
# MAGIC part of the model. Frozen weights get no gradient, so a step is cheaper and needs less memory.

# COMMAND ----------

from vlm.config import CosineScheduleConfig
from vlm.training.loop import fit
from vlm.training.objective import blind_losses
from vlm.training.optim import build_adamw, schedule, set_trainable


def count(model):
    sizes = {"encoder": 0, "projector": 0, "decoder": 0}
    for name, parameter in model.named_parameters():
        sizes[name.split(".")[0]] += parameter.numel()
    return sizes


set_trainable(towers.model, {"projector.*": 1.0})
sizes = count(towers.model)
trainable = sum(p.numel() for p in towers.model.parameters() if p.requires_grad)
print(f"{trainable:,} of {sum(sizes.values()):,} weights are trained")
assert trainable == sizes["projector"]

plt.figure(figsize=(4, 1.7))
plt.barh(list(sizes), list(sizes.values()), color=["lightgrey", "tab:orange", "lightgrey"])
plt.gca().invert_yaxis()
plt.xlabel("weights (grey: frozen)")

# COMMAND ----------

# MAGIC %md
# MAGIC ## Train the projector, and two controls
# MAGIC
# MAGIC Does the projector work, or would *any* model learn this task? We train three models with the same pictures and
# MAGIC the same number of steps, and measure the blind gap (notebook 4) on unseen rows:
# MAGIC
# MAGIC * **towers**: both towers as trained above, frozen; only the projector learns.
# MAGIC * **random encoder**: as in *towers*, but the encoder has random weights. The random encoder is frozen too, so
# MAGIC   it never learns to see.
# MAGIC * **from nothing**: all weights are random at the start, and all weights are trained.
# MAGIC 
# MAGIC In the code, `state_dict()` returns a dict with all weights of a model, and `load_state_dict` copies weights
# MAGIC from a dict into a model.

# COMMAND ----------

STEPS = 240


def train(captioner):
    """Train the trainable weights, and return (step, blind gap) on unseen rows."""
    model, history, order = captioner.model, [], np.random.default_rng(1)

    def batches():
        for _ in range(STEPS):
            yield [make_batch(order.choice(1500, 32, replace=False))]

    def on_step(report):
        if report.step % 30 == 0 or report.step == STEPS - 1:
            right, wrong, tokens = blind_losses(model.eval(), test, test.pixels_PHWC.roll(1, 0))
            history.append((report.step, float((wrong - right).sum() / tokens.sum())))
            model.train()

    fit(
        model, build_adamw(model, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.01), batches(), start=0, grad_clip=1.0,
        lr_schedule=lambda step: 4e-3 * schedule(CosineScheduleConfig(), step, steps=STEPS, warmup_steps=20), seed=0,
        rank=0, device=torch.device("cpu"), bf16=False, on_step=on_step,
    )  # fmt: skip
    model.eval()
    return np.array(history)


before = {name: value.clone() for name, value in towers.model.state_dict().items()}
random_encoder = vlm.build(config, captions, seed=1)
random_encoder.model.decoder.load_state_dict(decoder.state_dict())
set_trainable(random_encoder.model, {"projector.*": 1.0})
from_nothing = vlm.build(config, captions, seed=2)

gaps = {
    "towers": train(towers),
    "random encoder": train(random_encoder),
    "from nothing": train(from_nothing),
}
changed = {name.split(".")[0] for name, value in towers.model.state_dict().items() if not torch.equal(value, before[name])}
print("parts that have changed:", ", ".join(changed))
assert changed == {"projector"}

# COMMAND ----------

plt.figure()
for name, history in gaps.items():
    plt.plot(history[:, 0], history[:, 1], marker="o", label=name)
plt.xlabel("training step")
plt.ylabel("blind gap on unseen rows")
plt.legend()
final = {name: history[-1, 1] for name, history in gaps.items()}
for name, gap in final.items():
    print(f"{name:<15} blind gap {gap:.2f}")
assert final["towers"] > 0.3
assert final["towers"] > final["random encoder"] + 0.2

# COMMAND ----------

# MAGIC %md
# MAGIC With trained towers, the few weights of the projector are enough to let a decoder speak about what an encoder
# MAGIC sees. With a random encoder, the same projector finds less to translate. But it finds something: random weights
# MAGIC give a bad summary of a picture (notebook 1), but still a summary. So the trained encoder brings knowledge that
# MAGIC the projector cannot replace. The model that starts from nothing learns too, because our task is tiny and the
# MAGIC model may change all of its weights. With real photographs and real language, such a model would need millions
# MAGIC of pictures first.
# MAGIC
# MAGIC The next cell shows captions that the model with frozen towers writes for unseen pictures.

# COMMAND ----------

figure, axes = plt.subplots(2, 2, figsize=(4, 4.6))
results = towers.caption(pictures[1500:1504])
for axis, picture, result in zip(axes.flat, pictures[1500:], results, strict=False):
    axis.imshow(picture)
    axis.set_title(result.caption.replace(" in ", "\nin "), fontsize=8)
    axis.set(xticks=[], yticks=[])
words_right = np.mean(
    [colour in result.caption for result, caption in zip(towers.caption(pictures[1500:]), captions[1500:], strict=True)
     for colour in COLOURS if colour in caption]
)  # fmt: skip
print(f"colour right in {words_right:.0%} of 100 captions")
assert words_right > 0.5

# COMMAND ----------

# MAGIC %md
# MAGIC ## The same with published weights
# MAGIC
# MAGIC To train with published towers, use the following commands. The model of the run must be `vit_gpt2`. The setting
# MAGIC `train.stages` freezes all weights except the weights of the projector. `docs/weights.md` explains how published
# MAGIC weights become a model of your own, and `docs/models.md` lists the published models that fit.
# MAGIC
# MAGIC ```
# MAGIC lakesight import-weights --model vit_gpt2 \
# MAGIC   --encoder vit_mediumd --decoder gpt2 --out weights/vit_gpt2
# MAGIC lakesight train --run birds --set train.start_from=weights/vit_gpt2 \
# MAGIC   --set train.steps=1000 \
# MAGIC   --set 'train.stages=[{steps: 1000, groups: [{pattern: "projector.*", lr: 1e-3}]}]'
# MAGIC ```
# MAGIC
# MAGIC ## What you have seen
# MAGIC
# MAGIC * A projector translates between two parts that were trained apart.
# MAGIC * To freeze weights, you need only a list of name patterns. The comparison with a random encoder shows how much
# MAGIC   the trained encoder adds.
# MAGIC * After the projector has learned, *low-rank adapters* change the towers a little, without training all their
# MAGIC   weights (exercise 3).
# MAGIC
# MAGIC ## Exercises
# MAGIC
# MAGIC **1.** The model `vit_gpt2` has about 190 million weights in all, of which about 2 million belong to the
# MAGIC projector. How many times larger than the projector are the towers?
# MAGIC
# MAGIC <details><summary>Solution</summary>
# MAGIC
# MAGIC ```python
# MAGIC assert (190 - 2) / 2 == 94
# MAGIC ```
# MAGIC
# MAGIC The larger the towers, the smaller the share that is trained.
# MAGIC
# MAGIC </details>
# MAGIC
# MAGIC **2.** Let the projector and the *norms* of the decoder (notebook 3) learn. Which patterns does
# MAGIC `set_trainable` need, and how many weights are trained? The names of norms contain `norm`, and each norm has a
# MAGIC factor and a constant for each of the 64 numbers.
# MAGIC
# MAGIC <details><summary>Solution</summary>
# MAGIC
# MAGIC ```python
# MAGIC set_trainable(towers.model, {"projector.*": 1.0, r"decoder\..*norm.*": 1.0})
# MAGIC more = sum(p.numel() for p in towers.model.parameters() if p.requires_grad)
# MAGIC assert more - trainable == 5 * 2 * 64
# MAGIC ```
# MAGIC
# MAGIC The decoder has two norms in each of its two blocks and one norm at its end.
# MAGIC
# MAGIC </details>
# MAGIC
# MAGIC **3.** A low-rank adapter (LoRA) does not change the frozen weight W of a layer, and learns two thin matrices A
# MAGIC and B. The layer then computes `x W + x A B`. How many weights does an adapter of rank 4 have for a layer of 64
# MAGIC x 64?
# MAGIC
# MAGIC <details><summary>Solution</summary>
# MAGIC
# MAGIC ```python
# MAGIC a, b = torch.zeros(64, 4), torch.zeros(4, 64)
# MAGIC assert a.numel() + b.numel() == 512 == 64 * 64 // 8
# MAGIC ```
# MAGIC
# MAGIC The adapter has an eighth of the weights of the layer. `--set train.adapter.pattern='decoder.blocks.*'` trains
# MAGIC adapters in a run. The saved model contains the sum of weights and adapters, so the saved model can be loaded
# MAGIC like any other model.
# MAGIC
# MAGIC </details>
# MAGIC
# MAGIC **Next:** [8. PaliGemma's prefix mask, and boxes](08_paligemma.py) asks questions about a picture, and gets
# MAGIC places as answers.
