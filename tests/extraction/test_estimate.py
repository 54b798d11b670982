"""What an estimate says an extraction would do, against what the extraction then does."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.extracting import run
from support.operations import replace_operation
from support.tiny import photos, staged

from featstore import (
    Augment,
    Estimate,
    FeatureStore,
    FeatureStoreError,
    ImageError,
    ImageSet,
    StageRate,
    Trunk,
    estimate,
    extract,
)
from featstore.extraction import estimate as estimate_module
from featstore.extraction.job import Session
from featstore.extraction.opening import open_plan
from featstore.extraction.rates import STAGES
from featstore.store.gathering import Gathered

TWO_CUTS: dict[str, Any] = {"cuts": ["layer1:none", "layer2"], "augment": Augment("flip", seeds=[0, 1])}


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    """Twelve, of which two are copies of the first."""
    folder = photos(tmp_path / "photos", 10)
    for name in ("again.png", "and_again.png"):
        shutil.copy(folder / "cat" / "0.png", folder / "dog" / name)
    return ImageSet.from_folder(folder).split(valid=0.3, seed=0)


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return FeatureStore(tmp_path / "feats")


def estimated(images: ImageSet, store: FeatureStore, **options: Any) -> Estimate:
    return estimate(staged(), images, store, **{"workers": 2, "device": "cpu", "dtype": "float32", **options})


def files(folder: Path) -> dict[Path, tuple[int, bytes]]:
    paths = [Path(root, name) for root, _, names in os.walk(folder) for name in names]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def of(read: float, decode: float, forward: float, write: float, *, device: str = "cpu") -> Estimate:
    """Of 1,000 images, from rates."""
    rates = tuple(
        StageRate(stage=stage, images=rate, num_bytes=0, busy_seconds=1.0, seconds=9.0, workers=1)
        for stage, rate in zip(STAGES, (read, decode, forward, write), strict=True)
    )
    return Estimate(images=1000, sets=(), sample=64, device=device, start_seconds=5.0, rates=rates)


@pytest.mark.parametrize("stored", [0, 7])
def test_rows_and_bytes_are_those_that_the_extraction_then_writes(
    images: ImageSet, store: FeatureStore, stored: int
) -> None:
    if stored:
        run(images.select(range(stored)), store, cuts=["layer2"])
    before = {part.path for each in store.sets() for part in each.parts} if stored else set()
    found = estimated(images, store, **TWO_CUTS)
    assert [each.stage for each in found.rates] == list(STAGES)
    assert all(each.rate for each in found.rates)
    assert found.sample == found.images
    assert found.seconds() > found.start_seconds > 0

    report = run(images, store, **TWO_CUTS)
    assert [each["key"] for each in found.sets] == list(report.keys)
    assert [each["rows"] for each in found.sets] == [each["computed"] for each in report.sets]
    written = [
        sum(part.num_bytes for part in store.set(each["key"]).parts if part.path not in before) for each in found.sets
    ]
    assert [each["bytes"] for each in found.sets] == written
    assert found.num_bytes == sum(written)


def test_where_pixels_are_stored_an_estimate_reads_those_as_the_extraction_does(
    images: ImageSet, store: FeatureStore
) -> None:
    report = extract(staged(), images, store, cuts=["pixels"], device="cpu")
    pixels = store.set(report.keys[0]).parts[0]
    found = estimated(images, store, cuts=["layer2"])
    read, decode, forward, _ = found.rates
    assert (read.num_bytes, decode.rate) == (pixels.num_bytes, None)
    assert forward.queue is not None
    assert forward.queue < 1  # they wait for a moment
    assert found.seconds() > found.start_seconds
    assert run(images, store).rates[0].num_bytes == pixels.num_bytes


def test_an_estimate_leaves_a_store_as_it_was(images: ImageSet, store: FeatureStore) -> None:
    assert estimated(images, store, cuts=["layer2"]).images == 10
    assert not store.root.exists()
    assert {path.name for path in store.folder.parent.iterdir()} == {"photos"}
    run(images.select(range(3)), store, cuts=["layer1"])
    before = files(store.folder.parent)
    estimated(images, store, cuts=["layer2"])
    assert files(store.folder.parent) == before


def test_what_a_killed_estimate_leaves_of_a_store_that_is_not_there_yet_is_found_by_gc(
    images: ImageSet, store: FeatureStore
) -> None:
    killed = estimate_module._beside(store)
    run(images.select([0]), killed.__enter__())
    assert store.gc(older_than=3600).files == 0
    assert store.gc(older_than=0).files > 0
    assert list(store.root.iterdir()) == []


def test_a_store_that_is_begun_beside_an_estimate_stays(images: ImageSet, tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "new" / "feats")
    with estimate_module._beside(store):
        run(images.select([0]), store)
    assert {path.name.partition("@")[0] for path in store.root.iterdir()} == {"images", "net"}


def test_rows_are_kept_and_written_up_to_a_bound_whatever_the_passes(
    images: ImageSet, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    written: list[int] = []
    add, write = Gathered.add, Gathered.write

    def added(self: Gathered, *rows: Any) -> None:
        add(self, *rows)
        kept.append(self.num_rows)

    def wrote(self: Gathered, *where: Any) -> Path:
        written.append(self.num_rows)
        return write(self, *where)

    monkeypatch.setattr(Gathered, "add", added)
    monkeypatch.setattr(Gathered, "write", wrote)
    (wanted,) = estimated(images, store, cuts=["layer2"], batch_size=4).sets
    assert wanted["rows"] == 10
    assert (written, max(kept)) == ([1, 10], 10 + 4)
    for num_bytes, num_rows in ((3 * wanted["bytes"] // 10, 3), (0, 1)):
        monkeypatch.setattr(estimate_module, "WRITTEN_BYTES", num_bytes)
        kept.clear()
        written.clear()
        found = estimated(images, store, cuts=["layer2"], batch_size=4)
        assert (written, max(kept)) == ([1, num_rows], num_rows + 4)
        assert found.rates[2].images >= estimate_module.SAMPLE  # as many passes as ever


def test_where_nothing_can_be_written_nothing_is_opened(
    images: ImageSet, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Session] = []

    def noted(*arguments: Any, **options: Any) -> Session:
        opened.append(open_plan(*arguments, **options))
        return opened[-1]

    monkeypatch.setattr(estimate_module, "open_plan", noted)
    replace_operation(monkeypatch, "mkdir", refused)
    with pytest.raises(PermissionError):
        estimated(images, store, cuts=["layer2"])
    assert opened == []


def refused(operation: Any, path: Path) -> None:
    raise PermissionError(13, "Permission denied", str(path))


def test_the_sample_is_spread_over_what_is_missing(
    images: ImageSet, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(images.select(range(4)), store, cuts=["layer2"])
    monkeypatch.setattr(estimate_module, "SAMPLE", 3)
    read: list[int] = []
    reading = ImageSet.read

    def noted(self: ImageSet, index: int) -> Any:
        read.append(index)
        return reading(self, index)

    monkeypatch.setattr(ImageSet, "read", noted)
    assert estimated(images, store, cuts=["layer2"], workers=0).sample == 3
    missing = [index for index in range(len(images)) if index >= 4 and images.ids[index][-9:] != "again.png"]
    assert read[-6:] == [missing[0], missing[(len(missing) - 1) // 2], missing[-1]] * 2


def test_where_nothing_is_missing_nothing_is_run(
    images: ImageSet, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(images, store, cuts=["layer2"])

    def refused(*_: object) -> None:
        raise AssertionError("a pass")

    monkeypatch.setattr(Trunk, "__call__", refused)
    found = estimated(images, store, cuts=["layer2"])
    assert (found.images, found.sample, found.num_bytes, found.rates) == (0, 0, 0, ())
    assert (found.seconds(), found.seconds(8, machines=8), found.bound_by) == (0.0, 0.0, None)
    assert [each["rows"] for each in found.sets] == [0]


def test_images_that_can_not_be_decoded_end_it_as_they_end_an_extraction(tmp_path: Path, store: FeatureStore) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jpg").write_bytes(name.encode())
    images = ImageSet.from_folder(tmp_path)
    with pytest.raises(ImageError, match=r"a\.jpg"):
        estimated(images, store)
    with pytest.raises(FeatureStoreError, match="None of 2 images that were tried could be read and decoded"):
        estimated(images, store, on_error="skip")
    assert not store.root.exists()


def test_decoding_and_passes_share_a_cpu_and_a_gpu_waits_for_the_slower() -> None:
    cpu = of(300, 150, 100, 1000)  # 100 read and decoded
    assert cpu.seconds() == 5 + 1000 / 50
    assert cpu.seconds(8) == cpu.seconds()  # of one machine's processors
    assert cpu.seconds(8, machines=8) == 5 + 1000 / 400
    gpu = of(300, 150, 20, 1000, device="cuda")
    assert gpu.seconds() == 5 + 1000 / 20
    assert gpu.seconds(2) == 5 + 1000 / 40
    assert gpu.seconds(8) == 5 + 1000 / 100  # its processors decode no faster
    assert gpu.seconds(8, machines=8) == 5 + 1000 / 160
    assert of(300, 150, 1000, 10, device="cuda").seconds() == 5 + 1000 / 10


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ((300, 150, 100.1, 1000), "decode"),
        ((150, 300, 101, 1000), "read"),
        ((300, 150, 99, 1000), "forward"),
        ((300, 150, 99, 98), "write"),
    ],
)
def test_the_slowest_binds_where_the_same_workers_read_and_decode(
    rates: tuple[float, float, float, float], expected: str
) -> None:
    assert of(*rates).bound_by == expected
