"""A run's numbers and pictures -> event files that TensorBoard shows (the extra ``tensorboard``)."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from useg.data.images import read_size
from useg.errors import need

SHOWN = {"loss": "train/loss", "learning_rate": "train/learning rate", "images_per_second": "train/images a second",
         "validation_loss": "validation/cross-entropy", "mean_iou": "validation/mean IoU", "pixel_accuracy": "validation/pixel accuracy"}  # fmt: skip


class Board:
    """Writes one event file; of a run that went on there is one for each process that has trained it.

    Args:
        folder: where, beside the files of earlier processes.
        step: of the state from which the run goes on: what an earlier process has written of later steps counts no more.

    Raises:
        UsageError: the package is not installed.
        OSError: the folder cannot be written; also by the methods.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.proto = need("tensorboard.compat.proto.event_pb2", "tensorboard")
        folder.mkdir(exist_ok=True)
        self.file = open(folder / f"events.out.tfevents.{time.time_ns()}", "xb")  # noqa: SIM115 - they are read in the order of their names
        self.records = need("tensorboard.summary.writer.record_writer", "tensorboard").RecordWriter(self.file)
        self._write(self.proto.Event(wall_time=time.time(), file_version="brain.Event:2"))
        start = self.proto.SessionLog(status=self.proto.SessionLog.START)
        self._write(self.proto.Event(wall_time=time.time(), step=step + 1, session_log=start))

    def step(self, row: Mapping[str, Any]) -> None:
        """Note a row of the log."""
        self.numbers(row["step"], {SHOWN[key]: row[key] for key in SHOWN if row.get(key) is not None})

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Note values by their names; those that are no numbers are left out."""
        self._summary(step, [{"tag": tag, "simple_value": value} for tag, value in values.items() if math.isfinite(value)])

    def picture(self, step: int, path: Path) -> None:
        """Note a PNG or JPEG file."""
        width, height = read_size(path)
        image = {"width": width, "height": height, "colorspace": 3, "encoded_image_string": path.read_bytes()}
        self._summary(step, [{"tag": "validation/pictures", "image": image}])

    def flush(self) -> None:
        """Bring all to the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Write no more."""
        self.file.close()

    def _summary(self, step: int, values: list[dict[str, Any]]) -> None:
        self._write(self.proto.Event(wall_time=time.time(), step=step, summary={"value": values}))

    def _write(self, event: Any) -> None:
        self.records.write(event.SerializeToString())
