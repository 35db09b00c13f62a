# Databricks notebook source
# MAGIC %md
# MAGIC # 5. Mixture of experts
# MAGIC
# MAGIC Most weights of a model sit in its MLPs (notebook 3, exercise 3). More MLP weights make a model better, but
# MAGIC also slower. A *mixture of experts* has more weights without being slower: a layer has many MLPs, the *experts*,
# MAGIC and each token goes through only two experts. A small linear layer, the *router*, chooses the two experts.
# MAGIC
# MAGIC This notebook routes tokens by hand, compares the result with the library, and then draws the *load* of the
# MAGIC experts while a model trains. Without care, a few experts get all the work.

# COMMAND ----------

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.nn import functional as F

import vlm

plt.rcParams.update({"figure.figsize": (4, 2.6), "figure.constrained_layout.use": True, "font.size": 9})
torch.manual_seed(0)  # the same random numbers in each run
torch.set_num_threads(1)  # our tensors are small, and one thread is fastest for them

# COMMAND ----------

# MAGIC %md
# MAGIC ## Route ten tokens by hand
# MAGIC
# MAGIC `MoeMlp` is the layer of the library (`vlm/layers/moe.py`). We build a layer in which each token uses 2 of 4
# MAGIC experts, and look at the steps:
# MAGIC
# MAGIC 1. The router gives each token one score for each expert.
# MAGIC 2. The two experts with the highest scores are chosen.
# MAGIC 3. A softmax over the two chosen scores gives their shares, the *gates*. The gates of a token add up to 1.
# MAGIC
# MAGIC An expert is an MLP: a linear layer `up`, the function `relu`, which sets negative numbers to zero, and a
# MAGIC linear layer `out`. You can ignore the settings `noisy` and `z_weight`. In a name such as `gates_NK`, N is the
# MAGIC axis of the tokens, and K is the axis of the chosen experts.

# COMMAND ----------

from vlm.layers.moe import MoeMlp, PlainExperts, dispatch, naive_experts

X, K, W = 4, 2, 16  # experts, experts of a token, width
experts = PlainExperts(X, W, 32, F.relu, bias=True)
moe = MoeMlp(W, experts, top_k=K, noisy=False, balance_weight=0.01, z_weight=0.001).eval()
for parameter in experts.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
torch.nn.init.normal_(moe.router.weight, std=0.5)
tokens = torch.randn(10, W)

with torch.no_grad():
    scores = tokens @ moe.router.weight.T
    best, chosen = scores.topk(K)
    gates = best.softmax(dim=-1)
    routing = moe.route(tokens)
print("token  experts  gates")
for number in range(4):
    print(f"{number:>5}  {chosen[number].tolist()}   {[round(g, 2) for g in gates[number].tolist()]}")
assert torch.equal(routing.chosen_NK, chosen)
assert torch.allclose(routing.gates_NK, gates)

# COMMAND ----------

plt.figure(figsize=(4, 2.2))
table = torch.zeros(10, X).scatter(1, chosen, gates)
plt.imshow(table.T, cmap="Blues", vmin=0, vmax=1)
plt.colorbar(label="gate", shrink=0.6)
plt.xlabel("token")
plt.ylabel("expert")
plt.yticks(range(X))
plt.xticks(range(10))
assert torch.equal((table > 0).sum(dim=1), torch.full((10,), K))  # two experts for each token
assert torch.allclose(table.sum(dim=1), torch.ones(10))

# COMMAND ----------

# MAGIC %md
# MAGIC ## One token at a time, or all at once
# MAGIC
# MAGIC The obvious program loops over the experts: take the tokens of an expert, apply the MLP, multiply by the gate,
# MAGIC add up. A graphics card is slow at such loops. The library sorts the tokens by expert and computes all experts
# MAGIC with one grouped matrix product (`dispatch`). `naive_experts` is the loop over the experts, which the library
# MAGIC keeps as a check. Our own function `by_hand` computes one token after the other. The loop, the grouped product
# MAGIC and the whole layer must give the same numbers.

# COMMAND ----------

with torch.no_grad():
    by_hand = torch.zeros(10, W)
    for token in range(10):
        for expert, gate in zip(chosen[token], gates[token], strict=True):
            hidden = F.relu(experts.up.weight[expert] @ tokens[token] + experts.up.bias[expert])
            by_hand[token] += gate * (experts.out.weight[expert] @ hidden + experts.out.bias[expert])
    loop, grouped = naive_experts(experts, tokens, routing), dispatch(experts, tokens, routing)

for name, result in (("loop over experts", loop), ("grouped product", grouped), ("the layer", moe(tokens).detach())):
    difference = (result - by_hand).abs().max().item()
    print(f"{name:<17} difference {difference:.0e}")
    assert difference < 1e-4

# COMMAND ----------

# MAGIC %md
# MAGIC ## Many weights, few computations
# MAGIC
# MAGIC Here is the benefit of a mixture of experts: with more experts, the number of weights grows, but the
# MAGIC computation for a token does not.

# COMMAND ----------

numbers = [2, 4, 8, 16, 32]
one_expert = 2 * 128 * 512  # weights of an MLP that goes from width 128 to 512 and back
all_weights = [n * one_expert / 1e6 for n in numbers]
used = [2 * one_expert / 1e6] * len(numbers)
plt.figure(figsize=(4, 2.4))
plt.plot(numbers, all_weights, marker="o", label="weights of the layer")
plt.plot(numbers, used, marker="o", label="weights that a token uses")
plt.xlabel("experts")
plt.ylabel("millions")
plt.legend()
assert all_weights[-1] == 16 * used[-1]

# COMMAND ----------

# MAGIC %md
# MAGIC ## The trap: a few experts get everything
# MAGIC
# MAGIC An expert learns only from the tokens that the router sends to it. An expert with many tokens becomes better, so
# MAGIC the router sends even more tokens to this expert, and other experts never learn. The remedy is a second loss,
# MAGIC the *load-balance loss*. The load-balance loss is 1 if all experts get equally many tokens, and grows if a few
# MAGIC experts get more. The load-balance loss is added to the normal loss with a small weight, `balance_weight`.
# MAGIC
# MAGIC We train a model like that of notebook 4 twice, with 6 experts in each block of the decoder: once with the
# MAGIC balance loss, and once without. To make the trap visible in a minute, the routers of both models start with
# MAGIC weights that are three times as large as usual. These routers strongly prefer some experts from the start. The
# MAGIC training loop reports the load: the share of the work that each expert gets.

# COMMAND ----------

from pipelines.formats.shards import Row
from pipelines.scenes import draw, random_scene
from pipelines.worker.data.batches import Collator
from vlm.image import to_pixels
from vlm.training.loop import fit
from vlm.training.objective import routed_layers
from vlm.training.optim import build_adamw

rng = np.random.default_rng(0)
scenes = [random_scene(rng) for _ in range(400)]
pictures = [draw(scene, rng) for scene in scenes]
NUM_EXPERTS, STEPS = 6, 160


def build(balance_weight):
    attention = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 12}
    expert = {"kind": "plain", "mlp_width": 48}
    moe = {"kind": "moe", "num_experts": NUM_EXPERTS, "top_k": 2, "expert": expert, "balance_weight": balance_weight}
    encoder = {"width": 48, "depth": 1, "attention": attention, "mlp": {"kind": "plain", "mlp_width": 96}}
    config = {
        "image": {"size": 32},
        "text": {"kind": "bpe", "vocab_size": 320},
        "vision": {"stem": {"kind": "patch", "patch_size": 8}, "transformer": encoder},
        "decoder": {"context": 64, "transformer": {**encoder, "depth": 2, "mlp": moe, "position": {"kind": "rotary"}}},
        "generation": {"max_new_tokens": 24},
    }
    captioner = vlm.build(config, [scene.caption for scene in scenes])
    for layer in routed_layers(captioner.model).values():
        with torch.no_grad():
            layer.router.weight.mul_(3)
    return captioner


def train(balance_weight):
    """Train a model, and return its captioner and the load of the experts of the last block, (steps, experts)."""
    captioner = build(balance_weight)
    collator = Collator(captioner.tokenizer, captioner.model.config)
    rows = [
        Row(str(n), to_pixels(picture, captioner.model.config.image), [("", scene.caption)])
        for n, (picture, scene) in enumerate(zip(pictures, scenes, strict=True))
    ]
    order, loads, losses = np.random.default_rng(1), [], []

    def batches():
        for _ in range(STEPS):
            chosen = [rows[n] for n in order.choice(len(rows), 24, replace=False)]
            yield [collator.collate(chosen, [row.texts[0] for row in chosen])]

    def on_step(report):
        loads.append(list(report.router.load.values())[-1])
        losses.append(report.loss)

    fit(
        captioner.model, build_adamw(captioner.model, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01), batches(), start=0,
        lr_schedule=lambda step: 3e-3 * min(1, (step + 1) / 20), grad_clip=1.0, seed=0, rank=0,
        device=torch.device("cpu"), bf16=False, on_step=on_step,
    )  # fmt: skip
    return captioner, np.array(loads), losses


results = {weight: train(weight) for weight in (0.0, 0.05)}

# COMMAND ----------

# MAGIC %md
# MAGIC Each colour is an expert, and the height of its band is its load. The printed numbers are means over the last
# MAGIC 40 steps. Without the balance loss, two experts do nearly all of the work. With the balance loss, the load
# MAGIC swings from step to step, because each correction goes too far, but on average all experts get the same work.
# MAGIC After so few steps, the loss of the captions is about the same in both runs. But experts without work cannot
# MAGIC learn, so their weights are wasted.

# COMMAND ----------

figure, axes = plt.subplots(1, 2, figsize=(4.2, 2.6), sharey=True)
for axis, (weight, (_, loads, _)) in zip(axes, results.items(), strict=True):
    axis.stackplot(range(STEPS), loads.T, labels=[f"expert {n}" for n in range(NUM_EXPERTS)])
    axis.set(xlabel="training step", xlim=(0, STEPS - 1), ylim=(0, 1))
    axis.set_title(f"balance_weight {weight}", fontsize=9)
axes[0].set_ylabel("share of the work")
axes[1].legend(fontsize=8, loc="upper right")

last = {weight: loads[-40:].mean(axis=0) for weight, (_, loads, _) in results.items()}
for weight, load in last.items():
    shares = " ".join(f"{share:4.0%}" for share in load)
    print(f"balance_weight {weight}, load:")
    print(f"  {shares}")
for weight, (_, _, losses) in results.items():
    print(f"loss with balance_weight {weight}: {np.mean(losses[-40:]):.2f}")
without, balanced = last[0.0], last[0.05]
assert np.sort(without)[-2:].sum() > 0.6  # two experts do most of the work
assert balanced.max() < without.max()
assert (without < 0.08).sum() >= 2 > (balanced < 0.03).sum()

# COMMAND ----------

# MAGIC %md
# MAGIC ## Who does what?
# MAGIC
# MAGIC Nobody tells the experts what to become. We let the balanced model read some unseen scenes with their
# MAGIC captions, and count which expert gets which kind of token. Each row of the plot adds up to 1. No square is
# MAGIC above 0.5, because each token goes to two experts. If all experts did the same work, all rows would look alike.
# MAGIC But words for sizes and words for shapes, for example, go to different experts: the experts have specialised. (A
# MAGIC *hook* is a function that PyTorch calls each time before a layer runs. Our hook looks at the input of the
# MAGIC layer.)

# COMMAND ----------

captioner = results[0.05][0]
model = captioner.model.eval()
layer = list(routed_layers(model).values())[-1]
collator = Collator(captioner.tokenizer, model.config)
unseen = [random_scene(rng) for _ in range(60)]
new_rows = [
    Row(str(n), to_pixels(draw(scene, rng), model.config.image), [("", scene.caption)]) for n, scene in enumerate(unseen)
]
batch = collator.collate(new_rows, [row.texts[0] for row in new_rows])

routings = []
handle = layer.register_forward_pre_hook(lambda module, inputs: routings.append(module.route(inputs[0].flatten(0, 1))))
with torch.no_grad():
    model(batch)
handle.remove()

kinds = {"patch": [], "article": ["a"], "size": ["small", "large"], "colour": ["red", "green", "blue", "yellow"],
         "shape": ["circle", "square", "star", "triangle"]}  # fmt: skip
chosen = routings[0].chosen_NK
ids = batch.tokens_BT.flatten().tolist()
words = [captioner.tokenizer.decode([i]).strip() if i >= 0 else "picture" for i in ids]
counts = np.zeros((len(kinds), NUM_EXPERTS))
for row, (kind, members) in enumerate(kinds.items()):
    found = [n for n, word in enumerate(words) if word in members or (kind == "patch" and word == "picture")]
    counts[row] = np.bincount(chosen[found].flatten().numpy(), minlength=NUM_EXPERTS)
shares = counts / counts.sum(axis=1, keepdims=True)

plt.figure(figsize=(4, 2.7))
plt.imshow(shares, cmap="Blues", vmin=0)
plt.colorbar(label="share of the tokens", shrink=0.8)
plt.yticks(range(len(kinds)), list(kinds))
plt.xlabel("expert")
assert np.allclose(shares.sum(axis=1), 1)
assert np.abs(shares[2] - shares[4]).sum() > 0.2  # words for sizes and for shapes go to different experts

# COMMAND ----------

# MAGIC %md
# MAGIC ## What you have seen
# MAGIC
# MAGIC * A router chooses two of many experts for each token. With more experts, the layer grows, but the work for a
# MAGIC   token does not.
# MAGIC * The computation with sorted tokens gives the same numbers as the simple loop over the experts.
# MAGIC * Without a balance loss, a few experts get nearly everything. Lakesight draws the load of every run, so that
# MAGIC   you notice experts without work.
# MAGIC
# MAGIC ## Exercises
# MAGIC
# MAGIC **1.** Why does the config not allow `top_k: 1`? Look at the softmax over the chosen experts.
# MAGIC
# MAGIC <details><summary>Solution</summary>
# MAGIC
# MAGIC ```python
# MAGIC one_score = torch.randn(5, 1, requires_grad=True)
# MAGIC one_score.softmax(dim=-1).sum().backward()
# MAGIC assert torch.equal(one_score.softmax(dim=-1), torch.ones(5, 1))
# MAGIC assert one_score.grad.abs().max() == 0
# MAGIC ```
# MAGIC
# MAGIC The softmax of one number is always 1. The gate would not depend on the score, so the router would get no
# MAGIC gradient and could not learn. (`requires_grad=True` asks PyTorch for the gradient of a tensor.)
# MAGIC
# MAGIC </details>
# MAGIC
# MAGIC **2.** Compute the load-balance loss for 6 experts if all get the same share, and if one expert gets
# MAGIC everything. The loss is the number of experts times the sum of (load x mean probability) over the experts. The
# MAGIC mean probability of an expert is its share in a softmax over *all* scores, as a mean over the tokens. Assume
# MAGIC that the mean probability is equal to the load.
# MAGIC
# MAGIC <details><summary>Solution</summary>
# MAGIC
# MAGIC ```python
# MAGIC even, greedy = torch.full((6,), 1 / 6), torch.tensor([1.0, 0, 0, 0, 0, 0])
# MAGIC assert abs(6 * (even * even).sum().item() - 1) < 1e-6
# MAGIC assert 6 * (greedy * greedy).sum().item() == 6
# MAGIC ```
# MAGIC
# MAGIC </details>
# MAGIC
# MAGIC **3.** How many weights of the trained model does a token of the decoder *not* use?
# MAGIC
# MAGIC <details><summary>Solution</summary>
# MAGIC
# MAGIC ```python
# MAGIC of_experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
# MAGIC unused = of_experts * (NUM_EXPERTS - 2) // NUM_EXPERTS
# MAGIC assert 0.15 < unused / sum(p.numel() for p in model.parameters()) < 0.4
# MAGIC ```
# MAGIC
# MAGIC In each block, a token uses two of the six experts. The experts that a token does not use have together about a
# MAGIC quarter of all weights.
# MAGIC
# MAGIC </details>
# MAGIC
# MAGIC **Next:** our models have written texts, but we have not looked at the way in which they choose the words. [6.
# MAGIC Writing: cache, beams and sampling](06_generation.py) shows how a model writes.
