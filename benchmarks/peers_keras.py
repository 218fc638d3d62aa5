"""Train a U-Net in Keras as courses write it, by ``fit``, and print when each step ended as JSON.

peers.py runs this script under a Python that has TensorFlow; it imports nothing of useg. Images are
decoded once and kept in memory (``cache``), shuffled, and prepared while the network works
(``prefetch``), as TensorFlow's guide to input pipelines recommends.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf
from keras import layers


def block(x: Any, width: int, padding: str, dropout: float = 0.0) -> Any:
    for _ in range(2):
        x = layers.Conv2D(
            width, 3, activation="relu", padding=padding, kernel_initializer="he_normal"
        )(x)
    return layers.Dropout(dropout)(x) if dropout else x


def crop(skip: Any, x: Any) -> Any:
    """Crop the centre of ``skip`` to the size of ``x``."""
    lost = [have - want for have, want in zip(skip.shape[1:3], x.shape[1:3], strict=True)]
    return (
        layers.Cropping2D([(both // 2, both - both // 2) for both in lost])(skip)
        if any(lost)
        else skip
    )


def unet(spec: dict[str, Any]) -> keras.Model:
    network, (width, height) = spec["network"], spec["size"]
    padding = "same" if network["same"] else "valid"
    inputs = x = layers.Input((height, width, spec["channels"]))
    skips = []
    for level in range(4):
        x = block(
            x, network["width"] * 2**level, padding, network["dropout"] if level == 3 else 0.0
        )
        skips.append(x)
        x = layers.MaxPooling2D(2)(x)
    x = block(x, network["width"] * 16, padding, network["dropout"])
    for level in (3, 2, 1, 0):
        x = layers.Conv2DTranspose(
            network["width"] * 2**level, network["up_kernel"], strides=2, padding="same"
        )(x)
        x = block(
            layers.concatenate([crop(skips.pop(), x), x], axis=3),
            network["width"] * 2**level,
            padding,
        )
    if network["extra_conv"]:
        x = layers.Conv2D(
            network["width"], 3, activation="relu", padding=padding, kernel_initializer="he_normal"
        )(x)
    return keras.Model(
        inputs, layers.Conv2D(spec["classes"], 1, padding="same", dtype="float32")(x)
    )


def load_images(spec: dict[str, Any]) -> tf.data.Dataset:
    (width, height), margin = spec["size"], spec["margin"]

    def decode(image: Any, mask: Any) -> tuple[Any, Any]:
        image = tf.image.convert_image_dtype(
            tf.image.decode_png(tf.io.read_file(image), channels=spec["channels"]), tf.float32
        )
        mask = tf.image.decode_png(tf.io.read_file(mask), channels=3)[..., :1] // spec["divide"]
        if margin:
            around = [[margin, margin], [margin, margin], [0, 0]]
            return tf.pad(image, around, "SYMMETRIC"), tf.pad(mask, around, "SYMMETRIC")
        return tf.image.resize(image, (height, width)), tf.image.resize(
            mask, (height, width), method="nearest"
        )

    def window(image: Any, mask: Any) -> tuple[Any, Any]:
        both = tf.image.random_crop(
            tf.concat([image, tf.cast(mask, tf.float32)], axis=2),
            (height, width, spec["channels"] + 1),
        )
        return both[..., :-1], tf.cast(both[margin:-margin, margin:-margin, -1:], tf.uint8)

    files = [
        [str(path) for path in sorted(Path(spec[part]).glob("*.png"))[: spec["pictures"]]]
        for part in ("images", "masks")
    ]
    dataset = (
        tf.data.Dataset.from_tensor_slices(tuple(files))
        .map(decode, num_parallel_calls=tf.data.AUTOTUNE)
        .cache()
        .shuffle(500)
    )
    dataset = dataset.map(window, num_parallel_calls=tf.data.AUTOTUNE) if margin else dataset
    return dataset.batch(spec["batch"], drop_remainder=True).prefetch(tf.data.AUTOTUNE)


class Times(keras.callbacks.Callback):
    """Records when steps end, from the second epoch on; stops after the epoch when time is up."""

    def __init__(self, batch: int, seconds: float) -> None:
        super().__init__()
        self.batch, self.seconds, self.ends = batch, seconds, []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.ends.append((time.perf_counter(), self.batch))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if epoch == 0:
            self.ends = self.ends[-1:]
        self.model.stop_training = epoch > 0 and self.ends[-1][0] - self.ends[0][0] >= self.seconds


def main(spec: dict[str, Any]) -> None:
    if spec["precision"] == "bf16":
        keras.mixed_precision.set_global_policy("mixed_bfloat16")
    model = unet(spec)
    model.compile(
        optimizer="adam",
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    times = Times(spec["batch"], spec["seconds"])
    model.fit(load_images(spec), epochs=10_000, callbacks=[times], verbose=0)
    versions = {"keras": keras.__version__, "tensorflow": tf.__version__}
    device = "cuda" if tf.config.list_physical_devices("GPU") else "cpu"
    print(
        json.dumps(
            {"ends": times.ends, "parameters": model.count_params(), "device": device, **versions}
        )
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
