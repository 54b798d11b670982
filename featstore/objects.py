"""Objects: places in an object store, with what a store asks of a path; the one door to obstore.

obstore is imported when a place is first looked at, not before. Addresses, credentials and regions come from the
environment, as it reads them: ``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``, ``AWS_ALLOW_HTTP`` and the like.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path, PurePath
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

from featstore.errors import FeatureStoreError

SCHEMES = ("s3", "gs", "az", "memory")
"""What addresses of objects begin with. What lies in ``memory://`` is this process's own."""


if TYPE_CHECKING:
    _LikePath = Path
else:
    _LikePath = object


class ObjectPath(_LikePath):
    """The name of an object, or of what a folder of objects would be; what there is of it is as in `pathlib.Path`.

    To who checks types it is a `Path`, so that whatever handles the files of a store says what it always said. It is
    none: what a store never asks of a path isn't there, and nothing takes its name for one on the disk.

    Args:
        bucket: with its scheme: ``s3://bucket``.
        key: names with ``/`` between them; empty for the bucket.
    """

    def __init__(self, bucket: str, key: str) -> None:
        self.bucket, self.key = bucket, key

    def __str__(self) -> str:
        return f"{self.bucket}/{self.key}".rstrip("/")

    def __repr__(self) -> str:
        return f"ObjectPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and (self.bucket, self.key) == (other.bucket, other.key)

    def __hash__(self) -> int:
        return hash((self.bucket, self.key))

    def __lt__(self, other: PurePath) -> bool:
        return str(self) < str(other)

    def __truediv__(self, name: str | os.PathLike[str]) -> ObjectPath:
        below = PurePath(name)
        if below.is_absolute():
            raise ValueError(
                f"{str(below)!r} is an absolute path. Expected a name below {self}. Leave out its first '/'."
            )
        return ObjectPath(self.bucket, "/".join([*filter(None, [self.key]), *below.parts]))

    def __reduce__(self) -> tuple[type[ObjectPath], tuple[str, str]]:
        return ObjectPath, (self.bucket, self.key)

    @property
    def name(self) -> str:  # noqa: D102
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:  # noqa: D102
        return PurePath(self.name).stem

    @property
    def parent(self) -> ObjectPath:  # noqa: D102
        return ObjectPath(self.bucket, self.key.rpartition("/")[0])

    def with_name(self, name: str) -> ObjectPath:  # noqa: D102
        return self.parent / name

    def absolute(self) -> ObjectPath:  # noqa: D102
        return self

    def is_symlink(self) -> bool:  # noqa: D102
        return False

    def is_file(self) -> bool:
        """Whether there is such an object."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    exists = is_file

    def is_dir(self) -> bool:
        """Whether there are objects below."""
        if (seen := _seen(self)) is not None:
            return self.key in seen.folders
        with _told(self):
            return any(_obstore().list(_client(self.bucket), prefix=self.key or None, chunk_size=1))

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Size, and when it was put, by the clock of the object store; all else is 0.

        Raises:
            FileNotFoundError: if there is no such object.
        """
        if (seen := _seen(self)) is not None:
            if self.key not in seen.facts:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
            facts = seen.facts[self.key]
        else:
            with _told(self):
                facts = ObjectFacts.of(_obstore().head(_client(self.bucket), self.key))
        return os.stat_result((0, 0, 0, 0, 0, 0, facts.size, *[facts.when] * 3))

    lstat = stat

    def folders(self) -> list[str]:
        """Names of what would be folders in this one."""
        return self._listed()[0]

    def names(self) -> list[str]:
        """Names of all that would be in this folder; none where there is nothing."""
        folders, objects = self._listed()
        return [*folders, *objects]

    def _listed(self) -> tuple[list[str], list[str]]:
        if (seen := _seen(self)) is not None:
            return sorted(seen.folders.get(self.key, ())), seen.objects.get(self.key, [])
        with _told(self):
            found = _obstore().list_with_delimiter(_client(self.bucket), self.key or None)
        objects = (each["path"] for each in found["objects"])
        return _names(found["common_prefixes"]), _names(key for key in objects if key != self.key)  # see `_facts_below`


class ObjectFacts(NamedTuple):
    """What is known of an object that isn't read.

    Attributes:
        size: in bytes.
        when: it was put, in seconds since 1970, by the clock of the object store.
        tag: another one for other content.
    """

    size: int
    when: int
    tag: str

    @classmethod
    def of(cls, found: Any) -> ObjectFacts:
        """From what obstore says."""
        return cls(found["size"], int(found["last_modified"].timestamp()), found["e_tag"] or "")


_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.DOTALL | re.IGNORECASE)
_ONCE_AN_ADDRESS = re.compile(rf"({'|'.join(SCHEMES)}|file):(/(?!/)|$)", re.IGNORECASE)


def place_of(text: str | Path) -> Path:
    """What `text` names: an address of objects, ``file://`` and a path, or a path.

    Raises:
        ValueError: for another kind of address, and one that names no bucket or a name that no object may have.
    """
    if isinstance(text, ObjectPath):
        return text
    text = os.fspath(text)
    if _ONCE_AN_ADDRESS.match(text):
        raise ValueError(
            f"{text!r} is an address that was made a path, which lost some of its slashes. Expected it as text, such "
            "as s3://bucket/features. Give it so, without Path()."
        )
    found = _ADDRESS.match(text)
    if found is None:
        return Path(text)
    scheme, rest = found[1].lower(), found[2]
    if scheme == "file" and rest.startswith("/"):
        return Path(unquote(rest))
    bucket, *names = rest.split("/")
    if scheme not in SCHEMES or not bucket or {".", ".."} & set(names):
        raise ValueError(
            f"{text} is no address of a place. Expected one of {', '.join(f'{each}://' for each in SCHEMES)} with a "
            "bucket and a prefix, such as s3://bucket/features, or a folder."
        )
    return ObjectPath(f"{scheme}://{bucket}", "/".join(filter(None, names)))


def names_in(folder: Path) -> list[str]:
    """All names in a folder, in no order.

    Raises:
        OSError: as the system gave it; of objects no folder is missing.
    """
    return folder.names() if isinstance(folder, ObjectPath) else os.listdir(folder)


# ---- many names at once


@contextmanager
def seen_at_once(root: Path) -> Iterator[None]:
    """Within this, names below `root`, and what is known of them, are as they were when it was entered.

    That takes two requests a thousand objects, where each folder would take several. It holds for this thread; what
    objects contain is asked for as ever. On a disk, which answers at once, it does nothing.
    """
    earlier = _seen_now()
    if not isinstance(root, ObjectPath) or _seen(root) is not None:
        yield
        return
    _thread.seen = _look(root) or earlier
    try:
        yield
    finally:
        _thread.seen = earlier


def look_again() -> None:
    """Has names answered as they are, until `seen_at_once` is entered anew: something is gone that was seen."""
    _thread.seen = None


class _Seen:
    """What lay below a prefix at one moment."""

    def __init__(self, root: ObjectPath, facts: Mapping[str, ObjectFacts]) -> None:
        self.root, self.facts = root, facts
        self.folders: dict[str, set[str]] = {}
        self.objects: dict[str, list[str]] = {}
        for key in facts:
            folder, _, name = key.rpartition("/")
            if folder not in self.objects:
                self.folders.setdefault(folder, set())
                above = folder
                while above != root.key and above:
                    above, _, below = above.rpartition("/")
                    self.folders.setdefault(above, set()).add(below)
            self.objects.setdefault(folder, []).append(name)


_thread = threading.local()


def _seen_now() -> _Seen | None:
    found: _Seen | None = getattr(_thread, "seen", None)
    return found


def _seen(path: ObjectPath) -> _Seen | None:
    """What was seen, if `path` lies there."""
    seen = _seen_now()
    if seen is None or seen.root.bucket != path.bucket:
        return None
    return seen if f"{path.key}/".startswith(f"{seen.root.key}/".removeprefix("/")) else None


def _look(root: ObjectPath) -> _Seen | None:
    """What two listings one after the other agree on; None where others change it all the time.

    One of several pages isn't taken at one moment: it may miss an object put behind its page, and what that replaces,
    deleted before its own.
    """
    found = None
    for _ in range(_LOOKS):
        again = _facts_below(root)
        if again == found:
            return _Seen(root, again)
        found = again
    return None


def facts_below(root: ObjectPath) -> dict[str, ObjectFacts]:
    """All objects below `root` by their names from there, in one look, which takes a request a thousand."""
    return {key[len(root.key) :].lstrip("/"): facts for key, facts in _facts_below(root).items()}


def _facts_below(root: ObjectPath) -> dict[str, ObjectFacts]:
    with _told(root):
        pages = _obstore().list(_client(root.bucket), prefix=root.key or None)
        found = {each["path"]: ObjectFacts.of(each) for page in pages for each in page}
    # Consoles make empty objects for folders; obstore leaves out the slash that their names end with.
    folders = {root.key}
    for key in found:
        folder = key.rpartition("/")[0]
        while folder not in folders:
            folders.add(folder)
            folder = folder.rpartition("/")[0]
    return {key: facts for key, facts in found.items() if key != root.key and (facts.size or key not in folders)}


# ---- reading


def whole(path: ObjectPath, check: Callable[[int], None]) -> tuple[bytes, ObjectFacts]:
    """All bytes of an object, and what was known of it when they were read; `check` gets its size before.

    Raises:
        FileNotFoundError: if there is no such object.
        OSError: if the object store doesn't give it.
    """
    with _told(path):
        found = _obstore().get(_client(path.bucket), path.key)
    facts = ObjectFacts.of(found.meta)
    check(facts.size)
    with _told(path):
        return bytes(found.bytes()), facts


def start_of(path: ObjectPath, num_bytes: int) -> tuple[memoryview, int]:
    """The first bytes of an object, or all it has, and its size, by one request.

    Raises:
        FileNotFoundError: if there is no such object.
        OSError: if the object store doesn't give it.
    """
    try:
        with _told(path):
            found = _obstore().get(_client(path.bucket), path.key, options={"range": (0, num_bytes)})
            return memoryview(found.bytes()), int(found.meta["size"])
    except FileNotFoundError:
        raise
    except OSError:  # no range of an empty object can be had
        if path.stat().st_size:
            raise
        return memoryview(b""), 0


def ranges_of(path: ObjectPath, extents: Sequence[range]) -> list[memoryview]:
    """Bytes of an object, some requests at once; one for what lies side by side. A range past the end is cut short.

    Raises:
        FileNotFoundError: if there is no such object.
        OSError: if the object store doesn't give them.
    """
    starts, ends = [each.start for each in extents], [each.stop for each in extents]
    try:
        with _told(path):
            found = _obstore().get_ranges(_client(path.bucket), path.key, starts=starts, ends=ends, coalesce=1 << 16)
    except FileNotFoundError:
        raise
    except OSError:  # some say so of ranges past the end
        size = path.stat().st_size
        if size >= max(ends, default=0):
            raise
        return [memoryview(b"") for _ in extents]
    return [memoryview(each) for each in found]


# ---- changing


def put(path: ObjectPath, content: Any, *, replaces: bool = False) -> None:
    """Makes an object of the bytes `content`, whole or not at all; tried again where no reply came.

    Args:
        path: its name, which must be free unless it `replaces` what is there.
        content: a buffer.
        replaces: whatever the object was.

    Raises:
        FileExistsError: if there is another object of that name.
        OSError: if the object store doesn't take it.
    """
    for tries_left in reversed(range(_TRIES)):
        try:
            with _told(path):
                _obstore().put(
                    _client(path.bucket, _PUT_SECONDS),
                    path.key,
                    content,
                    mode="overwrite" if replaces else "create",
                    use_multipart=False,  # those that are never finished are paid for
                )
            return
        except FileExistsError:
            if not _is(path, memoryview(content)):  # it may be this one: its reply was lost, and it was tried again
                raise
            return
        except (FileNotFoundError, PermissionError):
            raise
        except OSError:
            if not tries_left:
                raise
            time.sleep(_PAUSE_SECONDS)


def _is(path: ObjectPath, content: memoryview) -> bool:
    """Whether an object has this content, by its size and its beginning, where our files have their checksums."""
    start, size = start_of(path, _USER_BLOCK_BYTES)
    return size == len(content) and start == content[: len(start)]


def copy(path: ObjectPath, target: ObjectPath) -> None:
    """Makes another object of the same content."""
    with _told(path):
        _obstore().copy(_client(path.bucket), path.key, target.key)


def delete(path: ObjectPath) -> None:
    """Deletes an object, which may be gone already."""
    with _told(path):
        _obstore().delete(_client(path.bucket), path.key)


# ---- the client

_TRIES, _PAUSE_SECONDS = 3, 1.0
_LOOKS = 4
_GET_SECONDS, _PUT_SECONDS = 120, 3600
"""For one request, a large part's among them; of the second no more is known than that a part has been sent whole."""

_RETRIES, _RETRY_SECONDS = 6, 60
_USER_BLOCK_BYTES = 4096

_clients: dict[tuple[str, int], Any] = {}
_lock = threading.Lock()
_is_forked = False


def _client(bucket: str, seconds: int = _GET_SECONDS) -> Any:
    obstore = _obstore()
    in_memory = bucket.startswith("memory:")
    with _lock:
        if _is_forked and not in_memory:
            raise FeatureStoreError(
                f"{bucket} can't be asked from here: this process was forked from one that had asked an object store, "
                "and lacks the threads of its client. Expected a process that was started anew: for a DataLoader "
                'multiprocessing_context="spawn", or num_workers=0.'
            )
        key = bucket, 0 if in_memory else seconds
        if key not in _clients:
            _clients[key] = obstore.store.MemoryStore() if in_memory else _connected(bucket, seconds)
        return _clients[key]


def _connected(bucket: str, seconds: int) -> Any:
    from_url, failed = _obstore().store.from_url, _obstore().exceptions.BaseError
    is_plain = any(value.lower() in ("1", "true") for name, value in os.environ.items() if name.endswith("_ALLOW_HTTP"))
    try:
        return from_url(
            bucket,
            client_options={"timeout": timedelta(seconds=seconds), "allow_http": is_plain},
            retry_config={"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=_RETRY_SECONDS)},
        )
    except (failed, ValueError) as error:
        raise FeatureStoreError(
            f"{bucket} can't be reached: {_reason(error)}. Expected what it needs in the environment, such as "
            "AWS_REGION and AWS_ACCESS_KEY_ID, or AZURE_STORAGE_ACCOUNT_NAME. Set it."
        ) from error


def _obstore() -> ModuleType:
    try:
        import obstore
        import obstore.store
    except ImportError as error:
        raise FeatureStoreError(
            "A place in an object store needs obstore, which isn't installed. Install it with pip install "
            "'featstore[s3]', or give a folder."
        ) from error
    return obstore


@contextmanager
def _told(path: ObjectPath) -> Iterator[None]:
    """Makes of obstore's errors those that the system gives of files."""
    failed = _obstore().exceptions
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
    except ValueError as error:  # a key that it doesn't ask a server for
        raise FileNotFoundError(errno.ENOENT, "no object can be called so", str(path)) from error
    except failed.InvalidPathError as error:
        raise FeatureStoreError(_unlisted(path, error)) from error
    except (failed.AlreadyExistsError, failed.PreconditionError) as error:
        raise FileExistsError(
            errno.EEXIST, "a written file is never replaced, choose another name", str(path)
        ) from error
    except (PermissionError, failed.PermissionDeniedError, failed.UnauthenticatedError) as error:
        raise PermissionError(
            errno.EACCES, "the object store doesn't allow it with the credentials in the environment", str(path)
        ) from error
    except failed.BaseError as error:
        raise OSError(errno.EIO, f"the object store failed ({_reason(error)})", str(path)) from error


def _names(keys: Iterable[str]) -> list[str]:
    return [key.rstrip("/").rpartition("/")[2] for key in keys]


def _unlisted(path: ObjectPath, error: BaseException) -> str:
    """What is said of an object whose name obstore refuses: no listing goes on behind it."""
    found = re.search(r'Path "(.*?)"(?: contained|: Encountered)', str(error), re.DOTALL)
    return (
        f"{path} can't be listed, for an object there is called {found[1] if found else _reason(error)!r}. Expected no "
        "name with an empty part (//), with '.' or '..' for a part, or with a control character. Rename or delete it, "
        "with a tool of the object store."
    )


def _reason(error: BaseException) -> str:
    """What an error says before it shows the server's answer, and the code in that."""
    code = re.search(r"<Code>(\w+)</Code>", str(error))
    said = re.split(r":? *(?:\n|<)", str(error), maxsplit=1)[0].strip()
    return f"{said}: {code[1]}" if code else said


def _start_in_child() -> None:
    """Notes in a forked child that the clients' threads are its parent's."""
    global _lock, _is_forked
    _lock = threading.Lock()
    _is_forked = _is_forked or any(not bucket.startswith("memory:") for bucket, _ in _clients)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_in_child)
