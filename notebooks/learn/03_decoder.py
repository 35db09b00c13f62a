# Databricks notebook source
# MAGIC %md
# MAGIC # 3. A decoder that writes characters
# MAGIC
# MAGIC The second half of a vision-language model is a *decoder*: a network that reads the beginning of a text and
# MAGIC predicts what comes next. Applied again and again to its own output, a decoder writes a text. This notebook
# MAGIC trains a small decoder on a few old poems, one character at a time. You will see how the decoder learns letters,
# MAGIC then words, then lines.
# MAGIC
# MAGIC The poems are in the public domain, and their text is in this notebook, so nothing is downloaded.

# COMMAND ----------

import math
import textwrap
from collections import Counter

import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F

import vlm

plt.rcParams.update({"figure.figsize": (4, 2.6), "figure.constrained_layout.use": True, "font.size": 9})
torch.manual_seed(0)  # the same random numbers in each run
torch.set_num_threads(1)  # our tensors are small, and one thread is fastest for them

# COMMAND ----------

# Jane Taylor 1806, William Blake 1794, Christina Rossetti 1872, Emily Dickinson 1861 and 1891, William Shakespeare 1609
TEXT = """\
Twinkle, twinkle, little star,
How I wonder what you are!
Up above the world so high,
Like a diamond in the sky.
When the blazing sun is gone,
When he nothing shines upon,
Then you show your little light,
Twinkle, twinkle, all the night.
Then the traveller in the dark
Thanks you for your tiny spark,
He could not see which way to go,
If you did not twinkle so.

Tyger Tyger, burning bright,
In the forests of the night;
What immortal hand or eye,
Could frame thy fearful symmetry?
In what distant deeps or skies,
Burnt the fire of thine eyes?
On what wings dare he aspire?
What the hand, dare seize the fire?
And what shoulder, and what art,
Could twist the sinews of thy heart?
And when thy heart began to beat,
What dread hand? and what dread feet?

Who has seen the wind?
Neither I nor you:
But when the leaves hang trembling,
The wind is passing through.
Who has seen the wind?
Neither you nor I:
But when the trees bow down their heads,
The wind is passing by.

Hope is the thing with feathers
That perches in the soul,
And sings the tune without the words,
And never stops at all,

I'm Nobody! Who are you?
Are you nobody, too?
Then there's a pair of us. Don't tell!
They'd banish us, you know.

Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date:
Sometime too hot the eye of heaven shines,
And often is his gold complexion dimm'd;
And every fair from fair sometime declines,
By chance, or nature's changing course, untrimm'd;
But thy eternal summer shall not fade,
Nor lose possession of that fair thou ow'st;
Nor shall Death brag thou wander'st in his shade,
When in eternal lines to time thou grow'st:
So long as men can breathe or eyes can see,
So long lives this, and this gives life to thee.
"""
lines = TEXT.splitlines()
print(f"{len(TEXT)} characters, {len(lines)} lines")

# COMMAND ----------

# MAGIC %md
# MAGIC ## Characters become numbers
# MAGIC
# MAGIC A network computes with numbers, so each character gets a number, its *token id*. The *tokenizer* translates
# MAGIC characters into token ids. Our tokenizer has one token for each of the 48 different characters in the text, and
# MAGIC 4 special tokens: for start, end, filler (*padding*) and unknown characters. Larger models use tokens for
# MAGIC frequent pieces of words (notebook 4).
# MAGIC
# MAGIC We keep the last 15 % of the text away from training. On this *validation* text we measure whether the decoder
# MAGIC has learned English, or has merely learned the poems by heart.

# COMMAND ----------

from vlm.text.chars import CharTokenizer

tokenizer = CharTokenizer("".join(sorted(set(TEXT))))
ids = torch.tensor(tokenizer.encode(TEXT))
print("Twinkle ->", tokenizer.encode("Twinkle"))
assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT  # nothing is lost

border = int(0.85 * len(ids))
train_ids, validation_ids = ids[:border], ids[border:]
print(f"{tokenizer.vocab_size} tokens; {len(train_ids)} characters to learn from")

# COMMAND ----------

# MAGIC %md
# MAGIC ## Two simple baselines to beat
# MAGIC
# MAGIC Which loss is good? The *loss* of a writer is minus the logarithm of the share that the writer gives to the
# MAGIC character that really comes next, as a mean over a text (see notebook 2). Two simple writers give us a scale:
# MAGIC
# MAGIC * **A pure guess** gives every token the same share. The loss of a pure guess is the logarithm of the number
# MAGIC   of tokens, here log 52.
# MAGIC * **A table of pairs** counts which character follows which, and knows nothing else.

# COMMAND ----------

V = tokenizer.vocab_size
guess = math.log(V)

pairs = Counter(zip(train_ids[:-1].tolist(), train_ids[1:].tolist(), strict=True))
counts = torch.full((V, V), 0.1)  # a little more than zero, because an unseen pair is not impossible
for (first, second), count in pairs.items():
    counts[first, second] += count
shares = counts / counts.sum(dim=1, keepdim=True)


def pair_loss(text):
    return -shares[text[:-1], text[1:]].log().mean().item()


by_pairs = pair_loss(validation_ids)
print(f"loss of a pure guess:     {guess:.2f}")
print(f"loss of a table of pairs: {by_pairs:.2f}")
assert by_pairs < guess

# COMMAND ----------

# MAGIC %md
# MAGIC ## The decoder
# MAGIC
# MAGIC `vlm.build` makes a whole vision-language model from a config. Here we use only the decoder of this model. The
# MAGIC decoder consists of
# MAGIC
# MAGIC * a table with one vector for each token, the *embeddings*;
# MAGIC * a stack of transformer blocks, each with attention under a causal mask (notebook 2) and then an MLP.
# MAGIC   Attention and MLP each add their output to their input. Before each of them, a *norm* brings the numbers of
# MAGIC   a vector to a common size;
# MAGIC * a linear layer, the *head*, that gives a score to each token. The head of a decoder has nothing to do with the
# MAGIC   heads of attention. The scores are called *logits*. Softmax turns logits into shares.
# MAGIC
# MAGIC In the config, `width` is the length of the vectors, and `mlp_width` is the length of the vectors inside an MLP.
# MAGIC `depth` is the number of blocks, and `context` is the length of the longest sequence. `gated` is a common
# MAGIC variant of the MLP. `dropout` sets a tenth of the numbers in the blocks to zero during training, at random, so
# MAGIC that the decoder learns less by heart. The part `vision` is required, but not used here.
# MAGIC
# MAGIC `position: rotary` says how the decoder knows the order of the tokens. The numbers of each query and each key
# MAGIC are taken in pairs, as points in a plane. Each point is rotated by an angle that depends on the position. The
# MAGIC dot product of a query and a key then depends on the distance between their positions.
# MAGIC
# MAGIC The capital letters at the end of a name, as in `tokens_BT`, are the axes of the tensor: B sequences of T
# MAGIC tokens.

# COMMAND ----------

blocks = {
    "width": 96,
    "depth": 3,
    "attention": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 24},
    "mlp": {"kind": "gated", "mlp_width": 192},
    "position": {"kind": "rotary"},
    "dropout": 0.1,
}
config = {
    "image": {"size": 8},
    "text": {"kind": "chars", "alphabet": tokenizer.alphabet},
    "vision": {
        "stem": {"kind": "patch", "patch_size": 8},
        "transformer": {**blocks, "width": 24, "depth": 1, "position": {"kind": "learned"}},
    },
    "decoder": {"context": 160, "transformer": blocks},
    "generation": {"max_new_tokens": 100},
}
captioner = vlm.build(config)
decoder = captioner.model.decoder
print(f"{sum(p.numel() for p in decoder.parameters()):,} weights in {len(decoder.blocks)} blocks")


def logits_of(tokens_BT):
    """Return the logits (B, T, V) of the token after each position."""
    return decoder.logits(decoder(decoder.embed(tokens_BT), mask=None))


first = logits_of(train_ids[None, :100])
print("tokens (1, 100) -> logits", tuple(first.shape))
start_loss = F.cross_entropy(first[0, :-1], train_ids[1:100]).item()
print(f"loss before training: {start_loss:.2f}")
print(f"loss of a pure guess: {guess:.2f}")
assert abs(start_loss - guess) < 0.3

# COMMAND ----------

# MAGIC %md
# MAGIC The loss of an untrained decoder is nearly the loss of a pure guess. The library deliberately draws small first
# MAGIC weights, so that the decoder prefers no token. A first loss far above the loss of a guess would be a sign of a
# MAGIC mistake.
# MAGIC
# MAGIC ## Train and watch it write
# MAGIC
# MAGIC A training step takes 24 random pieces of 48 characters. One piece is 48 exercises at once: every position
# MAGIC predicts the next character, and the causal mask hides this character from the position. Every 50 steps we
# MAGIC measure the loss on the validation text, and let the decoder write a line. `write` draws each character at
# MAGIC random, and prefers likely characters (`multinomial` draws according to the shares, and notebook 6 explains
# MAGIC `temperature`). `train()` and `eval()` switch dropout on and off. `AdamW` is Adam with `weight_decay`, which
# MAGIC pulls the weights a little towards zero in each step.

# COMMAND ----------

LENGTH, STEPS = 48, 300
optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3, weight_decay=0.1)


@torch.no_grad()
def write(start, count, temperature=0.5):
    """Continue a text by `count` characters, drawn from the shares of the decoder."""
    decoder.eval()
    tokens = tokenizer.encode(start)
    random = torch.Generator().manual_seed(1)
    for _ in range(count):
        scores = logits_of(torch.tensor([tokens[-100:]]))[0, -1]
        scores[list(tokenizer.suppressed_ids)] = -torch.inf  # the start token and the padding token are no text
        tokens.append(int(torch.multinomial((scores / temperature).softmax(-1), 1, generator=random)))
    decoder.train()
    return tokenizer.decode(tokens)


@torch.no_grad()
def mean_loss(text):
    decoder.eval()
    pieces = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)
    loss = F.cross_entropy(logits_of(pieces)[:, :-1].flatten(0, 1), pieces[:, 1:].flatten()).item()
    decoder.train()
    return loss


history = []
for step in range(STEPS + 1):
    if step % 50 == 0:
        history.append((step, mean_loss(train_ids), mean_loss(validation_ids)))
        line = write("When the ", 19).replace("\n", "/")
        print(f"step {step:>3}: {line}")
    starts = torch.randint(len(train_ids) - LENGTH - 1, (24, 1))
    pieces = train_ids[starts + torch.arange(LENGTH + 1)]
    loss = F.cross_entropy(logits_of(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)  # a single bad batch must not change the weights a lot
    optimizer.step()

# COMMAND ----------

# MAGIC %md
# MAGIC ## Two curves, one lesson
# MAGIC
# MAGIC The loss on the poems falls and falls. The loss on the unseen text falls too, to about the level of the table
# MAGIC of pairs, and then it *rises*. At the end, the loss on the unseen text is above the loss of a pure guess,
# MAGIC because the decoder is sure but wrong. After the lowest point, the decoder no longer learns English, but learns
# MAGIC the poems by heart. This is *overfitting*. Overfitting has one honest cure: more data. With 1,500 characters, no
# MAGIC setting of the training prevents overfitting for long.

# COMMAND ----------

steps, on_train, on_validation = zip(*history, strict=True)
plt.figure()
plt.plot(steps, on_train, marker="o", label="poems that it learns from")
plt.plot(steps, on_validation, marker="o", label="text that it has not seen")
plt.axhline(by_pairs, color="grey", linestyle="--", label="table of pairs")
plt.axhline(guess, color="grey", linestyle=":", label="pure guess")
plt.xlabel("training step")
plt.ylabel("loss")
plt.legend(fontsize=8)

best = min(on_validation)
print(f"best loss on unseen text: {best:.2f}")
print(f"last loss on the poems:   {on_train[-1]:.2f}")
print(f"last loss on unseen text: {on_validation[-1]:.2f}")
assert on_train[-1] < by_pairs < guess
assert abs(best - by_pairs) < 0.5
assert on_validation[-1] > best + 0.3  # it rises again
assert on_validation[-1] > on_train[-1] + 0.5  # learned by heart

# COMMAND ----------

# MAGIC %md
# MAGIC The decoder really knows its poems. We give the decoder the beginning of a line, and always take the most likely
# MAGIC character (a *temperature* near zero). Then the decoder continues as the poet did, or moves on to another poem
# MAGIC or to nonsense:

# COMMAND ----------

for line in write("Tyger Tyger, ", 90, temperature=0.01).splitlines():
    print(textwrap.fill(line, 38))

# COMMAND ----------

# MAGIC %md
# MAGIC ## What you have seen
# MAGIC
# MAGIC * A decoder predicts the next token from all earlier tokens. To write a text, a decoder predicts one token after
# MAGIC   the other.
# MAGIC * A loss means little alone. Compare a loss with a guess, with a simple writer, and with the loss on unseen
# MAGIC   text.
# MAGIC * If there are few texts, a model with many weights learns the texts by heart. Lakesight therefore always
# MAGIC   measures on texts that training has not seen.
# MAGIC
# MAGIC ## Exercises
# MAGIC
# MAGIC **1.** What does a loss of 1.0 mean? Which share does the right character get, if this share is the same at
# MAGIC every position?
# MAGIC
# MAGIC <details><summary>Solution</summary>
# MAGIC
# MAGIC ```python
# MAGIC share = math.exp(-1.0)
# MAGIC assert 0.36 < share < 0.37
# MAGIC ```
# MAGIC
# MAGIC About 37 %. The writer is as uncertain as if it chose between e = 2.7 equally likely characters. This number,
# MAGIC e to the power of the loss, is called *perplexity*.
# MAGIC
# MAGIC </details>
# MAGIC
# MAGIC **2.** Show that the decoder cannot look ahead: the logits of a position do not change if later characters
# MAGIC change.
# MAGIC
# MAGIC <details><summary>Solution</summary>
# MAGIC
# MAGIC ```python
# MAGIC decoder.eval()
# MAGIC one = torch.tensor([tokenizer.encode("The wind is passing by.")])
# MAGIC two = torch.tensor([tokenizer.encode("The wind is not so high")])
# MAGIC with torch.no_grad():
# MAGIC     moved = (logits_of(one) - logits_of(two)).abs().amax(dim=(0, 2))
# MAGIC same = len("The wind is ")
# MAGIC assert moved[:same].max() < 1e-4 < moved[same]
# MAGIC ```
# MAGIC
# MAGIC </details>
# MAGIC
# MAGIC **3.** Where do most of the weights sit: in embeddings and head, in attention, or in the MLPs?
# MAGIC `decoder.named_parameters()` gives the name of each weight.
# MAGIC
# MAGIC <details><summary>Solution</summary>
# MAGIC
# MAGIC ```python
# MAGIC kinds = {"attention": 0, "mlp": 0, "other": 0}
# MAGIC for name, parameter in decoder.named_parameters():
# MAGIC     kind = next((each for each in ("attention.", "mlp.") if each in name), "other").rstrip(".")
# MAGIC     kinds[kind] += parameter.numel()
# MAGIC assert kinds["mlp"] > kinds["attention"] > kinds["other"]
# MAGIC ```
# MAGIC
# MAGIC Most weights are in the MLPs, also in large models. Notebook 5 therefore shows a model that has many MLPs, but
# MAGIC uses only a few MLPs for each token.
# MAGIC
# MAGIC </details>
# MAGIC
# MAGIC **Next:** we have an encoder that reads pictures and a decoder that writes texts. [4. Join them](04_join.py)
# MAGIC connects the encoder and the decoder, and shows how the joined model can fail without anybody noticing.
