"""Image sources with faults of their own, and a policy, in a module that loads little: other processes import it."""

import os
import signal
from dataclasses import dataclass
from typing import Any

from featstore.images.sources import FolderSource


@dataclass(frozen=True)
class Deadly(FolderSource):
    """One of whose images ends the process that reads it, as a decoder that crashes does."""

    def read(self, image: str) -> bytes:
        if image == "50.png":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(image)


@dataclass(frozen=True)
class Faulty(FolderSource):
    """A source with a fault of its own."""

    def read(self, image: str) -> bytes:
        raise LookupError(f"no drawer for {image}")


STRENGTH = 1


def darker(image: Any, generator: Any) -> Any:
    """A policy whose strength is set by whoever imports this."""
    return image // STRENGTH
