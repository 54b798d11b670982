from __future__ import annotations

import os
import pickle
import re
import secrets
import sys
from pathlib import Path, PurePosixPath

import pytest
from support.object_server import Proxy, put_called

from featstore import FeatureStoreError, ImageSet, objects
from featstore.objects import ObjectPath, copy, delete, facts_below, names_in, place_of, put, ranges_of, start_of


def objects_below(text: str) -> ObjectPath:
    place = place_of(text)
    assert isinstance(place, ObjectPath)
    return place


def start(path: ObjectPath, num_bytes: int) -> tuple[bytes, int]:
    content, size = start_of(path, num_bytes)
    return bytes(content), size


def ranges(path: ObjectPath, extents: list[range]) -> list[bytes]:
    return [bytes(each) for each in ranges_of(path, extents)]


@pytest.fixture(params=["memory", "s3"])
def root(request: pytest.FixtureRequest) -> ObjectPath:
    """A prefix without objects, of this process and in a server."""
    if request.param == "memory":
        return objects_below(f"memory://{secrets.token_hex(8)}/some/prefix")
    return objects_below(f"{request.getfixturevalue('bucket')}/some/prefix")


@pytest.mark.parametrize(
    ("text", "bucket", "key"),
    [
        ("s3://bucket/a/b", "s3://bucket", "a/b"),
        ("s3://bucket//a/", "s3://bucket", "a"),
        ("gs://bucket", "gs://bucket", ""),
        ("az://container/a", "az://container", "a"),
        ("memory://x/y", "memory://x", "y"),
        ("S3://bucket/A", "s3://bucket", "A"),
    ],
)
def test_an_address_names_a_bucket_and_a_key(text: str, bucket: str, key: str) -> None:
    assert place_of(text) == ObjectPath(bucket, key)


def test_what_has_no_scheme_is_a_path_and_so_is_an_address_of_a_file(tmp_path: Path) -> None:
    assert place_of("some/folder") == Path("some/folder")
    assert place_of(tmp_path) == tmp_path
    assert place_of("file:///some/a%20folder") == place_of("FILE:///some/a%20folder") == Path("/some/a folder")


@pytest.mark.parametrize("text", ["http://host/a", "s3://", "s3:///a", "s3://bucket/../a", "file://host/a"])
def test_another_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no address of a place\. Expected one of s3://"):
        place_of(text)


@pytest.mark.parametrize("text", ["s3://bucket/a", "S3://bucket/a", "memory://", "file:///a"])
@pytest.mark.parametrize("kind", [Path, str])
def test_an_address_that_was_made_a_path_is_refused_where_a_folder_would_be_made(text: str, kind: type) -> None:
    with pytest.raises(ValueError, match=r"is an address that was made a path, .* without Path\(\)"):
        place_of(kind(Path(text)))
    with pytest.raises(ValueError, match="is an address that was made a path"):
        ImageSet.from_folder(kind(Path(text)))


@pytest.mark.parametrize("path", ["s3/bucket", "./s3:/bucket", "s3:a", "c:/a"])
def test_another_path_is_one(path: str) -> None:
    assert place_of(path) == Path(path)


@pytest.mark.parametrize("key", ["a", "a/b.h5", "a/.b.c.h5", "a/b/c"])
def test_the_parts_of_a_name_are_those_of_a_path(key: str) -> None:
    path, like = ObjectPath("s3://bucket", key), PurePosixPath("/", key)
    assert (path.name, path.stem) == (like.name, like.stem)
    assert f"/{path.parent.key}" == str(like.parent)
    assert f"/{path.with_name('x').key}" == str(like.with_name("x"))
    assert f"/{(path / 'x' / Path('y', 'z')).key}" == str(like / "x" / "y/z")
    assert {path: 1}[pickle.loads(pickle.dumps(path))] == 1
    assert not isinstance(path, os.PathLike)  # else it would be opened as a file of this machine


def test_what_was_put_is_listed_and_read_as_it_was(root: ObjectPath) -> None:
    content = secrets.token_bytes(5000)
    assert not root.is_dir()
    assert names_in(root) == []
    put(root / "a" / "b c.h5", content)
    put(root / "d", b"")
    assert root.is_dir()
    assert sorted(names_in(root)) == ["a", "d"]
    assert root.folders() == ["a"]
    assert names_in(root / "a") == ["b c.h5"]
    path = root / "a" / "b c.h5"
    assert path.stat().st_size == 5000
    assert start(path, 100) == (content[:100], 5000)
    assert start(path, 10_000) == (content, 5000)
    assert start(root / "d", 100) == (b"", 0)
    assert ranges(path, [range(7, 9), range(9, 4000), range(10)]) == [content[7:9], content[9:4000], content[:10]]


def test_a_range_past_the_end_is_cut_short(root: ObjectPath) -> None:
    put(root / "a", b"12345")
    assert ranges(root / "a", [range(3, 9)]) == [b"45"]
    assert ranges(root / "a", [range(7, 9)]) == [b""]


def test_an_object_that_is_not_there_is_missed_by_its_address(root: ObjectPath) -> None:
    path = root / "a"
    for ask in (path.stat, lambda: start_of(path, 1), lambda: ranges_of(path, [range(1)])):
        with pytest.raises(FileNotFoundError) as error:
            ask()
        assert error.value.filename == str(path)
    delete(path)  # which may have been tried before
    assert not path.exists()


def test_an_object_is_never_replaced_unless_that_is_asked_for(root: ObjectPath) -> None:
    path = root / "a"
    put(path, b"first")
    with pytest.raises(FileExistsError):
        put(path, b"other")
    assert start(path, 9) == (b"first", 5)
    put(path, b"other", replaces=True)
    assert start(path, 9) == (b"other", 5)


def test_a_copy_has_the_content_and_a_deletion_takes_one_name(root: ObjectPath) -> None:
    put(root / "a", b"12345")
    copy(root / "a", root / "b")
    delete(root / "a")
    assert start(root / "b", 9) == (b"12345", 5)
    assert names_in(root) == ["b"]


def test_a_put_whose_reply_is_lost_meets_its_own_object_and_is_done(bucket: str, proxy: Proxy) -> None:
    path, content = objects_below(bucket) / "a", secrets.token_bytes(5000)
    proxy.losing["PUT"] = 1
    put(path, content)
    assert proxy.losing["PUT"] == 0
    assert proxy.count("PUT") == 2
    assert start(path, 5000) == (content, 5000)


def test_a_put_whose_reply_is_lost_still_meets_another_object(bucket: str, proxy: Proxy) -> None:
    path = objects_below(bucket) / "a"
    put(path, b"first")
    proxy.losing["PUT"] = 1
    with pytest.raises(FileExistsError):
        put(path, b"other")
    assert start(path, 9) == (b"first", 5)


def test_an_absolute_path_is_below_no_address(root: ObjectPath) -> None:
    with pytest.raises(ValueError, match=f"'/a' is an absolute path. Expected a name below {root}"):
        root / "/a"


@pytest.mark.parametrize("name", ["a//b", "../b", "a\nb", "a\udc80"])
def test_of_a_name_that_no_object_may_have_there_is_none(root: ObjectPath, name: str) -> None:
    path = ObjectPath(root.bucket, f"{root.key}/{name}")
    assert not path.exists()
    with pytest.raises(FileNotFoundError, match="no object can be called so"):
        put(path, b"")


@pytest.mark.parametrize("name", ["a//b.jpg", "a/../b.jpg", "a/./b.jpg", "a\tb.jpg"])
def test_an_object_of_a_name_that_can_not_be_listed_is_named(object_server: int, bucket: str, name: str) -> None:
    root = objects_below(f"{bucket}/photos")
    put_called(object_server, f"{root}/{name}", b"")
    sentence = re.escape(
        f"{root} can't be listed, for an object there is called {f'photos/{name}'!r}. Expected no name"
    )
    for look in (root.is_dir, lambda: facts_below(root)):
        with pytest.raises(FeatureStoreError, match=f"^{sentence} .* Rename or delete it, with a tool"):
            look()


def test_objects_that_stand_for_folders_are_not_among_those_below(object_server: int, bucket: str) -> None:
    root = objects_below(f"{bucket}/photos")
    for name in ("", "a/", "a/b/", "a/b/c.jpg", "d", "e/"):
        put_called(object_server, f"{root}/{name}", b"")
    assert sorted(facts_below(root)) == ["a/b/c.jpg", "d", "e"]
    assert sorted(root.names()) == ["a", "d", "e"]
    assert (root / "a" / "b").names() == ["c.jpg"]
    with objects.seen_at_once(root):
        assert (root.names(), (root / "a").names(), (root / "a" / "b").names()) == (["a", "d", "e"], ["b"], ["c.jpg"])


def test_a_bucket_that_is_not_there_is_the_servers_word(bucket: str) -> None:
    with pytest.raises(OSError, match=f"the object store failed .*NoSuchBucket.*{bucket}-other/a"):
        (objects_below(f"{bucket}-other") / "a").is_dir()


def test_a_bucket_that_can_not_be_called_so_is_one_that_can_not_be_reached() -> None:
    with pytest.raises(FeatureStoreError, match="s3://a b can't be reached: invalid domain character"):
        objects_below("s3://a b/c").exists()


def test_a_server_that_is_not_there_is_an_error_of_the_system(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr(objects, "_RETRIES", 0)
    with pytest.raises(OSError, match=r"the object store failed \(.*127\.0\.0\.1:1"):
        (objects_below(bucket) / "a").stat()


def test_a_forked_process_is_refused_and_does_not_wait_for_ever(bucket: str) -> None:
    path = objects_below(bucket) / "a"
    put(path, b"12345")
    reads, writes = os.pipe()
    if (child := os.fork()) == 0:
        try:
            path.stat()
        except FeatureStoreError as error:
            os.write(writes, str(error).encode())
        finally:
            os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as answer:
        assert 'multiprocessing_context="spawn"' in answer.read()
    os.waitpid(child, 0)
    assert path.stat().st_size == 5


def test_without_obstore_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(FeatureStoreError, match=r"pip install 'featstore\[s3\]'"):
        objects_below("memory://without").is_dir()
