"""Samples that live on a GPU -> crops cut there, by the same draws as on the processor, so that it never waits for pictures."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from useg.data.augment import Crop, look_through
from useg.data.samples import Samples

SHARE = 0.3  # of the free memory that samples may take


class Resident:
    """Samples on a device: pixels of 8 bits as they are, others as float32; labels of 8 bits."""

    def __init__(self, samples: Samples, device: torch.device) -> None:
        self.device = device
        self.images = [self._moved(sample.image if sample.image.dtype == np.uint8 else sample.image.astype(np.float32)) for sample in samples]
        self.labels = [self._moved(sample.label) for sample in samples]

    def take(self, index: int, crop: Crop, size: tuple[int, int], margin: int) -> tuple[Tensor, Tensor]:
        """Cut a crop out of sample ``index``, as :func:`useg.data.augment.take` does.

        Returns:
            Image ``(height + 2 margin, width + 2 margin, C)`` float32 in raw pixel units, and label ``(height, width)`` int64.
        """
        image, label = self.images[index], self.labels[index]
        window = look_through((label.shape[0], label.shape[1]), crop, size, margin)
        rows, columns = self._moved(window.rows), self._moved(window.columns)
        upper, lower = image[rows].float()
        image = torch.lerp(upper, lower, self._moved(window.down)[:, None, None])
        image = torch.lerp(image[:, columns[0]], image[:, columns[1]], self._moved(window.right)[:, None])
        gain, offset = (self._moved(np.float32(each)) for each in (crop.gain, crop.offset))
        label = label[self._moved(window.label_rows)[:, None], self._moved(window.label_columns)]
        return image * gain + offset, label.long()

    def _moved(self, array: NDArray[np.generic] | np.generic) -> Tensor:
        return torch.from_numpy(np.array(array)).to(self.device, non_blocking=True)


def resident(samples: Samples, device: torch.device) -> Resident | None:
    """Bring samples to a GPU, if they fit into a part of its free memory."""
    if device.type != "cuda":
        return None
    bands = samples.ledger.moments.shape[2]
    needed = int(samples.ledger.areas.sum()) * (bands * (1 if samples.pixels == "uint8" else 4) + 1)
    return Resident(samples, device) if needed < SHARE * torch.cuda.mem_get_info(device)[0] else None
