"""Job: rows gathered and filed in parts, whatever fails or is interrupted; few parts in the end.

Long, since every job here runs on the same tiny network and store.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.extracting import counts, reduced, rows, run, up_to
from support.tiny import SIZE, VIEW, arrays, jpeg, net, photos, pixels, rows_by_hand, staged
from torch import Tensor, nn

from featstore import (
    Augment,
    FactsDifferError,
    FeatureStore,
    FeatureStoreError,
    ImageError,
    ImageSet,
    MissingFeaturesError,
    ModelError,
    StagedModel,
    View,
    plan,
)
from featstore.extraction import filed as filed_module
from featstore.extraction import job as job_module
from featstore.extraction.extract import run_plan
from featstore.extraction.job import Job
from featstore.files.part import write_part
from featstore.files.table import Table
from featstore.models.trunk import Trunk

FORMAT_PAGE = Path(__file__).parents[2] / "docs" / "format.md"


# ---- parts


def test_several_cuts_and_several_parts_have_the_right_rows(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_module, "COMMIT_BYTES", 1)
    monkeypatch.setattr(filed_module, "MERGE_BYTES", 0)
    images = arrays(23)
    report = run(images, store, cuts=["layer1:none", "layer2", "layer2:none"], batch_size=5)
    for key, cut, reduction in zip(
        report.keys, ["layer1", "layer2", "layer2"], ["none", "concat", "none"], strict=True
    ):
        found = store.set(key)
        assert sorted(part.num_rows for part in found.parts) == [3, 5, 5, 5, 5]
        assert found.index.num_images == 23
        by_hand = reduced(rows_by_hand(up_to(cut, net()), images, VIEW, batch_size=5), reduction)
        assert torch.equal(store.features(images, key)[:], by_hand)


@pytest.mark.parametrize(
    ("num_bytes", "seconds_a_batch", "num_rows"),
    [
        (2.5, 0, [12, 12, 4]),
        (1e9, 25, [12, 12, 4]),
        (1e9, 1, [28]),
        (2.5, 25, [12, 12, 4]),
        (1.5, 25, [8, 8, 8, 4]),  # the time counts from the last part, whatever that one was written for
    ],
)
def test_a_part_is_written_when_enough_rows_have_been_gathered_or_a_minute_after_the_last_one(
    store: FeatureStore,
    monkeypatch: pytest.MonkeyPatch,
    num_bytes: float,
    seconds_a_batch: float,
    num_rows: list[int],
) -> None:
    now = 0.0
    compute = Job._launch

    def lasting(self: Any, model: int, items: Any) -> None:
        nonlocal now
        compute(self, model, items)
        now += seconds_a_batch

    monkeypatch.setattr(job_module, "time", SimpleNamespace(monotonic=lambda: now, perf_counter=time.perf_counter))
    monkeypatch.setattr(Job, "_launch", lasting)
    monkeypatch.setattr(job_module, "COMMIT_BYTES", num_bytes * 4 * 24 * 4)  # of a batch of 4 rows of 24 float32 values
    monkeypatch.setattr(filed_module, "MERGE_BYTES", 0)
    key = run(arrays(28), store, batch_size=4).keys[0]
    parts = sorted(store.set(key).parts, key=lambda part: str(part.facts["when"]))
    assert [part.num_rows for part in parts] == num_rows
    assert (np.concatenate([part.digests for part in parts]) == arrays(28).digests().values).all()


def test_images_that_fail_are_filed_a_minute_after_the_last_part_though_no_pass_is_full(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now, take = 0.0, Job._take

    def lasting(self: Any, rendered: Any) -> None:
        nonlocal now
        take(self, rendered)
        now += 25

    photos(tmp_path / "photos", 2)
    for number in range(7):
        (tmp_path / f"photos/cat/bad{number}.jpg").write_bytes(b"no image %d" % number)
    monkeypatch.setattr(job_module, "time", SimpleNamespace(monotonic=lambda: now, perf_counter=time.perf_counter))
    monkeypatch.setattr(Job, "_take", lasting)
    monkeypatch.setattr(filed_module, "MERGE_BYTES", 0)
    key = run(ImageSet.from_folder(tmp_path / "photos"), store, on_error="skip").keys[0]
    parts = sorted(store.set(key).parts, key=lambda part: str(part.facts["when"]))
    assert [(part.num_rows, len(part.facts["failed"])) for part in parts] == [(0, 2), (0, 3), (0, 2), (2, 0)]


def test_rows_are_gathered_in_few_files(store: FeatureStore) -> None:
    run(arrays(200), store, augment=Augment("flip", seeds=[0]))
    assert len(list(store.root.rglob("part-*.h5"))) == 2


def test_the_batch_size_of_stored_rows_is_kept(store: FeatureStore) -> None:
    run(arrays(3), store, batch_size=7)
    run(arrays(6), store)
    found = store.sets()[0]
    assert [part.facts["profile"]["batch_size"] for part in found.parts] == [7, 7]
    run(arrays(8), store, batch_size=4)
    assert store.sets()[0].facts["profile"]["batch_size"] == 4  # of the newest part


def test_sets_that_began_in_passes_of_two_sizes_go_on_in_those(store: FeatureStore) -> None:
    sizes, images = {"layer1": 4, "layer2": 3}, arrays(9)
    for cut, size in sizes.items():
        run(arrays(2), store, cuts=[cut], batch_size=size)
    new = "layer2:max"  # which is computed as the first of the others
    report = run(images, store, cuts=[*sizes, new])
    assert counts(report) == (7 + 7 + 9, 4, 0)
    for key, size, cut in zip(report.keys, [4, 3, 4], [*sizes, "layer2"], strict=True):
        assert {part.facts["profile"]["batch_size"] for part in store.set(key).parts} == {size}
        reduction = store.set(key).spec.reduction
        by_hand = reduced(rows_by_hand(up_to(cut, net()), images.select(range(2, 9)), VIEW, batch_size=size), reduction)
        assert torch.equal(rows(store, images, key)[2:], by_hand)
    keys = run(arrays(11), store, cuts=[*sizes], batch_size=5).keys  # somebody has said
    assert [store.set(key).facts["profile"]["batch_size"] for key in keys] == [5, 5]


def test_a_part_says_what_made_it(store: FeatureStore) -> None:
    report = run(arrays(3), store, cuts=["layer2"], augment=Augment("flip", seeds=[4]))
    model = staged()
    for key, view in zip(report.keys, [VIEW, VIEW.with_seed("flip", 4)], strict=True):
        (part,) = store.set(key).parts
        facts = part.facts
        assert facts["key"] == key
        assert facts["view"] == facts["spec"]["view"] == view.facts()
        assert facts["spec"]["trunk"] == model.digest("layer2")
        assert (facts["backbone"], facts["cut"], facts["class_tokens"]) == ("net", "layer2", 0)
        names = model.cut_points[: model.index("layer2") + 1]
        assert [stage["name"] for stage in facts["stages"]] == names
        assert [stage["digest"] for stage in facts["stages"]] == [model.digest(name) for name in names]
        assert facts["stages"][-1] == {
            "name": "layer2", "layout": "NCHW", "shape": [12, 4, 4], "digest": model.digest("layer2")
        }  # fmt: skip
        assert facts["profile"]["batch_size"] == 32
        assert facts["profile"]["torch"] == torch.__version__
        assert len(facts["probe"]["values"]) == 2
        assert facts["failed"] == {}
        assert facts["supersedes"] == []
        assert facts["who"].startswith("featstore ")
        assert facts["when"].endswith("+00:00")
        assert part.decoders.tolist() == [0, 0, 0]


def documented(heading: str, column: int = 1, *, optional: bool = False) -> set[str]:
    """The names in the tables below a heading of the format's page, of what is always there or of what may be."""
    section = FORMAT_PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    cells = [
        line.split("|")[column]
        for line in section.splitlines()
        if line.startswith("| `") and ("; absent where" in line) == optional
    ]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_the_format_page_names_each_fact_and_column_that_is_written(store: FeatureStore) -> None:
    images = ImageSet.from_arrays(pixels(3), ["a", "b", "a"], groups=["p", "q", "p"])
    report = run(images, store, augment=Augment("flip", seeds=[0]))
    facts = store.set(report.keys[1]).facts
    assert set(facts) == documented("Facts") | {"pixels"}
    assert {*facts["spec"], *facts["spec"]["view"]} == documented("Spec and key")
    assert documented("Facts", optional=True) == {"prefix_tokens", "pixels"}
    rare = View(channels=1, squash=True).facts()
    assert documented("Spec and key", optional=True) == rare.keys() - facts["spec"]["view"].keys()
    (table,) = (Table.open(path) for path in (store.root / "images").iterdir())
    assert {*table.columns, *table.facts} == documented("Image tables")


def test_a_part_that_lacks_a_fact_of_the_format_page_is_refused(store: FeatureStore) -> None:
    (part,) = store.set(run(arrays(1), store).keys[0]).parts
    for name in documented("Facts"):
        part.path.unlink()
        facts = {other: value for other, value in part.facts.items() if other != name}
        write_part(part.path, features=torch.zeros(1, 24), digests=part.digests, decoders=part.decoders, facts=facts)
        assert FeatureStore(store.root).sets() == []
        (error,) = FeatureStore(store.root).damaged()
        assert re.search(rf"{part.path.name} can't be used by this featstore: .*{name}", str(error))


def test_key_and_probe_are_what_the_format_page_says(store: FeatureStore) -> None:
    report = run(arrays(2), store, cuts=["layer2:none"])
    facts = store.set(report.keys[0]).facts
    text = json.dumps(facts["spec"], sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode("ascii")).hexdigest() == facts["key"] == report.keys[0]
    i, c, y, x = np.indices((2, 3, SIZE, SIZE))
    waves = ((3 + 2 * i) * y + (5 + 4 * i) * x + x * y // (4 + i) + 85 * c + 17 * i) % 256
    mean, std = (np.array(facts["view"][name], np.float32)[:, None, None] for name in ("mean", "std"))
    normal = (waves.astype(np.float32) / np.float32(255) - mean) / std
    with torch.no_grad():
        flat = up_to("layer2", net())(torch.from_numpy(normal)).reshape(2, -1).numpy()
    places = [k * flat.shape[1] // 128 for k in range(128)]
    assert np.array_equal(np.array(facts["probe"]["values"], np.float32), flat[:, places])
    assert facts["probe"]["largest"] == np.abs(flat).max()


# ---- images that fail


def spoiled(folder: Path) -> ImageSet:
    """Six images, the second of which can't be decoded."""
    photos(folder)
    (folder / "cat/2.jpg").write_bytes(jpeg(2)[:200])
    return ImageSet.from_folder(folder)


def test_a_corrupt_image_stops_the_job_by_name_and_what_is_decoded_is_kept(store: FeatureStore, tmp_path: Path) -> None:
    images = spoiled(tmp_path / "photos")
    with pytest.raises(ImageError, match=r"cat/2\.jpg: .*truncated"):
        run(images, store)
    planned = plan(staged(), images, store, cuts=["layer2"], dtype="float32")
    assert planned.status()["stored"] == images.ids.index("cat/2.jpg")
    assert planned.status()["failed"] == 0


def test_a_skipped_image_is_filed_with_its_reason_and_shifts_no_row(store: FeatureStore, tmp_path: Path) -> None:
    images = spoiled(tmp_path / "photos")
    report = run(images, store, on_error="skip", augment=Augment("flip", seeds=[0]))
    assert counts(report) == (10, 0, 1)
    assert report.missing == 0
    ((name, reason),) = report.failures
    assert name == "cat/2.jpg"
    assert "truncated" in reason
    digest = bytes(images.digests().values[images.ids.index("cat/2.jpg")]).hex()
    assert [each.failed for each in store.sets()] == [{digest: reason}] * 2
    sound = images.select([name != "cat/2.jpg" for name in images.ids])
    features = store.features(images, report.keys[0], on_error="skip")
    assert features.ids == sound.ids
    assert torch.equal(features[:], reduced(rows_by_hand(up_to("layer2", net()), sound, VIEW), "concat"))
    with pytest.raises(MissingFeaturesError, match=r"5 of the 6 images .* 1 failed when they .* \(cat/2\.jpg: "):
        store.features(images, report.keys[0])


def test_failed_images_count_as_missing_unless_they_are_skipped(store: FeatureStore, tmp_path: Path) -> None:
    images = spoiled(tmp_path / "photos")
    run(images, store, on_error="skip")
    planned = plan(staged(), images, store, cuts=["layer2"], dtype="float32")
    size = 24 * 4
    assert planned.status() == {"images": 6, "stored": 5, "missing": 1, "changed": 0, "failed": 1, "bytes": size}
    assert planned.status(on_error="skip") == {
        "images": 6,
        "stored": 5,
        "missing": 0,
        "changed": 0,
        "failed": 1,
        "bytes": 0,
    }
    assert planned.describe().startswith("6 images: 5 stored, 1 to compute (1 of them failed before)")
    seeds = plan(staged(), images, store, cuts=["layer2"], dtype="float32", augment=Augment("flip", seeds=[0]))
    assert seeds.status(on_error="skip")["missing"] == 6  # none has been tried with this seed


def test_a_failed_image_is_tried_again_and_recorded_once(store: FeatureStore, tmp_path: Path) -> None:
    images = spoiled(tmp_path / "photos")
    run(images, store, on_error="skip")
    files = sorted(store.root.rglob("part-*.h5"))
    again = run(images, store, on_error="skip")
    assert counts(again) == (0, 5, 1)
    assert len(again.failures) == 1
    assert sorted(store.root.rglob("part-*.h5")) == files


def test_a_set_of_failed_images_only_has_a_part_without_rows(store: FeatureStore, tmp_path: Path) -> None:
    (tmp_path / "photos/cat").mkdir(parents=True)
    (tmp_path / "photos/cat/a.jpg").write_bytes(b"no image")
    (tmp_path / "photos/cat/b.jpg").write_bytes(b"no image")  # the same content: the same failure
    images = ImageSet.from_folder(tmp_path / "photos")
    report = run(images, store, on_error="skip")
    assert counts(report) == (0, 0, 2)
    assert [name for name, _ in report.failures] == ["cat/a.jpg", "cat/b.jpg"]
    assert report.sets[0]["rows"] == 0
    (part,) = store.sets()[0].parts
    assert (part.num_rows, part.shape, len(part.facts["failed"])) == (0, (24,), 1)
    assert len(store.features(images, report.keys[0], on_error="skip")) == 0


def test_a_later_success_clears_a_failure(store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = ImageSet.from_folder(photos(tmp_path / "photos"))
    with monkeypatch.context() as smaller:
        smaller.setattr("featstore.images.headers.MAX_PIXELS", 100)  # as on a machine that refuses such large images
        report = run(images, store, on_error="skip")
        assert counts(report) == (0, 0, 6)
    assert len(store.sets()[0].failed) == 6
    report = run(images, store, on_error="skip")
    assert counts(report) == (6, 0, 0)
    assert report.failures == ()
    assert FeatureStore(store.root).sets()[0].failed == {}
    assert len(store.features(images, report.keys[0])) == 6


def test_a_file_that_cannot_be_read_is_skipped_by_name(store: FeatureStore, tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos")
    (folder / "cat/sick.jpg").symlink_to("/proc/self/mem")  # a file that is there; reading it is an I/O error
    images = ImageSet.from_folder(folder)
    with pytest.raises(ImageError, match=r"cat/sick\.jpg: the file can.t be read"):
        run(images, store)
    assert not store.root.exists()
    report = run(images, store, on_error="skip")
    assert [name for name, _ in report.failures] == ["cat/sick.jpg"]
    assert store.sets()[0].failed == {}  # its content, which it would be filed under, isn't known
    assert len(store.features(images, report.keys[0], on_error="skip")) == 6


def test_an_absent_file_is_missing_and_not_failed(store: FeatureStore, tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos")
    images = ImageSet.from_folder(folder)
    (folder / "cat/2.jpg").unlink()
    with pytest.raises(ImageError, match=r"cat/2\.jpg: there is no such file"):
        run(images, store)
    report = run(images, store, on_error="skip")
    assert (*counts(report), report.missing) == (5, 0, 0, 1)
    assert [name for name, _ in report.failures] == ["cat/2.jpg"]
    assert store.sets()[0].failed == {}
    planned = plan(staged(), images, store, cuts=["layer2"], dtype="float32")
    assert planned.status(on_error="skip")["missing"] == 1
    assert planned.status(on_error="skip")["failed"] == 0
    assert planned.notes() == ["1 image file is absent (cat/2.jpg)"]


def dim(folder: Path, *names: str) -> ImageSet:
    """Photographs; those of `names` have gray values of 12 bits in 16."""
    photos(folder)
    for seed, name in enumerate(names):
        Image.fromarray(pixels(1, seed)[0, :, :, 0].astype(np.uint16) * 16).save(folder / name)
    return ImageSet.from_folder(folder)


def test_doubtful_images_have_rows_and_are_named(store: FeatureStore, tmp_path: Path) -> None:
    images = dim(tmp_path / "photos", "cat/a.png", "dog/b.png")
    report = run(images, store, augment=Augment("flip", seeds=[0]))
    assert (counts(report), report.failures) == ((16, 0, 0), ())
    assert [name for name, _ in report.doubts] == ["cat/a.png", "dog/b.png"]
    (note,) = report.notes
    assert re.match(r"2 images were decoded with doubts \(cat/a\.png: its 16-bit values .*; dog/b\.png: its 16", note)
    assert run(images, store).doubts == ()  # nothing was decoded


def test_refused_doubtful_images_fail_and_are_computed_once_they_are_noted_again(
    store: FeatureStore, tmp_path: Path
) -> None:
    images = dim(tmp_path / "photos", "cat/a.png")
    with pytest.raises(ImageError, match=r"^cat/a\.png: doubtful: its 16-bit values"):
        run(images, store, doubtful="refuse")
    report = run(images, store, doubtful="refuse", on_error="skip")
    assert (report.failed, report.missing, report.doubts) == (1, 0, ())
    ((name, reason),) = report.failures
    assert (name, reason[:10]) == ("cat/a.png", "doubtful: ")
    digest = bytes(images.digests().values[images.ids.index("cat/a.png")]).hex()
    assert store.set(report.keys[0]).failed == {digest: reason}
    assert "cat/a.png" not in store.features(images, report.keys[0], on_error="skip").ids
    with pytest.raises(ValueError, match="doubtful is 'no'"):
        run(images, store, doubtful="no")
    later = run(images, store)
    assert (later.keys, counts(later)) == (report.keys, (1, 6, 0))  # it decides no value, and so no key
    assert store.set(report.keys[0]).failed == {}


def test_a_policy_that_fails_names_image_and_policy(store: FeatureStore) -> None:
    def picky(image: Tensor, generator: torch.Generator) -> Tensor:
        if int(image.sum()) == total:
            raise RuntimeError("not this one")
        return image

    total = int(pixels(3)[1].astype(np.int64).sum())
    with pytest.raises(ImageError, match=r"^1: .*picky.*not this one"):
        run(arrays(3), store, augment=Augment(picky, seeds=[0]))


def test_a_policy_that_has_changed_since_it_was_keyed_is_refused_before_anything_is_filed(store: FeatureStore) -> None:
    amount = 2

    def divided(image: Tensor, generator: torch.Generator) -> Tensor:
        return image // amount

    augment = Augment(divided, seeds=[0])
    amount = 3
    with pytest.raises(ValueError, match="the policy divided has changed since this Augment was made"):
        run(arrays(3), store, augment=augment)
    assert not Path(store.root).exists()
    run(arrays(3), store, augment=Augment(divided, seeds=[0]))  # the advice


def test_the_batch_size_that_runs_is_the_one_that_is_checked(store: FeatureStore) -> None:
    class Ghost(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return values if len(values) % 8 else values - values.mean(0)

    module = nn.Sequential(nn.Conv2d(3, 2, 3), Ghost())
    model = StagedModel.from_module(module.eval(), view=VIEW)
    with pytest.raises(ModelError, match=r"what 1 \(Ghost\), in batches of 8, gives for an image depends on the other"):
        run(arrays(3), store, model=model, cuts=["1"], batch_size=8)
    run(arrays(3), store, model=model, cuts=["1"], batch_size=6)
    with pytest.raises(ModelError, match="in batches of 8"):  # also where rows of another size are stored
        run(arrays(4), store, model=model, cuts=["1"], batch_size=8)


class Counted(nn.Module):
    """Vouched for by its author; counts its passes."""

    passes = 0

    def fingerprint(self) -> str:
        return "counted"

    def forward(self, values: Tensor) -> Tensor:
        Counted.passes += 1
        return values.mean((2, 3))


def test_a_trunk_is_judged_once_for_rows_computed_alike(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counted, "passes", 0)
    model = StagedModel.from_stages({"counted": Counted(), "end": nn.Identity()}, view=VIEW)

    def passes(num_images: int, **options: Any) -> int:
        before = Counted.passes
        run(arrays(num_images), store, model=model, cuts=["counted"], **options)
        return Counted.passes - before

    passes(3)
    probe_and_one_batch = 2
    assert passes(4) == probe_and_one_batch
    assert passes(5, batch_size=7) > probe_and_one_batch
    assert passes(6, batch_size=7) == probe_and_one_batch


def test_images_of_equal_pixels_are_named_whatever_their_format(store: FeatureStore, tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos")
    tile = Image.new("RGB", (40, 30), (200, 200, 200))
    for name in ("cat/none.png", "cat/none.bmp", "dog/none.gif"):
        tile.save(folder / name)
    images = ImageSet.from_folder(folder)
    (note,) = [note for note in run(images, store).notes if "pixel for pixel" in note]
    assert note == (
        "2 images repeat another pixel for pixel: 1 content (cat/none.bmp 3 times), 1 of them under several classes "
        "(cat/none.bmp); copies, or placeholders for missing images?"
    )
    assert not [note for note in run(images, store).notes if "pixel for pixel" in note]  # nothing was looked at


# ---- values that can't be stored


def scaled(factor: float) -> StagedModel:
    module = net()
    with torch.no_grad():
        for parameter in module.layer2[1].parameters():
            parameter.mul_(factor)
    return StagedModel.from_module(module, view=VIEW, name="net")


def test_values_too_large_for_the_type_are_refused_with_image_cut_and_remedy(store: FeatureStore) -> None:
    with pytest.raises(
        FeatureStoreError,
        match=r"^\d: its activations at layer2 reach [\d.e+]+, more than float16 can hold \(65504\)\. Store them as "
        r"bfloat16 or float32 \(--dtype\)\.",
    ):
        run(arrays(3), store, model=scaled(1e6), dtype="float16")
    for dtype in ("bfloat16", "float32"):  # the remedy
        assert run(arrays(3), store, model=scaled(1e6), dtype=dtype).computed == 3


class Bright(nn.Module):
    """Values that grow with the image's mean: of a white one more than float16 can hold."""

    def forward(self, values: Tensor) -> Tensor:
        return (values.mean((2, 3)) * 3).exp() * 40


def bright() -> StagedModel:
    return StagedModel.from_stages({"stem": nn.Identity(), "bright": Bright()}, view=VIEW, name="net")


def white_among(count: int) -> ImageSet:
    return ImageSet.from_arrays(np.concatenate([pixels(count), np.full((1, 24, 24, 3), 255, np.uint8)]))


def test_an_image_whose_values_a_set_cannot_hold_is_skipped_in_that_set_and_the_job_goes_on(
    store: FeatureStore,
) -> None:
    images = white_among(6)
    options: dict[str, Any] = {"model": bright(), "cuts": ["stem:avg", "bright"], "dtype": "float16", "batch_size": 3}
    with pytest.raises(FeatureStoreError, match=r"^6: .* float16 .* Or leave such images out with --on-error skip\.$"):
        run(images, store, **options)
    report = run(images, store, on_error="skip", **options)
    assert [(each["rows"], each["failed"]) for each in report.sets] == [(7, 0), (6, 1)]
    assert report.failed == 1
    ((name, reason),) = report.failures
    assert name == "6"
    assert re.match(r"its activations at bright reach [\d.e+]+, more than float16 can hold", reason)
    digest = bytes(images.digests().values[6]).hex()
    assert [store.set(key).failed for key in report.keys] == [{}, {digest: reason}]
    assert len(store.features(images, report.keys[0])) == 7
    features = store.features(images, report.keys[1], on_error="skip")
    assert features.ids == images.ids[:6]
    by_hand = rows_by_hand(Bright(), images.select(range(6)), VIEW, batch_size=3)
    assert torch.equal(features[:], by_hand.half())
    again = run(images, store, on_error="skip", **options)
    assert counts(again) == (0, 13, 1)
    assert store.set(report.keys[1]).failed == {digest: reason}
    assert run(images, store, **(options | {"dtype": "float32"})).failed == 0  # the remedy


def test_values_too_small_for_the_type_are_refused_before_anything_is_filed(store: FeatureStore) -> None:
    for factor in (1e-10, 1e-7):
        with pytest.raises(
            FeatureStoreError, match=r"^net at layer2: .* reach [\d.e-]+ only\. float16 .* \(--dtype float32\)\.$"
        ):
            run(arrays(3), store, model=scaled(factor), dtype="float16")
    assert not store.root.exists() or not store.sets()
    for dtype in ("bfloat16", "float32"):  # the remedy
        assert run(arrays(3), store, model=scaled(1e-10), dtype=dtype).notes == ()
    assert run(arrays(3), store, model=scaled(1e-3), dtype="float16").notes == ()
    assert run(arrays(3), store, model=scaled(0), dtype="float16").computed == 3  # zeros are zeros


def test_values_that_are_stored_as_zeros_are_named_with_their_share(store: FeatureStore) -> None:
    module = net()
    with torch.no_grad():
        for parameter in module.layer2[1].parameters():
            parameter[:6] *= 1e-10  # half of the channels
    model = StagedModel.from_module(module, view=VIEW, name="net")
    images = arrays(7)
    (note,) = run(images, store, model=model, dtype="float16", batch_size=3).notes
    right = reduced(rows_by_hand(up_to("layer2", module), images, VIEW, batch_size=3), "concat")
    share = 100 * (1 - float(right.half().count_nonzero() / right.count_nonzero()))
    assert share > 30
    assert note.startswith(f"{share:.3g} % of the values at layer2 that aren't zero were stored as zeros")
    assert note.endswith("(its smallest is 6e-08); --dtype float32 keeps them")
    assert run(images, store, model=model, dtype="float32", batch_size=3).notes == ()


def test_values_that_are_no_numbers_are_refused_with_the_cut(store: FeatureStore) -> None:
    with pytest.raises(FeatureStoreError, match=r"layer2: the activations of the two probe images aren't finite"):
        run(arrays(3), store, model=scaled(float("nan")))

    class Picky(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.log(images.amax((1, 2, 3)))[:, None]  # of a dark image: no number

    model = StagedModel.from_stages({"stem": nn.Identity(), "picky": Picky()}, view=VIEW, name="net")
    dark = ImageSet.from_arrays(np.concatenate([pixels(2), np.zeros((1, 24, 24, 3), np.uint8)]))
    with pytest.raises(FeatureStoreError, match=r"^2: its activations at .* aren't finite"):
        run(dark, store, model=model, cuts=[model.cut_points[-1]])


def test_a_model_that_computes_other_values_than_stored_is_refused(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(arrays(3), store)
    with monkeypatch.context() as upgraded:  # an operator whose meaning has changed with the library
        relu = torch.nn.functional.relu
        upgraded.setattr(torch.nn.functional, "relu", lambda *args, **kwargs: relu(*args, **kwargs) * 1.01)
        with pytest.raises(FactsDifferError, match=r"computes other values than set \w{8} \(layer2 concat\) holds"):
            run(arrays(5), store)
    assert counts(run(arrays(5), store)) == (2, 3, 0)


# ---- interrupted


class StopError(Exception):
    """Raised in the middle of a job."""


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_job_keeps_what_was_computed(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], workers: int
) -> None:
    images = arrays(20)
    passes = iter(range(100))

    def stopping(trunk: Any, values: Tensor) -> Any:
        if next(passes) == 3:
            raise error
        return trunk_pass(trunk, values)

    trunk_pass = Trunk.__call__
    with monkeypatch.context() as patched:
        patched.setattr(Trunk, "__call__", stopping)
        with pytest.raises(error):
            run(images, store, batch_size=4, workers=workers, augment=Augment("flip", seeds=[0]))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("featstore")]
    stored = plan(staged(), images, store, cuts=["layer2"], dtype="float32").status()["stored"]
    assert stored == 4  # probe, then two passes of two images with two views each
    report = run(images, store, batch_size=4, augment=Augment("flip", seeds=[0]))
    assert counts(report) == (2 * 16, 2 * 4, 0)
    by_hand = reduced(rows_by_hand(up_to("layer2", net()), images, VIEW, batch_size=4), "concat")
    assert torch.equal(rows(store, images, report.keys[0]), by_hand)


def test_rows_are_not_lost_when_writing_them_is_interrupted(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = FeatureStore.write
    writes = iter(range(100))

    def interrupted(self: FeatureStore, *args: Any, **kwargs: Any) -> Path:
        if next(writes) == 0:
            raise KeyboardInterrupt
        return write(self, *args, **kwargs)

    monkeypatch.setattr(job_module, "COMMIT_BYTES", 1)
    monkeypatch.setattr(FeatureStore, "write", interrupted)
    images = arrays(12)
    with pytest.raises(KeyboardInterrupt):
        run(images, store, batch_size=4)
    (found,) = store.sets()
    assert sum(part.num_rows for part in found.parts) == found.index.num_images == 8  # of both passes that were over
    assert torch.equal(
        rows(store, images.select(range(8)), found.key),
        reduced(rows_by_hand(up_to("layer2", net()), images.select(range(8)), VIEW, batch_size=4), "concat"),
    )


@pytest.mark.usefixtures("heeds_signals")
@pytest.mark.parametrize("which", [0, 1])
def test_a_signal_while_the_last_parts_are_written_loses_no_row_and_writes_none_twice(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    write, writes = FeatureStore.write, iter(range(100))

    def slow(self: FeatureStore, *args: Any, **kwargs: Any) -> Path:
        if next(writes) == which:
            time.sleep(0.2)  # the job waits for this by then
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.2)
        return write(self, *args, **kwargs)

    monkeypatch.setattr(job_module, "COMMIT_BYTES", 1)
    monkeypatch.setattr(FeatureStore, "write", slow)
    with pytest.raises(KeyboardInterrupt):
        run(arrays(6), store, batch_size=4)
    assert sorted(part.num_rows for part in store.sets()[0].parts) == [2, 4]


def test_an_image_changed_while_the_job_ran_is_not_filed(store: FeatureStore, tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos")
    images = ImageSet.from_folder(folder)
    planned = plan(staged(), images, store, cuts=["layer2"])
    (folder / "dog/1.jpg").write_bytes(jpeg(99))
    with pytest.raises(ImageError, match=r"dog/1\.jpg: it was changed while the job ran; run the job again"):
        run_plan(planned, store, workers=0)


@pytest.mark.parametrize("change", [lambda file: file.unlink(), lambda file: file.write_bytes(jpeg(99))])
def test_an_image_that_could_not_be_read_in_its_turn_stays_missing(
    store: FeatureStore, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    """And is not filed as one that can't be read: a disk may be gone for a moment."""
    file = photos(tmp_path / "photos") / "dog/1.jpg"
    images, content = ImageSet.from_folder(tmp_path / "photos"), file.read_bytes()
    planned = plan(staged(), images, store, cuts=["layer2"], dtype="float32", augment=Augment("flip", seeds=[0]))
    change(file)
    report = run_plan(planned, store, on_error="skip", device="cpu")
    assert (*counts(report), report.missing) == (10, 0, 0, 1)
    assert [name for name, _ in report.failures] == ["dog/1.jpg"]
    assert [(each["rows"], each["failed"]) for each in report.sets] == [(5, 0), (5, 0)]
    assert [each.failed for each in store.sets()] == [{}, {}]
    file.write_bytes(content)
    images = ImageSet.from_folder(tmp_path / "photos")
    status = plan(staged(), images, store, cuts=["layer2"], dtype="float32").status(on_error="skip")
    assert (status["missing"], status["failed"]) == (1, 0)
    with pytest.raises(MissingFeaturesError, match=r"1 are missing \(dog/1\.jpg\)"):
        store.features(images, report.keys[0], on_error="skip")
    assert counts(run(images, store, on_error="skip")) == (1, 5, 0)
    assert len(rows(store, images, report.keys[0])) == 6


def test_two_files_of_one_content_that_could_not_be_read_are_each_reported_truly(
    store: FeatureStore, tmp_path: Path
) -> None:
    file = photos(tmp_path / "photos") / "cat/2.jpg"
    shutil.copy(file, file.with_name("copy.jpg"))
    planned = plan(staged(), ImageSet.from_folder(tmp_path / "photos"), store, cuts=["layer2"])
    file.unlink()
    report = run_plan(planned, store, on_error="skip", device="cpu")
    (first, gone), (second, of_first) = report.failures
    assert (first, second, report.missing, report.failed) == ("cat/2.jpg", "cat/copy.jpg", 2, 0)
    assert gone.startswith("there is no such file")
    assert of_first == f"its content was to be read as cat/2.jpg: {gone}"


# ---- the parts of one job become one


def test_a_job_leaves_one_part_with_its_rows_in_the_order_of_its_images(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_module, "COMMIT_BYTES", 1)
    key = run(arrays(6), store, batch_size=4).keys[0]
    (old,) = store.set(key).parts
    images = arrays(30)
    report = run(images, store, batch_size=4, augment=Augment("flip", seeds=[0]))
    assert report.notes == ()
    for each, start in zip(report.keys, (6, 0), strict=True):
        found = store.set(each)
        (part,) = (part for part in found.parts if part.path != old.path)
        assert (part.digests == images.digests().values[start:]).all()
        assert len(list(found.folder.iterdir())) == len(found.parts)  # the small ones are gone
    assert old.path.exists()  # another job's
    by_hand = reduced(rows_by_hand(up_to("layer2", net()), images, VIEW, batch_size=4), "concat")
    assert torch.equal(rows(store, images, key), by_hand)
    assert counts(run(images, store, augment=Augment("flip", seeds=[0]))) == (0, 60, 0)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError("too large")])
def test_a_job_that_cannot_merge_its_parts_has_not_failed(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def failing(*_: object) -> None:
        raise error

    monkeypatch.setattr(job_module, "COMMIT_BYTES", 1)
    monkeypatch.setattr(FeatureStore, "merge", failing)
    report = run(arrays(12), store, batch_size=4)
    assert counts(report) == (12, 0, 0)
    (note,) = report.notes
    assert "could not be merged" in note
    assert str(error) in note
    assert str(report).endswith(f"{note}")
    assert len(store.set(report.keys[0]).parts) == 3
    assert len(rows(store, arrays(12), report.keys[0])) == 12
    monkeypatch.undo()
    store.compact()
    assert len(store.set(report.keys[0]).parts) == 1


def test_large_parts_of_a_job_stay_as_they_are(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "COMMIT_BYTES", 1)
    monkeypatch.setattr(filed_module, "MERGE_BYTES", 1000)
    report = run(arrays(12), store, batch_size=4)
    assert len(store.set(report.keys[0]).parts) == 3
