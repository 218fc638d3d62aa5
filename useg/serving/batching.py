"""Calls of one network by many threads -> one thread that computes them, pictures of one size together where that is faster.

Nobody waits for company: while the network computes, calls gather, and the next computation takes what has gathered. At low load every
picture is computed at once and alone.

The answers are those of pictures computed alone, to the bit. A library may choose another algorithm for a batch, which rounds differently;
so the first batch of a size is computed both ways, and where they differ that size is computed one by one from then on.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from useg.inference.card import Card
from useg.inference.probe import probe, probe_size, seconds_of
from useg.inference.tiles import Network

LARGEST = 8  # pictures at a time
WORTH = 0.95  # a batch has to take at most this share of its pictures' time alone
_TRIAL_SECONDS = 0.3  # a picture that takes longer keeps all cores busy by itself


@dataclass(eq=False)
class _Call:
    x: NDArray[np.generic]
    answer: Future[NDArray[np.float32]] = field(default_factory=Future)


@dataclass
class Counts:
    """How often the network was called, with how many pictures (or windows of pictures), and for how long."""

    calls: int = 0
    pictures: int = 0
    seconds: float = 0.0


class Gathering:
    """A network like the one it is given, which any thread may call; a single thread computes.

    Args:
        network: the network.
        most: pictures that are computed together.
        values: numbers in those pictures, so that windows of large ones are not.

    >>> network = Gathering(lambda x: x.astype(np.float32), 8, 1000)
    >>> network(np.ones((1, 3, 2, 2), np.uint8)).shape
    (1, 3, 2, 2)
    """

    def __init__(self, network: Network, most: int, values: int) -> None:
        self.counts = Counts()
        self._network, self._most, self._values = network, most, values
        self._exact: dict[tuple[int, ...], bool] = {}
        self._calls: deque[_Call] = deque()
        self._called = threading.Condition()
        threading.Thread(target=self._compute, name="network", daemon=True).start()

    def __call__(self, x: NDArray[np.generic]) -> NDArray[np.float32]:
        """Compute ``x``, when its turn has come."""
        call = _Call(x)
        with self._called:
            self._calls.append(call)
            self._called.notify()
        return call.answer.result()

    def _compute(self) -> None:
        while True:
            with self._called:
                self._called.wait_for(lambda: self._calls)
                together = self._next()
            began = time.perf_counter()
            try:
                answers = self._answers([call.x for call in together])
            except BaseException as error:
                for call in together:
                    call.answer.set_exception(error)
                continue
            self.counts = Counts(self.counts.calls + 1, self.counts.pictures + len(answers), self.counts.seconds + time.perf_counter() - began)
            for call, answer in zip(together, answers, strict=True):
                call.answer.set_result(answer)

    def _answers(self, pictures: list[NDArray[np.generic]]) -> list[NDArray[np.float32]]:
        form = len(pictures), *pictures[0].shape
        if self._exact.get(form):
            return np.split(self._network(np.concatenate(pictures)), len(pictures))
        alone = [self._network(x) for x in pictures]
        if len(pictures) > 1 and form not in self._exact:
            self._exact[form] = np.array_equal(self._network(np.concatenate(pictures)), np.concatenate(alone))
        return alone

    def _next(self) -> list[_Call]:
        """Take the oldest call, and those that can be computed with it."""
        first = self._calls.popleft()
        alike = [call for call in self._calls if (call.x.dtype, *call.x.shape) == (first.x.dtype, *first.x.shape)]
        together = [first, *alike[: max(1, min(self._most, self._values // first.x.size)) - 1]]
        for call in together[1:]:
            self._calls.remove(call)
        return together


def best_batch(network: Network, card: Card) -> int:
    """Return how many pictures of the model's working size are best computed together: 1, unless more are faster."""
    x = probe(card, probe_size(card), LARGEST)
    alone = seconds_of(network, x[:1])
    best, least, count = 1, WORTH * alone, 2
    while alone < _TRIAL_SECONDS and count <= LARGEST:
        seconds = seconds_of(network, x[:count]) / count
        if seconds < least:
            best, least = count, seconds
        count *= 2
    return best


def gathering(network: Network, card: Card, batch: int) -> Gathering:
    """Wrap a network so that up to ``batch`` pictures of the working size are computed together, and fewer windows of larger ones."""
    width, height = probe_size(card)
    return Gathering(network, batch, batch * card.channels * width * height)
