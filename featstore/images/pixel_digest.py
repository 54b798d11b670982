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
from featstore.images.decoders import POLICY, REDUCED

SAMPLES = tuple(
    Path(__file__).parent / "samples" / name
    for name in ("subsampled.jpg", "progressive.jpg", "turned.jpg", "transparent.png")
)
"""Files of a few kilobytes, as `scripts/decoder_samples.py` makes them, in the order in which they are digested."""

_RESIZES: dict[str, tuple[int, ...]] = {POLICY: (45,), REDUCED: (45, 11, 5, 3)}
"""Of the views that the samples, 45 pixels high, are decoded for: in full, to a half, a quarter and an eighth."""


@cache
def pixel_digest(policy: str = POLICY) -> str:
    """What the decoders of this process give by a decode policy, 64 hexadecimal digits.

    The policy's of `PIXEL_DIGESTS` if it is what the policy means.
    """
    return digest_json(
        [
            digest_tensor(decode(path.read_bytes(), policy=policy, resize=resize, is_whole=True).pixels)
            for resize in _RESIZES[policy]
            for path in SAMPLES
        ]
    )


def check_pixels(stored: Collection[str], *, policy: str, what: str) -> None:
    """Compares the pixel digests of stored rows with that of the decoders here, by the rows' decode policy.

    Raises:
        FactsDifferError: if they differ; the message says what to do.
    """
    if not stored or {*stored} == {pixel_digest(policy)}:
        return
    raise FactsDifferError(
        f"The images of {what} were decoded to other pixels than the decoders here give, although all keys agree: the "
        f"digest of the pixels of {len(SAMPLES)} sample files was {' and '.join(each[:8] for each in sorted(stored))}, "
        f"is {pixel_digest(policy)[:8]}. Expected decoders that agree: featstore doctor tells which are here, and "
        f"whether they give the pixels of {policy}. Install those that it was made with, extract into another store, "
        "or remove the set (featstore remove) and extract it anew."
    )
