from __future__ import annotations

import errno
import io
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from support.programs import Ran, Run, photographs, runner

from featstore import FeatureSet, FeatureStore, ImageSet, backbone
from featstore.cli.store import COMMANDS, parse_duration
from featstore.files import disk
from featstore.files.part import Part
from training import Learner

MODEL = """
from collections import OrderedDict

import torch
from torch import nn


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 4)

    def fingerprint(self):
        return WORDS

    def forward(self, images):
        values = self.conv(images)
        return values if values.shape[0] > 0 else images


def make_model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return nn.Sequential(OrderedDict([("body", Body()), ("flat", nn.Flatten()), ("fc", nn.Linear(512, 5))]))
"""

NUM = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos/, own models, and the store feats/ with two sets of the photos."""
    root = tmp_path_factory.mktemp("made")
    photographs(root / "photos", NUM // 2)
    for name, words, seed in (("one", "1", 0), ("two", "2", 0), ("other", "3", 1)):
        source = f"WORDS, SEED = {words!r}, {seed}\n{MODEL}"
        (root / f"{name}.py").write_text(source, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        import featstore.cli.app

        for dtype in ("float16", "float32"):
            flags = ["--size", "32", "--cut", "body:avg", "--dtype", dtype]
            assert (
                featstore.cli.app.main(["extract", *images_and_store(), "--backbone", "one.py:make_model", *flags]) == 0
            )
    return root


def images_and_store() -> list[str]:
    return ["--images", "photos", "--store", "feats"]


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path / "here"


@pytest.fixture
def run(here: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(capsys)


def store() -> FeatureStore:
    return FeatureStore("feats")


def key_of(dtype: str = "float16") -> str:
    return next(each.key for each in store().sets() if each.spec.dtype == dtype)


def featstore(run: Run, *arguments: str) -> Ran:
    return run("featstore", *arguments, "--store", "feats")


def test_a_repaired_image_table_leaves_an_older_set_and_that_is_said(run: Run, here: Path) -> None:
    older = set(here.glob("feats/images/*.h5"))
    (here / "photos" / "extra").mkdir()
    shutil.copy(next(iter(here.glob("photos/*/*.jpg"))), here / "photos" / "extra" / "one.jpg")
    flags = ["--backbone", "one.py:make_model", "--size", "32", "--cut", "body:avg"]
    assert run("featstore", "extract", *images_and_store(), *flags).code == 0
    newest = set(here.glob("feats/images/*.h5")) - older
    for tables, said in ((newest, "is as an older table has it (12 images, "), (older, "is gone, until ")):
        for path in tables:
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
        shown = featstore(run, "show", key_of(), "--json").json
        assert (shown["superseded_rows"], shown["superseded"]) == (None, None)
        assert re.search(r"^superseded_rows +-$", featstore(run, "show", key_of()).out, re.MULTILINE)
        assert f"The image set photos {said}" in featstore(run, "verify", "--repair").err


def test_show_counts_and_names_rows_of_images_that_were_replaced_or_deleted(run: Run, here: Path) -> None:
    def superseded() -> tuple[int, list[str], str]:
        shown = featstore(run, "show", key_of(), "--json").json
        (line,) = re.findall(r"^superseded_rows +(.*)$", featstore(run, "show", key_of()).out, re.MULTILINE)
        return shown["superseded_rows"], shown["superseded"], line

    def extract() -> None:
        flags = ["--backbone", "one.py:make_model", "--size", "32", "--cut", "body:avg"]
        assert run("featstore", "extract", *images_and_store(), *flags).code == 0

    assert superseded() == (0, [], "0")
    first, second, *others, last = sorted(here.glob("photos/*/*"))
    ids = [path.relative_to(here / "photos").as_posix() for path in (first, second, *others)]
    shutil.copy(second, first)
    extract()
    assert superseded() == (1, ids[:1], f"1: {ids[0]}")
    for path in others[1:]:
        path.unlink()
    shutil.copy(last, first)
    extract()
    assert superseded() == (9, [ids[0], *ids[3:]], f"9: {', '.join([ids[0], *ids[3:]])}")
    for path in (second, others[0]):
        path.unlink()
    extract()
    latest = ids[1:11]  # what was replaced before is in an older table, which isn't asked any more
    assert superseded() == (11, latest, f"11: {', '.join(latest)}, 1 more")


def damage(dtype: str = "float16") -> Path:
    """Flips a bit in the features of a set's only part."""
    part = store().set(key_of(dtype)).parts[0]
    content = bytearray(part.path.read_bytes())
    content[part.features_offset] ^= 1
    part.path.write_bytes(content)
    return part.path


def split_in_two(dtype: str = "float16") -> None:
    """Files the rows of a set's part as two parts."""
    filed = store()
    found = filed.set(key_of(dtype))
    (part,) = found.parts
    for rows in (slice(0, 5), slice(5, NUM)):
        filed.write(
            found.spec,
            features=[part.features[rows].clone()],
            digests=part.digests[rows],
            decoders=part.decoders[rows],
            facts=part.facts,
        )
    part.path.unlink()


# ---- verify


def test_a_sound_store_is_verified(run: Run) -> None:
    ran = featstore(run, "verify")
    assert (ran.code, ran.err) == (0, "")
    assert re.fullmatch(r"2 parts and \d image tables, [\d,]+ bytes: all sound\n", ran.out)
    assert featstore(run, "verify", "--json").json["damaged"] == []


def test_damage_is_named_with_a_remedy_that_works(run: Run) -> None:
    part = damage()
    ran = featstore(run, "verify")
    assert ran.code == 1
    assert "1 can't be used" in ran.out
    assert f"{part} is damaged" in ran.err
    program, *remedy = shlex.split(ran.last_words.partition(": ")[2])
    repaired = run(program, *remedy)
    assert repaired.code == 0
    assert "1 set aside" in repaired.out
    assert repaired.last_words.startswith("What was set aside is missing now: run featstore extract again")
    assert featstore(run, "verify").code == 0
    flags = ["--backbone", "one.py:make_model", "--size", "32", "--cut", "body:avg"]
    assert run("featstore", "status", *images_and_store(), *flags).code == 3
    assert run("featstore", "extract", *images_and_store(), *flags).code == 0
    assert run("featstore", "status", *images_and_store(), *flags).code == 0


def test_verify_as_json_says_where_damage_was_set_aside(run: Run) -> None:
    part = damage()
    (before,) = featstore(run, "verify", "--json").json["damaged"]
    assert (Path(before["path"]).name, before["set_aside"]) == (part.name, None)
    (after,) = featstore(run, "verify", "--repair", "--json").json["damaged"]
    assert Path(after["set_aside"]).exists()


def test_what_repair_leaves_is_still_a_failure(run: Run, here: Path) -> None:
    (part,) = store().set(key_of()).parts
    other = store().set(key_of("float32")).folder
    shutil.move(part.path, other / "part-ffffffffffffffff.h5")
    ran = featstore(run, "verify", "--repair")
    assert ran.code == 1
    assert "belongs to set" in ran.err


def test_what_repair_would_not_set_aside_is_not_to_be_repaired(run: Run, here: Path) -> None:
    (here / "feats/images/labels.h5").write_bytes(b"mine, and none of featstore's")
    ran = featstore(run, "verify", "--json")
    (bad,) = ran.json["damaged"]
    assert (ran.code, bad["is_damage"], bad["set_aside"]) == (1, False, None)
    assert "--repair" not in ran.err


# ---- diff


def test_diff_lists_facts_images_and_values(run: Run) -> None:
    narrow, wide = key_of("float16"), key_of("float32")
    ran = featstore(run, "diff", narrow[:8], wide[:8])
    assert ran.code == 0
    assert ran.out == f"{store().diff(narrow, wide)}\n"
    assert ran.out.splitlines()[0] == f"storage type: float16 in {narrow[:8]}, float32 in {wide[:8]}"
    found = featstore(run, "diff", narrow, wide, "--json").json
    assert (found["num_both"], found["values"]["rows"], found["values"]["is_equal"]) == (NUM, NUM, False)
    assert found["facts"] == [["storage type", "float16", "float32"]]


def test_diff_of_a_set_with_itself_finds_nothing(run: Run) -> None:
    key = key_of()
    ran = featstore(run, "diff", key[:8], key[:8])
    assert ran.out.splitlines()[1:] == [f"values of {NUM} images: equal bit for bit"]


def test_an_unknown_key_is_an_error_whose_remedy_works(run: Run) -> None:
    ran = featstore(run, "diff", "0000", key_of())
    assert ran.code == 1
    program, *remedy = shlex.split(ran.last_words.partition("List what it holds: ")[2].rstrip("."))
    assert run(program, *remedy).code == 0


# ---- compact and gc


def test_compact_merges_and_gc_deletes_what_was_replaced(run: Run) -> None:
    split_in_two()
    key = key_of()
    before = store().features(ImageSet.from_folder("photos"), key)[:]
    ran = featstore(run, "compact", key[:8], "--json")
    (merge,) = ran.json["merges"]
    assert (ran.code, merge["key"], len(merge["replaced"])) == (0, key, 2)
    assert featstore(run, "compact").out == "0 parts merged into 0, 0 bytes written\n"
    dry = featstore(run, "gc", "--older-than", "0s", "--dry-run")
    assert dry.out.startswith("would delete 2 files")
    assert sorted(Path(line.strip()).name for line in dry.out.splitlines()[1:]) == sorted(merge["replaced"])
    assert featstore(run, "gc").out.startswith("deleted 0 files")  # they are younger than a day
    collected = featstore(run, "gc", "--older-than", "0s", "--json").json
    assert (collected["files"], len(collected["paths"]), collected["dry_run"]) == (2, 2, False)
    assert torch.equal(store().features(ImageSet.from_folder("photos"), key)[:], before)


def test_compact_says_what_it_merged_and_what_it_left_alone(run: Run) -> None:
    split_in_two()
    key = key_of()
    part = store().set(key).parts[0]
    content = bytearray(part.path.read_bytes())
    content[part.features_offset] ^= 1
    part.path.write_bytes(content)
    ran = featstore(run, "compact")
    assert ran.code == 1
    assert "1 sets left alone" in ran.out
    assert part.path.name in ran.err


@pytest.mark.parametrize(
    ("text", "seconds"), [("30m", 1800), ("24h", 86400), ("7d", 604800), ("0s", 0), ("1.5h", 5400)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["24", "h", "-1h", "1w", "", "٣h"])
def test_what_is_no_duration_is_refused(run: Run, text: str) -> None:
    ran = featstore(run, "gc", f"--older-than={text}")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f"--older-than is {text!r}. Expected a number and its unit: s, m, h or d, such as ")


# ---- remove


def test_remove_asks_for_yes_where_there_is_no_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    key = key_of()
    ran = featstore(run, "remove", key[:8])
    assert (ran.code, ran.out) == (2, "")
    assert "there is no terminal to ask at. Expected --yes" in ran.err
    assert len(store().sets()) == 2
    ran = featstore(run, "remove", key[:8], "--yes")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"set {key[:8]} removed: {NUM} rows in 1 parts")
    assert [each.spec.dtype for each in store().sets()] == ["float32"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answer", "is_removed"), [("y\n", True), ("YES\n", True), ("n\n", False), ("", False)])
def test_remove_asks_on_a_terminal(run: Run, monkeypatch: pytest.MonkeyPatch, answer: str, is_removed: bool) -> None:
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    key = key_of()
    ran = featstore(run, "remove", key[:6], key)
    assert "Remove this feature set from feats, for good? [y/N]" in ran.err
    assert key[:8] in ran.err
    assert ran.code == (0 if is_removed else 1)
    assert ("Nothing was removed." in ran.err) is not is_removed
    assert len(store().sets()) == (1 if is_removed else 2)


def test_remove_removes_nothing_if_a_key_is_unknown(run: Run) -> None:
    assert featstore(run, "remove", key_of(), "0000", "--yes").code == 1
    assert len(store().sets()) == 2


def test_remove_removes_nothing_if_one_of_the_sets_can_not_be(run: Run) -> None:
    second = store().set(key_of("float32"))
    (second.folder / "notes.txt").touch()
    ran = featstore(run, "remove", key_of(), second.key, "--yes")
    assert (ran.code, ran.out) == (1, "")
    assert "holds 'notes.txt'" in ran.err
    assert len(store().sets()) == 2


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_remove_tells_of_a_set_that_is_gone_though_the_disk_refuses_the_next_one(
    run: Run, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    first, second = (store().set(key_of(dtype)) for dtype in ("float16", "float32"))
    real = disk.move_aside

    def refusing(folder: Path) -> Path:
        if folder == second.folder:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return real(folder)

    monkeypatch.setattr(disk, "move_aside", refusing)
    ran = featstore(run, "remove", first.key, second.key, "--yes", *flags)
    assert ran.code == 1
    assert "Permission denied" in ran.err
    assert [each["key"] for each in ran.json] == [first.key] if flags else ran.out.startswith(f"set {first.key[:8]} ")
    assert [each.key for each in store().sets()] == [second.key]


@pytest.mark.parametrize("given", [64, 5])
@pytest.mark.parametrize("is_asked", [False, True])
def test_a_damaged_set_can_be_removed(run: Run, monkeypatch: pytest.MonkeyPatch, given: int, is_asked: bool) -> None:
    key = key_of()
    path = store().set(key).parts[0].path
    path.write_bytes(path.read_bytes()[:-10])
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    ran = featstore(run, "remove", key[:given], "--json", *["--yes"] * (not is_asked))
    assert (ran.code, [(each["key"], each["parts"]) for each in ran.json]) == (0, [(key[:8], 1)])
    assert ("is truncated" in ran.err) is is_asked
    assert featstore(run, "ls").code == 0
    assert len(store().sets()) == 1


# ---- show


def test_show_goes_on_where_a_job_merges_a_file_and_deletes_it_meanwhile(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (part,) = store().set(key_of()).parts
    real = FeatureStore.superseded

    def merging(self: FeatureStore, chosen: FeatureSet, **options: Any) -> dict[str, str | None]:
        part.path.unlink()
        return real(self, chosen, **options)

    monkeypatch.setattr(FeatureStore, "superseded", merging)
    (shown,) = featstore(run, "show", key_of(), "--json").json["files"]
    assert (shown["rows"], shown["bytes"]) == (NUM, None)


# ---- adopt


def test_adopt_files_the_set_for_the_same_model_in_another_spelling(run: Run) -> None:
    flags = ["--images", "photos", "--backbone", "two.py:make_model", "--size", "32"]
    key = key_of()
    ran = featstore(run, "adopt", key[:8], *flags, "--json")
    assert (ran.code, ran.err) == (0, "")
    report = ran.json
    assert (report["key_from"], report["rows"], report["compared"]) == (key, NUM, NUM)
    extract = ["extract", *images_and_store(), "--backbone", "two.py:make_model", "--size", "32", "--cut", "body:avg"]
    assert [each["computed"] for each in run("featstore", *extract, "--json").json["sets"]] == [0]
    shown = featstore(run, "show", report["key_to"])
    assert re.search(rf"^adopted\.key +{key}$", shown.out, re.MULTILINE)
    again = featstore(run, "adopt", key[:8], *flags, "--rows", "5", "--workers", "0", "--batch-size", "4")
    assert again.out.startswith(f"0 rows of set {key[:8]} filed under {report['key_to'][:8]}; 5 computed again")


def test_adopt_refuses_another_model_and_other_facts(run: Run) -> None:
    key = key_of()
    other = featstore(run, "adopt", key, "--images", "photos", "--backbone", "other.py:make_model", "--size", "32")
    assert other.code == 1
    assert "computes other values" in other.err
    resized = ["--size", "32", "--resize", "40"]
    larger = featstore(run, "adopt", key, "--images", "photos", "--backbone", "two.py:make_model", *resized)
    assert larger.code == 1
    assert "differ in resize (stored 37, yours 40)" in larger.err
    assert len(store().sets()) == 2


# ---- export and import


@pytest.mark.parametrize("suffix", [".npy", ".h5", ".safetensors"])
def test_what_export_writes_import_files_bit_for_bit(run: Run, suffix: str) -> None:
    key = key_of()
    ran = featstore(run, "export", key[:8], "--out", f"out{suffix}")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"{NUM} rows of set {key[:8]} (8 float16) in out{suffix}")
    ids = ["--ids", "out.csv"] if suffix == ".npy" else []
    back = run("featstore", "import", f"out{suffix}", "--store", "back", "--name", "mine", *ids, "--json")
    assert back.code == 0
    images = ImageSet.from_folder("photos")
    found = FeatureStore("back").features(images, back.json["key"])
    assert torch.equal(found[:], store().features(images, key)[:])
    stored, described = ImageSet.from_store(store()), ImageSet.from_store(FeatureStore("back"))
    assert described.ids == stored.ids
    assert described.splits.tolist() == stored.splits.tolist()
    np.testing.assert_array_equal(described.targets, stored.targets)


def test_export_as_json_and_of_a_named_image_set(run: Run) -> None:
    report = featstore(run, "export", key_of(), "--out", "out.npy", "--images-name", "photos", "--json").json
    assert (report["files"], report["rows"], report["shape"]) == (["out.npy", "out.csv"], NUM, [NUM, 8])
    missing = featstore(run, "export", key_of(), "--out", "more.npy", "--images-name", "birds")
    assert missing.code == 1
    assert "holds no image set called birds" in missing.err
    assert featstore(run, "export", key_of(), "--out", "out.npy").err == (
        "out.npy: it exists and isn't replaced; choose another name.\n"
    )
    assert featstore(run, "export", key_of(), "--out", "out.txt").code == 2
    assert featstore(run, "export", key_of(), "--out", "a.npy", "--on-error", "ignore").code == 2


def test_import_joins_rows_to_images_by_id(run: Run) -> None:
    images = ImageSet.from_folder("photos")
    order = np.random.default_rng(0).permutation(NUM)
    values = np.arange(NUM * 3, dtype=np.float32).reshape(NUM, 3)
    np.save("clip.npy", values[order])
    lines = "".join(f"{images.ids[place]}\n" for place in order)
    Path("ids.txt").write_text(lines, encoding="utf-8")
    flags = ["--name", "clip", "--images", "photos", "--ids", "ids.txt"]
    ran = featstore(run, "import", "clip.npy", *flags, "--json")
    assert ran.code == 0
    np.testing.assert_array_equal(store().features(images, ran.json["key"]).numpy(), values)
    again = featstore(run, "import", "clip.npy", *flags)
    assert again.out.startswith(f"0 rows written, {NUM} reused (3 float32): set {ran.json['key'][:8]}")


def test_import_by_ids_alone_takes_labels_and_splits_from_the_table(run: Run) -> None:
    values = np.array([[20.0 * (place % 2) - 10, 1.0] for place in range(20)], np.float16)
    np.save("clip.npy", values)
    rows = [f"{place},{'ab'[place % 2]},{'valid' if place > 15 else 'train'}" for place in range(20)]
    Path("table.csv").write_text("\n".join(["id,label,split", *rows]), encoding="utf-8")
    ran = run("featstore", "import", "clip.npy", "--store", "new", "--name", "clip", "--ids", "table.csv")
    assert ran.code == 0
    key = re.search(r"set ([0-9a-f]{8}), image set clip-\1$", ran.out, re.MULTILINE)
    assert key is not None
    filed = FeatureStore("new")
    images = ImageSet.from_store(filed)
    assert (images.name, images.classes) == (f"clip-{key[1]}", ("a", "b"))
    assert (len(images.train), len(images.valid)) == (16, 4)
    learn = Learner(filed.model(key[1]), images, filed, head="linear", device="cpu")
    learn.fit(5, lr=0.5)
    assert learn.evaluate()["accuracy"] == 1.0
    # What the last line says works as it stands.
    assert ran.last_words.startswith("A head on it: Learner(")
    expression = ran.last_words.partition(": ")[2]
    names = {"Learner": Learner, "ImageSet": ImageSet, "store": filed}
    assert isinstance(eval(expression, names), Learner)


def test_import_by_ids_alone_deals_a_table_without_splits_and_says_so(run: Run) -> None:
    np.save("clip.npy", np.ones((10, 2), np.float32))
    Path("table.tsv").write_text("file\tkind\n" + "".join(f"./{n}\tx\n" for n in range(10)), encoding="utf-8")
    columns = ["--path-column", "file", "--label-column", "kind"]
    flags = ["--store", "new", "--name", "clip", "--ids", "table.tsv", *columns]
    ran = run("featstore", "import", "clip.npy", *flags)
    assert ran.code == 0
    assert ran.err.startswith("no split column: 2 of 10 images held out")
    images = ImageSet.from_store(FeatureStore("new"))
    assert (images.ids[0], images.classes, len(images.valid)) == ("./0", ("x",), 2)


def test_a_table_that_was_sorted_still_fits_its_rows(run: Run) -> None:
    key = key_of()
    featstore(run, "export", key, "--out", "out.npy")
    header, *lines = Path("out.csv").read_text(encoding="utf-8").splitlines()
    Path("out.csv").write_text("\n".join([header, *lines[::-1]]), encoding="utf-8")
    back = run("featstore", "import", "out.npy", "--store", "back", "--name", "mine", "--ids", "out.csv", "--json")
    images = ImageSet.from_folder("photos")
    found = FeatureStore("back").features(images, back.json["key"])
    assert torch.equal(found[:], store().features(images, key)[:])
    described = ImageSet.from_store(FeatureStore("back"))
    labels = {image: described.classes[target] for image, target in zip(described.ids, described.targets, strict=True)}  # type: ignore[arg-type]
    assert labels == {image: image.partition("/")[0] for image in images.ids}


def test_import_of_hdf5_takes_named_datasets(run: Run) -> None:
    with h5py.File("clip.h5", "w") as file:
        file["embedding"], file["name"] = np.ones((2, 3)), ["cat/000.jpg", "no/such.jpg"]
    flags = ["--name", "clip", "--images", "photos", "--dataset", "embedding", "--id-dataset", "name"]
    ran = featstore(run, "import", "clip.h5", *flags, "--json")
    assert (ran.code, ran.json["rows"]) == (0, 1)
    assert ran.json["notes"] == [
        "1 id is no image of photos, and not imported (no/such.jpg)",
        f"{NUM - 1} images of photos have no row (cat/001.jpg, cat/002.jpg, cat/003.jpg, ...)",
        "float64 became float32",
    ]
    assert "1 id is no image of photos" in ran.err


def test_import_says_what_it_needs(run: Run) -> None:
    np.save("clip.npy", np.ones((2, 2), np.float32))
    named = ["--name", "clip"]
    ran = featstore(run, "import", "clip.npy", *named)
    assert (ran.code, "--ids ids.txt" in ran.err) == (2, True)
    ran = featstore(run, "import", "clip.npy", *named, "--valid", "0.5")
    assert ran.code == 2
    assert "--valid 0.5 is about images, and neither --images nor a table of ids is given" in ran.err
    assert featstore(run, "import", "clip.npy").code == 2
    assert featstore(run, "import", "clip.npy", *named, "--layout", "CHW").code == 2


def test_a_remedy_of_import_works(run: Run) -> None:
    featstore(run, "export", key_of(), "--out", "out.npy")
    ran = run("featstore", "import", "out.npy", "--store", "back", "--name", "mine")
    remedy = re.search(r"Give (--ids \S+), which is there", ran.err)
    assert remedy is not None
    assert run("featstore", "import", "out.npy", "--store", "back", "--name", "mine", *remedy[1].split()).code == 0


def test_the_remedy_for_a_damaged_part_works(run: Run) -> None:
    path = damage()
    ran = featstore(run, "export", key_of(), "--out", "out.npy")
    assert ran.code == 1
    assert path.name in ran.err
    assert "set it aside (featstore verify --repair) and extract or import again" in ran.err
    assert featstore(run, "verify", "--repair").code == 0
    flags = ["--backbone", "one.py:make_model", "--size", "32", "--cut", "body:avg"]
    assert run("featstore", "extract", *images_and_store(), *flags).code == 0
    assert featstore(run, "export", key_of(), "--out", "out.npy").code == 0


# ---- All of them


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "import"])
def test_a_store_that_is_not_there_is_one_sentence(run: Run, command: str) -> None:
    more = {
        "show": ["7c41"],
        "diff": ["7c41", "08d2"],
        "remove": ["7c41", "--yes"],
        "adopt": ["7c41", "--images", "photos", "--backbone", "one.py:make_model"],
        "export": ["7c41", "--out", "out.npy"],
    }
    ran = run("featstore", command, *more.get(command, []), "--store", "absent")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("There is no store absent.")
    assert not Path("absent").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_json_and_help(run: Run, command: str) -> None:
    ran = run("featstore", command, "--help")
    assert ran.code == 0
    assert "--json" in ran.out
    assert "--store" in ran.out
    assert command in run("featstore", "--help").out


def test_the_fixture_is_what_the_library_makes(here: Path) -> None:
    part = store().set(key_of()).parts[0]
    assert isinstance(part, Part)
    assert part.facts["stages"][0]["digest"] == backbone("one.py:make_model").digest("body")
