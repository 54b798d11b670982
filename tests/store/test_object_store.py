"""A store in an object store: the same rows, and what a folder would do, from a real server, lost replies included."""

from __future__ import annotations

import os
import re
import secrets
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support.extracting import counts, run
from support.object_server import ENVIRONMENT, Proxy, put_called
from support.operations import watch
from support.processes import Processes
from support.programs import Run
from support.tiny import arrays, digests_of, staged

from featstore import DamagedFileError, FeatureRequest, FeatureSet, FeatureStore, FeatureStoreError, ImageSet, estimate
from featstore.files.index import RowIndex
from featstore.files.part import Part, write_part
from featstore.objects import ObjectPath, delete, facts_below, put, start_of
from training import train_head
from training.saved import store_of

KINDS = ["memory", "s3"]


@pytest.fixture(params=KINDS)
def root(request: pytest.FixtureRequest) -> str:
    """A prefix without objects, of this process and in a server."""
    if request.param == "memory":
        return f"memory://{secrets.token_hex(8)}/some/features"
    return f"{request.getfixturevalue('bucket')}/some/features"


@pytest.fixture
def memory() -> FeatureStore:
    return FeatureStore(f"memory://{secrets.token_hex(8)}/features")


def the_set(store: FeatureStore) -> FeatureSet:
    (found,) = FeatureStore(str(store.root)).sets()
    return found


def rows(store: FeatureStore, images: ImageSet, **options: Any) -> torch.Tensor:
    return FeatureStore(str(store.root)).features(images, the_set(store), **options)[:]


def alter(path: Path, *, byte: int | None = None, length: int | None = None) -> None:
    """Puts another object in the place of one: with a bit flipped, or cut short."""
    assert isinstance(path, ObjectPath)
    content = bytearray(start_of(path, 1 << 30)[0])
    if byte is not None:
        content[byte] ^= 1
    put(path, content[:length], replaces=True)


def test_a_store_of_objects_holds_what_one_in_a_folder_holds(root: str, store: FeatureStore) -> None:
    images = arrays()
    there = FeatureStore(root)
    assert counts(run(images, there)) == counts(run(images, store))
    own, like = the_set(there).describe(), the_set(store).describe()
    assert str(own.pop("folder")) == f"{root}/{Path(like.pop('folder')).relative_to(store.folder)}"
    assert {name for name in own if own[name] != like[name]} <= {"when"}
    for access in ("auto", "memory", "stream"):
        assert torch.equal(rows(there, images, access=access), rows(store, images))
    assert counts(run(images, FeatureStore(root))) == (0, len(images), 0)
    assert there.images().ids == images.ids
    assert str(there.verify()).endswith("all sound")
    assert there.damaged() == []


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_stream_of_objects_gives_each_row_once(memory: FeatureStore, shuffle: bool) -> None:
    images = arrays(50)
    run(images, memory)
    expected = rows(memory, images)
    features = memory.features(images, the_set(memory), access="stream")
    batches = list(features.batches(7, shuffle=shuffle))
    assert sorted(row for _, numbers in batches for row in numbers.tolist()) == list(range(50))
    assert all(torch.equal(values, expected[torch.from_numpy(numbers)]) for values, numbers in batches)
    assert features.access.endswith(f"read plainly from {memory.folder.parent} in windows of 0.268 GB")


def test_rows_of_many_blocks_and_parts_are_read_in_any_order(memory: FeatureStore) -> None:
    size, shape = 70, (64, 32, 32)  # 4 rows a block
    values = torch.arange(size).reshape(-1, 1, 1, 1).expand(size, *shape).contiguous().float()
    digests = digests_of(*range(size))
    for place, some in enumerate((slice(45), slice(45, size))):
        decoders = digests[some, 0].copy()
        path = memory.folder / f"part-{place}.h5"
        write_part(path, features=values[some], digests=digests[some], decoders=decoders, facts={})
    index = RowIndex([Part.open(memory.folder / f"part-{place}.h5") for place in range(2)])
    order = torch.randperm(2 * size, generator=torch.Generator().manual_seed(0)) % size
    part_of, row_in = index.find(digests[order.numpy()])
    for place, part in enumerate(index.parts):
        assert torch.equal(part.read_rows(row_in[part_of == place]), values[order[torch.from_numpy(part_of == place)]])
        assert part.verify() == []
        for extent, block in part.read_blocks(reversed(range(len(part.checksums)))):
            assert torch.equal(block[:, 0, 0, 0], torch.arange(extent.start, extent.stop) + 45.0 * place)


def test_rows_with_scales_are_those_of_files(memory: FeatureStore, store: FeatureStore) -> None:
    for each in (memory, store):
        run(arrays(), each, dtype="int8")
    for access in ("memory", "stream"):
        assert torch.equal(rows(memory, arrays(), access=access), rows(store, arrays()))


def test_an_estimate_leaves_a_store_as_it_was(root: str) -> None:
    store = FeatureStore(root)
    run(arrays(), store)
    place = store.folder
    assert isinstance(place, ObjectPath)
    before = facts_below(place)
    found = estimate(staged(), arrays(20, seed=1), store, workers=0, device="cpu", dtype="float32")
    assert (found.images, len(found.rates)) == (20, 4)
    assert facts_below(place) == before


def test_a_head_trained_from_objects_is_that_trained_from_files(
    memory: FeatureStore, store: FeatureStore, tmp_path: Path
) -> None:
    images = arrays(24).split(valid=0.25)
    heads: list[Any] = []
    for each in (store, memory):
        run(images, each)
        torch.manual_seed(0)
        learn = train_head(staged(), images, each, epochs=2, lr=1e-2, out=tmp_path / f"run{len(heads)}", quiet=True)
        heads.append(learn.predict(images.valid))
    assert heads[0] == heads[1]
    found = store_of(tmp_path / "run1")
    assert found is not None
    assert found.folder == memory.folder


def test_the_programs_work_on_a_store_of_objects(bucket: str, run: Run, here: Path) -> None:
    flags = ["--store", f"{bucket}/features"]
    model = ["--images", "photos", "--backbone", "tiny.py:make_model", "--size", "32"]
    assert run("featstore", "extract", *model, "--cut", "pool", *flags).code == 0
    (listed,) = run("featstore", "ls", *flags, "--json").json
    assert (listed["rows"], listed["parts"]) == (20, 1)
    for command in (["show", listed["key"]], ["verify"], ["compact"], ["gc"], ["diff", listed["key"], listed["key"]]):
        assert run("featstore", *command, *flags).code == 0
    status = run("featstore", "status", *model, "--cut", "pool", *flags)
    assert status.code == 0
    trained = run("featstore-train", "head", *model, *flags, "--epochs", "1", "--lr", "0.01", "--out", "run")
    assert trained.code == 0, trained.err
    assert run("featstore", "remove", listed["key"], "--yes", *flags).code == 0
    assert run("featstore", "ls", *flags, "--json").json == []
    missing = run("featstore", "ls", "--store", f"{bucket}/other")
    assert missing.err.startswith(f"There is no store {bucket}/other.")
    assert run("featstore", "ls", "--store", "http://host/a").code != 0


def test_nothing_that_lies_on_another_machine_is_mapped(memory: FeatureStore) -> None:
    run(arrays(), memory)
    with pytest.raises(ValueError, match=r"access is 'map', and memory://\w+/features has no files of this machine"):
        FeatureStore(str(memory.root), access="map")
    with pytest.raises(ValueError, match="Expected memory, stream or auto there"):
        memory.features(arrays(), the_set(memory), access="map")
    with pytest.raises(ValueError, match="can't be mapped"):
        _ = the_set(memory).parts[0].features


def test_replies_that_are_lost_cost_no_row_and_leave_nothing_twice(bucket: str, proxy: Proxy) -> None:
    images, store = arrays(), FeatureStore(bucket)
    proxy.losing |= {"PUT": 2, "GET": 2, "HEAD": 1}
    assert counts(run(images, store)) == (10, 0, 0)
    assert proxy.losing == {"PUT": 0, "GET": 0, "HEAD": 0}
    assert torch.equal(rows(store, images), rows(FeatureStore(bucket), images))
    assert len(the_set(store).parts) == 1
    run(arrays(5, seed=1), store)
    proxy.losing |= {"PUT": 1, "POST": 2}  # a merge, and deletions
    assert store.compact().replaced == 2
    assert store.gc(older_than=0).files == 2
    assert proxy.losing == {"PUT": 0, "GET": 0, "HEAD": 0, "POST": 0}
    assert len(the_set(store).parts) == 1
    assert str(store.verify()).endswith("all sound")


def test_damage_is_named_set_aside_and_made_good(memory: FeatureStore) -> None:
    images, store = arrays(), memory
    run(images, store)
    expected, (part,) = rows(store, images), the_set(store).parts
    alter(part.path, byte=part.features_offset)
    with pytest.raises(DamagedFileError, match=f"{part.path} is damaged: its rows 0 to 9 don't fit their checksum"):
        rows(store, images)
    (bad,) = store.verify(repair=True).damaged
    assert (bad.path, bad.is_damage) == (part.path, True)
    assert bad.set_aside is not None
    assert bad.set_aside.exists()
    assert not part.path.exists()
    assert counts(run(images, store)) == (10, 0, 0)
    assert torch.equal(rows(store, images), expected)
    assert store.gc().paths == ()
    assert store.gc(older_than=0).paths == (bad.set_aside,)
    assert not bad.set_aside.exists()


@pytest.mark.parametrize("behind_features", [0, 1], ids=["frame", "features"])
def test_an_object_that_is_too_short_is_named(root: str, behind_features: int) -> None:
    images, store = arrays(), FeatureStore(root)
    run(images, store)
    features, (part,) = store.features(images, the_set(store)), the_set(store).parts
    alter(part.path, length=part.features_offset + behind_features * 5)
    with pytest.raises(DamagedFileError, match=f"{part.path} is damaged: it is truncated, .* bytes are missing"):
        Part.open(part.path)
    with pytest.raises(DamagedFileError, match="is truncated"):
        features[:]


def test_a_reader_finds_its_rows_in_what_took_their_place(memory: FeatureStore) -> None:
    images, store = arrays(), memory
    run(images, store)
    run(arrays(4, seed=1), store)
    reader, expected = store.features(images, the_set(store)), rows(store, images)
    assert store.compact().replaced == 2
    assert store.gc(older_than=0).files == 2
    assert torch.equal(reader[:], expected)


def test_a_removal_takes_superseded_parts_first_and_can_be_run_again(
    memory: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(arrays(), memory)
    run(arrays(4, seed=1), memory)
    assert memory.compact().replaced == 2
    key, images = the_set(memory).key, arrays(4, seed=1)
    deleted: list[str] = []

    def stopping(name: str, operation: Any, *args: Any) -> Any:
        if name == "unlink":
            if len(deleted) == 2:
                raise KeyboardInterrupt
            deleted.append(args[0].name)
        return operation(*args)

    with monkeypatch.context() as patched:
        watch(patched, stopping)
        with pytest.raises(KeyboardInterrupt):
            memory.remove(key)
    (left,) = the_set(memory).parts
    assert sorted(deleted) > [left.path.name] * 2
    assert len(rows(memory, images)) == 4
    assert str(memory.remove(key)).startswith(f"set {key[:8]} removed: 14 rows in 1 parts")
    assert memory.sets() == []


def test_what_else_lies_in_a_sets_folder_is_not_removed(memory: FeatureStore) -> None:
    run(arrays(), memory)
    found = the_set(memory)
    other = found.folder / "notes.txt"
    assert isinstance(other, ObjectPath)
    put(other, b"mine")
    with pytest.raises(FeatureStoreError, match=r"holds 'notes.txt', which is no part of set"):
        memory.remove(found.key)
    delete(other)
    memory.remove(found.key)


def test_objects_that_stand_for_folders_stop_no_removal(object_server: int, bucket: str) -> None:
    store = FeatureStore(f"{bucket}/features")
    run(arrays(), store)
    found = the_set(store)
    for folder in (store.folder, found.folder.parent, found.folder):
        put_called(object_server, f"{folder}/", b"")
    assert len(rows(store, arrays())) == 10
    assert store.remove(found.key).rows == 10
    assert FeatureStore(str(store.root)).sets() == []


def test_what_a_killed_estimate_left_is_deleted_once_it_is_old(memory: FeatureStore) -> None:
    run(arrays(), memory)
    left = memory.folder / ".estimate-0123456789abcdef" / "net@pool-0123456789ab" / "part-1.h5"
    mine = memory.folder / ".estimate-costs" / "part-1.h5"
    for path in (left, mine):
        assert isinstance(path, ObjectPath)
        put(path, b"123")
    assert memory.gc().paths == ()
    assert memory.gc(older_than=0, dry_run=True).paths == memory.gc(older_than=0).paths == (left,)
    assert (left.exists(), mine.exists(), len(the_set(memory).parts)) == (False, True, 1)


def test_features_of_objects_are_read_in_another_process(bucket: str, proxy: Proxy, processes: Processes) -> None:
    images, store = arrays(), FeatureStore(bucket)
    run(images, store)
    features = store.features(images, the_set(store))
    there = processes.call(all_rows, features, environment=environment(proxy))
    assert torch.equal(there, rows(store, images))


def all_rows(features: Any) -> torch.Tensor:
    values: torch.Tensor = features[:].clone()
    return values


def environment(proxy: Proxy) -> dict[str, str]:
    return {**ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}


EXTRACTION = """
    import sys
    from support.extracting import run
    from support.tiny import arrays
    from featstore import FeatureStore
    from featstore.extraction import job
    job.COMMIT_BYTES = 1
    run(arrays(32), FeatureStore(sys.argv[1]), batch_size=4)
"""


def test_an_extraction_that_is_killed_goes_on_where_it_was(bucket: str, proxy: Proxy, processes: Processes) -> None:
    store, images = FeatureStore(bucket), arrays(32)
    there = 0
    for _ in range(2):
        running = processes.start(EXTRACTION, bucket, environment=environment(proxy))
        proxy.requests.clear()
        proxy.losing["PUT"] = 1

        def kill(method: str, path: str, pid: int = running.pid) -> None:
            if sum("/part-" in each for put, each in proxy.requests if put == "PUT") == 3:  # one of them twice
                os.kill(pid, signal.SIGKILL)

        proxy.after = kill
        assert processes.end(running).returncode == -signal.SIGKILL
        proxy.after = None
        before, there = there, sum(part.num_rows for part in the_set(store).parts)
        assert before < there < 32
    assert counts(run(images, store, batch_size=4)) == (32 - there, there, 0)
    whole = FeatureStore(f"memory://{secrets.token_hex(8)}")
    run(images, whole, batch_size=4)
    assert torch.equal(rows(store, images), rows(whole, images))
    assert str(store.verify()).endswith("all sound")


def test_few_requests_are_made(bucket: str, proxy: Proxy) -> None:
    images, store = arrays(), FeatureStore(bucket)
    run(images, store)
    (part,) = the_set(store).parts
    proxy.requests.clear()
    Part.open(part.path)
    assert proxy.requests == [("GET", f"/{re.sub('@', '%40', str(part.path).removeprefix('s3://'))}")]
    features = store.features(images, the_set(store))
    proxy.requests.clear()
    assert len(features[:]) == 10
    assert proxy.count("GET") == len(proxy.requests) == 1
    features = store.features(images, the_set(store), access="stream")
    for _ in range(2):  # the rows come with the block that is checked; then alone
        proxy.requests.clear()
        assert len(features[[3, 1]]) == 2
        assert len(proxy.requests) == 1


def test_a_store_is_listed_twice_however_many_sets_and_parts_it_has(bucket: str, proxy: Proxy) -> None:
    store = FeatureStore(bucket)
    for seed in range(2):
        run(arrays(2, seed), store, cuts=["layer1", "layer2"])
    proxy.requests.clear()
    found = FeatureStore(bucket)
    described = [each.describe() for each in found.sets()]
    assert [each["parts"] for each in described] == [2, 2]
    key = described[0]["key"]
    is_listing = ["list-type" in path for _, path in proxy.requests]
    assert (sum(is_listing), len(is_listing)) == (2, 2 + 4)
    for look in (lambda: found.set(key), lambda: found.find(FeatureRequest.of(found.set(key).spec))):
        proxy.requests.clear()
        assert look()
        assert len(proxy.requests) <= 4
    proxy.requests.clear()
    assert found.damaged() == []
    assert len(proxy.requests) == 2 + 2  # and the image tables


def test_a_part_that_is_deleted_while_sets_are_looked_at_is_found_where_it_went(bucket: str, proxy: Proxy) -> None:
    store, other = FeatureStore(bucket), FeatureStore(bucket)
    run(arrays(), store)
    run(arrays(4, seed=1), store)
    merged: list[int] = []

    def merge(method: str, path: str) -> None:
        if proxy.count("GET") == 2 and not merged:  # it has been listed twice
            merged.append(other.compact().replaced)
            merged.append(other.gc(older_than=0).files)

    proxy.requests.clear()
    proxy.after = merge
    (found,) = store.sets()
    assert merged == [2, 2]
    assert (len(found.parts), found.index.num_images) == (1, 14)
