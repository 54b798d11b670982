"""Decoders: the names of the decode policies, what the decoder codes of rows mean, and how large an image may be."""

POLICY = "featstore-decode-1"
"""The name and version of the rules in `decode`. Other values for the same bytes need another name."""

REDUCED = "featstore-decode-1-reduced"
"""The same, but for large JPEGs, which are decoded at a half, a quarter or an eighth of their size."""

POLICIES = {"full": POLICY, "reduced": REDUCED}
"""What people call them."""

PIXEL_DIGEST = "0eccce17a6d4284f480505c1264779bf50a9c9d907401af4dad073bfd5e22e90"
"""What `pixel_digest` gives where decoders do as the policy says, and what it would have given for parts without it."""

PIXEL_DIGESTS = {POLICY: PIXEL_DIGEST, REDUCED: "cc09aec52456996a44fd59347e70a2e662bf64310e3c767267cb5a3b7405aab2"}
"""The same by policy; parts of reduced images have always had theirs."""

ARRAY, TORCHVISION, PILLOW, SIMPLEJPEG, PILLOW_HEIF, TORCHCODEC = range(6)
DECODERS: dict[int, str] = {
    ARRAY: "array",
    TORCHVISION: "torchvision.io",
    PILLOW: "pillow",
    SIMPLEJPEG: "simplejpeg",
    PILLOW_HEIF: "pillow-heif",
    TORCHCODEC: "torchcodec",
}
"""What the decoder code of a row means."""

MAX_PIXELS = 178_956_970
"""The most pixels that are decoded, half a gigabyte as RGB; also where Pillow stops unless told otherwise."""

MAX_FILE_BYTES = 8 * MAX_PIXELS + (64 << 20)
"""The most bytes of a file that is read: four channels of 16 bits a pixel, uncompressed, and what lies around them."""
