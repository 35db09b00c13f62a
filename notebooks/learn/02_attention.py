# Databricks notebook source
# MAGIC %md
# MAGIC # 2. Attention, by hand and then ours
# MAGIC
# MAGIC After notebook 1, a picture is a sequence of vectors, and each vector knows only its own patch. To describe a
# MAGIC picture, the vectors must exchange information: to answer "is there a star left of the circle?", the model needs
# MAGIC the patches of the star and of the circle. *Attention* is the part of the network in which vectors exchange
# MAGIC information. You will compute attention with a plain Python loop, then with matrices, and then see that the
# MAGIC layer of the library gives the same numbers.

# COMMAND ----------

import math

import matplotlib.pyplot as plt
import torch
from torch import nn

plt.rcParams.update({"figure.figsize": (4, 2.6), "figure.constrained_layout.use": True, "font.size": 9})
torch.manual_seed(0)  # the same random numbers in each run
torch.set_num_threads(1)  # our tensors are small, and one thread is fastest for them

# COMMAND ----------

# MAGIC %md
# MAGIC ## A dictionary with soft keys
# MAGIC
# MAGIC A Python `dict` finds the value of the key that is *equal* to a query. Attention works like a dictionary, but a
# MAGIC key need not be equal to the query. Attention compares the query with all keys, and returns a mixture of the
# MAGIC values. Keys that are more similar contribute more.
# MAGIC
# MAGIC Similarity is measured with the *dot product*: multiply two vectors number by number, and add up. Vectors that
# MAGIC point in the same direction have a large dot product. *Softmax* then turns similarities into shares, which are
# MAGIC positive numbers with the sum 1. Softmax takes e to the power of each number, so that all results are positive.
# MAGIC Then softmax divides each result by the sum of all results.
# MAGIC
# MAGIC Below, a query asks "what is warm?". The query and each key have two numbers: (warmth, size).

# COMMAND ----------

def softmax(scores):
    powers = [math.exp(score) for score in scores]
    return [power / sum(powers) for power in powers]


keys = {"sun": (3.0, 3.0), "ice": (-3.0, 0.0), "tea": (2.5, -1.0), "lake": (-1.0, 2.0)}
values = {"sun": 5_500.0, "ice": -5.0, "tea": 70.0, "lake": 12.0}  # temperatures
query = (1.0, 0.0)  # warm, whatever the size

scores = [sum(q * k for q, k in zip(query, key, strict=True)) for key in keys.values()]
shares = softmax(scores)
for name, score, share in zip(keys, scores, shares, strict=True):
    print(f"{name:<5} score {score:5.1f}   share {share:.3f}")
answer = sum(share * value for share, value in zip(shares, values.values(), strict=True))
print(f"mixed temperature: {answer:.0f}")
assert abs(sum(shares) - 1) < 1e-9

# COMMAND ----------

# MAGIC %md
# MAGIC ## Self-attention
# MAGIC
# MAGIC In a network, nobody writes keys by hand. Every vector of the sequence asks a question, and every vector
# MAGIC offers a key and a value. Query, key and value are computed from the vector with linear layers (tables of
# MAGIC weights, see notebook 1):
# MAGIC
# MAGIC * the *query*: what this position looks for;
# MAGIC * the *key*: what this position can be found by;
# MAGIC * the *value*: what this position passes on.
# MAGIC
# MAGIC Because the sequence attends to itself, this is called *self-attention*. The next cell computes self-attention
# MAGIC in a loop over 6 positions with vectors of width 16. The next section explains the division by `W**0.5`.

# COMMAND ----------

T, W = 6, 16  # positions, width
x = torch.randn(T, W)
w_query, w_key, w_value = (torch.randn(W, W) / W**0.5 for _ in range(3))

by_loop = []
for t in range(T):
    q = x[t] @ w_query
    scores = [float(q @ (x[s] @ w_key)) / W**0.5 for s in range(T)]
    shares = softmax(scores)
    by_loop.append(sum(share * (x[s] @ w_value) for s, share in enumerate(shares)))
by_loop = torch.stack(by_loop)

# the same computation in three lines
q, k, v = x @ w_query, x @ w_key, x @ w_value
shares = torch.softmax(q @ k.T / W**0.5, dim=-1)
by_matrix = shares @ v

difference = (by_loop - by_matrix).abs().max().item()
print("shares:", tuple(shares.shape))
print("values:", tuple(v.shape))
print("output:", tuple(by_matrix.shape))
print(f"loop and matrices differ by {difference:.1e}")
assert difference < 1e-5

# COMMAND ----------

# MAGIC %md
# MAGIC ## Why divide by the square root of the width?
# MAGIC
# MAGIC A dot product of long vectors is a sum of many numbers, some positive and some negative. The size of this sum
# MAGIC grows with the square root of the number of summands. Softmax of large numbers gives nearly everything to one
# MAGIC key. Then a small change of the weights changes the result hardly at all: the gradient is nearly zero, and
# MAGIC training makes no progress. Dividing by the square root of the width keeps the scores at the same size for any
# MAGIC width. The plot shows the largest share among 16 random keys, as a mean over 200 trials.

# COMMAND ----------

widths = [4, 16, 64, 256, 1024]
largest = {"without the division": [], "with the division": []}
for width in widths:
    scores = torch.randn(200, 1, width) @ torch.randn(200, width, 16)
    largest["without the division"].append(scores.softmax(-1).amax(-1).mean().item())
    largest["with the division"].append((scores / width**0.5).softmax(-1).amax(-1).mean().item())

plt.figure()
for name, heights in largest.items():
    plt.plot(widths, heights, marker="o", label=name)
plt.xscale("log", base=2)
plt.xticks(widths, widths)
plt.xlabel("width")
plt.ylabel("largest share")
plt.ylim(0, 1)
plt.legend()
assert largest["without the division"][-1] > 0.9
assert largest["with the division"][-1] < 0.4

# COMMAND ----------

# MAGIC %md
# MAGIC ## No looking ahead: the causal mask
# MAGIC
# MAGIC A model that writes text predicts the next word. If a position could look at later positions, the position would
# MAGIC read the answer. The *causal mask* forbids this: the scores of later positions become minus infinity, and
# MAGIC softmax turns these scores into shares of zero. In the plots, each row stands for a position that looks, and
# MAGIC each column for a position that is looked at. Darker squares are larger shares. In the right plot, a position
# MAGIC looks only at itself and at earlier positions. In the code, `tril` keeps the part of a matrix on and below its
# MAGIC diagonal, and `masked_fill` writes a number into all places that a mask marks.

# COMMAND ----------

scores = q @ k.T / W**0.5
allowed = torch.ones(T, T, dtype=torch.bool).tril()
causal = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1)

figure, axes = plt.subplots(1, 2, figsize=(4, 2.3))
for axis, drawn, title in zip(axes, (shares, causal), ("every position", "only earlier ones"), strict=True):
    axis.imshow(drawn, vmin=0, vmax=1, cmap="Blues")
    axis.set(title=title, xlabel="looked at", xticks=range(T), yticks=range(T))
axes[0].set_ylabel("looks")
assert torch.equal(causal.triu(1), torch.zeros(T, T))  # nothing above the diagonal
assert causal[0, 0] == 1  # the first position can look only at itself

# COMMAND ----------

# MAGIC %md
# MAGIC ## The layer of the library
# MAGIC
# MAGIC `vlm.layers.attention.Attention` is the layer that all models here use. This layer differs from our code in
# MAGIC three ways:
# MAGIC
# MAGIC * The layer has several *heads*. Each head has its own queries, keys and values and works on its own part of
# MAGIC   the width, so a position can look at different places for different reasons.
# MAGIC * One table of weights, `qkv`, computes queries, keys and values of all heads at once.
# MAGIC * A last linear layer, `out`, mixes the results of the heads.
# MAGIC
# MAGIC We compute two heads by hand with the weights of the layer, and compare. `chunk` cuts a tensor into equal
# MAGIC parts, and `cat` joins tensors. Keys and values could have fewer heads than queries (`num_kv_heads`), but here
# MAGIC keys, values and queries have equally many heads. Notebook 3 explains `dropout`.

# COMMAND ----------

from vlm.layers.attention import Attention, record_weights

H, D = 2, W // 2  # heads, width of a head
layer = Attention(W, num_heads=H, num_kv_heads=H, head_dim=D, bias=False, out_bias=False, dropout=0.0)

with torch.no_grad():
    q, k, v = (part.view(T, H, D) for part in layer.qkv(x).chunk(3, dim=-1))
    heads = []
    for h in range(H):
        scores = (q[:, h] @ k[:, h].T / D**0.5).masked_fill(~allowed, -torch.inf)
        heads.append(scores.softmax(dim=-1) @ v[:, h])
    by_hand = layer.out(torch.cat(heads, dim=-1))
    ours = layer(x[None], mask=None, causal=True)[0]  # [None] adds an axis: a batch of one sequence

difference = (by_hand - ours).abs().max().item()
print(f"difference to the library: {difference:.1e}")
assert difference < 1e-5

# COMMAND ----------

# MAGIC %md
# MAGIC ## A task that needs attention
# MAGIC
# MAGIC Can the layer learn *where to look*? We give the layer sequences of random letters. At every position, the
# MAGIC layer must name the letter that stood **three places earlier**. The letter at the current position says
# MAGIC nothing about the letter three places earlier. A network that cannot look back can only guess: with 8 letters, a
# MAGIC guess is right in 1 of 8 cases.
# MAGIC
# MAGIC The network is as small as possible. The network has a vector for each letter and for each position, one
# MAGIC attention layer, and a linear layer that gives a score to each of the 8 letters. (`Embedding` is a table of
# MAGIC vectors that are trained.) Each step trains on a batch of B = 64 sequences at once.
# MAGIC
# MAGIC The loss is the *cross-entropy*: minus the logarithm of the share that the network gives to the right letter,
# MAGIC as a mean over all answers. PyTorch's `cross_entropy` takes scores, and applies softmax itself.
# MAGIC `flatten(0, 1)` puts the positions of all sequences into one list. The loss is 0 if the network is sure and
# MAGIC right, and log 8 = 2.08 for a pure guess.

# COMMAND ----------

LETTERS, LENGTH, BACK = 8, 12, 3
letters, places = nn.Embedding(LETTERS, 32), nn.Embedding(LENGTH, 32)
attention = Attention(32, num_heads=1, num_kv_heads=1, head_dim=32, bias=False, out_bias=False, dropout=0.0)
scores_of = nn.Linear(32, LETTERS)
parts = nn.ModuleList([letters, places, attention, scores_of])
optimizer = torch.optim.Adam(parts.parameters(), lr=5e-3)


def forward(sequence):
    """Return the scores (B, LENGTH, LETTERS) of sequences of letters (B, LENGTH)."""
    return scores_of(attention(letters(sequence) + places.weight, mask=None, causal=True))


losses = []
for _ in range(300):
    sequence = torch.randint(LETTERS, (64, LENGTH))
    scores = forward(sequence)[:, BACK:]  # the first three positions have no answer
    loss = nn.functional.cross_entropy(scores.flatten(0, 1), sequence[:, :-BACK].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

test = torch.randint(LETTERS, (500, LENGTH))
with torch.no_grad():
    right = (forward(test)[:, BACK:].argmax(-1) == test[:, :-BACK]).float().mean().item()
print(f"correct on new sequences:  {right:.0%}")
print(f"correct by a random guess: {1 / LETTERS:.0%}")
assert right > 0.95

plt.figure()
plt.plot(losses)
plt.axhline(math.log(LETTERS), color="grey", linestyle="--", label="a guess: log 8 = 2.08")
plt.xlabel("training step")
plt.ylabel("loss")
plt.legend()

# COMMAND ----------

# MAGIC %md
# MAGIC ## Where does it look?
# MAGIC
# MAGIC `record_weights` makes a layer keep its shares. The plot shows what training has found: a stripe three places
# MAGIC below the diagonal. Nobody told the layer to look three places back. Positions 0 to 2 have no answer, so
# MAGIC training does not decide where these positions look.

# COMMAND ----------

with torch.no_grad(), record_weights([attention]) as recorded:
    forward(test)
seen = recorded[0][0].mean(dim=(0, 1))  # mean over the 500 sequences and the single head
stripe = seen.diagonal(-BACK).min().item()
print(f"smallest share on the stripe: {stripe:.2f}")
assert stripe > 0.5

plt.figure(figsize=(3.6, 3.2))
plt.imshow(seen, cmap="Blues", vmin=0, vmax=1)
plt.colorbar(label="share")
plt.xlabel("looked at")
plt.ylabel("position that looks")
plt.xticks(range(0, LENGTH, 2))
plt.yticks(range(0, LENGTH, 2))

# COMMAND ----------

# MAGIC %md
# MAGIC ## What you have seen
# MAGIC
# MAGIC * Attention compares a query with all keys, and mixes the values by similarity.
# MAGIC * The causal mask keeps a writer from reading ahead. The encoder of a picture needs no mask, because each patch
# MAGIC   may look at all other patches.
# MAGIC * The layer of the library gives the same numbers as the computation by hand. Training teaches the layer where
# MAGIC   to look.
# MAGIC
# MAGIC A *transformer block* is attention followed by a small network (*MLP*) that works on each position alone. An
# MAGIC MLP is a linear layer, then a function that sets negative numbers to zero (or nearly zero), then a second
# MAGIC linear layer. A *transformer* is a stack of such blocks. The class of the blocks is in `vlm/layers/block.py`.
# MAGIC
# MAGIC ## Exercises
# MAGIC
# MAGIC **1.** Multiply the scores of the first example (sun, ice, tea, lake) by 10 before the softmax, then by 0.1.
# MAGIC What happens to the shares?
# MAGIC
# MAGIC <details><summary>Solution</summary>
# MAGIC
# MAGIC ```python
# MAGIC first = [3.0, -3.0, 2.5, -1.0]
# MAGIC sharp, flat = softmax([10 * each for each in first]), softmax([0.1 * each for each in first])
# MAGIC assert max(sharp) > 0.99
# MAGIC assert max(flat) - min(flat) < 0.2
# MAGIC ```
# MAGIC
# MAGIC Large scores choose one key, small scores mix all keys. Notebook 6 uses the same method, under the name
# MAGIC *temperature*, to make a model choose its words more carefully or more freely.
# MAGIC
# MAGIC </details>
# MAGIC
# MAGIC **2.** Remove the positions (`places`) from the trained network. How many answers are still right?
# MAGIC
# MAGIC <details><summary>Solution</summary>
# MAGIC
# MAGIC ```python
# MAGIC with torch.no_grad():
# MAGIC     blind = scores_of(attention(letters(test), mask=None, causal=True))[:, BACK:]
# MAGIC without_places = (blind.argmax(-1) == test[:, :-BACK]).float().mean().item()
# MAGIC assert without_places < 0.5 < right
# MAGIC ```
# MAGIC
# MAGIC Far fewer answers are right. Without positions, attention sees a bag of letters, and "three places earlier"
# MAGIC has no meaning.
# MAGIC
# MAGIC </details>
# MAGIC
# MAGIC **3.** Change a letter at position 8, and show that the outputs of the positions before 8 do not change.
# MAGIC
# MAGIC <details><summary>Solution</summary>
# MAGIC
# MAGIC ```python
# MAGIC changed = test.clone()
# MAGIC changed[:, 8] = (changed[:, 8] + 1) % LETTERS
# MAGIC with torch.no_grad():
# MAGIC     moved = (forward(changed) - forward(test)).abs().amax(dim=(0, 2))
# MAGIC assert moved[:8].max() < 1e-5 < moved[8:].min()
# MAGIC ```
# MAGIC
# MAGIC With the causal mask, a later letter never changes the outputs of earlier positions. A program that writes text
# MAGIC can therefore keep these outputs (notebook 6).
# MAGIC
# MAGIC </details>
# MAGIC
# MAGIC **Next:** [3. A decoder that writes characters](03_decoder.py) stacks such layers and learns to write.
