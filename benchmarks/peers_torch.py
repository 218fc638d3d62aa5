"""Train a network in plain PyTorch or segmentation_models.pytorch, and print when each step ended.

peers.py runs this script in a process of its own, if need be under another Python. It imports
nothing of useg, and changes no setting that users of these packages would not change.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

# Steps that do not count, and the fewest that do.
WARMUP_STEPS, MIN_STEPS = 2, 3


class Block(nn.Module):
    def __init__(self, channels: int, width: int, padding: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=padding),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=padding),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class UNet(nn.Module):
    def __init__(
        self,
        channels: int,
        classes: int,
        width: int,
        same: bool,
        up_kernel: int,
        extra_conv: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        padding, widths = int(same), [width * 2**level for level in range(5)]
        sources = [channels, *widths]
        self.down = nn.ModuleList(
            Block(sources[k], widths[k], padding, dropout if k > 2 else 0.0) for k in range(5)
        )
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(
                2 * size,
                size,
                up_kernel,
                stride=2,
                padding=up_kernel - 2,
                output_padding=up_kernel - 2,
            )
            for size in widths[3::-1]
        )
        self.merge = nn.ModuleList(Block(2 * size, size, padding) for size in widths[3::-1])
        last = (
            [nn.Conv2d(width, width, 3, padding=padding), nn.ReLU(inplace=True)]
            if extra_conv
            else []
        )
        self.head = nn.Sequential(*last, nn.Conv2d(width, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down[:-1]:
            x = block(x)
            skips.append(x)
            x = self.pool(x)
        x = self.down[-1](x)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = up(x)
            skip = skips.pop()
            top, left = (skip.shape[2] - x.shape[2]) // 2, (skip.shape[3] - x.shape[3]) // 2
            skip = skip[:, :, top : top + x.shape[2], left : left + x.shape[3]]
            x = merge(torch.cat([skip, x], dim=1))
        return self.head(x)


class Pictures(Dataset[tuple[Tensor, Tensor]]):
    """Images and masks, decoded once; with a margin, random crops whose masks lack the margin."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.margin, (self.width, self.height) = spec["margin"], spec["size"]
        images, masks = (
            sorted(Path(spec[part]).glob("*.png"))[: spec["pictures"]]
            for part in ("images", "masks")
        )
        self.images = [
            self.decoded(path, "L" if spec["channels"] == 1 else "RGB", Image.Resampling.BILINEAR)
            for path in images
        ]
        self.masks = [
            self.decoded(path, "RGB", Image.Resampling.NEAREST)[..., :1] // spec["divide"]
            for path in masks
        ]

    def decoded(self, path: Path, mode: str, filter: Image.Resampling) -> np.ndarray:
        picture = Image.open(path).convert(mode)
        pixels = np.array(
            picture if self.margin else picture.resize((self.width, self.height), filter)
        )
        return np.pad(
            pixels.reshape(*pixels.shape[:2], -1),
            ((self.margin, self.margin), (self.margin, self.margin), (0, 0)),
            "symmetric",
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        image, mask = self.images[k], self.masks[k]
        top, left = (
            np.random.randint(have - want + 1)
            for have, want in zip(image.shape, (self.height, self.width), strict=False)
        )
        image, mask = (
            pixels[top : top + self.height, left : left + self.width] for pixels in (image, mask)
        )
        if np.random.random() < 0.5:
            image, mask = image[:, ::-1], mask[:, ::-1]
        mask = mask[
            self.margin : self.height - self.margin, self.margin : self.width - self.margin, 0
        ]
        return torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255, torch.from_numpy(
            mask.astype(np.int64)
        )


def plain(spec: dict[str, Any]) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], float]:
    return UNet(spec["channels"], spec["classes"], **spec["network"]), nn.CrossEntropyLoss(), 1e-3


def smp_package() -> Any:
    """Import the package, even if torch is built without CUDA and torchvision with it.

    torchvision then lacks operators that are not needed here.
    """
    register = torch.library.register_fake

    def register_known(name: str, *rest: Any, **named: Any) -> Any:
        return (
            (lambda function: function)
            if name.startswith("torchvision::")
            else register(name, *rest, **named)
        )

    torch.library.register_fake = register_known
    try:
        import segmentation_models_pytorch
    finally:
        torch.library.register_fake = register
    return segmentation_models_pytorch


def smp(spec: dict[str, Any]) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], float]:
    """Return the quick start's network; loss and rate are those of the package's CamVid example."""
    package = smp_package()
    model = package.Unet(
        spec["network"]["encoder"],
        encoder_weights=None,
        in_channels=spec["channels"],
        classes=spec["classes"],
    )
    dice = package.losses.DiceLoss(package.losses.MULTICLASS_MODE, from_logits=True)

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        value: Tensor = dice(logits, target)
        found = logits.softmax(dim=1).argmax(dim=1)
        package.metrics.get_stats(found, target, mode="multiclass", num_classes=spec["classes"])
        return value

    return model, loss, 2e-4


def main(spec: dict[str, Any]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, criterion, rate = (smp if "encoder" in spec["network"] else plain)(spec)
    model = model.to(device)
    loader = DataLoader(Pictures(spec), batch_size=spec["batch"], shuffle=True, drop_last=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(next(iter(loader))[0][:1].to(device))
    model.train()
    ends: list[tuple[float, int]] = []
    while (
        len(ends) < WARMUP_STEPS + MIN_STEPS
        or ends[-1][0] - ends[WARMUP_STEPS - 1][0] < spec["seconds"]
    ):
        for images, masks in loader:
            images, masks = images.to(device), masks.to(device)
            optimizer.zero_grad()
            loss = criterion(model(images), masks)
            loss.backward()
            optimizer.step()
            # For the running mean that training scripts print.
            loss.item()
            ends.append((time.perf_counter(), len(images)))
            if (
                len(ends) >= WARMUP_STEPS + MIN_STEPS
                and ends[-1][0] - ends[WARMUP_STEPS - 1][0] >= spec["seconds"]
            ):
                break
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        json.dumps(
            {
                "ends": ends[WARMUP_STEPS - 1 :],
                "parameters": parameters,
                "macs": counter.get_total_flops() // 2,
                "device": device.type,
            }
        )
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
