# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A class for every pixel: build a U-Net, understand it, use it
#
# You know Python and a little PyTorch, and you have never built a network that labels pixels. At
# the end of this notebook you can
#
# 1. **build a U-Net** block by block, know the shape after every layer, and prove that yours is
#    the network of the paper;
# 2. **say what separates** a plain convolutional network, a fully convolutional network (FCN) and
#    a U-Net, and show it with images and numbers;
# 3. **segment a street** as CARLA's simulated camera sees it, and score the result without
#    fooling yourself;
# 4. **compute the loss** that all this is trained with, sparse categorical cross-entropy pixel by
#    pixel, by hand.
#
# Nothing is downloaded: the images are street scenes that the notebook makes, each with its
# exact truth. Everything runs on a laptop without a GPU in a few minutes.
#
# **How to run it.** This file is a notebook written as plain Python. From the folder that holds
# `docs`:
#
# ```sh
# pip install '.[tutorial]'
# jupytext --to notebook docs/tutorial.py      # writes docs/tutorial.ipynb
# jupyter lab docs/tutorial.ipynb              # then: Run > Run All Cells
# ```
#
# **How to read it.** There are seven exercises. Each has a cell for your answer, a solution
# (folded away: try first) and a cell that checks you. An exercise that you leave empty is filled
# in by its solution, so the notebook always runs to its end.
#
# Two papers are behind all this: Long, Shelhamer and Darrell, *Fully Convolutional Networks for
# Semantic Segmentation*, CVPR 2015; and Ronneberger, Fischer and Brox, *U-Net: Convolutional
# Networks for Biomedical Image Segmentation*, MICCAI 2015.
#
# First the tools. If you have images of your own in CARLA's layout, name their folder in
# `DATA`; section 7 then uses them.

# %%
import os
import tempfile
import time
from pathlib import Path

import useg.machine

useg.machine.tune()  # before torch is imported: its threads then share the processor politely

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import SVG, Image
from torch import nn
from torch.nn import functional as F

import useg
from useg.classes import CARLA, IGNORE
from useg.pictures import add_legend, draw_difference, overlay, paint_label
from useg.scenes.scene import make_scene, write_scenes

os.environ.setdefault("USEG_CACHE", "off")  # leave no decoded images behind
DATA = os.environ.get("USEG_TUTORIAL_DATA")  # or write a folder here; None: made street scenes
STEPS = int(os.environ.get("USEG_TUTORIAL_STEPS", "800"))  # of training, for each network
SEED = int(os.environ.get("USEG_TUTORIAL_SEED", "0"))  # of everything random

# %% [markdown]
# Two small helpers: `show` sets images beside each other, and `attempt` picks your answer to an
# exercise, or the solution where you have not written one yet. There is nothing to learn in them.


# %%
def show(images, titles, columns=4, width=3.0, ids=()):
    """Set images in rows, each under its title; ``ids`` are the classes to name below."""
    columns = min(columns, len(images))
    rows, ratio = -(-len(images) // columns), images[0].shape[0] / images[0].shape[1]
    size = (width * columns, rows * (width * ratio + 0.3) + (0.4 if len(ids) else 0))
    figure, axes = plt.subplots(
        rows, columns, figsize=size, squeeze=False, layout="constrained", dpi=100
    )
    for spot in axes.flat:
        spot.axis("off")
    for spot, image, title in zip(axes.flat, images, titles, strict=False):
        spot.imshow(image, interpolation="nearest", cmap="gray")
        spot.set_title(title, fontsize=10)
    if len(ids):
        swatches = [plt.Rectangle((0, 0), 1, 1, color=np.array(CARLA.colors[k]) / 255) for k in ids]
        figure.legend(
            swatches,
            [CARLA.names[k] for k in ids],
            loc="outside lower center",
            ncols=7,
            fontsize=8,
            frameon=False,
        )
    return axes


def attempt(yours, solution, *example):
    """Return your function, or the solution if yours returns nothing yet."""
    if yours(*example) is None:
        print("not written yet: the solution stands in")
        return solution
    return yours


# %% [markdown]
# ## 1. The task: a class for every pixel
#
# A classifier says *there is a car in this image*. Segmentation says *which pixels* are car:
# its answer is a second image of the same height and width that holds a whole number, the
# class, at every pixel. We call it a **label map**.

# %%
scene = make_scene(23, (256, 192))
print(
    "image",
    scene.image.shape,
    scene.image.dtype,
    "   label map",
    scene.label.shape,
    scene.label.dtype,
)
print(
    "the pixel in row 150, column 128:",
    scene.image[150, 128],
    "is",
    scene.label[150, 128],
    "=",
    CARLA.names[scene.label[150, 128]],
)
show(
    [scene.image, paint_label(scene.label, CARLA)],
    ["the image", "its label map, in colours"],
    width=4.2,
    ids=np.unique(scene.label),
)
plt.show()

# %% [markdown]
# The thirteen classes are those of the CARLA driving simulator. The colours mean nothing to a
# network: they are paint for us, one per number. The class called *None* holds all pixels without
# another class; here that includes the sky.
#
# The classes are far from equally frequent. Count their pixels over forty scenes:

# %%
THIN = ("Poles", "RoadLines", "TrafficSigns", "Pedestrians")
LARGE = ("None", "Buildings", "Roads", "Sidewalks", "Vegetation", "Vehicles")
counts = sum(np.bincount(make_scene(k, (128, 96)).label.ravel(), minlength=13) for k in range(40))
order = np.argsort(counts)
plt.figure(figsize=(7, 3), dpi=100, layout="constrained")
plt.barh(
    [CARLA.names[k] for k in order],
    100 * counts[order] / counts.sum(),
    color=np.array(CARLA.colors)[order] / 255,
)
plt.xlabel("share of the pixels in %")
plt.gca().spines[["top", "right"]].set_visible(False)
plt.show()
thin = sum(counts[CARLA.names.index(name)] for name in THIN)
print(f"{', '.join(THIN)} together: {100 * thin / counts.sum():.0f} % of the pixels")

# %% [markdown]
# Keep that picture in mind. A network that never finds a pole, a line, a sign or a person can
# still be right at nine pixels of ten. Thin and small things are what makes segmentation hard, and
# what the U-Net was made for.
#
# > **In one sentence:** segmentation gives every pixel a class, and the rare, thin classes are
# > where networks differ.

# %% [markdown]
# ## 2. Build a U-Net
#
# ### A convolution, and the border that it costs
#
# A 3 x 3 convolution looks at each pixel with its eight neighbours and adds them up with nine
# weights. Where a neighbour is missing there is no answer, so one pixel is lost on each side.
# Here are nine weights that find vertical edges, applied to our scene:

# %%
grey = torch.from_numpy(scene.image).float().mean(2)[None, None]  # (batch, channels, height, width)
weights = torch.tensor([[[[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]]])
edges = F.conv2d(grey, weights)
print(tuple(grey.shape), "->", tuple(edges.shape))
show(
    [grey[0, 0], edges[0, 0].abs().clamp(max=255)],
    ["grey", "a 3 x 3 convolution: upright edges"],
    width=4.2,
)
plt.show()

# %% [markdown]
# In a network nobody writes the weights: they are learned, and there are many such filters side
# by side, called **channels**.
#
# ### The block: two convolutions
#
# A U-Net is made of one block, used again and again: 3 x 3 convolution, ReLU ($\max(x, 0)$), 3 x
# 3 convolution, ReLU. From here on we follow the paper's own numbers: a grey image of 572 x 572
# pixels. So that this takes no time, we build on PyTorch's `meta` device, where tensors have a
# shape but no content.


# %%
def double_conv(channels, width):
    """Two 3 x 3 convolutions with ReLU: each costs one pixel on every side."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU()
    )


with torch.device("meta"):
    x = torch.empty(1, 1, 572, 572)
    y = double_conv(1, 64)(x)
print(tuple(x.shape), "->", tuple(y.shape))

# %% [markdown]
# ### The contracting path: what is there?
#
# The first half of the network is its **contracting path**, or encoder. Max pooling keeps the
# largest of each 2 x 2 pixels: height and width are halved, so the next 3 x 3 convolution sees
# twice as far. After each pooling the block has twice as many channels. The paper does this four
# times.

# %%
widths = [64, 128, 256, 512, 1024]
kept = []  # what the skip connections will carry over
with torch.device("meta"):
    x = torch.empty(1, 1, 572, 572)
    for level, width in enumerate(widths):
        x = double_conv(x.shape[1], width)(x)
        print(f"level {level}: block {tuple(x.shape[1:])}", end="")
        if level < 4:
            kept.append(x)
            x = F.max_pool2d(x, 2)
            print(f", pooled {tuple(x.shape[1:])}", end="")
        print()

# %% [markdown]
# Drawn to scale, the five blocks look like this. From level to level the network knows less about
# *where* and more about *what*: fewer places, more channels.

# %%
figure, ax = plt.subplots(figsize=(9, 3), dpi=100, layout="constrained")
left = 0
for level, block in enumerate([*kept, x]):
    channels, side = block.shape[1:3]
    room = max(side + 12 * level, 260)
    for sheet in range(level + 1):  # one more sheet a level stands for twice the channels
        corner = (left + (room - side) / 2 + 12 * sheet, -side / 2 + 12 * sheet)
        ax.add_patch(plt.Rectangle(corner, side, side, facecolor="#9db9f5", edgecolor="#1f4fbf"))
    ax.text(
        left + room / 2,
        -310,
        f"level {level}\n{channels} channels\n{side} x {side}",
        ha="center",
        va="top",
        fontsize=9,
    )
    left += room + 50
ax.set(xlim=(-20, left), ylim=(-480, 320), aspect="equal")
ax.axis("off")
plt.show()

# %% [markdown]
# ### The expanding path: where is it?
#
# At the bottom are 1024 numbers at each of 28 x 28 places: good for *what*, too coarse for
# *where*. The **expanding path**, or decoder, brings the places back. Each step does three things:
#
# - an **up-convolution** (transposed, 2 x 2, stride 2) doubles height and width and halves the
#   channels;
# - the **skip connection** fetches the map of the same level from the contracting path, crops it to
#   the same size, and concatenates both (`torch.cat`): fine detail from the left, meaning from
#   below;
# - a **block** of two convolutions merges both.


# %%
def crop(skip, x):
    """Cut the middle out of ``skip``, as high and wide as ``x``."""
    top, left = (skip.shape[-2] - x.shape[-2]) // 2, (skip.shape[-1] - x.shape[-1]) // 2
    return skip[..., top : top + x.shape[-2], left : left + x.shape[-1]]


with torch.device("meta"):
    up = nn.ConvTranspose2d(1024, 512, 2, stride=2)(x)
    cut = crop(kept[3], up)
    both = torch.cat([cut, up], 1)
    merged = double_conv(1024, 512)(both)
print("from below   ", tuple(x.shape[1:]), "-> up-convolution", tuple(up.shape[1:]))
print("from the left", tuple(kept[3].shape[1:]), "-> cropped       ", tuple(cut.shape[1:]))
print("side by side ", tuple(both.shape[1:]), "-> block          ", tuple(merged.shape[1:]))

# %% [markdown]
# ### The whole network
#
# Four steps down, a bottom, four steps up, and a 1 x 1 convolution that turns the 64 channels
# into one number per class at each pixel. These numbers are called **logits**: the larger, the
# more the network believes in the class.


# %%
class MyUNet(nn.Module):
    """The U-Net of 2015."""

    def __init__(self, channels=1, classes=2):
        super().__init__()
        steps = [(channels, 64), (64, 128), (128, 256), (256, 512), (512, 1024)]
        self.down = nn.ModuleList(double_conv(before, after) for before, after in steps)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(2 * width, width, 2, stride=2) for width in (512, 256, 128, 64)
        )
        self.merge = nn.ModuleList(double_conv(2 * width, width) for width in (512, 256, 128, 64))
        self.head = nn.Conv2d(64, classes, 1)

    def forward(self, x):
        skips = []
        for block in self.down[:-1]:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.down[-1](x)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = up(x)
            x = merge(torch.cat([crop(skips.pop(), x), x], 1))
        return self.head(x)


# %% [markdown]
# That is all of it. Is it the paper's network? Three checks: the paper's size of the answer (572
# goes in, 388 comes out), its number of convolution layers (23), and how many numbers there are
# to learn.

# %%
with torch.device("meta"):
    mine = MyUNet()
    answer = mine(torch.empty(1, 1, 572, 572))
parameters = sum(parameter.numel() for parameter in mine.parameters())
layers = sum(isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) for layer in mine.modules())
print(
    f"572 x 572 -> {answer.shape[2]} x {answer.shape[3]}   "
    f"{layers} convolution layers   {parameters:,} parameters"
)
assert (answer.shape[2], layers, parameters) == (388, 23, 31_030_658)

# %% [markdown]
# And is it the same as `useg.UNet`? Give both the same weights and the same image (188 x 188,
# the smallest that four poolings without padding can take), and subtract.

# %%
torch.manual_seed(SEED)
mine, theirs = MyUNet(), useg.UNet()
mine.load_state_dict(
    theirs.state_dict()
)  # layer for layer: this alone fails if a name or a shape differs
image = torch.randn(1, 1, 188, 188)
with torch.no_grad():
    gap = (mine(image) - theirs(image)).abs().max().item()
print("largest difference:", gap)
assert gap == 0

# %% [markdown]
# Not nearly equal: equal. From here on we may use `useg.UNet`, which is your network with more
# settings, such as its width, its depth and its padding.
#
# `useg.drawing` draws a network out of its real layers, so the drawing cannot be wrong. Follow
# the arrows with the printed shapes above:

# %%
import re

drawing = useg.drawing(theirs, (572, 572))
SVG(re.sub('width="[0-9]+" height="[0-9]+"', 'width="900"', drawing, count=1))  # as wide as a page

# %% [markdown]
# ### Exercise 1: how large is the answer?
#
# Write a function that tells the height of the answer for an image of height `size`, for any
# `depth`, without building a network. A block takes 4 pixels, a pooling halves, an up-convolution
# doubles.


# %% tags=["exercise"]
def output_size(size, depth):
    """Return the height that comes out of an unpadded U-Net."""
    return None  # your answer here


# %% [markdown]
# Solution (folded).


# %% tags=["solution"] jupyter={"source_hidden": true}
def output_size_solution(size, depth):
    """Down, bottom, up."""
    for _ in range(depth):
        size = (size - 4) // 2
    size -= 4
    for _ in range(depth):
        size = 2 * size - 4
    return size


# %% [markdown]
# Check yourself against real networks:

# %% tags=["check"]
answer = attempt(output_size, output_size_solution, 572, 4)
assert answer(572, 4) == 388, (
    f"the paper's image of 572 gives 388, yours gives {answer(572, 4)}; "
    f"remember the block at the bottom"
)
for depth in (1, 2, 3):
    network = useg.UNet(width=1, depth=depth)
    size = network.valid_size(120)
    real = network(torch.zeros(1, 1, size, size)).shape[-1]
    assert answer(size, depth) == real, (
        f"{size} pixels and depth {depth}: really {real}, yours says {answer(size, depth)}"
    )
print("Right: you can follow the sizes through any U-Net.")

# %% [markdown]
# ### Exercise 2: how many numbers does a layer learn?
#
# A convolution has one weight for each place of its kernel, each channel that comes in and each
# that goes out, and one bias for each that goes out.


# %% tags=["exercise"]
def conv_parameters(channels_in, channels_out, kernel):
    """Return how many numbers a convolution with a kernel of ``kernel`` x ``kernel`` learns."""
    return None  # your answer here


# %% [markdown]
# Solution (folded).


# %% tags=["solution"] jupyter={"source_hidden": true}
def conv_parameters_solution(channels_in, channels_out, kernel):
    """Weights and biases."""
    return kernel * kernel * channels_in * channels_out + channels_out


# %% [markdown]
# Check yourself: your function, summed over the paper's 23 layers, must give 31,030,658.

# %% tags=["check"]
count = attempt(conv_parameters, conv_parameters_solution, 1, 64, 3)
with torch.device("meta"):
    layers = [
        layer
        for layer in useg.UNet().modules()
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
    ]
total = sum(count(layer.in_channels, layer.out_channels, layer.kernel_size[0]) for layer in layers)
assert count(1, 64, 3) == 640, (
    f"the first layer has 640 (64 times nine weights, and 64 biases), yours says {count(1, 64, 3)}"
)
assert total == 31_030_658, f"all layers have 31,030,658, yours sum up to {total:,}"
print(
    "Right: two thirds of them are in the two convolutions at the bottom "
    "and in the first block after it."
)

# %% [markdown]
# > **In one sentence:** the contracting path finds out *what* is there, the expanding path *where*,
# > and skip connections hand the fine maps of the first to the second.

# %% [markdown]
# ## 3. The lost border, and how tiles give it back
#
# Unpadded convolutions answer only where they have seen all that they need. Here is what a
# smaller U-Net of depth 3 has no answer for: everything outside the frame.

# %%
torch.manual_seed(SEED)
unpadded = useg.UNet(
    3, 13, width=8, depth=3
).double()  # not trained: what follows holds for any weights
street = make_scene(23, (260, 188)).image  # 188 and 260 are sizes that it takes
margin = unpadded.margin
dimmed = street // 3
dimmed[margin:-margin, margin:-margin] = street[margin:-margin, margin:-margin]
lost = 1 - (260 - 2 * margin) * (188 - 2 * margin) / (260 * 188)
ax = show(
    [street, dimmed], ["what goes in", f"answered: all but {margin} pixels on each side"], width=4.2
)[0, 1]
ax.add_patch(
    plt.Rectangle(
        (margin - 0.5, margin - 0.5),
        260 - 2 * margin,
        188 - 2 * margin,
        fill=False,
        color="white",
        lw=1.5,
    )
)
plt.show()
print(f"{100 * lost:.0f} % of the pixels get no answer")

# %% [markdown]
# The way out in section 2 of the paper: outside the image, let the network see the image's
# **mirror image**. The frame of the answers is then exactly the image. (The alternative is
# `padding="same"`: zeros are put around the map before every convolution. Nothing is lost and
# sizes are simple, which is why most U-Nets today do it; but near the border the network sees a
# black frame that is not there.)

# %%
around = ((margin, margin), (margin, margin), (0, 0))
mirrored = np.pad(street, around, mode="symmetric")
ax = show(
    [mirrored],
    ["the image with its mirror image around it; the frame is what gets an answer"],
    width=6,
)[0, 0]
ax.add_patch(
    plt.Rectangle((margin - 0.5, margin - 0.5), 260, 188, fill=False, color="white", lw=1.5)
)
plt.show()


def logits_of(pixels):
    """Ask the unpadded network: pixels (H, W, 3) -> logits (13, H - 2 margin, W - 2 margin)."""
    x = torch.from_numpy(np.ascontiguousarray(pixels)).double().permute(2, 0, 1)[None] / 128 - 1
    with torch.no_grad():
        return unpadded(x)[0].numpy()


whole = logits_of(mirrored)
print("image", street.shape[:2], "-> logits", whole.shape)

# %% [markdown]
# ### Tiles
#
# An image that does not fit into memory is cut into windows that overlap by the margin: where one
# window has no answer, its neighbour has one. Windows of 172 pixels give answers of 84 pixels, so
# they can stand 84 apart. Or can they? We also try 80.

# %%
WINDOW = 172
answered = WINDOW - 2 * margin


def in_tiles(step):
    """Label the street in windows that start every ``step`` pixels."""
    H, W = street.shape[:2]
    pixels = np.pad(
        street, ((margin, margin + WINDOW), (margin, margin + WINDOW), (0, 0)), mode="symmetric"
    )
    logits = np.zeros((13, H + WINDOW, W + WINDOW))
    for top in range(0, H, step):
        for left in range(0, W, step):
            answer = logits_of(pixels[top : top + WINDOW, left : left + WINDOW])
            logits[:, top : top + answered, left : left + answered] = answer
    return logits[:, :H, :W]


tiled = {step: in_tiles(step) for step in (84, 80)}
for step, logits in tiled.items():
    changed = 100 * (logits.argmax(0) != whole.argmax(0)).mean()
    most = np.abs(logits - whole).max()
    print(
        f"{step} apart: logits differ by up to {most:.1e}, "
        f"class changed at {changed:.1f} % of the pixels"
    )
assert (tiled[80].argmax(0) == whole.argmax(0)).all()

# %% [markdown]
# Laid 80 apart the tiles give the answer of the whole image (the last digit of the arithmetic
# aside). Laid 84 apart they do not, although every tile is a correct answer of the same network.
# Where do they differ?

# %%
gaps = [np.abs(tiled[step] - whole).max(0) for step in (84, 80)]
axes = show(
    [street, *gaps],
    ["the image", "tiles 84 apart: difference", "tiles 80 apart: none"],
    width=3.3,
)
for spot, step in zip(axes[0, 1:], (84, 80), strict=True):
    spot.images[0].set(cmap="inferno", clim=(0, gaps[0].max()))
    for line in range(step, 260, step):
        spot.axvline(line - 0.5, color="white", lw=0.6, ls=":")
        if line < 188:
            spot.axhline(line - 0.5, color="white", lw=0.6, ls=":")
plt.show()

# %% [markdown]
# The reason is the pooling: three poolings put an 8 x 8 grid on the image. A window that starts
# at a multiple of 8 has its grid where the whole image has it; 84 is no multiple of 8, so there
# pooling groups other pixels. (The corners agree: they start at 0 and at 2 x 84 = 168
# = 21 x 8.) With the paper's numbers it is the same: 388 is no multiple of 16, and windows belong
# 384 apart. `useg` places them so by itself:

# %%
from useg.inference import tiles
from useg.models.geometry import Geometry

geometry = Geometry(unpadded.margin, unpadded.stride, unpadded.context, unpadded.valid_size)
answer = tiles.predict_tiled(
    street,
    lambda x: np.stack([logits_of(each.transpose(1, 2, 0)) for each in x]),
    geometry,
    tile=WINDOW,
)
print("useg's tiles, largest difference:", f"{np.abs(answer - whole).max():.1e}")
assert (answer.argmax(0) == whole.argmax(0)).all()

# %% [markdown]
# ### Exercise 3: how far apart?
#
# Write the rule: windows of `window` pixels, a network that loses `margin` on each side and has
# `depth` poolings. How far apart may the windows stand at most, so that no pixel is left out and
# the answer is that of the whole image?


# %% tags=["exercise"]
def tile_step(window, margin, depth):
    """Return the largest right distance between two windows, in pixels."""
    return None  # your answer here


# %% [markdown]
# Solution (folded).


# %% tags=["solution"] jupyter={"source_hidden": true}
def tile_step_solution(window, margin, depth):
    """As far as a window answers, rounded down to the grid of the poolings."""
    stride = 2**depth
    return (window - 2 * margin) // stride * stride


# %% [markdown]
# Check yourself:

# %% tags=["check"]
step = attempt(tile_step, tile_step_solution, 572, 92, 4)
for window, lost, depth, right in ((572, 92, 4, 384), (172, 44, 3, 80), (140, 20, 2, 100)):
    said = step(window, lost, depth)
    assert said == right, (
        f"a window of {window}, margin {lost}, depth {depth}: {right} is right, yours says {said}"
    )
print("Right: no seam to hide, because there is none.")

# %% [markdown]
# > **In one sentence:** an unpadded U-Net answers for less than it sees; a mirrored border gives
# > the edge back, and tiles laid on the grid of the poolings give exactly the answer of the whole
# > image.

# %% [markdown]
# ## 4. How far does a pixel see? The receptive field
#
# The class of a pixel depends on a square of the image around it, its **receptive field**. A
# grey spot is road or wall or sky: only what is around it can tell. Each 3 x 3 convolution adds
# one step on each side, and after a pooling a step is twice as long. `useg.describe` follows
# every layer (right column). For a small U-Net with two poolings:

# %%
print(useg.describe(useg.UNet(3, 13, width=8, depth=2, padding="same"), (128, 96)))

# %% [markdown]
# And here the receptive fields of U-Nets with one to four poolings, as squares on a scene: all
# for the one pixel in the middle.

# %%
wide = make_scene(23, (320, 240))
ax = show([wide.image], ["what the pixel in the middle can see"], width=6)[0, 0]
for depth, color in zip((1, 2, 3, 4), ("#ffffff", "#ffe14a", "#ff9d3d", "#ff6f91"), strict=True):
    field = useg.describe(useg.UNet(3, 13, width=2, depth=depth, padding="same"), (320, 240)).field
    name = f"{depth} pooling{'s' * (depth > 1)}: {field} x {field}"
    ax.add_patch(
        plt.Rectangle(
            (160 - field / 2, 120 - field / 2),
            field,
            field,
            fill=False,
            color=color,
            lw=2.5,
            label=name,
        )
    )
ax.plot(160, 120, "+", color="white")
ax.legend(
    loc="upper left", fontsize=9, facecolor="#333333", labelcolor="linecolor", framealpha=0.85
)
plt.show()

# %% [markdown]
# One pooling sees a piece of a car, four see the whole situation. But *can see* is not *looks
# at*. Ask by how much the answer at the middle changes when a pixel of the image changes (that
# is a gradient): the influence is strong in the middle and fades outwards.

# %%
torch.manual_seed(SEED)
network = useg.UNet(3, 13, width=8, depth=3, padding="same")
x = torch.randn(1, 3, 128, 128, requires_grad=True)
network(x)[0, :, 64, 64].sum().backward()
influence = x.grad[0].abs().sum(0)
rows = influence.sum(1).nonzero().squeeze()
field = useg.describe(network, (128, 128)).field
print(
    f"the answer at row 64 depends on the rows {rows.min()} to {rows.max()}: "
    f"{len(rows)} rows, of at most {field}"
)
ax = show([influence.sqrt()], ["influence on the pixel in the middle (square root)"], width=4)[0, 0]
ax.images[0].set_cmap("inferno")
plt.show()

# %% [markdown]
# ### Exercise 4: compute a receptive field
#
# Begin with a field of 1 and steps of 1 pixel. A layer with a kernel of `k` adds `k - 1` steps to
# the field; a layer with a stride of `s` makes the steps `s` times as long for those that follow.


# %% tags=["exercise"]
def receptive_field(layers):
    """Return the field after ``layers``, a list of (kernel, stride)."""
    return None  # your answer here


# %% [markdown]
# Solution (folded).


# %% tags=["solution"] jupyter={"source_hidden": true}
def receptive_field_solution(layers):
    """Grow the field, stretch the steps."""
    field, step = 1, 1
    for kernel, stride in layers:
        field += (kernel - 1) * step
        step *= stride
    return field


# %% [markdown]
# Check yourself against `useg.describe`, down to the bottom of a U-Net:

# %% tags=["check"]
grow = attempt(receptive_field, receptive_field_solution, [(3, 1)])
assert grow([(3, 1), (3, 1)]) == 5, (
    f"two 3 x 3 convolutions see 5 pixels, yours says {grow([(3, 1), (3, 1)])}"
)
contracting = [(3, 1), (3, 1), (2, 2)] * 4 + [(3, 1), (3, 1)]
layers = useg.describe(useg.UNet(), (572, 572)).layers
bottom = next(layer.field for layer in layers if layer.name == "down.4.2")
assert grow(contracting) == bottom, (
    f"at the bottom of the paper's U-Net it is {bottom}, yours says {grow(contracting)}"
)
print(f"Right: the bottom of the paper's U-Net sees {bottom} pixels; the expanding path adds more.")

# %% [markdown]
# > **In one sentence:** poolings let a pixel see far, which is how a network knows *what*
# > something is, and it is also how it forgets exactly *where* it was.

# %% [markdown]
# ## 5. The loss: sparse categorical cross-entropy, pixel by pixel
#
# The network writes $K$ logits at each pixel, one per class. Training needs one number that says
# how wrong they are. Take the smallest image worth the name: 2 x 2 pixels, three classes. The
# truth is one whole number per pixel.

# %%
target = np.array([[0, 2], [1, 1]])  # the true class of each pixel
logits = np.array(  # (3 classes, 2 rows, 2 columns)
    [
        [[4.0, 0.0], [1.0, 0.0]],  # class 0
        [[1.0, 0.0], [3.0, 0.0]],  # class 1
        [[0.0, 2.0], [1.0, 5.0]],  # class 2
    ]
)
print("truth\n", target, "\nclass of the largest logit\n", logits.argmax(0), sep="")

# %% [markdown]
# Three pixels are right, the last is wrong, and badly: 5 for class 2, 0 for the true class 1.
# Three steps lead to the loss.
#
# 1. **Softmax** turns the logits $z$ of a pixel into probabilities: $p_k = e^{z_k} / \sum_j
#    e^{z_j}$.
# 2. Of these only that of the true class $t$ counts: the pixel's loss is $-\log p_t$. That is 0
#    when $p_t = 1$, and grows without end as $p_t$ goes to 0.
# 3. The loss of the image is the **mean over its pixels**.

# %%
probabilities = np.exp(logits) / np.exp(logits).sum(0)
print("pixel          probabilities          truth   p of it   -log p")
losses = np.zeros((2, 2))
for row in range(2):
    for column in range(2):
        true = target[row, column]
        p = probabilities[true, row, column]
        losses[row, column] = -np.log(p)
        text = "  ".join(f"{value:.3f}" for value in probabilities[:, row, column])
        print(f"({row}, {column})     {text}     {true}       {p:.3f}    {losses[row, column]:.3f}")
by_hand = losses.mean()
print(f"mean: {by_hand:.6f}")

# %% [markdown]
# The wrong pixel makes nearly all of the loss: being sure *and* wrong is expensive. PyTorch gives
# the same number, and so does `useg`:

# %%
from useg.scoring.losses import cross_entropy

z = torch.tensor(logits)[None]  # (batch, classes, height, width)
t = torch.tensor(target)[None]  # (batch, height, width), whole numbers
print(
    f"by hand {by_hand:.6f}   torch {F.cross_entropy(z, t).item():.6f}   "
    f"useg {cross_entropy(z, t).item():.6f}"
)
assert np.isclose(by_hand, F.cross_entropy(z, t).item())
assert np.isclose(by_hand, cross_entropy(z, t).item())

# %% [markdown]
# ### Why "sparse"?
#
# The textbook writes the truth **one-hot**: $K$ numbers per pixel, a 1 at the true class and 0
# elsewhere, and the loss as $-\sum_k y_k \log p_k$. All terms but one are multiplied by 0.
# *Sparse* means to skip them: the truth stays one whole number that says which term to take. The
# result is the same; the memory is not. For a batch of eight images and 13 classes:

# %%
one_hot = F.one_hot(t, 3).permute(0, 3, 1, 2).double()
textbook = -(one_hot * z.log_softmax(1)).sum(1).mean().item()
print(f"one-hot {textbook:.6f}, sparse {by_hand:.6f}")
batch = torch.from_numpy(np.stack([make_scene(k, (256, 192)).label for k in range(8)]))
for name, tensor in (
    ("label maps as stored, uint8 ", batch),
    ("whole numbers for the loss  ", batch.long()),
    ("one-hot, float32            ", F.one_hot(batch.long(), 13).float()),
):
    print(f"{name} {tuple(tensor.shape)!s:>18}  {tensor.nbytes / 1e6:5.1f} MB")

# %% [markdown]
# ### Pixels that do not count
#
# Some pixels have no truth: the border of an object that nobody could draw exactly, the bonnet of
# the camera car. They get the number 255, **ignore**: they have no part in the sum, nor in the
# number of pixels that it is divided by, and no gradient. Ignore the wrong pixel:

# %%
ignoring = t.clone()
ignoring[0, 1, 1] = IGNORE
z_learning = z.clone().requires_grad_()
loss = cross_entropy(z_learning, ignoring)
loss.backward()
print(
    f"loss {loss.item():.6f} = mean of the other three "
    f"{np.mean([losses[0, 0], losses[0, 1], losses[1, 0]]):.6f}"
)
print("gradient at the ignored pixel:", z_learning.grad[0, :, 1, 1].tolist())

# %% [markdown]
# ### Logits, not probabilities
#
# In Keras this is the switch `from_logits=True`. PyTorch's `cross_entropy`, and `useg`'s, always
# expect logits and do the softmax themselves. If the network ends with a softmax as well, nothing
# breaks, and that is the trouble: the loss is wrong, and nobody is told.

# %%
certain = torch.tensor([[[[50.0]], [[0.0]], [[0.0]]]])  # quite sure of class 0, and right
right = torch.tensor([[[0]]])
print(f"from logits:         {F.cross_entropy(certain, right).item():.4f}")
print(
    f"softmax done twice:  {F.cross_entropy(certain.softmax(1), right).item():.4f}   "
    f"and it never gets better"
)
huge = torch.tensor([1000.0, 0.0])
print("exp(1000) overflows, so softmax by hand gives", (huge.exp() / huge.exp().sum()).tolist())
print("log-softmax from logits is safe:             ", huge.log_softmax(0).tolist())

# %% [markdown]
# ### Exercise 5: write the loss
#
# In numpy, for logits `(K, H, W)` and a truth `(H, W)` in which 255 does not count. (Boolean
# indexing helps: `logits[:, counted]` has the shape `(K, number of pixels)`.)


# %% tags=["exercise"]
def pixel_loss(logits, target):
    """Return the mean of -log p of the true class over the pixels that count."""
    return None  # your answer here


# %% [markdown]
# Solution (folded).


# %% tags=["solution"] jupyter={"source_hidden": true}
def pixel_loss_solution(logits, target):
    """Subtract the largest logit before the softmax: the same result, and nothing overflows."""
    counted = target != 255
    z, true = logits[:, counted], target[counted]
    z = z - z.max(0)
    log_p = z - np.log(np.exp(z).sum(0))
    return -log_p[true, np.arange(len(true))].mean()


# %% [markdown]
# Check yourself on random logits, with a tenth of the pixels ignored:

# %% tags=["check"]
rng = np.random.default_rng(0)
z, truth = rng.normal(size=(13, 6, 8)), rng.integers(0, 13, (6, 8))
truth[rng.random((6, 8)) < 0.1] = 255
loss = attempt(pixel_loss, pixel_loss_solution, z, truth)
expected = F.cross_entropy(
    torch.tensor(z)[None], torch.tensor(truth)[None], ignore_index=255
).item()
assert np.isclose(loss(z, truth), expected), (
    f"torch says {expected:.6f}, yours says {loss(z, truth):.6f}; "
    f"do ignored pixels count in the mean?"
)
print(f"Right: {expected:.6f}. You have written sparse categorical cross-entropy.")

# %% [markdown]
# > **In one sentence:** at each pixel take the softmax of the logits and then minus the logarithm
# > of the true class's probability; the loss is the mean over the pixels that count.

# %% [markdown]
# ## 6. Plain CNN, FCN, U-Net: what each one brings back
#
# ### A score that sees thin things: IoU
#
# The share of right pixels is a poor judge: we saw that thin classes hardly count in it.
# **Intersection over union** asks of each class by itself: of all pixels that are this class in
# the truth *or* in the answer, how many are it in both? A class that is never found scores 0,
# however rare it is.
#
# ### Exercise 6: write IoU


# %% tags=["exercise"]
def iou(prediction, truth, k):
    """Return the intersection over union of class ``k`` in two label maps; nan if in neither."""
    return None  # your answer here


# %% [markdown]
# Solution (folded).


# %% tags=["solution"] jupyter={"source_hidden": true}
def iou_solution(prediction, truth, k):
    """Both, over either."""
    either = ((prediction == k) | (truth == k)).sum()
    return ((prediction == k) & (truth == k)).sum() / either if either else float("nan")


# %% [markdown]
# Check yourself against the counts from which `useg` computes every score:

# %% tags=["check"]
from useg.scoring.metrics import confusion, score

score_of = attempt(iou, iou_solution, np.array([0, 1]), np.array([0, 1]), 0)
truth = make_scene(3, (128, 96)).label
moved = np.roll(truth, 2, axis=1)  # an answer that is right but for two pixels' shift to the side
expected = {
    entry.name: entry.iou
    for entry in score(confusion(moved, truth, 13), CARLA.names, 1).classes
    if entry.pixels
}
for name, value in expected.items():
    said = score_of(moved, truth, CARLA.names.index(name))
    assert np.isclose(said, value), f"{name}: {value:.3f} is right, yours says {said:.3f}"
print("Right. An answer that is only shifted by two pixels scores:")
print(
    ", ".join(
        f"{name} {expected[name]:.2f}"
        for name in ("Roads", "Buildings", "Poles", "TrafficSigns")
        if name in expected
    )
)

# %% [markdown]
# A shift of two pixels costs a road little and a pole nearly everything.
#
# ### What a coarse map cannot hold
#
# Before any training: take the truth itself and squeeze it through a coarse map. Each block of
# `stride` x `stride` pixels keeps only the shares of its classes; enlarge these smoothly, take
# the largest at each pixel, and score that against the truth.

# %%
# scenes for scoring; no network will train on them
tests = [make_scene(500_000 + k, (128, 96)) for k in range(40)]


def coarse(label, stride):
    """Squeeze a label map through a map of one place for each stride x stride pixels."""
    classes = F.one_hot(torch.from_numpy(label).long(), 13).permute(2, 0, 1).float()[None]
    enlarged = F.interpolate(
        F.avg_pool2d(classes, stride), label.shape, mode="bilinear", align_corners=False
    )
    return enlarged[0].argmax(0).numpy().astype(np.uint8)


def score_all(answers):
    """Score label maps for the test scenes: IoU by class name."""
    counts = sum(
        confusion(answer, scene.label, 13) for answer, scene in zip(answers, tests, strict=True)
    )
    return {entry.name: entry.iou for entry in score(counts, CARLA.names, len(answers)).classes}


def mean_of(scores, names):
    """Average the IoU of some classes."""
    return float(np.mean([scores[name] for name in names]))


strides = (1, 2, 4, 8, 16, 32)
squeezed = [score_all([coarse(scene.label, stride) for scene in tests]) for stride in strides]

# %% [markdown]
# As a curve, and as images of one scene:

# %%
plt.figure(figsize=(6, 2.8), dpi=100, layout="constrained")
plt.plot(
    [mean_of(c, LARGE) for c in squeezed],
    "o-",
    color="#804080",
    label="large classes (road, buildings, vehicles, ...)",
)
plt.plot(
    [mean_of(c, THIN) for c in squeezed],
    "o-",
    color="#dc143c",
    label="thin classes (poles, lines, signs, people)",
)
plt.xticks(range(6), [f"{stride}" for stride in strides])
plt.xlabel("stride of the coarse map")
plt.ylabel("mean IoU of the squeezed truth")
plt.ylim(0, 1.03)
plt.legend(frameon=False, fontsize=8)
plt.gca().spines[["top", "right"]].set_visible(False)
plt.show()
example = 10
images = [
    tests[example].image,
    *(paint_label(coarse(tests[example].label, stride), CARLA) for stride in (1, 8, 16)),
]
show(images, ["image", "truth", "truth through stride 8", "truth through stride 16"])
plt.show()

# %% [markdown]
# The large classes keep their shape, roughly; the thin ones are gone long before. A trained
# network may choose its scores more cleverly than this, but where inside a block a thin thing
# stands, a coarse map hardly tells. The detail must be brought back from somewhere. Here are
# three answers to *from where?*
#
# - **Plain CNN.** A classifier, asked at every place at once: convolutions and poolings, then one
#   answer for each block of 16 x 16 pixels, smoothly enlarged. Nothing brings detail back.
# - **FCN** (Long et al. 2015). Two ideas: the enlargement is a transposed convolution that is
#   *learned*; and to the coarse class scores, scores from earlier, finer maps are *added*.
#   FCN-32s adds none and enlarges 32 times; FCN-8s adds two and still enlarges 8 times.
# - **U-Net** (Ronneberger et al. 2015). Goes up level by level to full size, and at each level
#   fetches not scores but *all features* of the contracting path, concatenates them with its own,
#   and merges them by convolutions.
#
# Which layers make up the way back to full size? Read them off the real networks:

# %%
from useg.models.baselines import FCN, PixelClassifier

NETWORKS = {
    "plain CNN": lambda: PixelClassifier(3, 13, width=12, normalize=True),
    "FCN-32s": lambda: FCN(3, 13, step=32, width=6, normalize=True),
    "FCN-8s": lambda: FCN(3, 13, step=8, width=6, normalize=True),
    "U-Net, skips cut": lambda: useg.UNet(
        3, 13, width=8, padding="same", normalize=True, skips=[False] * 4
    ),
    "U-Net": lambda: useg.UNet(3, 13, width=8, padding="same", normalize=True),
}
for name, make in NETWORKS.items():
    description = useg.describe(make(), (128, 96))
    print(
        f"\n{name}: {description.parameters:,} parameters, "
        f"{description.macs / 1e6:.0f} million multiply-adds"
    )
    for layer in description.layers:
        if layer.name.startswith(("score", "up", "enlarge", "head")):
            print(f"    {layer.name:12} {layer.kind:30} -> {' x '.join(map(str, layer.shape))}")

# %% [markdown]
# "U-Net, skips cut" is our control: the same network with zeros in place of what the skip
# connections carry. The widths are chosen so that all five have 0.4 to 0.5 million parameters.
# They do not cost the same work: a U-Net computes at full size as well, and that is part of what
# it is. (`normalize=True` adds batch normalisation, which is not in the papers; it makes short
# trainings work.)
#
# ### A training loop
#
# Two hundred scenes to learn from. The loss is that of section 5 with one addition: a pixel
# counts the more, the rarer its class is: in proportion to $1/\sqrt{s}$ for a class with share
# $s$. Else the networks would take very long to bother about one pixel in a hundred.


# %%
def tensors(scenes):
    """Scenes -> pixels (N, 3, 96, 128) of about -1 to 1, and classes (N, 96, 128)."""
    x = (
        torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2).float()
        / 64
        - 2
    )
    target = torch.from_numpy(np.stack([scene.label for scene in scenes])).long()
    return x.contiguous(memory_format=torch.channels_last), target


x, target = tensors([make_scene(1_000_000 * (1 + SEED) + k, (128, 96)) for k in range(200)])
x_test, _ = tensors(tests)
shares = torch.bincount(target.flatten(), minlength=13) / target.numel()
weight = shares.rsqrt() / (shares * shares.rsqrt()).sum()
print(", ".join(f"{name} {w:.1f}" for name, w in zip(CARLA.names, weight.tolist(), strict=True)))

# %% [markdown]
# The loop itself is the same for every network: draw a few scenes, mirror every other batch,
# compute the loss, step downhill.


# %%
def learn(network):
    """Train a network on the scenes; returns its label maps of the test scenes."""
    network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS)
    draws = torch.Generator().manual_seed(SEED)
    for step in range(STEPS):
        chosen = torch.randint(len(x), (2,), generator=draws)
        pixels, truth = x[chosen], target[chosen]
        if step % 2:
            pixels, truth = pixels.flip(-1), truth.flip(-1)
        loss = cross_entropy(network(pixels), truth, weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return answers_of(network)


def answers_of(network):
    """Label the test scenes."""
    network.eval()
    with torch.no_grad():
        return [network(image[None])[0].argmax(0).numpy().astype(np.uint8) for image in x_test]


# %% [markdown]
# Now all five, one after the other, with the same scenes in the same order.

# %%
trained, answers, scores = {}, {}, {}
for name, make in NETWORKS.items():
    began = time.perf_counter()
    torch.manual_seed(SEED)
    trained[name] = make()
    answers[name] = learn(trained[name])
    scores[name] = score_all(answers[name])
    thin, large = mean_of(scores[name], THIN), mean_of(scores[name], LARGE)
    seconds = time.perf_counter() - began
    print(
        f"{name:17} {seconds:4.0f} s   "
        f"mean IoU of the large classes {large:.2f}, of the thin ones {thin:.2f}"
    )

# %% [markdown]
# ### The same scene through all five
#
# None of them has seen this scene. Look at the poles, the signs, the lines on the road and the
# people.

# %%
COLOURS = {
    "plain CNN": "#94a3b8",
    "FCN-32s": "#d9b44a",
    "FCN-8s": "#e07b39",
    "U-Net, skips cut": "#a78bda",
    "U-Net": "#1d4ed8",
}


def draw_scene(figure, grid):
    """The image, the truth and every network's answer, with the names of the classes."""
    truth = tests[example].label
    images = {"image": tests[example].image, "truth": paint_label(truth, CARLA)}
    images |= {name: paint_label(answer[example], CARLA) for name, answer in answers.items()}
    for place, (name, image) in enumerate(images.items()):
        ax = figure.add_subplot(grid[place // 4, place % 4])
        ax.imshow(image, interpolation="nearest")
        ax.set_title(
            name,
            fontsize=10,
            color=COLOURS.get(name, "black"),
            fontweight="bold" if name in COLOURS else "normal",
        )
        ax.axis("off")
    ax = figure.add_subplot(grid[1, 3])
    ax.axis("off")
    swatches = [
        plt.Rectangle((0, 0), 1, 1, color=np.array(CARLA.colors[k]) / 255) for k in np.unique(truth)
    ]
    ax.legend(
        swatches,
        [CARLA.names[k] for k in np.unique(truth)],
        loc="center",
        ncols=2,
        fontsize=8,
        frameon=False,
    )


figure = plt.figure(figsize=(12, 4.9), dpi=100, layout="constrained")
draw_scene(figure, figure.add_gridspec(2, 4))
plt.show()

# %% [markdown]
# One scene may be luck. The IoU over all forty test scenes, class by class:


# %%
def draw_bars(ax):
    """IoU of every network: the thin classes, and the means of the thin and of the large ones."""
    groups = {
        **{name: (name,) for name in THIN},
        "mean of\nthin classes": THIN,
        "mean of\nlarge classes": LARGE,
    }
    for k, (network, color) in enumerate(COLOURS.items()):
        values = [mean_of(scores[network], names) for names in groups.values()]
        ax.bar(np.arange(len(groups)) + 0.16 * (k - 2), values, 0.16, color=color, label=network)
    for k, value in enumerate([mean_of(scores["U-Net"], names) for names in groups.values()]):
        ax.text(
            k + 0.32, value + 0.01, f"{value:.2f}", ha="center", fontsize=8, color=COLOURS["U-Net"]
        )
    ax.axvline(len(THIN) - 0.5, color="#999999", lw=0.8)
    ax.set_xticks(range(len(groups)), groups)
    ax.set_ylabel("IoU (more is better)")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=9)


figure, ax = plt.subplots(figsize=(12, 3.4), dpi=100, layout="constrained")
draw_bars(ax)
plt.show()
for name in ("FCN-32s", "plain CNN", "FCN-8s"):
    large, thin = (
        mean_of(scores[name], names) / max(0.01, mean_of(scores["U-Net"], names))
        for names in (LARGE, THIN)
    )
    print(
        f"{name:9} reaches {large:.0%} of the U-Net's IoU on the large classes, "
        f"{thin:.0%} on the thin ones"
    )

# %% [markdown]
# Read it in two steps.
#
# - **The large classes** (rightmost) suffer least: a coarse answer is nearly enough for a road.
# - **The thin classes** are where the networks part. FCN-32s answers from a map of 4 x 3 places;
#   these images are small, so it loses more here than on the paper's photographs, but of the
#   same kind. FCN-8s adds finer scores and gains most on the lines. The U-Net brings back all
#   features at all levels, and wins, most clearly on the lines. (Not in every bar: at this size
#   people are blobs rather than lines, and there FCN-8s does about as well.)
#
# The control says *why*. It is the same network with the same number of parameters, and without
# its skip connections it is worse than the plain CNN: all detail must squeeze through a bottom of
# 8 x 6 places, and so must everything that it learns.
#
# ### Cut the skip connections of the trained U-Net, one by one
#
# `network.skips` says which levels carry features. We do not train again: we take something away
# from a finished network and look at what is missing.

# %%
network = trained["U-Net"]
cuts, cut_answers = {"all there": (True,) * 4}, {}
cuts |= {f"level {level} cut": tuple(k != level for k in range(4)) for level in range(4)}
for name, skips in cuts.items():
    network.skips = skips
    cut_answers[name] = answers_of(network)
    result = score_all(cut_answers[name])
    size = (
        f"{128 >> cuts[name].index(False)} x {96 >> cuts[name].index(False)} places"
        if False in skips
        else ""
    )
    print(
        f"{name:12} large classes {mean_of(result, LARGE):.2f}   "
        f"thin classes {mean_of(result, THIN):.2f}   {size}"
    )
network.skips = (True,) * 4
images = [
    tests[example].image,
    paint_label(tests[example].label, CARLA),
    *(paint_label(each[example], CARLA) for each in cut_answers.values()),
]
show(images, ["image", "truth", *cut_answers], columns=4)
plt.show()

# %% [markdown]
# Level 0 is the top, at full size. Without it the network is left with maps of half the size, and
# the thin classes go first. Further down a cut costs less and less: what those levels know of
# places, the levels above know better. (A network that was *trained* without a skip would have
# learned to make do; this shows what the finished one relies on.)
#
# > **In one sentence:** a plain CNN answers from its coarsest map, an FCN mends that answer with
# > finer *scores*, and a U-Net rebuilds it with all the finer *features*; the gain is in the thin
# > classes.

# %% [markdown]
# The image of the project's README is drawn by the same two functions. This cell writes it when
# `USEG_TUTORIAL_FIGURE` names a file:

# %%
if target_file := os.environ.get("USEG_TUTORIAL_FIGURE"):
    figure = plt.figure(figsize=(11, 7.4), dpi=100, layout="constrained")
    grid = figure.add_gridspec(3, 4, height_ratios=(1, 1, 1.15))
    draw_scene(figure, grid)
    draw_bars(figure.add_subplot(grid[2, :]))
    figure.savefig(target_file, bbox_inches="tight", pad_inches=0.1)
    plt.close(figure)

# %% [markdown]
# ## 7. Segment a street with useg
#
# You have seen every part. Now the whole job, as you would do it with your own images: a folder
# with CARLA's layout,
#
# ```
# DATA/CameraRGB/NAME.png    the images
# DATA/CameraSeg/NAME.png    the masks: the class number is in the red channel
# ```
#
# If `DATA` names no folder, we make one with 120 scenes. Then: what is in it, and which images
# are held out from training?

# %%
from useg.data.dataset import read_sample

workspace = tempfile.TemporaryDirectory()
WORK = Path(workspace.name)
if DATA is None:
    write_scenes(WORK / "streets", 120, (128, 96), seed=100 + SEED)
folder = Path(DATA or WORK / "streets")
dataset = useg.open_dataset(folder)
print(f"layout {dataset.layout}, {len(dataset.pairs)} pairs, {len(dataset.classes)} classes")
print({split: len(dataset.of(split)) for split in ("train", "gap", "val")}, "-", dataset.splits_by)
pairs = [dataset.of("train")[0], dataset.of("val")[0]]
samples = [read_sample(pair, dataset) for pair in pairs]
show(
    [
        each
        for sample in samples
        for each in (sample.image, paint_label(sample.label, dataset.classes))
    ],
    [text for pair in pairs for text in (f"{pair.split}: {pair.image.name}", "its mask")],
)
plt.show()

# %% [markdown]
# ### Why there is a gap: the parrot
#
# The numbers in the names look like a video, so `useg` did not hold out images at random. It
# held out the **end** of the video, and left a **gap** before it whose images are not used. To see
# why, meet a model that learns nothing. The parrot looks for the training image that is most like
# the new one, and repeats its label map.


# %%
def parrot(scenes, train, val):
    """Score repeating the label map of the most similar training image: mean IoU."""
    images = (
        torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2).float()
    )
    thumbs = F.adaptive_avg_pool2d(images, 24).flatten(1)
    nearest = torch.cdist(thumbs[val], thumbs[train], p=1).argmin(1)
    counts = sum(
        confusion(scenes[train[j]].label, scenes[i].label, 13)
        for i, j in zip(val, nearest.tolist(), strict=True)
    )
    return score(counts, CARLA.names, len(val)).mean_iou


video = []  # four streets, filmed by a camera that turns slowly: 30 frames each
for street in range(4):
    wide = make_scene(900_000 + street, (192, 144))
    for left in range(0, 60, 2):
        view = np.s_[24:120, left : left + 128]
        video.append(type(wide)(wide.image[view], wide.label[view]))
shuffled = np.random.default_rng(0).permutation(120).tolist()
ends = [k for k in range(120) if k % 30 >= 24]
starts = [k for k in range(120) if k % 30 < 22]  # two frames before each end are the gap
show(
    [video[k].image for k in (0, 1, 24, 30)],
    ["frame 0", "frame 1", "frame 24", "frame 30: the next street"],
)
plt.show()
print(f"frames held out at random:            {parrot(video, shuffled[24:], shuffled[:24]):.2f}")
print(f"the end of each street, with a gap:   {parrot(video, starts, ends):.2f}")
print(
    f"a street of which it saw nothing:     "
    f"{parrot(video, list(range(90)), list(range(90, 120))):.2f}"
)

# %% [markdown]
# With the random split this fraud looks like a strong model: for every held-out frame, its
# neighbour is in the training set. A network can memorise training images as well, so its score
# can be inflated in the same way. Blocks with a gap are stricter: they show how good the model is
# on the *same streets a little further on*. Other streets are harder still, and only images of
# other streets can tell how hard.
#
# What does the parrot score on the folder that we are about to use?

# %%
from useg.images.files import Sample, resize_image, resize_label

frames = [read_sample(pair, dataset) for pair in dataset.pairs]
frames = [
    Sample(resize_image(frame.image, (128, 96)), resize_label(frame.label, (128, 96)))
    for frame in frames
]
mixed = np.random.default_rng(0).permutation(len(frames)).tolist()
held = len(dataset.of("val"))
parts = {
    split: [k for k, pair in enumerate(dataset.pairs) if pair.split == split]
    for split in ("train", "val")
}
print(f"held out at random:    {parrot(frames, mixed[held:], mixed[:held]):.2f}")
print(f"held out by useg:      {parrot(frames, parts['train'], parts['val']):.2f}")

# %% [markdown]
# Each made scene is a street of its own, so there is nothing to repeat, and both numbers are low
# and alike. With the frames of a real drive the first number is far above the second: the
# difference is the part of a score that is memory.
#
# ### Exercise 7: hold out the end of a video
#
# Write the split: `count` frames in order, the last `held` of them for validation, `gap` frames
# before these unused, the rest for training.


# %% tags=["exercise"]
def split_video(count, held, gap):
    """Return two lists of frame numbers: (train, val)."""
    return None  # your answer here


# %% [markdown]
# Solution (folded).


# %% tags=["solution"] jupyter={"source_hidden": true}
def split_video_solution(count, held, gap):
    """The beginning, and the end."""
    return list(range(count - held - gap)), list(range(count - held, count))


# %% [markdown]
# Check yourself:

# %% tags=["check"]
split = attempt(split_video, split_video_solution, 30, 6, 2)
train, val = split(30, 6, 2)
assert list(val) == [24, 25, 26, 27, 28, 29], (
    f"the last six frames of 30 are 24 to 29, yours are {val}"
)
assert min(val) - max(train) == 3, (
    f"frames 22 and 23 belong to nobody, but the last of yours for training is {max(train)}"
)
assert len(train) == 22, f"22 of 30 frames are left for training, yours are {len(train)}"
print("Right: this score will mean something.")

# %% [markdown]
# ### Train
#
# One call. `useg` picks every setting that you omit, from the images and this machine, and prints
# why. We set a small network, a small size and few steps, so that it takes about half a minute;
# without these settings it takes ten minutes and gives better scores. We also turn off the random
# changes of colour and light, which make a model robust to other streets and weather: our held-out
# scenes look like the training scenes, and few steps are better spent on those.

# %%
from useg.training.trainer import SilentProgress

progress = SilentProgress()
progress.say = print
settings = {
    "data.size": "128x96",
    "model.width": 8,
    "train.batch": 4,
    "train.steps": STEPS // 2,
    "train.photometric": 0,
    "train.exposure": 0,
    "train.seed": SEED,
}
run = useg.train(folder, WORK / "run", settings=settings, progress=progress)
print(f"\nmean IoU on the held-out images: {run.scores.mean_iou:.2f}")
Image(WORK / "run" / "curves.png", width=700)

# %% [markdown]
# The left curve is the loss of section 5 (plus the Dice loss, in which rare classes count as much
# as frequent ones); the right one is the score on the held-out images after each pass over the
# training images. The run folder holds the model file, every setting, the log and a report,
# `report.html`.
#
# ### Score it honestly
#
# The scores are computed at the resolution of the masks, on the held-out images alone.

# %%
model = useg.load(WORK / "run")
evaluation = useg.evaluate(model, folder)
present = sorted(
    (entry for entry in evaluation.scores.classes if entry.pixels), key=lambda entry: entry.iou
)
plt.figure(figsize=(7, 3.2), dpi=100, layout="constrained")
bars = plt.barh(
    [entry.name for entry in present],
    [entry.iou for entry in present],
    color=[np.array(CARLA.colors[e.id]) / 255 for e in present],
)
plt.bar_label(
    bars,
    [
        f"{entry.iou:.2f}  ({100 * entry.pixels / evaluation.counts.sum():.1f} % of the pixels)"
        for entry in present
    ],
    padding=4,
    fontsize=8,
)
plt.xlim(0, 1.4)
plt.xticks(np.arange(0, 1.01, 0.25))
plt.xlabel("IoU")
plt.gca().spines[["top", "right"]].set_visible(False)
plt.show()
result = evaluation.scores
print(
    f"{result.num_images} images, mean IoU {result.mean_iou:.3f}, "
    f"right pixels {result.pixel_accuracy:.3f}"
)
print("classes without a pixel in the truth:", ", ".join(result.absent) or "none")

# %% [markdown]
# Two questions to ask of any such number.
#
# **Which classes are in the mean?** A class that does not occur in the truth can be neither found
# nor missed. Counting it as 0 punishes, counting it as 1 flatters; `useg` leaves it out and names
# it. Take the upper third of one image, where no road can be:

# %%
sample = read_sample(dataset.of("val")[0], dataset)
upper = slice(0, len(sample.label) // 3)
single = score(confusion(model(sample.image)[upper], sample.label[upper], 13), CARLA.names, 1)
values = [entry.iou for entry in single.classes]
print("absent:", ", ".join(single.absent) or "none")
as_0, as_1 = (np.nan_to_num(values, nan=absent).mean() for absent in (0.0, 1.0))
print(
    f"mean IoU with absent classes left out {single.mean_iou:.3f}, "
    f"counted as 0 {as_0:.3f}, counted as 1 {as_1:.3f}"
)

# %% [markdown]
# **Does every image contain something that any model would get right?** The bonnet of the camera's
# own car is labelled *Vehicles*, always in the same place. Ignore the lowest fifth of the images
# (255, as in section 5), and score the vehicles that matter:

# %%
counts = np.zeros((13, 13), np.int64)
for pair in dataset.of("val"):
    sample = read_sample(pair, dataset)
    truth = sample.label.copy()
    truth[int(0.8 * len(truth)) :] = IGNORE
    counts += confusion(model(sample.image), truth, 13)
without = {entry.name: entry.iou for entry in score(counts, CARLA.names, 1).classes}
vehicles = next(entry.iou for entry in evaluation.scores.classes if entry.name == "Vehicles")
print(f"Vehicles: IoU {vehicles:.2f} with the bonnet, {without['Vehicles']:.2f} without")

# %% [markdown]
# ### Label a new image
#
# An image of any size goes in, a label map of the same size comes out; `overlay` paints it over
# the image, `add_legend` names what was found and how much of it.

# %%
new = read_sample(dataset.of("val")[-1], dataset) if DATA else make_scene(777, (320, 240))
prediction = model(new.image)
assert prediction.shape == new.image.shape[:2]
labelled = add_legend(overlay(new.image, prediction, model.classes), prediction, model.classes)
plt.figure(figsize=(8, 8 * labelled.shape[0] / labelled.shape[1]), dpi=100, layout="constrained")
plt.imshow(labelled)
plt.axis("off")
plt.show()

# %% [markdown]
# Where is it wrong? Here we know the truth, and can look:

# %%
show(
    [
        paint_label(new.label, model.classes),
        paint_label(prediction, model.classes),
        draw_difference(prediction, new.label),
    ],
    ["truth", "prediction", "wrong pixels are yellow"],
    width=3.8,
)
plt.show()
print(f"{100 * (prediction == new.label).mean():.0f} % of the pixels are right")

# %% [markdown]
# The mistakes lie along borders and on thin things: the same lesson, seen from its other end. And
# `model.probabilities` tells how sure it is: the share that the softmax gives to the class that
# it chose. Where it is dark it hesitates, mostly where it is wrong.

# %%
sure = model.probabilities(new.image).max(0)
ax = show([new.image, sure], ["the new image", "how sure it is (bright: sure)"], width=4.2)[0, 1]
ax.images[0].set(cmap="viridis", clim=(0, 1))
plt.show()
wrong = prediction != new.label
print(
    f"mean certainty where it is right {sure[~wrong].mean():.2f}, "
    f"where it is wrong {sure[wrong].mean():.2f}"
)

# %% [markdown]
# > **In one sentence:** hold out what is not a twin of the training images, average over
# > classes that are there, ask what is too easy, and then look at the images.

# %% [markdown]
# ## 8. What you can do now
#
# - You built the network of the paper, and it was equal to `useg.UNet` to the last bit.
# - You know what unpadded convolutions cost, and what mirrored tiles give back.
# - You can say what separates a plain CNN, an FCN and a U-Net, and have measured it.
# - You can write the loss on a blackboard.
# - You trained on a street, and know what its score does and does not say.
#
# From here, on the command line:
#
# ```sh
# useg inspect DATA                         # what is in a folder, and what is wrong with it
# useg train DATA --out RUN --minutes 10
# useg evaluate RUN DATA
# useg predict RUN IMAGES --out LABELS
# ```
#
# Read next: `useg/models/unet.py` (your network of section 2, with its settings) and
# `useg/training/loop.py` (the loop of section 6, with what a long run needs). Train the plain
# networks yourself with `--set model.encoder=cnn`, `fcn32s` or `fcn8s`. And change this notebook:
# another `SEED`, another width, one pooling less.
#
# The last cell removes the temporary folder. Skip it if you want to look into `WORK`.

# %%
workspace.cleanup()
