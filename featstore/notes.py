"""Notes: what the library says to a person while it works, by the loggers `featstore` and `training`.

They print plain lines on stderr, as long as an application doesn't configure them as it does any logger; what it gave a
level or a handler before stays so. To have them where the application's root logger has its own:

    for name in ("featstore", "training"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
"""

from __future__ import annotations

import logging
import sys

from featstore.words import printable


class Printer(logging.Handler):
    """Prints messages on what is stderr when they come."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints the message of `record`; errors of writing are the caller's."""
        print(printable(self.format(record)), file=sys.stderr)


def logger_of(name: str) -> logging.Logger:
    """The logger `name`; one that nobody has configured prints, from level INFO on.

    It then hands nothing on to other loggers' handlers, so that nothing comes twice.
    """
    logger = logging.getLogger(name)
    if not logger.handlers and logger.level == logging.NOTSET:
        logger.addHandler(Printer())
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger
