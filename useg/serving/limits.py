"""What the service takes and how long it tries -> refusals that say so in one sentence."""

from __future__ import annotations

from dataclasses import dataclass

from useg.errors import UsageError

RETRY_SECONDS = 2  # what a refused client is told to wait


@dataclass(frozen=True)
class Limits:
    """How much the service takes on; whatever is above is refused at once, so that what was taken on is done.

    Args:
        upload: bytes of one request's body.
        pixels: of one picture; also of all pictures that are worked on at one time, so that large ones take turns.
        pictures: of one request.
        waiting: pictures that wait for their turn.
        seconds: from a request's first byte to its answer's last.
        answer: bytes of one answer; only class probabilities reach it.
    """

    upload: int = 32_000_000
    pixels: int = 25_000_000
    pictures: int = 32
    waiting: int = 64
    seconds: float = 25.0
    answer: int = 400_000_000

    def __post_init__(self) -> None:
        for name in ("upload", "pixels", "pictures", "waiting", "seconds", "answer"):
            if getattr(self, name) <= 0:
                raise UsageError(f"the limit '{name}' is {getattr(self, name):g}, but nothing could be served below 1; give a number above 0")

    @property
    def held(self) -> int:
        """Bytes of all requests' bodies that are in memory at one time."""
        return 8 * self.upload


class RefusalError(Exception):
    """A request that is not served.

    Args:
        status: of HTTP.
        sentence: what was wrong, what is allowed, what to do.
    """

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(status, sentence)
        self.status, self.sentence = status, sentence

    @property
    def headers(self) -> dict[str, str]:
        """When to come again, or how to prove who one is."""
        return {503: {"retry-after": str(RETRY_SECONDS)}, 401: {"www-authenticate": "Bearer"}}.get(self.status, {})


def busy(why: str) -> RefusalError:
    """Return the one refusal that is not the client's doing."""
    return RefusalError(503, f"{why}; try again in {RETRY_SECONDS} seconds")


def gone() -> RefusalError:
    """Return the refusal that nobody reads but the log."""
    return RefusalError(499, "the client has gone")
