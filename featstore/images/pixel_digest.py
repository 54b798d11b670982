"""The pixel digest: which pixels the decoders here give, by files that come with featstore; a fact of what is filed.

It is the net under the decode policy's name, which says what pixels there should be, whatever library decodes.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from pathlib import Path

from featstore.digest import digest_json, digest_tensor
from featstore.errors import FactsDifferError
from featstore.images.decode import decode
from featstore.images.decoders import POLICY

SAMPLES = tuple(
    Path(__file__).parent / "samples" / name
    for name in ("subsampled.jpg", "progressive.jpg", "turned.jpg", "transparent.png")
)
"""Files of a few kilobytes, as `scripts/decoder_samples.py` makes them, in the order in which they are digested."""


@cache
def pixel_digest() -> str:
    """What the decoders of this process give, 64 hexadecimal digits: `PIXEL_DIGEST` if it is what the policy means."""
    return digest_json([digest_tensor(decode(path.read_bytes(), is_whole=True).pixels) for path in SAMPLES])


def check_pixels(stored: Collection[str], *, what: str) -> None:
    """Compares the pixel digests of stored rows with that of the decoders here.

    Raises:
        FactsDifferError: if they differ; the message says what to do.
    """
    if not stored or {*stored} == {pixel_digest()}:
        return
    raise FactsDifferError(
        f"The images of {what} were decoded to other pixels than the decoders here give, although all keys agree: the "
        f"digest of the pixels of {len(SAMPLES)} sample files was {' and '.join(each[:8] for each in sorted(stored))}, "
        f"is {pixel_digest()[:8]}. Expected decoders that agree: featstore doctor tells which are here, and whether "
        f"they give the pixels of {POLICY}. Install those that it was made with, extract into another store, or remove "
        "the set (featstore remove) and extract it anew."
    )
