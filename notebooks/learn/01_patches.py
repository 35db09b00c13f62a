# Databricks notebook source
# MAGIC %md
# MAGIC # 1. Pictures become patches
# MAGIC
# MAGIC A language model reads a *sequence*: one word after the other. A picture is not a sequence, but a square of
# MAGIC coloured dots. This notebook shows how a vision-language model turns a picture into a sequence, so that the
# MAGIC same kind of network can read both. A *network* is a function that computes with many adjustable numbers, its
# MAGIC *weights*.
# MAGIC
# MAGIC You need Python and a little NumPy. You need no knowledge of deep learning. Every term is explained where it
# MAGIC first appears. The notebook runs in a few seconds on a laptop, without a GPU.
# MAGIC
# MAGIC This is the first of nine notebooks. At the end of the last notebook, you have built every part of a model that
# MAGIC describes pictures.

# COMMAND ----------

import matplotlib.pyplot as plt
import numpy as np
import torch

from pipelines.scenes import Scene, SceneObject, draw

plt.rcParams.update({"figure.figsize": (4, 2.6), "figure.constrained_layout.use": True, "font.size": 9})
torch.manual_seed(0)  # the same random numbers in each run
torch.set_num_threads(1)  # our tensors are small, and one thread is fastest for them

# COMMAND ----------

# MAGIC %md
# MAGIC ## A picture is a table of numbers
# MAGIC
# MAGIC Lakesight can draw simple scenes, so we know the content of our pictures exactly. Here is one scene. A picture
# MAGIC of 64 x 64 dots (*pixels*) has three numbers for each pixel: how much red, green and blue it has, from 0 to 255.

# COMMAND ----------

rng = np.random.default_rng(3)
scene = Scene((SceneObject("large", "red", "star"), SceneObject("small", "blue", "circle")), "left of")
pixels = np.array(draw(scene, rng))

plt.figure(figsize=(3, 3.2))
plt.imshow(pixels)
plt.title(scene.caption, fontsize=8)
print("rows, columns, colours:", pixels.shape)
print("pixel (30, 20):", pixels[30, 20].tolist())

# COMMAND ----------

# MAGIC %md
# MAGIC ## Cut the picture into patches
# MAGIC
# MAGIC We cut the picture into a grid of 8 x 8 squares. Each square is a *patch* of 8 x 8 pixels. Then we put the
# MAGIC patches in a row, as we read a page: from left to right, and from top to bottom. The picture has become a
# MAGIC sequence of 64 patches.
# MAGIC
# MAGIC Cutting needs no loop. `reshape` splits the axis of pixel rows into two axes: the place in the grid and the
# MAGIC place inside the patch. `reshape` splits the axis of pixel columns in the same way. `transpose` then brings the
# MAGIC two grid axes to the front.

# COMMAND ----------

P = 8  # patch size in pixels
side = 64 // P  # patches along one side


def cut(picture):
    """Cut a picture (64, 64, 3) into patches (64, 8, 8, 3)."""
    squares = picture.reshape(side, P, side, P, 3).transpose(0, 2, 1, 3, 4)
    return squares.reshape(side * side, P, P, 3)


patches = cut(pixels)
print("patches:", patches.shape)  # patches, rows, columns, colours
assert np.array_equal(patches[9], pixels[8:16, 8:16])  # patch 9 is in row 1, column 1 of the grid

gaps = np.full((side, P + 2, side, P + 2, 3), 255, dtype=np.uint8)  # white, two pixels wider than a patch
gaps[:, 1:-1, :, 1:-1] = patches.reshape(side, side, P, P, 3).transpose(0, 2, 1, 3, 4)
plt.figure(figsize=(3.6, 3.8))
plt.imshow(gaps.reshape(side * (P + 2), side * (P + 2), 3))
for number in range(side * side):
    plt.text(number % side * (P + 2) + 0.8, number // side * (P + 2) + 2.6, str(number), fontsize=7)
plt.axis("off")
plt.title("64 patches and their places in the sequence", fontsize=9)

# COMMAND ----------

# MAGIC %md
# MAGIC ## From a patch to a vector
# MAGIC
# MAGIC From here on we use PyTorch (`torch`), in which an array is called a *tensor*. PyTorch works like NumPy, and can
# MAGIC also train weights. `@` multiplies matrices, as in NumPy. Some names differ: `dim`, `view` and `permute` in
# MAGIC PyTorch are `axis`, `reshape` and `transpose` in NumPy. In PyTorch, `transpose(1, 2)` swaps axes 1 and 2, and
# MAGIC `flatten(2)` joins all axes from axis 2 on. `randn` draws random numbers around zero, and `item()` turns a
# MAGIC tensor with a single number into a Python number. A method whose name ends in `_`, such as `copy_`, changes the
# MAGIC tensor itself.
# MAGIC
# MAGIC A patch is 8 x 8 x 3 = 192 numbers. The network works with lists of numbers, called *vectors*, of a length
# MAGIC that we choose. The length of the vectors is the *width* of the network. We need a rule that turns 192 numbers
# MAGIC into, for example, 32.
# MAGIC
# MAGIC The simplest rule is a *linear layer*. Each of the 32 new numbers is a weighted sum of the 192 old numbers.
# MAGIC The layer is a table of 32 x 192 weights, and the computation is one matrix product. At the start, the weights
# MAGIC are random. Later in this notebook, training finds useful weights. Many layers also add a constant to each sum,
# MAGIC the *bias*. Our layer has no bias (`bias=False` in the next section).
# MAGIC
# MAGIC The code divides the pixels by 255, so that all numbers lie between 0 and 1. A sum of 192 numbers would be
# MAGIC large, so the code divides the weights by the square root of 192 (notebook 2 explains the square root).

# COMMAND ----------

width = 32
flat = torch.tensor(patches.reshape(64, 192) / 255, dtype=torch.float32)
weights = torch.randn(width, 192) / 192**0.5
vectors = flat @ weights.T
print("patches:           ", tuple(flat.shape))
print("weights, transposed:", tuple(weights.T.shape))
print("vectors:           ", tuple(vectors.shape))

# COMMAND ----------

# MAGIC %md
# MAGIC ## The same with the library
# MAGIC
# MAGIC In the library `vlm`, this layer is `PatchStem`, in `vlm/vision.py`. `PatchStem` is a *convolution*: a small
# MAGIC window slides over the picture and computes weighted sums. Our window is as large as a patch and slides by a
# MAGIC whole patch, so the windows never overlap. With such a window, a convolution gives the same numbers as cutting
# MAGIC the picture and multiplying by the weights. To prove that the numbers are the same, we give the layer our
# MAGIC weights and compare the results.
# MAGIC
# MAGIC In the code, `[None]` adds an axis of length 1, because layers expect several pictures at once.
# MAGIC `torch.no_grad()` tells PyTorch that we do not train inside the block.

# COMMAND ----------

from vlm.vision import PatchStem

stem = PatchStem(P, width, bias=False)
with torch.no_grad():
    stem.weight.copy_(weights.view(width, P, P, 3).permute(0, 3, 1, 2))  # the layer wants colours before rows
picture = torch.tensor(pixels / 255, dtype=torch.float32).permute(2, 0, 1)[None]  # (1 picture, 3, 64, 64)
grid = stem(picture)
sequence = grid.flatten(2).transpose(1, 2)
print("picture", tuple(picture.shape))
print("grid of vectors", tuple(grid.shape))
print("sequence of vectors", tuple(sequence.shape))
difference = (sequence[0] - vectors).abs().max().item()
print(f"largest difference: {difference:.1e}")
assert difference < 1e-4

# COMMAND ----------

# MAGIC %md
# MAGIC ## What do 32 numbers keep of a patch?
# MAGIC
# MAGIC Random weights give a bad summary of a patch. Let us *train* good weights. We add a second linear layer that
# MAGIC tries to draw the patch again from its vector. A better drawing means that the vector has kept more of the
# MAGIC patch. Training repeats three steps, each time with a *batch* of 256 random patches:
# MAGIC
# MAGIC 1. Compute the *loss*, one number that says how wrong the result is. Here the loss is the mean squared
# MAGIC    difference between the drawing and the patch.
# MAGIC 2. Compute the *gradient*. The gradient says for each weight in which direction the loss grows. PyTorch
# MAGIC    computes the gradient for us (`loss.backward()`), after `zero_grad()` has deleted the gradient of the
# MAGIC    previous step.
# MAGIC 3. Move each weight a small step in the opposite direction (`optimizer.step()`). The *optimizer* (here the
# MAGIC    common optimizer `Adam`) decides how far each weight moves. `lr`, the *learning rate*, is the basic length of
# MAGIC    a step.
# MAGIC
# MAGIC These three steps are all that "learning" means in these notebooks. Larger models have more weights, but learn
# MAGIC with the same three steps.

# COMMAND ----------

from pipelines.scenes import random_scene

pictures = [np.array(draw(random_scene(rng), rng)) for _ in range(60)]
data = torch.tensor(np.stack([cut(each) for each in pictures]).reshape(-1, 192) / 255, dtype=torch.float32)
print(f"{len(pictures)} pictures give {len(data)} patches")


def train(width, steps=600):
    """Train a pair of linear layers, patch to vector and vector to patch, and return the layers and the losses."""
    torch.manual_seed(0)
    shrink, redraw = torch.nn.Linear(192, width), torch.nn.Linear(width, 192)
    torch.nn.init.constant_(redraw.bias, 0.9)  # begin with a light grey, because most patches are background
    optimizer = torch.optim.Adam([*shrink.parameters(), *redraw.parameters()], lr=5e-3)
    losses = []
    for _ in range(steps):
        batch = data[torch.randint(len(data), (256,))]  # 256 random patches
        loss = ((redraw(shrink(batch)) - batch) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return shrink, redraw, losses


trained = {width: train(width) for width in (2, 8, 32)}
plt.figure()
for size, (_, _, losses) in trained.items():
    plt.plot(losses, label=f"vectors of {size} numbers")
plt.yscale("log")
plt.xlabel("training step")
plt.ylabel("loss")
plt.legend()
plt.title("The loss falls. Longer vectors keep more.", fontsize=9)
last = {size: np.mean(losses[-20:]) for size, (_, _, losses) in trained.items()}
assert last[2] > last[8] > last[32]

# COMMAND ----------

# MAGIC %md
# MAGIC The curves jump, because each step measures another batch, and because a step sometimes goes too far.
# MAGIC
# MAGIC A picture shows the difference better than a number. We send our scene through each pair of layers, patch by
# MAGIC patch, and put the drawn patches back together. With 2 numbers for each patch, the place of the objects and a
# MAGIC little of their colour remain. With 32 numbers instead of 192, the shapes are clear.

# COMMAND ----------

def join(drawn):
    """Put patches (64, 192) back together into a picture (64, 64, 3)."""
    return drawn.reshape(side, side, P, P, 3).transpose(0, 2, 1, 3, 4).reshape(64, 64, 3)


assert np.array_equal(join(patches.reshape(64, 192)), pixels)  # cutting and joining loses nothing

figure, axes = plt.subplots(2, 2, figsize=(4, 4.4))
axes.flat[0].imshow(pixels)
axes.flat[0].set_title("original (192 numbers)", fontsize=9)
for axis, (size, (shrink, redraw, _)) in zip(list(axes.flat)[1:], trained.items(), strict=True):
    with torch.no_grad():
        axis.imshow(join(redraw(shrink(flat)).clamp(0, 1).numpy()))
    axis.set_title(f"from {size} numbers a patch", fontsize=9)
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])

# COMMAND ----------

# MAGIC %md
# MAGIC ## A sequence forgets the place
# MAGIC
# MAGIC Cutting the picture into patches loses one thing: a vector does not say *where* its patch was. The layers that
# MAGIC follow, the *blocks* of notebook 2, treat the vectors like a bag of puzzle pieces: they ignore the order. The
# MAGIC remedy is simple. Every place of the grid gets a vector of its own, the *position embedding*. The position
# MAGIC embedding is added to the patch's vector and trained like all other weights.
# MAGIC
# MAGIC `vlm.build` makes a whole model from a *config*, a dict of settings. We take the model's *encoder* (the part
# MAGIC that reads pictures). Then we shuffle the patches of the picture and look at the mean of the encoder's outputs.
# MAGIC Without positions, the outputs are the same vectors in another order, so their mean does not change, except for
# MAGIC rounding. With positions, the mean changes. Later notebooks explain the names in the config.

# COMMAND ----------

import vlm

attention = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 8}
blocks = {"width": 32, "depth": 2, "attention": attention, "mlp": {"kind": "plain", "mlp_width": 64}}
config = {
    "image": {"size": 64},
    "text": {"kind": "chars", "alphabet": "abc"},
    "vision": {"stem": {"kind": "patch", "patch_size": P}, "transformer": blocks},
    "decoder": {"context": 80, "transformer": blocks},
    "generation": {"max_new_tokens": 8},
}
encoder = vlm.build(config).model.encoder
print("position vectors:", tuple(encoder.position.shape))

order = np.random.default_rng(0).permutation(64)
shuffled_pixels = join(patches[order].reshape(64, 192))
shuffled = torch.tensor(shuffled_pixels / 255, dtype=torch.float32).permute(2, 0, 1)[None]


def change():
    """Return how much the mean output changes when the patches are shuffled."""
    with torch.no_grad():
        return (encoder(picture).mean(dim=1) - encoder(shuffled).mean(dim=1)).abs().max().item()


with torch.no_grad():
    encoder.position.mul_(10)  # in a new model the positions are small; training makes them larger
with_positions = change()
with torch.no_grad():
    encoder.position.zero_()
without_positions = change()
print("change of the output")
print(f"  with positions:    {with_positions:.4f}")
print(f"  without positions: {without_positions:.7f}")
assert with_positions > 0.001 > 1e-5 > without_positions

figure, axes = plt.subplots(1, 2, figsize=(4, 2.2))
for axis, shown, title in zip(axes, (pixels, shuffled_pixels), ("original", "shuffled patches"), strict=True):
    axis.imshow(shown)
    axis.set_title(title, fontsize=9)
    axis.set(xticks=[], yticks=[])

# COMMAND ----------

# MAGIC %md
# MAGIC ## What you have seen
# MAGIC
# MAGIC * A picture (64, 64, 3) becomes a sequence of 64 vectors: cut, flatten, multiply by a table of weights.
# MAGIC * In the library, one convolution (`PatchStem`) cuts, flattens and multiplies.
# MAGIC * In a training step, we compute a loss, compute its gradient, and move the weights a little.
# MAGIC * Position embeddings tell the network where each patch was.
# MAGIC
# MAGIC ## Exercises
# MAGIC
# MAGIC **1.** A photograph has 224 x 224 pixels, and a patch has 16 x 16 pixels. How long is the sequence, and how many
# MAGIC numbers does a patch have?
# MAGIC
# MAGIC <details><summary>Solution</summary>
# MAGIC
# MAGIC ```python
# MAGIC length, numbers = (224 // 16) ** 2, 16 * 16 * 3
# MAGIC assert (length, numbers) == (196, 768)
# MAGIC ```
# MAGIC
# MAGIC The sequence has 196 patches, and each patch has 768 numbers. Smaller patches show more detail but make a
# MAGIC longer sequence, and longer sequences cost more time.
# MAGIC
# MAGIC </details>
# MAGIC
# MAGIC **2.** How many weights and biases does `PatchStem(16, 128, bias=True)` have in all? Compute the number, then
# MAGIC count them with PyTorch.
# MAGIC
# MAGIC <details><summary>Solution</summary>
# MAGIC
# MAGIC ```python
# MAGIC layer = PatchStem(16, 128, bias=True)
# MAGIC counted = sum(parameter.numel() for parameter in layer.parameters())
# MAGIC assert counted == 128 * 768 + 128 == 98_432
# MAGIC ```
# MAGIC
# MAGIC The layer computes 128 sums over 768 numbers, and adds one bias to each sum.
# MAGIC
# MAGIC </details>
# MAGIC
# MAGIC **3.** Is a picture of noise harder to summarise than a scene? Send random pixels through the trained layers of
# MAGIC width 32, and compare the losses.
# MAGIC
# MAGIC <details><summary>Solution</summary>
# MAGIC
# MAGIC ```python
# MAGIC shrink, redraw, _ = trained[32]
# MAGIC noise = torch.rand(64, 192)
# MAGIC with torch.no_grad():
# MAGIC     of_noise = ((redraw(shrink(noise)) - noise) ** 2).mean().item()
# MAGIC     of_scene = ((redraw(shrink(flat)) - flat) ** 2).mean().item()
# MAGIC assert of_noise > 3 * of_scene
# MAGIC ```
# MAGIC
# MAGIC Noise is much harder to summarise. Neighbouring pixels of a scene mostly agree, so a few numbers describe
# MAGIC them. Neighbouring pixels of noise have nothing in common.
# MAGIC
# MAGIC </details>
# MAGIC
# MAGIC **Next:** the patches form a sequence, but each vector knows only its own patch. In [2. Attention, by hand and
# MAGIC then ours](02_attention.py), the vectors exchange information.
