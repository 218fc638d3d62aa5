"""The device that computes: which one, in which precision, and whether it computes correctly.

:func:`choose_device` is the one place that decides. A device other than the CPU is trusted only
after :func:`find_fault` has compared it with the CPU. :class:`GraphedFunction` keeps a GPU from
waiting for Python.
"""

from __future__ import annotations

import copy
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from useg.errors import MachineError
from useg.machine import DEVICE_VARIABLE, Input, Result

CPU = torch.device("cpu")

# A number type is used if it is at least this many times as fast as fp32; where it is emulated it
# is slower.
MIN_SPEEDUP = 1.3

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

# Differences between a device and the CPU, in relation to the size of the CPU's values, that are
# always allowed: first in fp32, then with fewer bits.
MAX_FP32_DIFFERENCES = {"logits": 0.01, "loss": 0.001, "gradients": 0.05}
MAX_DIFFERENCES = {"logits": 0.25, "loss": 0.1, "gradients": 0.75}

# Deep networks magnify rounding: in bf16 the gradients of an untrained EfficientNet are all noise,
# on any device. So a difference may be this many times as large as the one that the same number of
# bits makes on the CPU.
MAX_ROUNDING_RATIO = 4.0

# Factor on the loss in fp16, in which small gradients would become 0.
PROBE_SCALE = 1024.0

Tensors = Sequence[Tensor | None]
TensorFunction = Callable[..., Tensors]


# From this version on, cuDNN compiles its kernels for depthwise convolutions at their first use,
# for every size and in every thread. On an H200, the first step of EfficientNet-Lite0 takes 20
# seconds, and one at another size 10 more. With PyTorch's own kernels it takes one second, and
# later steps take 10 to 40 % longer.
MIN_COMPILING_CUDNN = 91000

_may_compile: ContextVar[bool] = ContextVar("may_compile", default=False)


def choose_device(wanted: str | None = None) -> torch.device:
    """Return the device that computes.

    Args:
        wanted: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``, ``"xpu"``, or ``"auto"``: the
            accelerator that PyTorch finds, else the CPU. By default the environment variable
            ``USEG_DEVICE`` decides, else ``"auto"``.

    Raises:
        MachineError: PyTorch finds no such device.
    """
    name = wanted or os.environ.get(DEVICE_VARIABLE) or "auto"
    accelerator = find_accelerator()
    if name == "auto":
        return accelerator or CPU
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    found = [str(each) for each in (CPU, accelerator) if each]
    count = torch.accelerator.device_count() if accelerator else 0
    known = device is not None and device.type in {each.partition(":")[0] for each in found}
    if device is None or not known or (device.type != "cpu" and (device.index or 0) >= count):
        raise MachineError(
            f"there is no device {name!r} here; PyTorch finds {' and '.join(found)}; choose one "
            "of them, or install a build of torch for your GPU"
        )
    if device.type == "cpu":
        return CPU
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # torchrun has given each process its own.
        return torch.device(device.type)
    if device.index is not None:
        torch.accelerator.set_device_index(device.index)
    return device


def find_accelerator() -> torch.device | None:
    """Return the GPU or other accelerator that PyTorch finds: CUDA, ROCm, MPS or XPU."""
    return torch.accelerator.current_accelerator(check_available=True)


def free_memory(device: torch.device) -> int:
    """Return the bytes of memory that are free on an accelerator."""
    return torch.accelerator.get_memory_info(device)[0]


def describe_device(device: torch.device) -> str:
    """Return a name for people, such as ``"NVIDIA H100 80GB HBM3 (cuda)"``."""
    module = torch.get_device_module(device)
    name = getattr(module, "get_device_name", None)
    return str(device) if device == CPU or name is None else f"{name(device)} ({device})"


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of a device or of the machine is used up."""
    texts = "allocate memory", "out of memory"
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


def release_memory(device: torch.device) -> None:
    """Give memory that no tensor uses back to the device."""
    if device.type != "cpu":
        torch.accelerator.empty_cache()


def move_arrays(arrays: Sequence[NDArray[np.generic]], device: torch.device) -> list[Tensor]:
    """Copy arrays of one number type to a device together, as :func:`move_tensor` does.

    Each array is copied once on the CPU, into the memory from which the device takes all of them.
    """
    kind = torch.from_numpy(np.empty(0, arrays[0].dtype)).dtype
    sizes = [array.size for array in arrays]
    packed = torch.empty(sum(sizes), dtype=kind, pin_memory=device.type == "cuda")
    for part, array in zip(torch.split(packed, sizes), arrays, strict=True):
        part.view(array.shape).numpy()[...] = array
    moved = torch.split(packed.to(device, non_blocking=True), sizes)
    return [part.view(array.shape) for part, array in zip(moved, arrays, strict=True)]


def move_tensor(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the CPU to a device, without waiting for what the device computes."""
    if device.type == "cuda":
        # A copy from other memory waits until the GPU has done its work.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def get_random_states(device: torch.device) -> list[Tensor]:
    """Return the state of the device's random numbers in a list; empty for the CPU."""
    if device.type == "cpu":
        return []
    return [torch.get_device_module(device).get_rng_state(device)]


def set_random_states(states: list[Tensor], device: torch.device) -> None:
    """Restore what :func:`get_random_states` returned, or a list with a state per device."""
    if device.type != "cpu" and states:
        own = (device.index or torch.accelerator.current_device_index()) if len(states) > 1 else 0
        torch.get_device_module(device).set_rng_state(states[own], device)


def choose_precision(wanted: str | None, device: torch.device) -> torch.dtype | None:
    """Return the autocast type of ``"bf16"``, ``"fp16"`` or ``"fp32"`` (None).

    If ``wanted`` is None, it is :func:`fastest_precision`.
    """
    return PRECISIONS[wanted or fastest_precision(device)]


def fastest_precision(device: torch.device) -> str:
    """Return bf16 where it is measured to be faster than fp32; on GPUs without it, fp16."""
    if measure_speedup(device, torch.bfloat16) >= MIN_SPEEDUP:
        return "bf16"
    # On CPUs, gradients in fp16 are slow and imprecise.
    if device != CPU and measure_speedup(device, torch.float16) >= MIN_SPEEDUP:
        return "fp16"
    return "fp32"


@cache
def measure_speedup(device: torch.device, dtype: torch.dtype) -> float:
    """Return how many times as fast a convolution is in this number type as in fp32.

    It takes some hundredths of a second, once per process. 0 if the device cannot compute it.
    """
    # A GPU takes as long for little work as for none.
    batch, side = (1, 64) if device.type == "cpu" else (16, 128)
    x, weight = (
        torch.ones(shape, device=device).to(memory_format=torch.channels_last)
        for shape in ((batch, 64, side, side), (64, 64, 3, 3))
    )
    seconds: dict[bool, float] = {}
    try:
        reduced = x.to(dtype), weight.to(dtype)
        with torch.inference_mode():
            # The two take turns, so that other load disturbs both alike. The shortest time counts:
            # the first calls warm up.
            for k in range(12):
                is_reduced = k % 2 == 1
                inputs = reduced if is_reduced else (x, weight)
                taken = _measure_call(partial(F.conv2d, *inputs, padding=1), device)
                seconds[is_reduced] = min(seconds.get(is_reduced, taken), taken)
    except (RuntimeError, TypeError):
        return 0.0
    return seconds[False] / seconds[True]


@contextmanager
def allow_compiling(is_allowed: bool) -> Iterator[None]:
    """Let cuDNN compile kernels in this thread, or not; it pays if they are used for minutes."""
    token = _may_compile.set(is_allowed)
    try:
        yield
    finally:
        _may_compile.reset(token)


def avoids_compiling(device: torch.device) -> bool:
    """Whether a device computes depthwise convolutions without cuDNN, which would compile them."""
    return device.type == "cuda" and not _may_compile.get() and _cudnn_compiles()


def _cudnn_compiles() -> bool:
    if torch.version.cuda is None:
        return False
    version = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return (version or 0) >= MIN_COMPILING_CUDNN


def measure_training_speed(
    network: nn.Module, x: Tensor, precision: torch.dtype | None, graphed: bool = True
) -> float:
    """Return how many pixels per second a network can be trained on.

    Args:
        network: A network on the device of ``x``; only its gradients change.
        x: A batch ``(N, C, H, W)``.
        precision: The autocast type; None is fp32.
        graphed: Whether training replays recorded steps where that is possible.
    """

    def gradients(x: Tensor) -> list[Tensor | None]:
        network.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, precision, enabled=precision is not None):
            loss = network(x).float().square().mean()
        loss.backward()
        return [parameter.grad for parameter in network.parameters()]

    step = graph_on_gpu(gradients, x.device) if graphed else gradients
    count = WARMUP_CALLS + 4 if isinstance(step, GraphedFunction) else 3
    seconds = min(_measure_call(partial(step, x), x.device) for _ in range(count))
    network.zero_grad(set_to_none=True)
    return x.shape[0] * x.shape[2] * x.shape[3] / seconds


def _measure_call(function: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - began


def find_fault(
    network: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    target: Tensor,
    precision: torch.dtype | None,
    device: torch.device,
) -> str | None:
    """Compare logits, loss and gradients of a training step on a device with the CPU's.

    Args:
        network: A network on the CPU; it is copied.
        loss: Logits and target -> scalar.
        x: A batch ``(N, C, H, W)`` on the CPU.
        target: Its class ids ``(N, h, w)`` on the CPU.
        precision: Autocast type of the run; None is fp32.
        device: The device to compare with the CPU.

    Returns:
        What is wrong, to follow "because", or None if the device computes correctly.
    """
    network = copy.deepcopy(network).train()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            # It draws other random numbers on each device.
            module.p = 0.0
    train = partial(_train_once, network, loss, x, target)
    expected = train(None, CPU)
    # In this layout the CPU needs no compiled layers.
    plain = copy.deepcopy(network)
    plain.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    train_plain = partial(_train_once, plain, loss, x, target)
    for each, limits in ((None, MAX_FP32_DIFFERENCES), (precision, MAX_DIFFERENCES)):
        try:
            with _exact_fp32(each is None):
                found = train(each, device)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            release_memory(device)
            return f"a training step on it fails ({first_line(error)})"
        # bf16 has the fewest bits, and all CPUs compute it; fp32 is compared with fp64.
        rounding = torch.float64 if each is None else torch.bfloat16
        rounded = cache(partial(train_plain, rounding, CPU))
        for name, limit in limits.items():
            fault = find_difference(name, found[name], expected[name], limit, rounded)
            if fault:
                return fault
        if precision is None:
            break
    return None


def find_difference(
    name: str,
    found: Tensor,
    expected: Tensor,
    limit: float,
    rounded: Callable[[], Mapping[str, Tensor]],
) -> str | None:
    """Compare a result of a device with the CPU's.

    Args:
        name: What they are, for the message.
        found: The device's result, on the CPU.
        expected: The CPU's.
        limit: Relative difference that is always allowed.
        rounded: Returns what the CPU computes in another precision, by name. A difference beyond
            ``limit`` that such rounding explains is not a fault.

    Returns:
        What is wrong, to follow "because", or None.
    """
    if not bool(torch.isfinite(found).all()):
        return f"its {name} contain NaN or infinite values where the CPU's do not"
    difference = relative_difference(found, expected)
    if difference <= limit:
        return None
    if difference > MAX_ROUNDING_RATIO * relative_difference(rounded()[name], expected):
        return f"its {name} differ by {100 * difference:.3g} % from the CPU's"
    return None


def first_line(error: Exception) -> str:
    """Return the first line of an error of PyTorch, whose messages can be pages long."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return the size of the difference of two tensors in relation to the second."""
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def _train_once(
    network: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    target: Tensor,
    precision: torch.dtype | None,
    device: torch.device,
) -> dict[str, Tensor]:
    """Return logits, loss and gradients of one training step of a copy, as float64 on the CPU.

    ``precision`` is the autocast type; float64 is the type of everything.
    """
    network, x = copy.deepcopy(network).to(device), x.to(device)
    if precision is torch.float64:
        network, x, precision = network.double(), x.double(), None
    with torch.autocast(device.type, precision, enabled=precision is not None):
        logits = network(x)
    value = loss(logits, target.to(device))
    scale = PROBE_SCALE if precision is torch.float16 else 1.0
    (value * scale).backward()  # type: ignore[no-untyped-call]
    gradients = [each.grad.flatten() for each in network.parameters() if each.grad is not None]
    values = {"logits": logits, "loss": value[None], "gradients": torch.cat(gradients) / scale}
    return {name: tensor.detach().cpu().double() for name, tensor in values.items()}


@contextmanager
def _exact_fp32(wanted: bool) -> Iterator[None]:
    """Do not let NVIDIA GPUs round the inputs of fp32 convolutions to 10 bits (TF32)."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = before and not wanted
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


# Calls with inputs of the same shapes that are computed as they are, before one is recorded:
# libraries choose their kernels in the first ones.
WARMUP_CALLS = 2


# A graph keeps the memory of its activations.
MAX_GRAPHS = 4


Shapes = tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: Sequence[Tensor]
    outputs: Tensors


def graph_on_gpu(function: TensorFunction, device: torch.device) -> TensorFunction:
    """Return what computes the same faster on a CUDA GPU; on other devices the function itself."""
    is_cuda = device.type == "cuda" and torch.version.cuda is not None
    return GraphedFunction(function, device) if is_cuda else function


class GraphedFunction:
    """A function of tensors that is recorded once and replayed for inputs of the same shapes.

    A small network on a fast GPU takes longer to launch, kernel by kernel, than to compute. As one
    CUDA graph it is launched at once.

    Outputs are overwritten by the next call. A function that cannot be recorded, for example
    because it reads values back, is called as it is.

    Args:
        function: Tensors on a GPU -> tensors. It may change tensors that it keeps, such as
            running means.
        device: The device.
    """

    def __init__(self, function: TensorFunction, device: torch.device) -> None:
        self.function, self.device = function, device
        self.records = True
        self.recordings: dict[Shapes, _Recording] = {}
        self.calls: Counter[Shapes] = Counter()
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, *inputs: Tensor) -> Tensors:
        """Call the function, or replay it."""
        if not self.records:
            return self.function(*inputs)
        shapes = tuple((each.shape, each.stride(), each.dtype) for each in inputs)
        recording = self.recordings.get(shapes)
        if recording is None:
            self.calls[shapes] += 1
            if self.calls[shapes] <= WARMUP_CALLS or len(self.recordings) >= MAX_GRAPHS:
                return self._call(inputs)
            try:
                recording = self._record(inputs)
            except RuntimeError:
                self.records = False
                self.recordings.clear()
                torch.cuda.empty_cache()
                return self.function(*inputs)
            self.recordings[shapes] = recording
        for own, given in zip(recording.inputs, inputs, strict=True):
            own.copy_(given)
        recording.graph.replay()
        return recording.outputs

    def _call(self, inputs: Sequence[Tensor]) -> Tensors:
        """Call the function on the stream on which it will be recorded."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            outputs = self.function(*inputs)
        current.wait_stream(self.stream)
        return outputs

    def _record(self, inputs: Sequence[Tensor]) -> _Recording:
        own = [each.clone(memory_format=torch.preserve_format) for each in inputs]
        graph = torch.cuda.CUDAGraph()
        # Other threads go on preparing batches meanwhile.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            outputs = self.function(*own)
        return _Recording(graph, own, outputs)


def in_compute_thread(
    function: Callable[[Input], Result], device: torch.device
) -> Callable[[Input], Result]:
    """Return a function that computes the same, always in one thread, whichever thread calls it.

    cuDNN chooses its kernels again in each thread, and compiles some of them: EfficientNet takes
    seconds the first time. Nor can it do so while a graph is recorded.

    Args:
        function: Computes on the device.
        device: The device.
    """

    def compute(x: Input) -> Result:
        if device.index is not None:
            # Each thread has its own, at first the first GPU.
            torch.accelerator.set_device_index(device.index)
        return function(x)

    def call(x: Input) -> Result:
        return _compute_thread().submit(compute, x).result()

    return call


@cache
def _compute_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "compute")
