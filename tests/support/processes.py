"""Programs in a process of their own, without the seconds that a new interpreter takes to import torch."""

from __future__ import annotations

import gc
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from itertools import count
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import Any, NamedTuple, NoReturn, Self

AS_A_MODULE = "import runpy, sys; del sys.argv[0]; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
"""The program that is ``python -m NAME ...``, with NAME as its first argument."""

AS_A_SCRIPT = """
    import os, runpy, sys
    del sys.argv[0]
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""The program that is ``python FILE ...``, with FILE as its first argument."""

_CALL = """
    import pickle, sys
    from pathlib import Path
    file = Path(sys.argv[1])
    function, arguments = pickle.loads(file.read_bytes())
    file.write_bytes(pickle.dumps(function(*arguments)))
"""


class Started(NamedTuple):
    """A program at work, and the files that take what it prints."""

    pid: int
    command: list[str]
    out: Path
    err: Path


class Processes:
    """An interpreter that has imported `modules` and nothing else, and runs each program in a fork of itself.

    So a program finds what a new interpreter has after these imports: nothing is cached or drawn, no thread has
    started, and hashes of texts have another seed than here. It imports from where this process does.
    """

    def __init__(self, *modules: str) -> None:
        self._modules = modules

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory()
        self._numbers = count()
        seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
        self._process = subprocess.Popen(
            [sys.executable, __file__, *self._modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        self._folder.cleanup()

    def start(
        self, program: str, *arguments: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> Started:
        """Starts ``python -c program argument ...``; `end` must follow."""
        out, err = self._file(), self._file()
        given = {
            "program": dedent(program),
            "arguments": arguments,
            "cwd": str(cwd or Path.cwd()),
            "environment": dict(environment or {}),
            "out": str(out),
            "err": str(err),
        }
        return Started(self._ask("start", given), [program, *arguments], out, err)

    def end(self, started: Started) -> subprocess.CompletedProcess[str]:
        """What it leaves, whatever its exit code is."""
        return self.end_all([started])[0]

    def end_all(self, started: Sequence[Started]) -> list[subprocess.CompletedProcess[str]]:
        """What they leave. As a launcher does, where one fails it kills the others, which may wait for that one."""
        codes = self._ask("end", [each.pid for each in started])
        return [
            subprocess.CompletedProcess(each.command, code, *(path.read_text("utf-8") for path in (each.out, each.err)))
            for each, code in zip(started, codes, strict=True)
        ]

    def run(self, program: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """`start` and `end`."""
        return self.end(self.start(program, *arguments, **options))

    def answer(self, program: str, *arguments: str, **options: Any) -> str:
        """What the program prints.

        Raises:
            AssertionError: if it failed; with what it said.
        """
        ran = self.run(program, *arguments, **options)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.strip()

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """What a function of a module gives there, of arguments pickled as `multiprocessing` does for a new process."""
        file = self._file()
        file.write_bytes(ForkingPickler.dumps((function, arguments)))
        self.answer(_CALL, str(file), **options)
        return pickle.loads(file.read_bytes())

    def _file(self) -> Path:
        return Path(self._folder.name, str(next(self._numbers)))

    def _ask(self, *question: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{json.dumps(question)}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def main() -> None:
    """Starts and ends what `Processes` asks for, until it closes the pipe."""
    gc.freeze()  # else each fork's first collection copies what it shares
    answer: int | list[int]
    for line in sys.stdin:
        match json.loads(line):
            case ["start", given]:
                answer = os.fork()
                if answer == 0:
                    _run(**given)
            case ["end", pids]:
                answer = _ended(pids)
        print(json.dumps(answer), flush=True)


def _ended(pids: list[int]) -> list[int]:
    """The exit codes, in order."""
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        for pid in (each for each in pids if each not in codes):
            # One alone is waited for without a pause.
            found, status = os.waitpid(pid, 0 if len(codes) == len(pids) - 1 else os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid] != 0:
                    for other in (each for each in pids if each not in codes):
                        os.kill(other, signal.SIGKILL)
        if len(codes) < len(pids):
            time.sleep(0.01)
    return [codes[pid] for pid in pids]


def _run(*, program: str, arguments: list[str], cwd: str, environment: dict[str, str], out: str, err: str) -> NoReturn:
    anew = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for number, (name, flags) in enumerate([(os.devnull, os.O_RDONLY), (out, anew), (err, anew)]):
        os.dup2(os.open(name, flags, 0o600), number)
    os.chdir(cwd)
    os.environ.update(environment)
    sys.path[0] = ""
    sys.argv = ["-c", *arguments]
    sys.modules["__main__"] = ModuleType("__main__")
    code = 0
    try:
        exec(compile(program, "<string>", "exec"), vars(sys.modules["__main__"]))
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # to take torch down properly needs a second


if __name__ == "__main__":
    for module in sys.argv[1:]:
        import_module(module)
    main()
