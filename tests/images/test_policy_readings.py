"""What a person's own policy reads besides image and generator: refused where no key covers it."""

from __future__ import annotations

import io
import os
import random
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from support.own_modules import module_of
from torch import Tensor
from torchvision.io import decode_image, encode_jpeg

from featstore.images.augmentation import policy

DIGEST = bytes(range(32))
IMAGE = torch.arange(3 * 40 * 50).reshape(3, 40, 50).to(torch.uint8)

TABLE = "import numpy as np\nimport torch\nfrom pathlib import Path\nHOME = {home!r}\n"


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("return torch.from_numpy(np.load(HOME + '/table.npy'))[image.long()]", r"a file \(.*/table.npy\)"),
        ("return torch.from_numpy(np.fromfile(HOME + '/table.npy', 'u1')[-256:])[image.long()]", r"a file \("),
        ("return image + len(list(Path(HOME).iterdir()))", r"a file \("),
        ("return image + Path(HOME, 'table.npy').read_bytes()[-1]", r"a file \("),
        # In branches that no trial reaches.
        ("return image if len(image) == 3 else np.load('table.npy')", r"a file \(np.load\)"),
        ("return image if len(image) == 3 else open('table.npy')", r"a file \(open\)"),
        ("if len(image) != 3:\n        import glob as g\n        g.glob('*')\n    return image", r"a file \(g.glob\)"),
        ("if len(image) != 3:\n        from PIL import Image\n        Image.open('x')\n    return image", r"a file \("),
    ],
)
def test_a_policy_that_reads_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, what: str
) -> None:
    monkeypatch.setitem(sys.modules, "own_policy", ModuleType("own_policy"))
    np.save(tmp_path / "table.npy", np.arange(256, dtype=np.uint8))
    source = TABLE.format(home=str(tmp_path)) + f"def own(image, generator):\n    {body}\n"

    with pytest.raises(ValueError, match=f"the policy own reads {what}.*its key doesn't cover.*at the top level"):
        policy(module_of(tmp_path, source).own)


def test_a_file_that_is_read_at_the_top_level_is_keyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = TABLE.format(home=str(tmp_path)) + "TABLE = torch.from_numpy(np.load(HOME + '/table.npy'))\n"
    source = head + "def own(image, generator):\n    return TABLE[image.long()]\n"
    policies = []
    for table in (np.arange(256), 255 - np.arange(256)):
        monkeypatch.setitem(sys.modules, "own_policy", ModuleType("own_policy"))
        np.save(tmp_path / "table.npy", table.astype(np.uint8))
        policies.append(policy(module_of(tmp_path, source).own))

    assert policies[0] != policies[1]


LIMIT = 3
now = time.time


def chosen(image: Tensor) -> Tensor:
    return image.flip(2) if os.getenv("FLIPPED") else image


class Chooser:
    def choose(self, image: Tensor) -> Tensor:
        return image if time.monotonic() > 0 else image.flip(2)


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (lambda image, generator: image // int(os.environ.get("DIVISOR", "1")), r"the environment \(os.environ\)"),
        (lambda image, generator: chosen(image), r"the environment \(os.getenv\)"),
        (lambda image, generator: image // (1 + hash("text") % 5), r"numbers that each process has .* \(hash\).*crc32"),
        (lambda image, generator: image // globals()["LIMIT"], r"what the interpreter holds \(globals\)"),
        (lambda image, generator: image // sys.modules[__name__].LIMIT, r"what the interpreter holds \(sys.modules\)"),
        (lambda image, generator: image if time.time() < 1e12 else image.flip(2), r"the clock \(time.time\)"),
        (lambda image, generator: image if now() < 1e12 else image.flip(2), r"the clock \(now\)"),
        (lambda image, generator: Chooser().choose(image), r"the clock \(time.monotonic\)"),
        (lambda image, generator: image[:, : threading.get_ident()], r"the environment \(threading.get_ident\)"),
        # In branches that no trial reaches.
        (lambda image, generator: image if len(image) == 3 else uuid.uuid4(), r"the system's entropy \(uuid.uuid4\)"),
        (lambda image, generator: image if len(image) == 3 else random.random(), r"a global random state \(random.r"),
        (lambda image, generator: image if len(image) == 3 else np.random.rand(), r"a global random state \(np.r"),  # noqa: NPY002
    ],
)
def test_a_policy_that_reads_what_its_key_doesnt_cover_is_refused(function: Callable[..., Tensor], what: str) -> None:
    with pytest.raises(ValueError, match=f"reads {what}.*fingerprint"):
        policy(function)


def test_an_own_modules_attribute_by_a_computed_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("own_policy", "settings"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module_of(tmp_path, "STRENGTH = 2\n", "settings")
    source = "import settings\ndef own(image, generator):\n    return image // getattr(settings, 'STREN' + 'GTH')\n"

    with pytest.raises(ValueError, match=r"what the interpreter holds \(an attribute of settings by its name\)"):
        policy(module_of(tmp_path, source).own)


def test_a_fingerprint_vouches_for_what_a_policy_reads(tmp_path: Path) -> None:
    np.save(tmp_path / "table.npy", np.arange(256, dtype=np.uint8))

    def own(image: Tensor, generator: torch.Generator) -> Tensor:
        return torch.from_numpy(np.load(tmp_path / "table.npy"))[image.long()]

    vars(own)["fingerprint"] = "table 1"
    assert torch.equal(policy(own).apply(IMAGE, 0, DIGEST), IMAGE)


def imports_late(image: Tensor, generator: torch.Generator) -> Tensor:
    import tomllib  # opens the module's files

    Path(os.devnull).write_text(tomllib.__name__)
    return image


def compressed(image: Tensor, generator: torch.Generator) -> Tensor:
    """As JPEG would leave it."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=30)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


def compressed_by_torch(image: Tensor, generator: torch.Generator) -> Tensor:
    read: Tensor = decode_image(encode_jpeg(image.contiguous(), 30))
    return read


@pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")
@pytest.mark.parametrize("function", [compressed, compressed_by_torch])
def test_an_image_compressed_in_memory_is_no_file(function: Callable[..., Tensor]) -> None:
    assert policy(function).apply(IMAGE, 0, DIGEST).shape == IMAGE.shape


def test_imports_and_writing_are_no_reading(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(tmp_path)  # a folder that the import lists first
    monkeypatch.delitem(sys.modules, "tomllib", raising=False)
    assert policy(imports_late).name == "imports_late"
