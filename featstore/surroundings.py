"""Surroundings: what code reads that no key covers (files, environment, clocks), by its names and while it runs."""

from __future__ import annotations

import builtins
import dis
import os
import random
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

from featstore.source_code import all_codes, closure_of, is_from_library, is_library_file


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Something that code reads besides its arguments.

    Attributes:
        kind: one of the keys of `REMEDIES`.
        name: how the code calls it, or the file that it opened.
    """

    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} ({self.name})"

    @property
    def remedy(self) -> str:
        """What to do instead, a sentence."""
        return REMEDIES[self.kind]


_AT_THE_TOP = (
    "Read it at the top level of its module into a constant (a tensor, a number, a text), which the key covers"
)

REMEDIES = {
    "a file": f"{_AT_THE_TOP}.",
    "another program": f"{_AT_THE_TOP}.",
    "the environment": f"{_AT_THE_TOP}.",
    "what the interpreter holds": "Name what it uses in its code, so that the key covers it.",
    "numbers that each process has of its own": "Take a hash that is the same everywhere, such as zlib.crc32.",
    "the clock": "Take the clock out of its code.",
    "the system's entropy": "Draw every random number from the generator: torch.rand(1, generator=generator).",
    "a global random state": "Draw every random number from the generator: torch.rand(1, generator=generator).",
}
"""Kind of reading -> the way out."""

_CLOCKS = (
    "time time_ns monotonic monotonic_ns perf_counter perf_counter_ns process_time process_time_ns thread_time "
    "localtime gmtime ctime strftime"
)

_READERS: list[tuple[str, str, str]] = [
    ("a file", "builtins", "open input"),
    ("a file", "io", "open open_code FileIO"),
    ("a file", "os", "open fdopen listdir scandir walk fwalk stat lstat access readlink"),
    ("a file", "os.path", "exists lexists isfile isdir islink getmtime getatime getctime getsize samefile realpath"),
    ("a file", "glob", "glob iglob"),
    ("a file", "mmap", "mmap"),
    ("a file", "sqlite3", "connect"),
    ("a file", "importlib.resources", "files open_text open_binary read_text read_binary"),
    ("a file", "pkgutil", "get_data"),
    ("a file", "numpy", "fromfile memmap"),
    ("a file", "torch", "from_file"),
    ("a file", "torchvision.io", "read_image read_file read_video"),
    ("a file", "torchvision.io.image", "read_image read_file"),
    ("what may be a file", "numpy", "load loadtxt genfromtxt"),
    ("what may be a file", "torch", "load"),
    ("what may be a file", "torch.jit", "load"),
    ("what may be a file", "torchvision.io", "decode_image"),
    ("what may be a file", "torchvision.io.image", "decode_image"),
    ("what may be a file", "PIL.Image", "open"),
    ("a file", "PIL.ImageFont", "truetype load"),
    ("a file", "cv2", "imread"),
    ("a file", "h5py", "File"),
    ("another program", "os", "system popen"),
    ("another program", "subprocess", "run Popen call check_call check_output getoutput getstatusoutput"),
    ("another program", "socket", "socket create_connection gethostname getaddrinfo"),
    ("another program", "urllib.request", "urlopen urlretrieve"),
    ("the environment", "os", "environ environb getenv getenvb getcwd getcwdb getpid getppid cpu_count uname getlogin"),
    ("the environment", "os", "get_terminal_size getloadavg sched_getaffinity"),
    ("the environment", "platform", "node machine system platform processor release uname version python_version"),
    ("the environment", "multiprocessing", "cpu_count current_process"),
    ("the environment", "threading", "current_thread get_ident get_native_id main_thread active_count"),
    ("the environment", "sys", "argv"),
    ("what the interpreter holds", "builtins", "globals eval exec __import__"),
    ("what the interpreter holds", "sys", "modules _getframe"),
    ("what the interpreter holds", "importlib", "import_module"),
    ("numbers that each process has of its own", "builtins", "hash id"),
    ("the clock", "time", _CLOCKS),
    ("the clock", "datetime.datetime", "now utcnow today"),
    ("the clock", "datetime.date", "today"),
    ("the system's entropy", "os", "urandom getrandom"),
    ("the system's entropy", "uuid", "uuid1 uuid4"),
    ("the system's entropy", "random", "SystemRandom"),
    ("the system's entropy", "secrets", "choice randbelow randbits token_bytes token_hex token_urlsafe SystemRandom"),
    ("a global random state", "torch", "manual_seed seed initial_seed get_rng_state set_rng_state default_generator"),
]

_IN_MEMORY = {"BytesIO", "StringIO", "encode_jpeg", "encode_png"}
"""Names that code has where what it opens or decodes is no file: an image compressed and read again."""

_FILE_METHODS = {"read_bytes", "read_text", "iterdir", "rglob"}
"""Methods that paths alone have."""

# --- by names ---


def readings(*starts: Any, methods: Iterable[str] = ()) -> Iterator[Reading]:
    """What the code reached from `starts` reads of files, environment, clocks, entropy and the interpreter, by name.

    Follows own functions, and own classes' methods of the names that the code has; of libraries only what is called is
    looked at. What has no name there (what a library opens, a name that is computed) is for `noticed`.

    Args:
        starts: functions, and objects of own classes.
        methods: names of methods of those objects that are called.
    """
    return _Walk(methods).found(starts)


class _Unknown:
    """What stands for a value that can't be told from the code."""


_UNKNOWN: Any = _Unknown()


@dataclass(frozen=True)
class _NotImported:
    """What a branch that hasn't run yet imports, or an attribute of it."""

    name: str


class _Walk:
    """One walk through code: what has been seen, and which names it has."""

    def __init__(self, methods: Iterable[str]) -> None:
        self.kinds = _kinds()
        self.names = set(methods)
        self.seen: dict[int, Any] = {}  # holds what is made on the way, whose id would serve again
        self.pending: list[FunctionType] = []
        self.homes: list[tuple[dict[str, Any], bool]] = []  # attributes of classes and objects; whether it is made here

    def found(self, starts: Iterable[Any]) -> Iterator[Reading]:
        for start in starts:
            self.follow(start)
        self._follow_named()
        while self.pending:
            yield from self._read_by(self.pending.pop())
            if not self.pending:
                self._follow_named()

    def _follow_named(self) -> None:
        """Follows the attributes of classes and objects whose names the code has, and what making an object calls."""
        for home, is_made_here in list(self.homes):
            for name, value in list(home.items()):
                is_special = name.startswith("__") and name.endswith("__")
                if name in self.names or (is_special and is_made_here):
                    self.follow(value)

    def follow(self, value: Any) -> None:
        """Notes what is to be walked through: a function, a class, an object or a container of some."""
        if id(value) in self.seen:
            return
        self.seen[id(value)] = value
        if isinstance(value, FunctionType):
            self.follow(vars(value).get("__wrapped__"))
            if not is_library_file(value.__code__.co_filename):
                self.pending.append(value)
        elif isinstance(value, MethodType | staticmethod | classmethod):
            self.follow(value.__func__)
        elif isinstance(value, property):
            self.follow(value.fget)
        elif isinstance(value, list | tuple | set | frozenset):
            for item in value:
                self.follow(item)
        elif isinstance(value, dict):
            self.follow(list(value.values()))
        elif isinstance(value, type):
            self._follow_class(value, is_made_here=True)
        elif not isinstance(value, ModuleType) and self._follow_class(type(value), is_made_here=False):
            self.homes.append((getattr(value, "__dict__", {}), False))

    def _follow_class(self, kind: type, *, is_made_here: bool) -> bool:
        own = [each for each in kind.__mro__ if not is_from_library(each)]
        self.homes += [(dict(vars(each)), is_made_here) for each in own]
        return bool(own)

    def _read_by(self, function: FunctionType) -> Iterator[Reading]:
        known = dict(closure_of(function))
        self.follow([*known.values(), *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()])
        for code in all_codes(function.__code__):
            for name, value in self._values(code, function.__globals__, known):
                kind = "a file" if value is _UNKNOWN else self._kind(value)
                if kind == "what may be a file":
                    kind = "a file"
                    if _IN_MEMORY & set(_names(function.__code__)):
                        continue  # and `noticed` sees whether it is
                if kind is not None:
                    yield Reading(kind=kind, name=name)
                else:
                    self.follow(value)

    def _values(self, code: CodeType, outside: dict[str, Any], known: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        """The values that `code` takes from outside its arguments, by the names it has for them.

        `known` is what its closure holds, to which its imports are added.
        """
        text, value, module = "", _UNKNOWN, _UNKNOWN
        is_looked_up = False  # what comes next, by a name that may be computed
        for step in dis.get_instructions(code):
            name = str(step.argval)
            if step.opname in {"PUSH_NULL", "SWAP", "POP_TOP", "COPY_FREE_VARS"}:
                continue
            if step.opname in {"LOAD_GLOBAL", "LOAD_NAME"}:
                text, value = name, outside.get(name, getattr(builtins, name, _UNKNOWN))
            elif step.opname in {"LOAD_FAST", "LOAD_DEREF", "LOAD_CLASSDEREF"}:
                text, value = name, known.get(name, _UNKNOWN)
            elif step.opname == "IMPORT_NAME":
                text, value = name, _imported(name)
                module = value
            elif step.opname == "IMPORT_FROM":
                text, value = name, _attribute(module, name)
            elif step.opname in {"LOAD_ATTR", "LOAD_METHOD"}:
                self.names.add(name)
                text, value = f"{text}.{name}", _attribute(value, name)
                if value is _UNKNOWN and name in _FILE_METHODS:
                    yield f".{name}", _UNKNOWN
            else:
                if step.opname in {"STORE_FAST", "STORE_DEREF"} and value is not _UNKNOWN:
                    is_package = value is module and "." in text  # import os.path gives os its name
                    known[name] = _imported(text.partition(".")[0]) if is_package else value
                text, value = "", _UNKNOWN
            if is_looked_up and isinstance(value, ModuleType) and not _is_library_module(value):
                yield f"an attribute of {text} by its name", sys.modules
            is_looked_up = any(value is each for each in (getattr, vars))
            if value is not _UNKNOWN:
                yield text, value

    def _kind(self, value: Any) -> str | None:
        if isinstance(value, BuiltinFunctionType | MethodType) and any(
            value.__self__ is state for state in _global_states()
        ):
            return "a global random state"
        return self.kinds.get(value.name if isinstance(value, _NotImported) else _key(value))


def _kinds() -> dict[object, str]:
    """Key of a value that reads, and its full name, -> kind of reading."""
    found: dict[object, str] = {}
    for kind, home, names in _READERS:
        owner: Any = sys.modules.get(home) or getattr(sys.modules.get(home.rpartition(".")[0]), home.split(".")[-1], 0)
        for name in names.split():
            found[f"{home}.{name}"] = kind
            value = _attribute(owner, name)
            if value is not _UNKNOWN:
                found[_key(value)] = kind
    return found


def _key(value: Any) -> object:
    """What tells a value from others. A method of a class is made anew each time it is looked up."""
    if isinstance(value, BuiltinFunctionType | MethodType):
        return id(value.__self__), value.__name__
    return id(value)


def _global_states() -> list[object]:
    """The generators that the functions of `random` and of `numpy.random` draw from."""
    numpys = getattr(getattr(sys.modules.get("numpy"), "random", None), "rand", None)
    python: Any = random.random
    return [python.__self__, *([numpys.__self__] if numpys is not None else [])]


def _imported(name: str) -> Any:
    return sys.modules.get(name) or _NotImported(name)


def _attribute(owner: Any, name: str) -> Any:
    """The attribute of a module or class, which reading doesn't change; of other objects only their type is known."""
    if isinstance(owner, _NotImported):
        return _NotImported(f"{owner.name}.{name}")
    if not isinstance(owner, ModuleType | type):
        return _UNKNOWN
    try:
        return getattr(owner, name, _UNKNOWN)
    except Exception:  # a property of a person's own metaclass may raise anything
        return _UNKNOWN


def _is_library_module(module: ModuleType) -> bool:
    path = getattr(module, "__file__", None)
    return path is None or is_library_file(path)


def _names(code: CodeType) -> Iterator[str]:
    for each in all_codes(code):
        yield from (*each.co_names, *each.co_varnames, *each.co_freevars)


# --- while it runs ---


_EVENTS = {
    "open": "a file", "os.listdir": "a file", "os.scandir": "a file", "glob.glob": "a file",
    "sqlite3.connect": "a file",
    "subprocess.Popen": "another program", "os.system": "another program", "os.posix_spawn": "another program",
    "socket.connect": "another program", "socket.getaddrinfo": "another program", "urllib.Request": "another program",
}  # fmt: skip
"""Audit event of Python's -> kind of reading."""

_OF_CODE = {
    "_frozen_importlib",
    "_frozen_importlib_external",
    "importlib._bootstrap",
    "importlib._bootstrap_external",
    "linecache",
    "torch._dynamo",
    "torch._inductor",
    "triton",
}
"""Modules that read code and what was compiled from it."""

_OF_THE_SYSTEM = ("/proc/", "/sys/", os.devnull)

_here = threading.local()


@contextmanager
def noticed() -> Iterator[list[Reading]]:
    """A list of the files and programs that the block reads, in this thread, beside libraries' own."""
    _listen()
    before = getattr(_here, "found", None)
    found: list[Reading] = []
    _here.found = found
    try:
        yield found
    finally:
        _here.found = before


@cache
def _listen() -> None:
    sys.addaudithook(_heard)  # for good: a hook can't be taken away


def _heard(event: str, args: tuple[Any, ...]) -> None:
    # An interpreter that ends has emptied this module.
    if _EVENTS is None or event not in _EVENTS or getattr(_here, "found", None) is None:
        return
    found, _here.found = _here.found, None  # what follows isn't the block's
    try:
        subject = args[0] if args else None
        is_path = _EVENTS[event] == "a file"
        if is_path and (isinstance(subject, int) or (event == "open" and _is_written(args)) or _is_ours(subject)):
            return
        if not _is_about_code(sys._getframe(1)):
            found.append(Reading(kind=_EVENTS[event], name=_worded(event, subject)))
    finally:
        _here.found = found


def _is_written(args: tuple[Any, ...]) -> bool:
    flags = args[2] if len(args) > 2 and isinstance(args[2], int) else os.O_RDONLY
    return flags & (os.O_RDONLY | os.O_WRONLY | os.O_RDWR) == os.O_WRONLY


def _is_ours(path: Any) -> bool:
    """Whether a path is a library's or the system's: of these the names alone count."""
    if not isinstance(path, str | bytes | os.PathLike):
        return False
    text = os.fsdecode(path)
    return text.startswith(_OF_THE_SYSTEM) or is_library_file(text)


def _is_about_code(frame: FrameType | None) -> bool:
    """Whether Python or torch read code there, on behalf of the person's code that led to it."""
    while frame is not None and is_library_file(frame.f_code.co_filename):
        name = str(frame.f_globals.get("__name__"))
        if name in _OF_CODE or ".".join(name.split(".")[:2]) in _OF_CODE or name.split(".")[0] in _OF_CODE:
            return True
        frame = frame.f_back
    return False


def _worded(event: str, subject: Any) -> str:
    if isinstance(subject, str | bytes | os.PathLike):
        return os.fsdecode(subject)
    return "the current folder" if subject is None and event.startswith("os.") else event
