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
# 1. **build a U-Net** block by block, name the shape after every layer, and check that your network
#    is that of the paper;
# 2. **explain how** a plain convolutional network, a fully convolutional network (FCN) and a U-Net
#    **differ**, and show it with images and numbers;
# 3. **segment street scenes** with the classes of the CARLA simulator, and score the result on
#    images that the model has not seen;
# 4. **compute the training loss by hand**: sparse categorical cross-entropy, pixel by pixel.
#
# Nothing is downloaded: the notebook generates images of streets, each with its exact labels.
# Everything runs on a laptop without a GPU in a few minutes.
#
# **How to run it.** This file is a notebook written as plain Python. In the folder that contains
# `docs`:
#
# ```sh
# pip install '.[tutorial]'
# jupytext --to notebook docs/tutorial.py      # writes docs/tutorial.ipynb
# jupyter lab docs/tutorial.ipynb              # then: Run > Run All Cells
# ```
#
# **How to read it.** There are seven exercises. Each has a cell for your answer, a hidden solution
# (try the exercise first) and a cell that checks your answer. If you leave an exercise empty, the
# notebook uses the solution, so it always runs to its end.
#
# The networks are those of two papers: Long, Shelhamer and Darrell, *Fully Convolutional Networks
# for Semantic Segmentation*, CVPR 2015; and Ronneberger, Fischer and Brox, *U-Net: Convolutional
# Networks for Biomedical Image Segmentation*, MICCAI 2015.
#
# First the imports. If you have your own images in CARLA's layout, set `DATA` to their folder;
# section 7 then uses them.

# %%
import os
import tempfile
import time
from pathlib import Path

import useg.machine

useg.machine.tune()  # before torch is imported: it sets how torch's threads wait

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import SVG, Image
from torch import nn
from torch.nn import functional as F

import useg
from useg.classes import CARLA, IGNORE
from useg.scenes.generate import make_scene, write_scenes
from useg.visualization import add_legend, draw_difference, overlay, paint_label

os.environ.setdefault("USEG_CACHE", "off")  # keep no decoded images on disk
DATA = os.environ.get("USEG_TUTORIAL_DATA")  # or a folder; None: generated scenes
STEPS = int(os.environ.get("USEG_TUTORIAL_STEPS", "800"))  # of training, for each network
SEED = int(os.environ.get("USEG_TUTORIAL_SEED", "0"))  # of all random numbers

# %% [markdown]
# Two helper functions: `show` draws images side by side. `attempt` returns your answer to an
# exercise, or the solution if you have not written one yet.


# %%
def show(images, titles, columns=4, width=3.0, ids=()):
    """Draw images in rows, each with its title; the legend names the classes ``ids``."""
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
        print("not written yet; the solution is used")
        return solution
    return yours


# %% [markdown]
# ## 1. The task: a class for every pixel
#
# A classifier says *there is a car in this image*. Segmentation says *which pixels* belong to the
# car: its output is a second array of the same height and width, which holds one integer, the
# class, for every pixel. We call it a **label map**.

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
# The thirteen classes are those of the CARLA driving simulator. The colours are only for display: a
# network sees just the numbers. The class called *None* holds all pixels without another class;
# here that includes the sky.
#
# Some classes are far more frequent than others. Count their pixels in forty scenes:

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
# Remember this chart. A network that never finds a pole, a line, a sign or a person can still
# classify nine of ten pixels correctly. Thin and small objects make segmentation hard, and there
# the U-Net has its advantage.
#
# > **In one sentence:** segmentation gives every pixel a class, and the rare, thin classes are
# > where networks differ.

# %% [markdown]
# ## 2. Build a U-Net
#
# ### A convolution loses the border
#
# A 3 x 3 convolution computes a weighted sum of each pixel and its eight neighbours. Where a
# neighbour is missing, there is no output, so one pixel is lost on each side. These nine weights (a
# Sobel filter) detect vertical edges:

# %%
grey = torch.from_numpy(scene.image).float().mean(2)[None, None]  # (batch, channels, height, width)
weights = torch.tensor([[[[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]]])
edges = F.conv2d(grey, weights)
print(tuple(grey.shape), "->", tuple(edges.shape))
show(
    [grey[0, 0], edges[0, 0].abs().clamp(max=255)],
    ["grey", "a 3 x 3 convolution: vertical edges"],
    width=4.2,
)
plt.show()

# %% [markdown]
# In a network, the weights are not written by hand but learned. Each layer has many such filters;
# the output of each filter is called a **channel**.
#
# ### The block: two convolutions
#
# A U-Net repeats one block: 3 x 3 convolution, ReLU ($\max(x, 0)$), 3 x 3 convolution, ReLU. From
# here on we use the sizes of the paper: a grey image of 572 x 572 pixels. To save time, we put the
# tensors on PyTorch's `meta` device, where they have a shape but no content.


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
# ### The contracting path: what is in the image
#
# The first half of the network is its **contracting path**, or encoder. Max pooling keeps the
# largest of each 2 x 2 values. It halves height and width, so the next 3 x 3 convolution covers
# twice the distance in the image. After each pooling, the block has twice as many channels. The
# paper does this four times.

# %%
widths = [64, 128, 256, 512, 1024]
kept = []  # for the skip connections
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
# The drawing shows the five blocks to scale. From level to level, the feature maps get smaller and
# have more channels: they say less about *where* something is, and more about *what* it is.

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
# ### The expanding path: where it is
#
# The lowest level has 1024 channels at 28 x 28 positions: enough for *what*, too coarse for
# *where*. The **expanding path**, or decoder, restores the resolution. Each of its steps has three
# parts:
#
# - an **up-convolution** (transposed, 2 x 2, stride 2) doubles height and width and halves the
#   number of channels;
# - the **skip connection** takes the feature map of the same level from the contracting path, crops
#   it to the same size, and concatenates both (`torch.cat`): the map from the contracting path has
#   the fine detail, the map from below has the context;
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
# The network has four levels down, the lowest level, four levels up, and a 1 x 1 convolution that
# turns the 64 channels into one number per class at each pixel. These numbers are called
# **logits**. The class with the largest logit is the prediction.


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
# That is the whole network. To see whether it is the network of the paper, check three numbers: the
# size of the output (388 for an input of 572), the number of convolution layers (23), and the
# number of parameters.

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
# Is it the same network as `useg.UNet`? Give both the same weights and the same image, and subtract
# the outputs. The image has 188 x 188 pixels, the smallest size for four poolings without padding.

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
# The outputs are equal to the last bit. From here on we use `useg.UNet`, which is your network with
# more settings, such as its width, its depth and its padding.
#
# `useg.drawing` draws a network from its actual layers, so the drawing always matches the network.
# Compare it with the shapes printed above:

# %%
import re

drawing = useg.drawing(theirs, (572, 572))
SVG(re.sub('width="[0-9]+" height="[0-9]+"', 'width="900"', drawing, count=1))  # as wide as a page

# %% [markdown]
# ### Exercise 1: the size of the output
#
# Write a function that returns the height of the output for an image of height `size` and a U-Net
# of any `depth`, without building the network. A block removes 4 pixels, a pooling halves the
# height, an up-convolution doubles it.


# %% tags=["exercise"]
def output_size(size, depth):
    """Return the height of the output of an unpadded U-Net."""
    return None  # your answer here


# %% [markdown]
# Solution (folded).


# %% tags=["solution"] jupyter={"source_hidden": true}
def output_size_solution(size, depth):
    """Follow the height down and up again."""
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
    f"remember the block of the lowest level"
)
for depth in (1, 2, 3):
    network = useg.UNet(width=1, depth=depth)
    size = network.valid_size(120)
    real = network(torch.zeros(1, 1, size, size)).shape[-1]
    assert answer(size, depth) == real, (
        f"{size} pixels and depth {depth}: {real} is right, yours says {answer(size, depth)}"
    )
print("Right: you can compute the size after any layer of a U-Net.")

# %% [markdown]
# ### Exercise 2: the number of parameters of a layer
#
# A convolution has one weight for each position in its kernel, each input channel and each output
# channel, and one bias for each output channel.


# %% tags=["exercise"]
def conv_parameters(channels_in, channels_out, kernel):
    """Return the number of parameters of a convolution with a ``kernel`` x ``kernel`` kernel."""
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
    "Right: two thirds of them are in the two convolutions of the lowest level "
    "and in the first block of the expanding path."
)

# %% [markdown]
# > **In one sentence:** the contracting path finds out *what* is there, the expanding path *where*,
# > and skip connections pass the fine feature maps of the first to the second.

# %% [markdown]
# ## 3. The lost border, mirroring and tiles
#
# An unpadded convolution has an output only where its whole kernel is inside the image. For a
# smaller U-Net of depth 3, the frame shows which part of the image has an output.

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
titles = ["input", f"output: all but {margin} pixels on each side"]
ax = show([street, dimmed], titles, width=4.2)[0, 1]
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
print(f"{100 * lost:.0f} % of the pixels have no output")

# %% [markdown]
# Section 2 of the paper has a solution: extend the image by its **mirror image**. Then the output
# covers exactly the original image. (The alternative is `padding="same"`, which adds zeros around
# the feature map before every convolution. The output is as large as the input, so most U-Nets
# today use it. But near the border, the network sees zeros that are not in the image.)

# %%
around = ((margin, margin), (margin, margin), (0, 0))
mirrored = np.pad(street, around, mode="symmetric")
ax = show(
    [mirrored],
    ["the image, extended by its mirror image; the output covers the frame"],
    width=6,
)[0, 0]
ax.add_patch(
    plt.Rectangle((margin - 0.5, margin - 0.5), 260, 188, fill=False, color="white", lw=1.5)
)
plt.show()


def logits_of(pixels):
    """Run the unpadded network: pixels (H, W, 3) -> logits (13, H - 2 margin, W - 2 margin)."""
    x = torch.from_numpy(np.ascontiguousarray(pixels)).double().permute(2, 0, 1)[None] / 128 - 1
    with torch.no_grad():
        return unpadded(x)[0].numpy()


whole = logits_of(mirrored)
print("image", street.shape[:2], "-> logits", whole.shape)

# %% [markdown]
# ### Tiles
#
# An image that does not fit into memory is cut into windows. They overlap by twice the margin, so
# that their outputs cover the image. Windows of 172 pixels have outputs of 84 pixels, so it seems
# that they can be 84 pixels apart. We try this, and 80.

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
# With windows 80 pixels apart, the result is that of the whole image, except for rounding errors.
# With windows 84 pixels apart, it is not, although the same network computed every window. Where do
# the results differ?

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
# The reason is the pooling. Three poolings divide the image into a grid of 8 x 8 pixels. If a
# window starts at a multiple of 8, its grid lies on that of the whole image. 84 is not a multiple
# of 8, so pooling in those windows combines other pixels. (The windows in the corners agree: they
# start at 0 and at 2 x 84 = 168 = 21 x 8.) The same holds for the sizes of the paper: 388 is not a
# multiple of 16, so windows must be 384 apart. `useg` places windows in this way:

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
# ### Exercise 3: the distance between windows
#
# A network loses `margin` pixels on each side and has `depth` poolings. Windows have `window`
# pixels. What is the largest distance between windows for which every pixel has an output, and the
# result is that of the whole image?


# %% tags=["exercise"]
def tile_step(window, margin, depth):
    """Return the largest correct distance between two windows, in pixels."""
    return None  # your answer here


# %% [markdown]
# Solution (folded).


# %% tags=["solution"] jupyter={"source_hidden": true}
def tile_step_solution(window, margin, depth):
    """The size of the output of a window, rounded down to the grid of the poolings."""
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
print("Right: at this distance, there are no seams.")

# %% [markdown]
# > **In one sentence:** the output of an unpadded U-Net is smaller than its input; mirroring
# > restores the border, and tiles on the grid of the poolings give exactly the result of the whole
# > image.

# %% [markdown]
# ## 4. The receptive field
#
# The output for a pixel depends on a square of the image around it, its **receptive field**. A grey
# pixel may be road, wall or sky; its surroundings show which. Each 3 x 3 convolution extends the
# field by one step on each side, and after a pooling, steps are twice as long. `useg.describe`
# computes the field after every layer (right column). For a small U-Net with two poolings:

# %%
print(useg.describe(useg.UNet(3, 13, width=8, depth=2, padding="same"), (128, 96)))

# %% [markdown]
# The squares are the receptive fields of the pixel in the middle, for U-Nets with one to four
# poolings.

# %%
wide = make_scene(23, (320, 240))
ax = show([wide.image], ["receptive fields of the pixel in the middle"], width=6)[0, 0]
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
# With one pooling, the field covers a part of a car; with four, half of the scene. But not all
# pixels in the field have the same influence. The gradient tells how much the output in the middle
# changes when a pixel of the image changes. It is large near the middle and decreases outwards.

# %%
torch.manual_seed(SEED)
network = useg.UNet(3, 13, width=8, depth=3, padding="same")
x = torch.randn(1, 3, 128, 128, requires_grad=True)
network(x)[0, :, 64, 64].sum().backward()
influence = x.grad[0].abs().sum(0)
rows = influence.sum(1).nonzero().squeeze()
field = useg.describe(network, (128, 128)).field
print(
    f"the output at row 64 depends on the rows {rows.min()} to {rows.max()}: "
    f"{len(rows)} rows, of at most {field}"
)
ax = show([influence.sqrt()], ["influence on the pixel in the middle (square root)"], width=4)[0, 0]
ax.images[0].set_cmap("inferno")
plt.show()

# %% [markdown]
# ### Exercise 4: compute a receptive field
#
# Begin with a field of 1 and a step of 1 pixel. A layer with a kernel of `k` adds `k - 1` steps to
# the field. A layer with a stride of `s` makes the steps of all following layers `s` times as long.


# %% tags=["exercise"]
def receptive_field(layers):
    """Return the field after ``layers``, a list of (kernel, stride)."""
    return None  # your answer here


# %% [markdown]
# Solution (folded).


# %% tags=["solution"] jupyter={"source_hidden": true}
def receptive_field_solution(layers):
    """Add to the field, and lengthen the steps."""
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
    f"two 3 x 3 convolutions have a field of 5 pixels, yours says {grow([(3, 1), (3, 1)])}"
)
contracting = [(3, 1), (3, 1), (2, 2)] * 4 + [(3, 1), (3, 1)]
layers = useg.describe(useg.UNet(), (572, 572)).layers
bottom = next(layer.field for layer in layers if layer.name == "down.4.2")
assert grow(contracting) == bottom, (
    f"at the lowest level of the paper's U-Net it is {bottom}, yours says {grow(contracting)}"
)
print(
    f"Right: at the lowest level of the paper's U-Net it is {bottom} pixels; "
    f"the expanding path adds more."
)

# %% [markdown]
# > **In one sentence:** poolings enlarge the receptive field, which helps to tell *what* something
# > is, but they lose *where* exactly it is.

# %% [markdown]
# ## 5. The loss: sparse categorical cross-entropy, pixel by pixel
#
# The network computes $K$ logits for each pixel, one per class. Training needs one number that says
# how wrong they are. We use a tiny image of 2 x 2 pixels and three classes. The ground truth is one
# integer per pixel.

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
# Three pixels are right. The last one is wrong by far: its logit is 5 for class 2, and 0 for the
# true class 1. The loss is computed in three steps.
#
# 1. **Softmax** turns the logits $z$ of a pixel into probabilities: $p_k = e^{z_k} / \sum_j
#    e^{z_j}$.
# 2. Only the probability of the true class $t$ counts: the loss of the pixel is $-\log p_t$. That
#    is 0 when $p_t = 1$, and grows without bound as $p_t$ approaches 0.
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
# The wrong pixel contributes nearly all of the loss: confident errors cost most. PyTorch and `useg`
# compute the same number:

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
# Textbooks write the ground truth **one-hot**: $K$ numbers per pixel, a 1 for the true class and 0
# for the others. The loss is then $-\sum_k y_k \log p_k$, where all terms but one are multiplied by
# 0. *Sparse* cross-entropy skips these terms: the ground truth stays one integer, which selects the
# term. The result is the same, but one-hot labels need far more memory. For a batch of eight images
# and 13 classes:

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
# ### Ignored pixels
#
# Some pixels have no true class, such as the border of an object that nobody can draw exactly, or
# the bonnet of the camera's own car. They get the value 255, **ignore**. They contribute nothing to
# the sum, do not count in the mean, and have no gradient. Ignore the wrong pixel:

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
# In Keras, this is the argument `from_logits=True`. The `cross_entropy` of PyTorch and of `useg`
# always expects logits and computes the softmax itself. If the network also ends with a softmax,
# the loss is wrong, and no error is raised.

# %%
certain = torch.tensor([[[[50.0]], [[0.0]], [[0.0]]]])  # confident of class 0, and right
right = torch.tensor([[[0]]])
print(f"from logits:         {F.cross_entropy(certain, right).item():.4f}")
print(
    f"softmax done twice:  {F.cross_entropy(certain.softmax(1), right).item():.4f}   "
    f"the smallest value that it can have"
)
huge = torch.tensor([1000.0, 0.0])
print("exp(1000) overflows, so softmax by hand gives", (huge.exp() / huge.exp().sum()).tolist())
print("log-softmax from logits is safe:             ", huge.log_softmax(0).tolist())

# %% [markdown]
# ### Exercise 5: write the loss
#
# Write it in numpy, for logits `(K, H, W)` and a ground truth `(H, W)` in which 255 is ignored.
# (Boolean indexing helps: `logits[:, counted]` has the shape `(K, number of pixels)`.)


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
# > **In one sentence:** the loss of a pixel is minus the logarithm of the softmax probability of
# > its true class; the loss of an image is the mean over the pixels that are not ignored.

# %% [markdown]
# ## 6. Plain CNN, FCN and U-Net compared
#
# ### IoU: a score for each class
#
# The share of right pixels says little about thin classes, because they have few pixels.
# **Intersection over union** (IoU) is computed for each class: of all pixels that have this class
# in the ground truth *or* in the prediction, how many have it in both? A class that is never found
# scores 0, however rare it is.
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
    """Intersection divided by union."""
    either = ((prediction == k) | (truth == k)).sum()
    return ((prediction == k) & (truth == k)).sum() / either if either else float("nan")


# %% [markdown]
# Check yourself against the counts from which `useg` computes every score:

# %% tags=["check"]
from useg.scoring.metrics import confusion, score

score_of = attempt(iou, iou_solution, np.array([0, 1]), np.array([0, 1]), 0)
truth = make_scene(3, (128, 96)).label
moved = np.roll(truth, 2, axis=1)  # right, but shifted by two pixels
expected = {
    entry.name: entry.iou
    for entry in score(confusion(moved, truth, 13), CARLA.names, 1).classes
    if entry.pixels
}
for name, value in expected.items():
    said = score_of(moved, truth, CARLA.names.index(name))
    assert np.isclose(said, value), f"{name}: {value:.3f} is right, yours says {said:.3f}"
print("Right. A prediction that is only shifted by two pixels scores:")
print(
    ", ".join(
        f"{name} {expected[name]:.2f}"
        for name in ("Roads", "Buildings", "Poles", "TrafficSigns")
        if name in expected
    )
)

# %% [markdown]
# A shift of two pixels changes the IoU of a road little, and that of a pole a lot.
#
# ### What a coarse map loses
#
# First an experiment without a network: we reduce the ground truth to a coarse map. Each block of
# `stride` x `stride` pixels keeps only the shares of its classes. We enlarge these shares
# bilinearly, take the class with the largest share at each pixel, and score the result against the
# ground truth.

# %%
# scenes for scoring; no network will train on them
tests = [make_scene(500_000 + k, (128, 96)) for k in range(40)]


def coarse(label, stride):
    """Reduce a label map by ``stride``, and enlarge it again."""
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
# The curves show the scores, the images one scene:

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
plt.ylabel("mean IoU of the reduced labels")
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
# The large classes roughly keep their shape; the thin ones disappear at smaller strides. A trained
# network can use its coarse map better than this, but a coarse map hardly tells where in a block a
# thin object is. The networks differ in how they recover this detail:
#
# - **Plain CNN.** A classifier that is applied at every position: convolutions and poolings, then
#   one output for each block of 16 x 16 pixels, enlarged bilinearly. It recovers no detail.
# - **FCN** (Long et al. 2015). Two ideas: the enlargement is a *learned* transposed convolution,
#   and scores from earlier, finer feature maps are *added* to the coarse class scores. FCN-32s adds
#   none and enlarges 32 times; FCN-8s adds two and still enlarges 8 times.
# - **U-Net** (Ronneberger et al. 2015). It enlarges level by level to full size. At each level it
#   takes not scores but *all features* of the contracting path, concatenates them with its own, and
#   merges them by convolutions.
#
# These are the layers that compute the scores and enlarge them, listed from the actual networks:

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
# "U-Net, skips cut" is the control: the same network with zeros in place of the features of the
# skip connections. We chose the widths so that all five have 0.4 to 0.5 million parameters. Their
# cost differs: a U-Net also computes at full size. (`normalize=True` adds batch normalisation,
# which is not in the papers; short training runs need it.)
#
# ### A training loop
#
# The training set has two hundred scenes. The loss is that of section 5 with class weights: pixels
# of a class with the share $s$ have a weight proportional to $1/\sqrt{s}$. Without weights, the
# networks would take much longer to learn classes that have one pixel in a hundred.


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
# The loop is the same for every network: pick random scenes, mirror every other batch, compute the
# loss, update the weights.


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
# Train all five, one after the other, with the same scenes in the same order:

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
# ### The predictions of all five networks
#
# None of the networks was trained on this scene. Compare the poles, the signs, the lines on the
# road and the people.

# %%
COLOURS = {
    "plain CNN": "#94a3b8",
    "FCN-32s": "#d9b44a",
    "FCN-8s": "#e07b39",
    "U-Net, skips cut": "#a78bda",
    "U-Net": "#1d4ed8",
}


def draw_scene(figure, grid):
    """Draw the image, the ground truth, every network's prediction, and the class names."""
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
# One scene proves little. The chart shows the IoU of each class over all forty test scenes:


# %%
def draw_bars(ax):
    """Draw each network's IoU: of the thin classes, and the means of thin and large ones."""
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
# The chart shows two things.
#
# - **The large classes** (rightmost) differ less: for a road, a coarse map is nearly enough.
# - **The thin classes** differ most. FCN-32s predicts from a map of 4 x 3 positions. These images
#   are small, so it loses more here than on the larger photographs of the paper. FCN-8s adds finer
#   scores and gains most on the road lines. The U-Net uses all features at all levels and has the
#   best mean; its lead is largest on the road lines. (It is not best in every class: at this size
#   people are blobs rather than lines, and FCN-8s is about as good.)
#
# The control shows the reason. It is the same network with the same number of parameters, but
# without its skip connections it is worse than the plain CNN: all information must pass through the
# lowest level, which has 8 x 6 positions, and so must all gradients of the contracting path.
#
# ### Cut the skip connections of the trained U-Net, one by one
#
# `network.skips` says which levels have a skip connection. We do not train again: we remove one
# connection at a time from the trained network and score its predictions.

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
# Level 0 is the top, at full size. Without it, the finest features that the network has are at half
# the size, and the thin classes disappear first. Each lower level matters less, because the levels
# above it hold the same information about positions, in finer detail. (A network *trained* without
# one of the connections would have learned to compensate for it; this experiment shows what the
# trained network relies on.)
#
# > **In one sentence:** a plain CNN predicts from its coarsest feature map, an FCN adds finer
# > *scores*, and a U-Net uses all the finer *features*; thin classes gain most.

# %% [markdown]
# The same two functions draw the image in the project's README. This cell writes it if
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
# You now know every part. This section goes through the whole job, as you would do it with your own
# images. They are in a folder with CARLA's layout:
#
# ```
# DATA/CameraRGB/NAME.png    the images
# DATA/CameraSeg/NAME.png    the masks: the class number is in the red channel
# ```
#
# If `DATA` names no folder, we generate one with 120 scenes. First we look at its content, and at
# which images are held out from training.

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
# ### Why there is a gap: a model that only memorises
#
# The numbers in the file names look like those of a video, so `useg` did not hold out images at
# random. It held out the **end** of the video, and left a **gap** before it whose images are not
# used. The reason becomes clear with a model that only memorises: for each new image, it finds the
# most similar training image and returns the label map of that one.


# %%
def nearest_score(scenes, train, val):
    """Return the mean IoU of repeating the label map of the most similar training image."""
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
at_random = nearest_score(video, shuffled[24:], shuffled[:24])
at_the_ends = nearest_score(video, starts, ends)
other_street = nearest_score(video, list(range(90)), list(range(90, 120)))
print(f"frames held out at random:            {at_random:.2f}")
print(f"the end of each street, with a gap:   {at_the_ends:.2f}")
print(f"a street that is not in training:     {other_street:.2f}")

# %% [markdown]
# With the random split, this model seems strong: the neighbour of every held-out frame is in the
# training set. A network can memorise training images as well, so its score can be inflated in the
# same way. Blocks with a gap are stricter: they show how good the model is on the *same streets a
# little further on*. Other streets are harder still, and only images of other streets can show how
# hard.
#
# What does this model score on the folder that we are about to use?

# %%
from useg.images.image_files import Sample, resize_image, resize_label

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
print(f"held out at random:    {nearest_score(frames, mixed[held:], mixed[:held]):.2f}")
print(f"held out by useg:      {nearest_score(frames, parts['train'], parts['val']):.2f}")

# %% [markdown]
# Each generated scene is another street, so memorising does not help: both numbers are low and
# similar. With the frames of a real drive, the first number is far above the second. The difference
# shows how much of a score can come from memorising.
#
# ### Exercise 7: hold out the end of a video
#
# Write a function that splits `count` frames, given in order: the last `held` frames are for
# validation, the `gap` frames before these are unused, and the rest are for training.


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
    f"frames 22 and 23 are the gap, but yours trains on frames up to {max(train)}"
)
assert len(train) == 22, f"22 of 30 frames are left for training, yours are {len(train)}"
print("Right: this score will mean something.")

# %% [markdown]
# ### Train
#
# Training is one call. `useg` picks every setting that you omit, from the images and this machine,
# and prints why. We set a small network, a small size and few steps, so that it takes about half a
# minute; without these settings it takes ten minutes and gives better scores. We also turn off
# three settings that make a model robust to other streets and weather: the same brightness for all
# images, and random changes of colour and of exposure. Our held-out scenes look like the training
# scenes, so these settings would not help in so few steps.

# %%
from useg.training.trainer import SilentProgress

progress = SilentProgress()
progress.say = print
settings = {
    "data.size": "128x96",
    "data.standardize": False,
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
# ### Score the model
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
# Ask two questions about any such score.
#
# **Which classes are in the mean?** A class that does not occur in the ground truth can be neither
# found nor missed. Counting its IoU as 0 makes the mean too low, counting it as 1 makes it too
# high; `useg` leaves it out and names it. Take the upper third of one image, where no road can be:

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
# (255, as in section 5), and score the other vehicles:

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
# The model takes an image of any size and returns a label map of the same size. `overlay` paints it
# over the image, and `add_legend` lists the classes and their shares.

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
# Where is the model wrong? For this image we know the ground truth, so we can draw the errors:

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
# Most errors are along borders and on thin objects. `model.probabilities` tells how confident the
# model is: the largest of the softmax probabilities at each pixel. Confidence is lower (darker)
# where the model is more often wrong.

# %%
confidence = model.probabilities(new.image).max(0)
axes = show([new.image, confidence], ["the new image", "confidence (bright: high)"], width=4.2)
axes[0, 1].images[0].set(cmap="viridis", clim=(0, 1))
plt.show()
wrong = prediction != new.label
print(
    f"mean confidence where it is right {confidence[~wrong].mean():.2f}, "
    f"where it is wrong {confidence[wrong].mean():.2f}"
)

# %% [markdown]
# > **In one sentence:** hold out images that are not near duplicates of training images, average
# > over the classes that occur, look for what any model would get right, and look at the images.

# %% [markdown]
# ## 8. What you can do now
#
# - You built the network of the paper, and its output was equal to that of `useg.UNet` to the last
#   bit.
# - You know what unpadded convolutions lose, and how mirroring and tiles restore it.
# - You can explain how a plain CNN, an FCN and a U-Net differ, and have measured it.
# - You can compute the loss by hand.
# - You trained a model on street scenes, and know what its score says and what it does not say.
#
# The same on the command line:
#
# ```sh
# useg inspect DATA                         # what is in a folder, and what is wrong with it
# useg train DATA --out RUN --minutes 10
# useg evaluate RUN DATA
# useg predict RUN IMAGES --out LABELS
# ```
#
# Read next: `useg/models/unet.py` (your network of section 2, with its settings) and
# `useg/training/loop.py` (the loop of section 6, with what long runs need). Train the other
# networks yourself with `--set model.encoder=cnn`, `fcn32s` or `fcn8s`. Change this notebook: try
# another `SEED`, another width, or one pooling less.
#
# The last cell removes the temporary folder. Skip it if you want to look into `WORK`.

# %%
workspace.cleanup()
