"""Damage of every kind to the files of a store: each is found and named, and harms nothing but what it hit."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest
import torch
from support import released
from support.full_disk import largest_file

from featstore import DamagedFileError, FeatureStore
from featstore.digest import digest_json
from featstore.files.part import Part, write_part
from featstore.files.table import Table, write_table
from featstore.store.spec import FeatureSpec

NUM_FLIPS = 100
"""Bits of each region. One checksum covers all of a region, so few of them say of a bit what many would."""

ROWS_A_BLOCK, NUM_BLOCKS = 10, 10
NUM_ROWS = ROWS_A_BLOCK * NUM_BLOCKS
FACTS = released.PART_FACTS
OTHER_SPEC = {**released.SPEC, "trunk": digest_json("another trunk")}
OTHER_FACTS = {**FACTS, "spec": OTHER_SPEC, "key": digest_json(OTHER_SPEC)}


class Store(NamedTuple):
    """A store of three parts and an image table."""

    root: Path
    part: Path  # what gets damaged
    beside: Path  # of the same set
    other: Path  # of another set
    table: Path

    def damage(self, *, sound_sets: int = 1) -> str:
        """What is said about the one file that can't be used; the other set, or both, still can be."""
        store = FeatureStore(self.root)
        (error,) = store.damaged()
        assert [each.key for each in store.sets()] == [FACTS["key"], OTHER_FACTS["key"]][-sound_sets:]
        return str(error)

    def check_others(self) -> None:
        """The files beside the damaged one are sound, and the other set can be used."""
        assert torch.equal(Part.open(self.beside).features, released.FEATURES)
        assert Part.open(self.beside).verify() == []
        assert Table.open(self.table).facts == released.TABLE_FACTS
        store = FeatureStore(self.root)
        assert torch.equal(store.features(store.images(), OTHER_FACTS["key"])[:], released.FEATURES)

    def check_whole(self) -> None:
        """All is well."""
        assert FeatureStore(self.root).damaged() == []
        assert Part.open(self.part).verify() == []
        self.check_others()


def made(root: Path, num_rows: int, shape: tuple[int, ...]) -> Store:
    """A `Store` whose part to be damaged has rows of that shape, of small whole numbers."""
    folder, other_folder = root / "net@layer2-a" / "the set", root / "net@layer2-b" / "the other set"
    store = Store(root, folder / "part-a.h5", folder / "part-b.h5", other_folder / "part-c.h5", root / "images/t-0.h5")
    for path in (store.part, store.other, store.table):
        path.parent.mkdir(parents=True)
    features = (torch.arange(num_rows * int(np.prod(shape))) % 200).bfloat16().view(num_rows, *shape)
    digests = np.random.default_rng(0).integers(0, 256, (num_rows, 32), np.uint8)
    write_part(store.part, features=features, digests=digests, decoders=np.full(num_rows, 2, np.uint8), facts=FACTS)
    for path, facts in [(store.beside, FACTS), (store.other, OTHER_FACTS)]:
        write_part(path, features=released.FEATURES, digests=released.DIGESTS, decoders=released.DECODERS, facts=facts)
    write_table(store.table, columns=released.COLUMNS, facts=released.TABLE_FACTS)
    return store


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store with a part of ten blocks, which each test leaves as it was."""
    root = tmp_path_factory.mktemp("large")
    store = made(root, NUM_ROWS, (52_000,))
    yield store
    store.check_whole()
    shutil.rmtree(root)


@pytest.fixture
def small(tmp_path: Path) -> Store:
    """A store whose part to be damaged has two rows."""
    return made(tmp_path / "store", 2, (3000,))


@contextmanager
def flipped(path: Path, bit: int) -> Iterator[None]:
    """One bit of the file is another, meanwhile."""
    _flip(path, bit)
    yield
    _flip(path, bit)


def _flip(path: Path, bit: int) -> None:
    with path.open("r+b", buffering=0) as file:
        old = os.pread(file.fileno(), 1, bit // 8)[0]
        os.pwrite(file.fileno(), bytes([old ^ 1 << bit % 8]), bit // 8)


def regions(path: Path) -> dict[str, list[range]]:
    """The bytes of each dataset as h5py sees them, of the user block, and of all else: the structure."""
    with h5py.File(path) as file:
        datasets = {name: file[name].id for name in file if file[name].size}
        found = {
            name: [range(each.get_offset(), each.get_offset() + each.get_storage_size())]
            for name, each in datasets.items()
        }
    found["header"] = [range(4096)]
    taken = sorted((extents[0] for extents in found.values()), key=lambda extent: extent.start)
    ends = [extent.stop for extent in taken]
    found["structure"] = [
        range(end, start) for end, start in zip(ends, [*(e.start for e in taken[1:]), path.stat().st_size], strict=True)
    ]
    return found


def some_bits(extents: list[range], seed: int) -> list[int]:
    """`NUM_FLIPS` different bits of the bytes in `extents`, or all if fewer, and one of each extent's ends."""
    places = np.concatenate([np.arange(extent.start, extent.stop) for extent in extents])
    num_bits = len(places) * 8
    bits = np.random.default_rng(seed).choice(num_bits, size=min(NUM_FLIPS, num_bits), replace=False)
    ends = {place * 8 + seed for extent in extents if extent for place in (extent.start, extent.stop - 1)}
    return sorted(ends | {int(places[bit // 8]) * 8 + int(bit % 8) for bit in bits})


# ---- one flipped bit

NAMED = {
    "digest": "bytes are altered in its digests (",
    "decoder": "bytes are altered in its decoders (",
    "crc": "bytes are altered in its checksums (",
    "facts": "bytes are altered in its facts (",
    "structure": "bytes are altered in its structure (",
    "header": "bytes are altered in its header",
}


@pytest.mark.parametrize("region", NAMED)
def test_a_flipped_bit_outside_the_features_is_found_with_its_region_and_harms_no_other_part(
    large: Store, region: str
) -> None:
    bits = some_bits(regions(large.part)[region], seed=1)
    assert len(bits) >= NUM_FLIPS
    for bit in bits:
        with flipped(large.part, bit):
            assert large.damage().startswith(f"{large.part} is damaged: {NAMED[region]}")
    with flipped(large.part, bits[0]):
        large.check_others()


def test_every_bit_of_the_header_that_says_something_is_found_there(large: Store) -> None:
    with large.part.open("rb") as file:
        says_something = [place for place, byte in enumerate(file.read(4096)) if byte or place < 88]
    assert len(says_something) > 100
    for bit in (place * 8 + bit for place in says_something for bit in range(8)):
        with flipped(large.part, bit), pytest.raises(DamagedFileError) as error:
            Part.open(large.part)
        assert str(error.value).startswith(f"{large.part} is damaged: {NAMED['header']}")


def test_a_flipped_bit_in_the_features_is_found_with_its_rows_and_the_other_rows_are_read(large: Store) -> None:
    part = Part.open(large.part)
    (extent,) = regions(large.part)["features"]
    assert len(part.checksums) == NUM_BLOCKS
    blocks_hit = set()
    for bit in some_bits([extent], seed=2):
        block = (bit // 8 - extent.start) // (len(extent) // NUM_BLOCKS)
        first, last = block * ROWS_A_BLOCK, (block + 1) * ROWS_A_BLOCK - 1
        with flipped(large.part, bit):
            assert part.verify() == [range(first, last + 1)]
            with pytest.raises(DamagedFileError, match=rf"part-a\.h5 is damaged: its rows {first} to {last} don't fit"):
                list(part.read_blocks([block]))
            assert [rows.start for rows, _ in part.read_blocks([(block + 1) % NUM_BLOCKS])]
        blocks_hit.add(block)
    assert blocks_hit == set(range(NUM_BLOCKS))


def test_a_flipped_bit_in_an_image_table_is_found_with_its_column_and_harms_no_part(small: Store) -> None:
    places = regions(small.table)
    assert places.keys() == {*released.COLUMNS, "facts", "structure", "header"}
    for region, extents in places.items():
        named = f"column {region}" if region in released.COLUMNS else region
        for bit in some_bits(extents, seed=3):
            with flipped(small.table, bit), pytest.raises(DamagedFileError) as error:
                Table.open(small.table)
            assert re.match(rf"{small.table} is damaged: bytes are altered in its {named}\b", str(error.value))
        with flipped(small.table, extents[0].start * 8):
            assert small.damage(sound_sets=2).startswith(f"{small.table} is damaged: ")
    small.check_whole()


def test_damage_in_several_regions_names_them_all(small: Store) -> None:
    places = regions(small.part)
    with flipped(small.part, places["digest"][0].start * 8), flipped(small.part, places["facts"][0].start * 8 + 80):
        assert re.search(r"bytes are altered in its (digests and facts|facts and digests) \(", small.damage())
    small.check_whole()


# ---- another length


def test_a_file_that_ends_too_soon_is_found_wherever_it_ends(small: Store) -> None:
    content = small.part.read_bytes()
    edges = {edge for extents in regions(small.part).values() for each in extents for edge in (each.start, each.stop)}
    middles = {(e.start + e.stop) // 2 for extents in regions(small.part).values() for e in extents}
    sizes = ({0, 1, 31, 32, 35, 40, 76, 4095, 4097, 4100, len(content) - 1} | edges | middles) - {len(content)}
    assert len(sizes) > 20
    for size in sizes:
        os.truncate(small.part, size)
        missing = (4096 if size < 4096 else len(content)) - size
        assert small.damage().startswith(f"{small.part} is damaged: it is truncated, {missing} bytes are missing")
        small.part.write_bytes(content)
    os.truncate(small.part, 5000)
    small.check_others()


def test_a_file_whose_end_never_reached_the_disk_is_found(small: Store) -> None:
    """As after a power loss on a file system that keeps lengths before contents."""
    content = small.part.read_bytes()
    places = regions(small.part)
    for start, named in [
        (0, "is not a file of featstore's"),
        (100, "in its header"),
        (4096, "structure"),
        (places["digest"][0].start, "digests"),
    ]:
        small.part.write_bytes(content[:start].ljust(len(content), b"\0"))
        assert named in small.damage()
    start = places["features"][0].start
    small.part.write_bytes(content[: start + 10].ljust(len(content), b"\0"))
    assert Part.open(small.part).verify() == [range(2)]


@pytest.mark.parametrize("extra", [1, 4096, 1 << 20])
def test_a_file_that_has_grown_is_found(small: Store, extra: int) -> None:
    size = small.part.stat().st_size
    os.truncate(small.part, size + extra)
    assert f"{small.part} is damaged: it has {size + extra} bytes, which its user block contradicts" in (small.damage())
    small.check_others()


def test_two_files_that_were_joined_by_a_copy_are_found(small: Store) -> None:
    with small.part.open("ab") as file:
        file.write(small.beside.read_bytes())
    assert "which its user block contradicts" in small.damage()


# ---- no file at all


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Ends whoever waits for longer."""

    def give_up(*_: object) -> None:
        raise TimeoutError(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            listener.bind(f"/proc/self/fd/{folder}/{path.name}")  # the whole path may be longer than a socket's may
        finally:
            os.close(folder)


NO_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "folder": (lambda path: path.mkdir(), "is a folder, where a file was expected"),
    "pipe": (os.mkfifo, "is a named pipe, where a file was expected"),
    "socket": (bind_socket, "can't be opened: No such device or address"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device, where a file was expected"),
    "loop": (lambda path: path.symlink_to(path), "can't be opened: Too many levels of symbolic links"),
    "empty": (lambda path: path.touch(), "it is truncated, 4096 bytes are missing"),
}


@pytest.mark.parametrize("kind", ["part", "table"])
@pytest.mark.parametrize(("make", "words"), NO_FILES.values(), ids=NO_FILES)
def test_what_is_no_file_is_refused_in_a_sentence_and_not_waited_for(
    small: Store, make: Callable[[Path], Any], words: str, kind: str
) -> None:
    path: Path = getattr(small, kind)
    path.unlink()
    make(path)
    with at_most(seconds=10):
        error = small.damage(sound_sets=1 if kind == "part" else 2)
    assert error.startswith(f"{path} ")
    assert words in error
    assert "Move a sound copy into its place" in error
    if kind == "part":
        small.check_others()


def test_a_part_that_becomes_a_pipe_is_refused_by_whoever_has_it_open(small: Store) -> None:
    part = Part.open(small.part)
    small.part.unlink()
    os.mkfifo(small.part)
    with at_most(seconds=10):
        for use in (part.verify, lambda: list(part.read_blocks([0])), lambda: part.read_rows(np.array([0]))):
            with pytest.raises(DamagedFileError, match=r"part-a\.h5 is a named pipe"):
                use()
        with pytest.raises(DamagedFileError, match=r"part-a\.h5"):
            _ = part.features


# ---- no room, no permission


def file_one_more(store: Store, num_rows: int = 2000) -> Path:
    """Publishes one more part, of 384 bytes a row, in the set of the one to be damaged."""
    facts = {name: FACTS[name] for name in FACTS if name not in ("spec", "key", "view", "supersedes", "who", "when")}
    return FeatureStore(store.root).write(
        FeatureSpec.from_facts(released.SPEC),
        features=[torch.ones(num_rows, 3, 8, 8, dtype=torch.bfloat16)],
        digests=np.zeros((num_rows, 32), np.uint8),
        decoders=np.zeros(num_rows, np.uint8),
        facts=facts,
    )


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_full_disk_is_the_systems_error_and_leaves_the_store_as_it_was(small: Store) -> None:
    before = files(small.root)
    with largest_file(100_000), pytest.raises(OSError, match="File too large") as error:
        file_one_more(small)
    assert error.value.errno == errno.EFBIG
    assert files(small.root) == before
    small.check_whole()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """An own file system of 512 KiB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None:
        pytest.skip("there is no mount program here")
    mounting = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounting.returncode:
        pytest.skip(f"a file system can't be mounted here: {mounting.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_really_full_leaves_the_store_as_it_was_and_takes_more_once_there_is_room(
    tiny_disk: Path,
) -> None:
    store = made(tiny_disk / "store", 2, (3000,))
    ballast = tiny_disk / "ballast"
    ballast.write_bytes(bytes(100_000))
    before = files(store.root)
    with pytest.raises(OSError, match="No space left") as error:
        file_one_more(store)
    assert error.value.errno == errno.ENOSPC
    assert files(store.root) == before
    store.check_whole()

    ballast.unlink()
    assert Part.open(file_one_more(store, num_rows=200)).verify() == []
    store.check_whole()


def check_that_it_can_only_be_read(store: Store, refusal: str) -> None:
    before = files(store.root)
    store.check_whole()
    with pytest.raises(OSError, match=refusal):
        file_one_more(store)
    assert files(store.root) == before


def test_a_store_on_a_read_only_disk_is_read_and_not_changed(tiny_disk: Path) -> None:
    store = made(tiny_disk / "store", 2, (3000,))
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    check_that_it_can_only_be_read(store, "Read-only file system")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_store_in_a_read_only_folder_is_read_and_not_changed(small: Store) -> None:
    folders = [small.part.parent, small.other.parent, small.table.parent]
    for folder in folders:
        folder.chmod(0o500)
    try:
        check_that_it_can_only_be_read(small, "Permission denied")
    finally:
        for folder in folders:
            folder.chmod(0o700)
