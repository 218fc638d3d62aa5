"""A model -> the initial weights of a run: what is reused, what is new, and what is dropped.

Everything is taken over that fits: the weights of the network, the pixel statistics, and, where
the user sets no others, the settings of the network and the working size. The rows of the output
layer follow the names of the classes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from useg.classes import IGNORE, ClassTable
from useg.config import ModelSettings, Settings, read_provenance, read_settings
from useg.data.class_mapping import has_default_names, match_classes, parse_class_map
from useg.data.dataset import Dataset, read_pair_size
from useg.data.split_files import restore_splits
from useg.errors import DataError, ModelError, SettingsError, format_count
from useg.models.geometry import WorkingSize
from useg.models.pretrained import adapt_stem
from useg.models.segmenter import Segmenter, build_network, load_model, on_meta
from useg.parsing import printable
from useg.training.plan import Plan

# Images are distorted if their aspect ratio differs from that of the working size by this factor.
_MAX_DISTORTION = 1.1

# A run may start from a run that itself started from another; this many of them count.
_MAX_ANCESTORS = 100

_NEW_ROW = -1


@dataclass(frozen=True)
class WarmStart:
    """A model that a run starts from.

    Args:
        model: The model.
        path: Its file or run folder.
        rows: For each class of the data, the row of the model's output layer, or -1 for a new one.
        num_seen: Held-out images that the model or its ancestors were trained on.
        is_new_place: Whether no image of the data was among their training images.
        notes: What is taken over and what is not, in sentences.
        share: Share of these weights in the kept model of the run (:meth:`mix_into`).
    """

    model: Segmenter
    path: Path
    rows: tuple[int, ...]
    num_seen: int
    is_new_place: bool
    notes: tuple[str, ...]
    share: float = 0.0

    @property
    def keeps_all_classes(self) -> bool:
        """Whether the model knows every class of the data."""
        return _NEW_ROW not in self.rows

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        return _digest_weights(self.model)

    def provenance(self, classes: ClassTable) -> dict[str, Any]:
        """Return the provenance of the start, for the model file of the run."""
        old = self.model.classes.names
        return {
            "model": printable(self.path.absolute().name),
            "sha256": self.digest,
            "dataset": self.model.provenance.get("dataset", ""),
            "new_classes": _names_without(classes, self.rows),
            "dropped_classes": [name for k, name in enumerate(old) if k not in self.rows],
            "num_seen": self.num_seen,
            "share": self.share,
        }

    def initialize(self, model: Segmenter) -> None:
        """Give the model of the run these weights; those of new classes stay as they are."""
        by_class = _tensors_by_size(model.settings, "classes")
        by_band = _tensors_by_size(model.settings, "channels")
        old, new = self.model.network.state_dict(), model.network.state_dict()
        for name, tensor in new.items():
            source = old[name]
            if name in by_band:
                source = adapt_stem(source, model.channels)
            if name not in by_class:
                tensor.copy_(source)
                continue
            rows = self.rows
            if model.settings.get("objects") and self.model.settings.get("objects"):
                # The output of the depth follows those of the classes.
                rows = (*rows, len(self.model.classes))
            for k, row in enumerate(rows):
                if row != _NEW_ROW:
                    tensor[k] = source[row]

    def mix_into(self, model: Segmenter, share: float) -> None:
        """Give the model of the run this share of these weights, and keep the rest of its own."""
        weights = model.network.state_dict()
        trained = {name: tensor.clone() for name, tensor in weights.items()}
        self.initialize(model)
        for name, tensor in weights.items():
            if tensor.is_floating_point():
                tensor.lerp_(trained[name], 1 - share)
            else:
                tensor.copy_(trained[name])

    def pixel_statistics(self, channels: int) -> tuple[list[float], list[float]]:
        """Return mean and deviation of each band; their averages for another number of bands."""
        mean, std = (part.flatten().tolist() for part in (self.model.mean, self.model.std))
        if channels == len(mean):
            return mean, std
        return [sum(mean) / len(mean)] * channels, [sum(std) / len(std)] * channels


def _digest_weights(model: Segmenter) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def adopt_settings(
    start: str | os.PathLike[str], chosen: Settings, given: Collection[str]
) -> tuple[Settings, str]:
    """Set what a model decides: the network and the working size, where the user sets no others.

    Args:
        start: A run folder or a model file.
        chosen: The settings.
        given: Keys of the settings that the user has set.

    Returns:
        The settings, and what was taken over in words.

    Raises:
        ModelError: There is no such model.
        SettingsError: The weights do not fit the network that the user has set.
    """
    path = Path(os.path.abspath(start))
    model = load_model(path)
    known = ModelSettings().architecture()
    changes: dict[str, Any] = {
        f"model.{key}": value for key, value in model.settings.items() if key in known
    }
    frame, scale = model.working.frame, model.working.scale
    if not {"data.size", "data.scale"} & set(given):
        changes |= {"data.size": frame, "data.scale": None if frame else scale}
    # Images are standardised only if all have one size.
    changes["data.standardize"] = model.working.standardize and "data.scale" not in given
    changes = {key: value for key, value in changes.items() if key not in given}
    settings = chosen.with_({**changes, "model.start": str(path)})
    _check_network(model, settings, path)
    trained = model.provenance.get("dataset")
    return settings, (
        f"starting from {path}"
        f"{f', trained on {trained}' if trained else ''}: encoder {model.settings.get('encoder')}, "
        f"width {model.settings.get('width')}, {_describe_working_size(model.working)}, "
        f"{format_count(len(model.classes), 'class', 'classes')}"
    )


def _check_network(model: Segmenter, settings: Settings, path: Path) -> None:
    """Refuse settings of a network that the weights of the model do not fit."""
    network = {**settings.model.architecture(), "classes": len(model.classes)}
    # An output for objects is taken over where both have one.
    network["objects"] = model.settings.get("objects")
    with on_meta(path):
        wanted = build_network({**network, "channels": model.channels}).state_dict()
    own = model.network.state_dict()
    if {name: each.shape for name, each in wanted.items()} == {
        name: each.shape for name, each in own.items()
    }:
        return
    different = [
        f"model.{key} = {network[key]}, where the model has {value}"
        for key, value in model.settings.items()
        if key in network and network[key] != value
    ]
    raise SettingsError(
        f"the weights of {path} do not fit {' and '.join(different) or 'this network'}; leave "
        "such settings out, or do not start from that model"
    )


def read_start(plan: Plan, dataset: Dataset) -> WarmStart:
    """Read the model that a run starts from (``model.start``), and say what is taken over.

    Raises:
        ModelError: The model is missing or damaged.
        SettingsError: It does not fit the network, or ``model.start_map`` has an unknown class.
        DataError: The number type of the images is not that of the model.
    """
    settings = plan.settings
    assert settings.model.start
    path = Path(settings.model.start)
    model = load_model(path)
    _check_network(model, settings, path)
    if plan.pixels != model.pixels:
        raise DataError(
            f"the images of {dataset.root} are {plan.pixels}, but {path} takes {model.pixels}; "
            f"convert the images to {model.pixels}, or do not start from that model"
        )
    rows = _match_rows(dataset, model, settings.model.start_map)
    seen = find_seen(path, dataset)
    num_seen = len(seen & {pair.identity for pair in dataset.of("val")})
    notes = [
        _describe_classes(rows, dataset.classes, model.classes),
        *_describe_sizes(plan, dataset, model),
        *_describe_bands(plan.channels, model.channels),
        *_describe_seen(num_seen, dataset),
    ]
    return WarmStart(model, path, rows, num_seen, not seen, tuple(notes))


def _match_rows(dataset: Dataset, model: Segmenter, text: str | None) -> tuple[int, ...]:
    """Return for each class of the data the row of the model's output layer, or -1."""
    own = dataset.classes
    if text is None and own.names == model.classes.names:
        return tuple(range(len(own)))
    class_map: str | Mapping[str, str] = {} if text is None else parse_class_map(text)
    mapping = match_classes(own, model.classes, class_map, str(dataset.root))
    assert mapping
    return tuple(_NEW_ROW if k == IGNORE else k for k in mapping.ids)


def _tensors_by_size(settings: Mapping[str, Any], key: str) -> set[str]:
    """Return the names of the weights whose shape depends on the number of classes or bands."""
    with on_meta("the network"):
        smaller, larger = (
            build_network({**settings, key: settings[key] + more}).state_dict() for more in (0, 1)
        )
    return {name for name in smaller if smaller[name].shape != larger[name].shape}


def _names_without(classes: ClassTable, rows: tuple[int, ...]) -> list[str]:
    return [name for name, row in zip(classes.names, rows, strict=True) if row == _NEW_ROW]


def _describe_classes(rows: tuple[int, ...], classes: ClassTable, old: ClassTable) -> str:
    new = _names_without(classes, rows)
    dropped = [name for k, name in enumerate(old.names) if k not in rows]
    unnamed = has_default_names(classes) and has_default_names(old)
    by_id = "; they have no names, so they are matched by their ids" if unnamed else ""
    if not new and not dropped:
        return f"the model's classes are those of the data{by_id}"
    if len(new) == len(classes):
        return (
            f"none of the model's classes ({', '.join(old.names)}) is among those of the data "
            f"({', '.join(classes.names)}), so the output layer is initialised "
            "randomly; to reuse classes that have other names in the data, map them with NAME=NAME"
        )
    renamed = [
        f"{name} from {old.names[row]}"
        for name, row in zip(classes.names, rows, strict=True)
        if row != _NEW_ROW and name != old.names[row]
    ]
    parts = [f"{len(classes) - len(new)} of {len(classes)} classes are reused{by_id}"]
    parts += [f"renamed: {', '.join(renamed)}"] if renamed else []
    parts += [f"new: {', '.join(new)}"] if new else []
    if dropped:
        parts.append(f"dropped: {', '.join(dropped)} (list them in classes.toml to keep them)")
    return "; ".join(parts)


def _describe_working_size(working: WorkingSize) -> str:
    frame = working.frame
    return f"{frame[0]}x{frame[1]} pixels" if frame else f"scale {working.scale:g}"


def _describe_sizes(plan: Plan, dataset: Dataset, model: Segmenter) -> Iterator[str]:
    """Say if the working size of the run differs from the model's, or distorts the images."""
    was, now = model.working, plan.working
    if was.standardize != now.standardize:
        yield (
            f"data.standardize is {now.standardize} in this run, but {was.standardize} in the model"
        ).lower()
    if replace(was, standardize=now.standardize) != now:
        yield (
            f"the working size of the model is {_describe_working_size(was)}, that of this run "
            f"{_describe_working_size(now)}"
        )
    if now.frame is None:
        return
    width, height = read_pair_size(dataset.of("train")[0])
    ratio = (width / height) / (now.frame[0] / now.frame[1])
    if max(ratio, 1 / ratio) > _MAX_DISTORTION:
        yield (
            f"images of {width}x{height} pixels are distorted to {now.frame[0]}x{now.frame[1]}, "
            "the working size of the model; set another one with data.size=WIDTHxHEIGHT"
        )


def _describe_bands(new: int, old: int) -> Iterator[str]:
    if new != old:
        yield (
            f"the images have {format_count(new, 'band')}, but the model takes {old}: the weights "
            "of the first convolutions are averaged over the bands"
        )


def _describe_seen(num_seen: int, dataset: Dataset) -> Iterator[str]:
    if num_seen:
        yield (
            f"{num_seen} of {format_count(len(dataset.of('val')), 'held-out image')} "
            "were used to train the initial model, so the scores will be too high; add a split.csv "
            "to the data to hold out other images"
        )


def refuse_changed_start(run_toml: Path) -> None:
    """Refuse to continue or repeat a run if the model that it started from is another one now.

    Raises:
        ModelError: The model has changed, or is missing.
    """
    start = read_settings(run_toml).model.start
    before = read_provenance(run_toml).get("start_sha256")
    if start is None or before is None:
        return
    if _digest_weights(load_model(Path(start))) != before:
        raise ModelError(
            f"{start} is not the model from which the run of {run_toml} started; restore that "
            "model, or start a new run"
        )


def find_seen(path: Path, dataset: Dataset) -> set[tuple[Path, int | None]]:
    """Return the identities of the images that the model or one of its ancestors was trained on.

    They are read from the run folders of the models, as far as these still exist.
    """
    seen: set[tuple[Path, int | None]] = set()
    for folder, name in _ancestors(path):
        with suppress(DataError):
            known = restore_splits(folder / "split.csv", dataset, "")
            if known and name == dataset.root.name:
                seen |= {pair.identity for pair in known.of("train")}
    return seen & {pair.identity for pair in dataset.pairs}


def _ancestors(path: Path) -> Iterator[tuple[Path, str]]:
    """Yield the run folder of a model and the name of its data set; then that of its start, ..."""
    for _ in range(_MAX_ANCESTORS):
        run_toml = (path if path.is_dir() else path.parent) / "run.toml"
        try:
            start = read_settings(run_toml).model.start
            data = read_provenance(run_toml).get("dataset", "")
        except SettingsError:
            # Not a run folder, or one of another version.
            return
        yield run_toml.parent, Path(str(data)).name
        if start is None:
            return
        path = Path(start)
