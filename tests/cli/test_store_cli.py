from __future__ import annotations

import errno
import io
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support import two_sets
from support.programs import Run
from support.two_sets import NUM, damage, featstore, images_and_store, key_of, store

from featstore import FeatureSet, FeatureStore, ImageSet, backbone
from featstore.cli import exchange
from featstore.cli import store as store_commands
from featstore.cli.store import parse_duration
from featstore.files import disk
from featstore.files.part import Part


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return two_sets.copied(made, tmp_path / "here", monkeypatch)


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
    assert re.fullmatch(r"2 parts and \d image tables?, [\d,]+ bytes: all sound\n", ran.out)
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


# ---- All commands about stores

COMMANDS = [*store_commands.COMMANDS, *exchange.COMMANDS]


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
