"""Read a model file of any kind and make it a function: raw pixels in, logits out.

PyTorch computes run folders and ``model.safetensors``; ONNX Runtime and OpenVINO compute exported
models (:mod:`useg.inference.exported`) and convert trained ones.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, wraps
from pathlib import Path
from typing import Any
from warnings import warn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from useg.device import (
    CPU,
    choose_device,
    choose_precision,
    describe_device,
    find_accelerator,
    find_difference,
    first_line,
    graph_on_gpu,
    in_compute_thread,
    is_out_of_memory,
    release_memory,
)
from useg.errors import (
    DataError,
    DeviceWarning,
    FaultyDeviceError,
    MachineError,
    ModelError,
    SettingsError,
    choose,
    need,
)
from useg.inference.tiles import LogitsFunction
from useg.models import segmenter
from useg.models.description import ModelDescription, description_from_json, unusable
from useg.models.geometry import reflect_indices
from useg.models.segmenter import Segmenter, build_network, check_geometry, describe_model, on_meta

# Probes: longest side, and number of scenes; a larger batch repeats them.
MAX_PROBE_SIDE_PIXELS = 512
NUM_PROBE_SCENES = 4

# Difference of a GPU's logits of the probe from the CPU's, in relation to their size, that is
# always allowed.
MAX_LOGIT_DIFFERENCE = 0.25
MAX_GPU_PROBE_SIDE_PIXELS = 192

# Memory for the activations of a window. At their peak the activations in memory are this number
# of the largest feature map and of the logits, fitted to measured processes (benchmarks/tiles.py).
MAX_WINDOW_BYTES = 1 << 30
PEAK_FEATURE_MAPS = 7
PEAK_LOGIT_MAPS = 2

# Side of the image for which the network is computed to estimate its memory.
DESCRIBED_SIDE_PIXELS = 256


@dataclass(frozen=True)
class Runtime:
    """A model that is ready to compute.

    Args:
        run: Raw pixels ``(N, C, H, W)`` -> logits ``(N, K, h, w)`` float32. With objects, the logit
            of the depth follows those of the K classes.
        description: What the model takes, its classes, and how it was trained.
        name: What computes it, one of ``RUNTIMES``.
        source: The file or folder it was read from.
        pixel_bytes: Memory that an exported graph needs for each pixel; 0 if it was not measured.
    """

    run: LogitsFunction
    description: ModelDescription
    name: str
    source: Path
    pixel_bytes: int = 0

    def class_logits(self, x: NDArray[np.generic]) -> NDArray[np.float32]:
        """Return the logits of the classes alone."""
        return self.run(x)[:, : len(self.description.classes)]

    @cached_property
    def window_pixels(self) -> int:
        """Number of pixels of a window whose activations take about ``MAX_WINDOW_BYTES``."""
        return min(
            window_pixels(self.description, MAX_WINDOW_BYTES),
            MAX_WINDOW_BYTES // max(1, self.pixel_bytes),
        )


@dataclass(frozen=True)
class StoredModel:
    """A model that was read and checked, in the form in which it was stored.

    One of the three forms is set. The others are made from it on demand.

    Args:
        description: What the file says about the model.
        source: The file or folder it was read from.
        model: From a run folder or ``model.safetensors``.
        onnx_file: From an ``.onnx``.
        openvino_graph: From an ``.xml``.
        pixel_bytes: Memory that an exported graph needs for each pixel; 0 if it was not measured.
    """

    description: ModelDescription
    source: Path
    model: Segmenter | None = None
    onnx_file: bytes | None = None
    openvino_graph: Any = None
    pixel_bytes: int = 0

    @property
    def native(self) -> str:
        """The runtime that computes the model as it is stored."""
        if self.model is not None:
            return "torch"
        if self.onnx_file is not None:
            return "onnx"
        if self.description.precision == "int8":
            from useg.inference import exported

            return "openvino-bf16" if exported.has_bf16() else "openvino"
        return "openvino"

    @property
    def as_torch(self) -> Segmenter:
        """The model as a module.

        Raises:
            ModelError: It was exported.
        """
        if self.model is None:
            raise ModelError(
                f"{self.source} is an exported model, which PyTorch does not run; "
                f"choose another runtime or give the run folder"
            )
        return self.model

    @cached_property
    def as_onnx(self) -> bytes:
        """The model as an ONNX file.

        Raises:
            ModelError: It was exported to OpenVINO.
        """
        if self.openvino_graph is not None:
            raise ModelError(
                f"{self.source} is an OpenVINO model, which ONNX Runtime does not run; "
                f"choose another runtime or give the run folder"
            )
        if self.onnx_file is not None:
            return self.onnx_file
        from useg.inference import exported

        return exported.to_onnx(self.as_torch)

    @cached_property
    def as_openvino(self) -> Any:
        """The model as an OpenVINO graph."""
        from useg.inference import exported

        if self.onnx_file is not None:
            return exported.openvino_from_onnx(self.onnx_file)
        if self.openvino_graph is not None:
            return self.openvino_graph
        return exported.to_openvino(self.as_torch)


def read_model(path: Path) -> StoredModel:
    """Read a run folder, a ``model.safetensors``, an ``.onnx`` or an ``.xml``.

    Raises:
        ModelError: There is none, it is damaged, or useg did not write it.
    """
    if path.suffix not in (".onnx", ".xml"):
        model = segmenter.load_model(path)
        return StoredModel(describe_model(model), path, model)
    if not path.is_file():
        raise ModelError(
            f"there is no model at {path}; "
            f"give a run folder, a model.safetensors, or an .onnx or .xml that useg export wrote"
        )
    from useg.inference import exported, graph_checks

    if path.suffix == ".onnx":
        content, text = exported.read_onnx(path)
        description = description_from_json(text, str(path))
        check_geometry(description, path)
        pixel_bytes = graph_checks.check_onnx(content, description, path)
        return StoredModel(description, path, onnx_file=content, pixel_bytes=pixel_bytes)
    graph, text = exported.read_openvino(path)
    description = description_from_json(text, str(path))
    check_geometry(description, path)
    num_bytes = path.with_suffix(".bin").stat().st_size
    pixel_bytes = graph_checks.check_openvino(graph, num_bytes, description, path)
    return StoredModel(description, path, openvino_graph=graph, pixel_bytes=pixel_bytes)


def load_runtime(path: Path, runtime: str | None = None) -> Runtime:
    """Load a model and make it ready to compute.

    Args:
        path: A run folder, a ``model.safetensors``, an ``.onnx`` or an ``.xml``.
        runtime: One of ``RUNTIMES``. By default the GPU, if there is one and the model was
            trained by useg, else the runtime that the file was made for, in fp32.

    Raises:
        UsageError: There is no such model or runtime, the file is damaged, or a package is
            missing.
    """
    if runtime is not None:
        # A misspelled runtime is refused before the model is read.
        choose("runtime", runtime, RUNTIMES)
    # So is a device that is not here, whatever computes.
    choose_device()
    stored = read_model(path)
    return _start_or_fall_back(stored, runtime) if runtime else start_default(stored)


def start_default(stored: StoredModel) -> Runtime:
    """Start the GPU, if there is one and useg trained the model, else the model's own runtime."""
    has_gpu = choose_device() != CPU and stored.model is not None
    return _start_or_fall_back(stored, "gpu" if has_gpu else stored.native)


def runtime_of_model(model: Segmenter, source: Path, name: str = "torch") -> Runtime:
    """Make a model in memory ready to compute, by default by PyTorch in fp32 where its weights are.

    Errors are those of :func:`start_runtime`.
    """
    return _start_or_fall_back(StoredModel(describe_model(model), source, model), name)


def _start_or_fall_back(stored: StoredModel, name: str) -> Runtime:
    """Start a runtime; if it is a GPU that cannot be trusted, the CPU computes, with a warning."""
    try:
        return start_runtime(stored, name)
    except FaultyDeviceError as error:
        warn(f"{error}; the CPU is used instead", DeviceWarning, stacklevel=2)
        return start_runtime(stored, stored.native)


def start_runtime(stored: StoredModel, name: str) -> Runtime:
    """Make a model ready to compute with the runtime of that name.

    Raises:
        UsageError: There is no such runtime, or it cannot compute this model here.
    """
    network = choose("runtime", name, RUNTIMES)(stored)
    checked = _checked(network, stored.description, stored.source)
    return Runtime(checked, stored.description, name, stored.source, stored.pixel_bytes)


def _checked(
    network: LogitsFunction, description: ModelDescription, source: Path
) -> LogitsFunction:
    """Check the logits of a function: their shape, and that they are finite numbers."""

    @wraps(network)
    def run(x: NDArray[np.generic]) -> NDArray[np.float32]:
        logits = network(x)
        height, width = (side - 2 * description.margin for side in x.shape[2:])
        shape = len(x), description.num_outputs, height, width
        if logits.shape != shape or logits.dtype != np.float32:
            raise unusable(
                source, f"it returns {logits.dtype} of shape {logits.shape} instead of {shape}"
            )
        with np.errstate(all="ignore"):
            finite = np.isfinite(logits.sum())
        if not finite:
            raise DataError(
                f"{source} computes NaN or infinite values; the image or the model contains "
                "extreme values: check both"
            )
        return logits

    return run


def probe_size(description: ModelDescription) -> tuple[int, int]:
    """Return the (width, height) of a probe: the input of the network at its working size.

    Each side is at most about ``MAX_PROBE_SIDE_PIXELS``.
    """
    working = description.working
    width, height = working.of(*(working.frame or (MAX_PROBE_SIDE_PIXELS, MAX_PROBE_SIDE_PIXELS)))
    whole = [
        description.valid_size(min(side, MAX_PROBE_SIDE_PIXELS) + 2 * description.margin)
        for side in (width, height)
    ]
    return whole[0], whole[1]


def make_probe(
    description: ModelDescription, size: tuple[int, int], count: int = 1
) -> NDArray[np.generic]:
    """Make images on which two forms of a model are compared; the same every time.

    They are synthetic street scenes with the pixel statistics of the training images.

    Args:
        description: The model's.
        size: (width, height).
        count: Number of images.

    Returns:
        Raw pixels ``(count, C, height, width)`` of the model's number type.
    """
    width, height = size
    scenes = np.stack([_probe_scene(k % NUM_PROBE_SCENES) for k in range(count)])
    rows, columns = reflect_indices(np.arange(height), 192), reflect_indices(np.arange(width), 256)
    bands = [band % 3 for band in range(description.channels)]
    x = scenes[:, rows][:, :, columns].transpose(0, 3, 1, 2)[:, bands]
    x = (x - x.mean((0, 2, 3), keepdims=True)) / x.std((0, 2, 3), keepdims=True)
    mean, std = (
        np.array(values, np.float32)[:, None, None]
        for values in (description.mean, description.std)
    )
    x = x * std + mean
    if description.pixels != "float32":
        x = np.clip(np.rint(x), 0, np.iinfo(description.pixels).max)
    pixels: NDArray[np.generic] = x.astype(description.pixels)
    return pixels


@cache
def _probe_scene(seed: int) -> NDArray[np.float32]:
    from useg.scenes.generate import make_scene

    return make_scene(seed, (256, 192)).image.astype(np.float32)


def label_agreement(logits: NDArray[np.float32], others: NDArray[np.float32]) -> float:
    """Return the share of pixels, 0 to 1, with the same label in both ``(N, K, h, w)``."""
    return float((logits.argmax(1) == others.argmax(1)).mean())


def window_pixels(description: ModelDescription, budget_bytes: int) -> int:
    """Return how many pixels a window may have so that its activations fit ``budget_bytes``."""
    return budget_bytes // bytes_per_pixel(description)


def bytes_per_pixel(description: ModelDescription) -> int:
    """Estimate the peak memory of the network's activations for each input pixel, in fp32.

    It is seven times its largest feature map and twice its logits: the content of the last level
    of the expanding path.
    """
    from useg.models.describe import largest_feature_map

    side = description.valid_size(max(DESCRIBED_SIDE_PIXELS, description.smallest))
    with on_meta("the model"):
        network = build_network(description.network)
    maps_per_pixel = PEAK_FEATURE_MAPS * largest_feature_map(network, side) / side**2
    return int(4 * (maps_per_pixel + PEAK_LOGIT_MAPS * description.num_outputs))


def torch_function(model: Segmenter) -> LogitsFunction:
    """Compute with PyTorch in fp32, on the device of the weights."""
    return _logits_function(model, bf16=False)


def torch_bf16_function(model: Segmenter) -> LogitsFunction:
    """Compute convolutions with PyTorch in bf16, on the device of the weights.

    Autocast decides about everything else; the logits are fp32. Weights are converted once instead
    of in every call, which saves 10 % with one small image at a time. Grouped convolutions are
    small and stay in fp32.
    """
    return _logits_function(_convert_weights(model, torch.bfloat16), bf16=True)


def gpu_function(model: Segmenter) -> LogitsFunction:
    """Compute with PyTorch on the GPU, in the number type that is fastest there.

    Raises:
        MachineError: There is no GPU.
        FaultyDeviceError: It does not compute what the CPU computes.
    """
    device = choose_device()
    if device == CPU:
        problem = "PyTorch finds no GPU here"
        if find_accelerator():
            problem = "the runtime is gpu, but the device is the CPU"
        raise MachineError(
            f"{problem}; choose the runtime auto, or install a build of torch for your GPU"
        )
    fault = None
    try:
        precision = choose_precision(None, device)
        run = _device_function(_convert_weights(model, precision).to(device), precision)
        description = describe_model(model)
        sides = (min(side, MAX_GPU_PROBE_SIDE_PIXELS) for side in probe_size(description))
        width, height = (description.valid_size(side) for side in sides)
        x = make_probe(description, (width, height))
        fault = _find_fault(model, run(x), x)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        release_memory(device)
        fault = f"a prediction on it fails ({first_line(error)})"
    if fault:
        raise FaultyDeviceError(f"{describe_device(device)} is not used, because {fault}")
    return run


def _find_fault(model: Segmenter, found: NDArray[np.float32], x: NDArray[np.generic]) -> str | None:
    """Compare logits of a device with the CPU's; return what is wrong, or None."""
    if model.mean.device != CPU:
        model = copy.deepcopy(model).cpu()
    return find_difference(
        "logits",
        torch.from_numpy(found),
        torch.from_numpy(torch_function(model)(x)),
        MAX_LOGIT_DIFFERENCE,
        lambda: {"logits": torch.from_numpy(torch_bf16_function(model)(x))},
    )


def _device_function(model: Segmenter, precision: torch.dtype | None) -> LogitsFunction:
    """Compute on the device of the weights; a batch that does not fit is computed in parts."""
    device = model.mean.device

    def logits_of(x: torch.Tensor) -> list[torch.Tensor | None]:
        with torch.autocast(device.type, precision, enabled=precision is not None):
            return [model(x).float()]

    graphed, lock = graph_on_gpu(logits_of, device), threading.Lock()

    @torch.inference_mode()
    def run_whole(x: NDArray[np.generic]) -> NDArray[np.float32]:
        (logits,) = graphed(_to_tensor(x).to(device))
        assert logits is not None
        # The next call overwrites it. Page-locked memory takes it several times as fast.
        copied = torch.empty(logits.shape, pin_memory=device.type == "cuda")
        result: NDArray[np.float32] = copied.copy_(logits).numpy()
        return result

    compute = in_compute_thread(run_whole, device) if device.type == "cuda" else run_whole

    def run(x: NDArray[np.generic]) -> NDArray[np.float32]:
        with lock:
            try:
                return compute(x)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                release_memory(device)
                if len(x) == 1:
                    raise MachineError(
                        f"an image of {x.shape[3]}x{x.shape[2]} pixels needs more memory than "
                        f"{describe_device(device)} has; compute on the CPU (USEG_DEVICE=cpu), "
                        "or choose smaller windows (tile in Python)"
                    ) from error
        half = len(x) // 2
        return np.concatenate([run(x[:half]), run(x[half:])])

    return run


def _convert_weights(model: Segmenter, precision: torch.dtype | None) -> Segmenter:
    """Return a copy whose convolutions have this number type, but for grouped ones."""
    model = copy.deepcopy(model)
    for module in model.modules():
        is_large = isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.groups == 1
        if is_large and precision is not None:
            module.to(precision)
    return model


def _logits_function(model: Segmenter, *, bf16: bool) -> LogitsFunction:
    if model.mean.device != CPU:
        return _device_function(model, torch.bfloat16 if bf16 else None)

    def run(x: NDArray[np.generic]) -> NDArray[np.float32]:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits: NDArray[np.float32] = model(_to_tensor(x)).float().numpy()
        return logits

    return run


def _to_tensor(x: NDArray[np.generic]) -> torch.Tensor:
    # PyTorch has few operations on uint16.
    if x.dtype == np.uint16:
        x = x.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(x))


def _onnx_function(stored: StoredModel) -> LogitsFunction:
    from useg.inference import exported

    # A missing package is reported before the conversion, which takes a while.
    need("onnxruntime", exported.ONNX_EXTRA)
    return exported.onnx_function(stored.as_onnx, stored.source)


def _openvino_function(stored: StoredModel) -> LogitsFunction:
    from useg.inference import exported

    return exported.openvino_function(stored.as_openvino)


def _openvino_bf16_function(stored: StoredModel) -> LogitsFunction:
    from useg.inference import exported

    return exported.openvino_bf16_function(stored.as_openvino)


def split_model_paths(path: Path) -> list[Path]:
    """Split ``MODEL,MODEL``; an existing path is one model, even with a comma in its name.

    Raises:
        SettingsError: There is nothing before or after a comma.
    """
    names = [str(path)] if path.exists() else str(path).split(",")
    if not all(names):
        raise SettingsError(
            f"'{path}' lacks a model before or after a comma; give RUN, or RUN,RUN for an ensemble"
        )
    return [Path(name) for name in names]


def check_ensemble(first: Runtime, second: Runtime) -> None:
    """Refuse models that cannot form an ensemble.

    Raises:
        ModelError: They have different classes, bands or number types.
    """
    classes = [runtime.description.classes.names for runtime in (first, second)]
    if classes[0] != classes[1]:
        raise ModelError(
            f"{first.source} has the classes {', '.join(classes[0])}, "
            f"but {second.source} has {', '.join(classes[1])}; "
            f"an ensemble needs models of the same classes in the same order"
        )
    inputs = [
        f"{runtime.description.channels} bands of {runtime.description.pixels}"
        for runtime in (first, second)
    ]
    if inputs[0] != inputs[1]:
        raise ModelError(
            f"{first.source} takes images with {inputs[0]}, but {second.source} {inputs[1]}; "
            f"an ensemble needs models of the same images"
        )


RUNTIMES: dict[str, Callable[[StoredModel], LogitsFunction]] = {
    "torch": lambda stored: torch_function(stored.as_torch),
    "torch-bf16": lambda stored: torch_bf16_function(stored.as_torch),
    "gpu": lambda stored: gpu_function(stored.as_torch),
    "onnx": _onnx_function,
    "openvino": _openvino_function,
    "openvino-bf16": _openvino_bf16_function,
}
