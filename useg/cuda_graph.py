"""Replays a function of tensors as one CUDA graph, where the GPU waits for Python.

A small network on a fast GPU takes longer to launch, kernel by kernel, than to compute.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Calls with inputs of the same shapes that are computed as they are, before one is recorded:
# libraries choose their kernels in the first ones.
WARMUP_CALLS = 2

# A graph keeps the memory of its activations.
MAX_GRAPHS = 4

Tensors = Sequence[Tensor | None]
Shapes = tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: Sequence[Tensor]
    outputs: Tensors


class GraphedFunction:
    """A function of tensors that is recorded once and replayed for inputs of the same shapes.

    Outputs are overwritten by the next call. A function that cannot be recorded, for example
    because it reads values back, is called as it is. Nothing is recorded on other devices.

    Args:
        function: Tensors on a GPU -> tensors. It may change tensors that it keeps, such as
            running means.
        device: The device.
    """

    def __init__(self, function: Callable[..., Tensors], device: torch.device) -> None:
        self.function, self.device = function, device
        self.records = device.type == "cuda" and torch.version.cuda is not None
        self.recordings: dict[Shapes, _Recording] = {}
        self.calls: Counter[Shapes] = Counter()
        self.stream: torch.cuda.Stream | None = None
        if self.records:
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
        assert self.stream
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
