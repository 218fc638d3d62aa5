"""What torch has, too, trained in another way where torch 2.13's own is slow on CPUs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution whose bias is added after it.

    The gradient of a bias inside of it takes oneDNN, where maps are large, nearly as long as those of the weights and the input together.
    """

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return (N, D, H', W') for (N, C, H, W)."""
        if not self.training or self.bias is None or x.device.type != "cpu" or output_size is not None:
            return super().forward(x, output_size)
        y = F.conv_transpose2d(x, self.weight, None, self.stride, self.padding, self.output_padding, self.groups, self.dilation)  # type: ignore[arg-type]
        return y + self.bias.to(y.dtype)[:, None, None]


class Dropout(nn.Dropout):
    """Dropout that draws 16 random bits for a feature, so that its share is exact to 2**-16; torch draws 53, one feature after the other."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, H, W) with a share ``p`` of the features 0 and the others ``1 / (1 - p)`` times as large."""
        if not self.training or not self.p or x.device.type != "cpu":
            return super().forward(x)
        N, C, H, W = x.shape
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[: x.numel()]
        kept = bits.view(N, H, W, C).permute(0, 3, 1, 2) >= int(self.p * 2**16) - 2**15  # channels last, as x is
        return x * (kept.to(x.dtype) / (1 - self.p))


def concatenate(*parts: Tensor) -> Tensor:
    """Join feature maps (N, C_k, H, W) to (N, sum of C_k, H, W); each gets its gradient in one piece.

    As torch does it, the gradients are slices of that of the whole, and through an enlargement these go ten times as slowly.
    """
    if torch.is_grad_enabled() and not torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        parts = tuple(part[...] for part in parts)  # of what goes elsewhere, too, just this share of the gradient
        for part in parts:
            if part.requires_grad:
                part.register_hook(_in_one_piece)  # type: ignore[no-untyped-call]
    return torch.cat(parts, 1)


def _in_one_piece(gradient: Tensor) -> Tensor:
    return gradient.contiguous(memory_format=torch.channels_last)
