# Databricks notebook source
# MAGIC %md
# MAGIC # 6. Writing: cache, beams and sampling
# MAGIC
# MAGIC A trained decoder only gives a share to each possible next token. To get a text, a program must choose a token,
# MAGIC append the token, and ask the decoder again. This notebook answers three questions about the program:
# MAGIC
# MAGIC * How does the model avoid reading everything again for each token? (*key-value cache*)
# MAGIC * Is the best next token always the best start of a text? (*beam search*)
# MAGIC * How do we get different texts, but no nonsense? (*sampling*)

# COMMAND ----------

import dataclasses
import math
from collections import Counter

import matplotlib.pyplot as plt
import numpy as np
import torch

import vlm

plt.rcParams.update({"figure.figsize": (4, 2.6), "figure.constrained_layout.use": True, "font.size": 9})
torch.manual_seed(0)  # the same random numbers in each run
torch.set_num_threads(1)  # our tensors are small, and one thread is fastest for them

# COMMAND ----------

# MAGIC %md
# MAGIC ## A model that has a choice
# MAGIC
# MAGIC If a picture had only one caption, there would be nothing to choose. We therefore describe each scene in one of
# MAGIC four ways, with these frequencies:
# MAGIC
# MAGIC | caption | how often |
# MAGIC |---|---|
# MAGIC | `one red star` | 40 % |
# MAGIC | `a red star` | 20 % |
# MAGIC | `a star in red` | 20 % |
# MAGIC | `a star that is red` | 20 % |
# MAGIC
# MAGIC Look at the first word: 60 % of the captions begin with `a`. But the most frequent *caption* begins with
# MAGIC `one`. We train the small model of notebook 4 on these captions, for about 20 seconds. The loss cannot reach
# MAGIC zero, because nobody can know which of the four ways the next caption uses.

# COMMAND ----------

from pipelines.formats.shards import Row
from pipelines.scenes import Scene, SceneObject, draw
from pipelines.worker.data.batches import Collator
from vlm.config import CosineScheduleConfig
from vlm.image import to_pixels
from vlm.training.loop import fit
from vlm.training.optim import build_adamw, schedule

COLOURS, SHAPES = ("red", "green", "blue", "yellow", "purple"), ("circle", "square", "star")
WAYS = {"one {c} {s}": 0.4, "a {c} {s}": 0.2, "a {s} in {c}": 0.2, "a {s} that is {c}": 0.2}
rng = np.random.default_rng(0)
things = [(str(rng.choice(COLOURS)), str(rng.choice(SHAPES))) for _ in range(800)]
pictures = [draw(Scene((SceneObject("large", *thing),), "in the middle"), rng) for thing in things]


def describe(thing):
    """Describe a thing in one of the four ways, drawn at random."""
    way = rng.choice(list(WAYS), p=list(WAYS.values()))
    return str(way).format(c=thing[0], s=thing[1])


attention = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 16}
encoder = {"width": 64, "depth": 1, "attention": attention, "mlp": {"kind": "plain", "mlp_width": 128}}
captioner = vlm.build(
    {
        "image": {"size": 32},
        "text": {"kind": "bpe", "vocab_size": 320},
        "vision": {"stem": {"kind": "patch", "patch_size": 8}, "transformer": encoder},
        "decoder": {"context": 48, "transformer": {**encoder, "depth": 2, "position": {"kind": "rotary"}}},
        "generation": {"max_new_tokens": 12},
    },
    [describe(thing) for thing in things],
)
model, tokenizer = captioner.model, captioner.tokenizer
collator = Collator(tokenizer, model.config)
rows = [Row(str(n), to_pixels(picture, model.config.image), []) for n, picture in enumerate(pictures)]
STEPS, order = 400, np.random.default_rng(1)


def batches():
    for _ in range(STEPS):
        chosen = order.choice(700, 32, replace=False)
        yield [collator.collate([rows[n] for n in chosen], [("", describe(things[n])) for n in chosen])]


losses = []
fit(
    model, build_adamw(model, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05), batches(), start=0, grad_clip=1.0, seed=0,
    lr_schedule=lambda step: 3e-3 * schedule(CosineScheduleConfig(), step, steps=STEPS, warmup_steps=20), rank=0,
    device=torch.device("cpu"), bf16=False, on_step=lambda report: losses.append(report.loss),
)  # fmt: skip
model.eval()
print(f"loss at the start {losses[0]:.2f}, at the end {np.mean(losses[-20:]):.2f}")

number = 700  # a picture that training has not seen
picture, (colour, shape) = pictures[number], things[number]
plt.figure(figsize=(2.4, 2.6))
plt.imshow(picture)
plt.axis("off")
plt.title(f"{colour} {shape}", fontsize=10)

# COMMAND ----------

# MAGIC %md
# MAGIC ## Write without reading again: the cache
# MAGIC
# MAGIC The simple way to write is to append the new token and to run the model over the whole sequence again. But with
# MAGIC a causal mask, a new token never changes the outputs of earlier positions (notebook 2, exercise 3). The keys and
# MAGIC values of earlier positions can therefore be kept, in a *key-value cache*. Each step then computes only the new
# MAGIC position. We write the same caption without and with a cache. `request.prefix` has the ids of 16 slots and the
# MAGIC start token, `eos_id` is the end token, and `media` is empty in this kind of model.

# COMMAND ----------

request = captioner.request([picture])


@torch.no_grad()
def write_again_and_again():
    """Write without a cache. Return the tokens, the logits of each step, and the number of computed positions."""
    features, tokens, logits, computed = model.encode(torch.stack(request.pixels)), [], [], 0
    while len(tokens) < 12 and (not tokens or tokens[-1] != tokenizer.eos_id):
        sequence = torch.tensor([[*request.prefix, *tokens]])
        embedded, media = model.embed(sequence, features)
        hidden = model.decoder(embedded, mask=None, media=media)
        logits.append(model.decoder.logits(hidden[0, -1]))
        tokens.append(int(logits[-1].argmax()))
        computed += sequence.shape[1]
    return tokens, torch.stack(logits), computed


@torch.no_grad()
def write_with_cache():
    """Write with a cache, and return the same values as `write_again_and_again`."""
    cache = model.new_cache(batch=1, context=model.config.decoder.context)
    features = model.encode(torch.stack(request.pixels))
    logits = [model.prefill(features, torch.tensor([request.prefix]), cache)[0]]  # reads slots and start token once
    tokens, computed = [int(logits[0].argmax())], len(request.prefix)
    while len(tokens) < 12 and tokens[-1] != tokenizer.eos_id:
        logits.append(model.step(torch.tensor([tokens[-1]]), cache)[0])  # one position
        tokens.append(int(logits[-1].argmax()))
        computed += 1
    return tokens, torch.stack(logits), computed


slow, slow_logits, slow_count = write_again_and_again()
fast, fast_logits, fast_count = write_with_cache()
difference = (slow_logits - fast_logits).abs().max().item()
print("caption:", tokenizer.decode(fast))
print(f"logits differ by at most {difference:.0e}")
print(f"computed positions without cache: {slow_count}")
print(f"computed positions with cache:    {fast_count}")
assert slow == fast
assert difference < 1e-4
assert fast_count == len(request.prefix) + len(fast) - 1

lengths = np.arange(1, 101)
start = len(request.prefix)
plt.figure(figsize=(4, 2.4))
plt.plot(lengths, lengths * start + lengths * (lengths - 1) / 2, label="without cache")
plt.plot(lengths, start + lengths - 1, label="with cache")
plt.xlabel("written tokens")
plt.ylabel("computed positions")
plt.legend()

# COMMAND ----------

# MAGIC %md
# MAGIC ## The shares of the next token
# MAGIC
# MAGIC Before we choose a token, we look at the shares. The plot shows the shares of the first token for our picture,
# MAGIC and of the token after `a`. The model has learned the frequencies of the four ways roughly, from examples alone.

# COMMAND ----------

@torch.no_grad()
def shares_after(text):
    """Return the shares of the next token after the picture and the beginning of a caption."""
    sequence = torch.tensor([[*request.prefix, *tokenizer.encode(text)]])
    embedded, media = model.embed(sequence, model.encode(torch.stack(request.pixels)))
    logits = model.decoder.logits(model.decoder(embedded, mask=None, media=media)[0, -1])
    logits[list(tokenizer.suppressed_ids)] = -torch.inf  # an answer never contains padding or a start token
    return logits.softmax(dim=-1)


figure, axes = plt.subplots(1, 2, figsize=(4, 2.4), sharey=True)
for axis, text in zip(axes, ("", "a"), strict=True):
    best = shares_after(text).topk(4)
    names = [repr(tokenizer.decode([i])).strip("'") for i in best.indices.tolist()]
    axis.bar(range(4), best.values)
    axis.set_xticks(range(4), names, rotation=30, fontsize=8)
    axis.set_title(f"after '{text}'" if text else "first token", fontsize=9)
axes[0].set_ylabel("share")

first = {text: shares_after("")[tokenizer.encode(text)[0]].item() for text in ("a", "one")}
for text, share in first.items():
    print(f"share of '{text}' as first token: {share:.2f}")
assert 0.45 < first["a"] < 0.75
assert first["a"] > first["one"] > 0.25

# COMMAND ----------

# MAGIC %md
# MAGIC ## Beam search
# MAGIC
# MAGIC *Greedy* writing takes the best token in each step. Here greedy writing takes `a`. But three captions begin with
# MAGIC `a`, so each of them gets only a part of the share of `a`. Greedy writing cannot go back to `one`. *Beam search*
# MAGIC keeps several beginnings alive, here three, and extends all of them. The share of a whole text is the product of
# MAGIC the shares of its tokens. With logarithms, the product becomes a sum.
# MAGIC
# MAGIC We search by hand, draw the tree, and compare the result with the library. The logarithm of a share is called
# MAGIC *log-probability* in the code. In the plot, thick lines lead to the best caption. The number below a word is the
# MAGIC product of the shares of all tokens up to this word. (By default, the library divides the sum of the logarithms
# MAGIC by the length of the text. With `length_penalty=0`, the library does not divide.)

# COMMAND ----------

def beam_search(width):
    """Return all steps of a beam search, and its best caption with the caption's log-probability."""
    beams, finished, steps = [("", 0.0, False)], [], []
    while beams and len(steps) < 12:
        candidates = []
        for text, score, _ in beams:
            best = shares_after(text).log().topk(width)
            for logprob, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                end = token == tokenizer.eos_id
                candidates.append((text, text if end else text + tokenizer.decode([token]), score + logprob, end))
        candidates = sorted(candidates, key=lambda each: -each[2])[:width]
        steps.append(candidates)
        finished += [(score, text) for _, text, score, end in candidates if end]
        beams = [(text, score, end) for _, text, score, end in candidates if not end]
        if finished and (not beams or max(finished)[0] >= max(score for _, score, _ in beams)):
            break  # an unfinished caption can only become less likely
    return steps, *max(finished)


steps, best_score, best_text = beam_search(3)
greedy = captioner.caption([picture])[0].caption
by_library = captioner.caption([picture], num_beams=3, length_penalty=0.0)[0].caption
greedy_score = captioner.logprobs([picture], [""], [greedy])[0].total
print(f"greedy: {greedy:<20} share {math.exp(greedy_score):.2f}")
print(f"beams:  {best_text:<20} share {math.exp(best_score):.2f}")
print(f"beams of the library: {by_library}")
assert best_text == by_library == f"one {colour} {shape}"
assert best_score > greedy_score

figure, axis = plt.subplots(figsize=(4.2, 3.4))
places = {"": (0, 1.0)}
for depth, candidates in enumerate(steps, 1):
    for row, (parent, text, score, end) in enumerate(candidates):
        x, y = places[parent]
        good = best_text.startswith(text) and best_text.startswith(parent)
        axis.plot([x, depth], [y, row], color="tab:blue", linewidth=3 if good else 1, alpha=1 if good else 0.4)
        word = "(end)" if end else text[len(parent):].strip()
        axis.text(depth, row + 0.12, f"{word}\n{math.exp(score):.2f}", ha="center", va="top", fontsize=8)
        if not end:
            places[text] = (depth, row)
axis.set(xlim=(-0.3, len(steps) + 0.5), ylim=(2.7, -0.3), yticks=[], xlabel="token of the caption")
axis.set_title("beginnings that stay alive, with their shares", fontsize=9)

# COMMAND ----------

# MAGIC %md
# MAGIC ## Sampling: temperature, top-k, top-p
# MAGIC
# MAGIC For variety, we draw the next token at random, according to the shares. Four settings change the shares before
# MAGIC the draw:
# MAGIC
# MAGIC * `temperature` divides the logits. Below 1, large shares grow. Above 1, all shares become more equal, and
# MAGIC   nonsense gets its chance.
# MAGIC * `top_k` keeps the k largest shares.
# MAGIC * `top_p` keeps the largest shares that together reach p.
# MAGIC * `min_p` keeps the shares that are at least p times the largest share.
# MAGIC
# MAGIC The function `filter_scores` of the library applies all four settings to logits. Softmax then makes the sum of
# MAGIC the kept shares 1 again. To see the effect, imagine a model that is less sure than our model. The imagined model
# MAGIC gives six tokens the shares in the next cell. The logarithms of these shares can serve as logits, because
# MAGIC softmax turns the logarithms back into the shares.

# COMMAND ----------

from vlm.generation.sampling import filter_scores

given = torch.tensor([[0.40, 0.25, 0.15, 0.10, 0.06, 0.04]])
variants = {
    "unchanged": {"temperature": 1.0},
    "temperature 0.5": {"temperature": 0.5},
    "temperature 2": {"temperature": 2.0},
    "top_k 3": {"temperature": 1.0, "top_k": 3},
    "top_p 0.7": {"temperature": 1.0, "top_p": 0.7},
    "min_p 0.2": {"temperature": 1.0, "min_p": 0.2},
}
bent = {name: filter_scores(given.log(), captioner.settings(**each))[0].softmax(-1) for name, each in variants.items()}
figure, axes = plt.subplots(2, 3, figsize=(4.2, 3), sharex=True, sharey=True)
for axis, (name, shares) in zip(axes.flat, bent.items(), strict=True):
    axis.bar(range(6), shares)
    axis.set_title(name, fontsize=8)
    axis.set_xticks([])
for axis in axes[:, 0]:
    axis.set_ylabel("share")
assert (bent["top_k 3"] > 0).sum() == 3
assert (bent["top_p 0.7"] > 0).sum() == 3  # 0.40 + 0.25 is not yet 0.7
assert bent["temperature 0.5"][0] > given[0, 0] > bent["temperature 2"][0]

# COMMAND ----------

# MAGIC %md
# MAGIC Now our trained model writes 300 captions of the same picture at each of three temperatures. At temperature 1,
# MAGIC the frequencies are roughly the frequencies in the training captions. A low temperature prefers the token that
# MAGIC is best *now*, so sampling makes the same mistake as greedy writing. At a high temperature, the model starts to
# MAGIC invent captions. In the labels, c is the colour and s is the shape.

# COMMAND ----------

from vlm.generation.generate import generate

requests = [dataclasses.replace(request, seed=seed) for seed in range(300)]
expected = [way.format(c=colour, s=shape) for way in WAYS]
figure, axes = plt.subplots(1, 3, figsize=(4.2, 3), sharey=True)
frequencies = {}
for axis, temperature in zip(axes, (0.3, 1.0, 1.7), strict=True):
    texts = [each.text for each in generate(model, tokenizer, requests, captioner.settings(temperature=temperature))]
    counts = Counter(texts)
    shares = [counts[text] / len(texts) for text in expected]
    frequencies[temperature] = [*shares, 1 - sum(shares)]
    axis.bar(range(5), frequencies[temperature])
    axis.set_xticks(range(5), ["one c s", "a c s", "a s in c", "a s that", "other"], rotation=90, fontsize=8)
    axis.set_title(f"temperature {temperature}", fontsize=8)
axes[0].set_ylabel("share of 300 captions")
print("temperature  shares of the captions")
for temperature, shares in frequencies.items():
    print(f"{temperature:>11} ", " ".join(f"{share:4.0%}" for share in shares))
assert 0.15 < frequencies[1.0][0] < 0.6
assert frequencies[1.0][-1] < 0.2
assert frequencies[1.7][-1] > frequencies[1.0][-1]

# COMMAND ----------

# MAGIC %md
# MAGIC ## What you have seen
# MAGIC
# MAGIC * With a key-value cache, each step computes one position instead of the whole sequence, and the result stays
# MAGIC   the same.
# MAGIC * Greedy writing is short-sighted. Beam search finds a likelier caption. Sampling gives variety.
# MAGIC * All settings work in `lakesight ask`, `caption` and `evaluate`, and as arguments of `captioner.caption`.
# MAGIC
# MAGIC ## Exercises
# MAGIC
# MAGIC **1.** A prefix has 17 positions, and a caption has 5 tokens. How many positions are computed with and without a
# MAGIC cache?
# MAGIC
# MAGIC <details><summary>Solution</summary>
# MAGIC
# MAGIC ```python
# MAGIC without_cache = sum(17 + n for n in range(5))
# MAGIC with_cache = 17 + 4
# MAGIC assert (without_cache, with_cache) == (95, 21)
# MAGIC ```
# MAGIC
# MAGIC </details>
# MAGIC
# MAGIC **2.** At a very low temperature, sampling gives the greedy caption every time. Show this for temperature 0.01
# MAGIC and ten values of `seed`.
# MAGIC
# MAGIC <details><summary>Solution</summary>
# MAGIC
# MAGIC ```python
# MAGIC texts = {captioner.caption([picture], temperature=0.01, seed=seed)[0].caption for seed in range(10)}
# MAGIC assert texts == {greedy}
# MAGIC ```
# MAGIC
# MAGIC Dividing by 0.01 multiplies the differences of the logits by 100. Temperature 0 means greedy writing in
# MAGIC Lakesight.
# MAGIC
# MAGIC </details>
# MAGIC
# MAGIC **3.** Forbid the word "a" with the setting `stop=["a"]`. What is the caption now, and why is this caption not
# MAGIC what you wanted?
# MAGIC
# MAGIC <details><summary>Solution</summary>
# MAGIC
# MAGIC ```python
# MAGIC assert captioner.caption([picture], stop=["a"])[0].caption == ""
# MAGIC ```
# MAGIC
# MAGIC The text ends before the first stop string. A stop string does not make the model choose another word. Here
# MAGIC the text is empty, because its first word is "a".
# MAGIC
# MAGIC </details>
# MAGIC
# MAGIC **Next:** so far, every model was trained from nothing. [7. Frozen towers and a projector](07_frozen.py) starts
# MAGIC from parts that others have trained.
