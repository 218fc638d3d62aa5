"""A model and what it needs to be served: its network computed for many, the line, the uploads, the counts; and how a request waits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from fastapi import Request

from useg.inference.predictor import Predictor
from useg.serving import protocol
from useg.serving.batching import Gathering, best_batch, gathering
from useg.serving.desk import Desk
from useg.serving.limits import Limits, gone
from useg.serving.metrics import Metrics
from useg.serving.uploads import Uploads

T = TypeVar("T")


@dataclass
class Service:
    """One model and all that is needed to serve it.

    Args:
        name: of the model, for clients.
        predictor: the model; its network may be called by several threads.
        network: counts the network's calls.
        limits: what is taken on.
        desk: where pictures wait.
        uploads: receives them.
        metrics: counts requests.
        draining: whether the service is about to end: it answers, but wants no more.
    """

    name: str
    predictor: Predictor
    network: Gathering
    limits: Limits
    desk: Desk
    uploads: Uploads
    metrics: Metrics = field(default_factory=Metrics)
    draining: bool = False


def make_service(predictor: Predictor, limits: Limits, batch: int | None = None) -> Service:
    """Prepare a model for being served.

    Args:
        predictor: the model.
        limits: what is taken on.
        batch: pictures of the working size that are computed together; by default a trial decides.
    """
    runtime = predictor.runtime
    batch = batch or best_batch(runtime.run, runtime.card)
    network = gathering(runtime.run, runtime.card, batch)
    desk = Desk(batch + 2, limits.pixels, limits.waiting)
    return Service(protocol.name_of(runtime.source), Predictor(replace(runtime, run=network)), network, limits, desk, Uploads(limits))


async def all_of(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Wait for all; when one fails, the others are given up."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Wait for work, or give it up when the client hangs up; the request's body has been read.

    Raises:
        RefusalError: 499, the client has gone.
    """

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(hung_up())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise gone()
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()


def note(request: Request, **entries: Any) -> None:
    """Add to what is logged of a request."""
    request.scope["state"].setdefault("notes", {}).update(entries)
