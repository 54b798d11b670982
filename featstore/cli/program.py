"""A program: one run of a typer app, what it prints and where, and the exit code that each kind of error gets.

Results go to stdout; everything said to a person goes to stderr.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO, TypeVar

import typer
import typer.main

from featstore.digest import Json
from featstore.errors import FeatureStoreError, ImageError
from featstore.machine import keep_freed_memory, limit_threads
from featstore.remedies import Command
from featstore.words import printable

DONE, FAILED, WRONG_USAGE, INCOMPLETE, SIGNALLED = 0, 1, 2, 3, 128
"""Exit codes of both programs; INCOMPLETE is for `extract` and `status` alone, and the signal's number is added to
SIGNALLED, as shells do: 130 for Ctrl-C, 143 for SIGTERM."""

TWICE_SECONDS = 0.25
"""Two signals in less are one: `timeout` sends its own to the process, and then to the group that it is in."""

MOST_LISTED = 10

Word = TypeVar("Word", bound=str)


class IncompleteError(FeatureStoreError):
    """Images that were asked for lack their files; a program ends with the exit code `INCOMPLETE`."""


# Typer loads pydantic, which takes as long as all else, to make bool values of flags that are not given, and so None;
# that those are False needs none.
_NOT_GIVEN = dict.fromkeys(("help", "install_completion", "show_completion"), False)

# The parent of all errors in a command line. It has no public name, and its module differs between typer's versions.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def new_app(**settings: Any) -> typer.Typer:
    """A typer app whose help is plain text, the same in a terminal and in a file."""
    return typer.Typer(
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        context_settings={"max_content_width": 110, "default_map": _NOT_GIVEN},
        **settings,
    )


def run(app: typer.Typer, name: str, argv: Sequence[str] | None = None) -> int:
    """The exit code of one run of `app` under the name `name`; raises nothing but what ends an interpreter.

    An error is one sentence on stderr. With ``--debug`` among the arguments its traceback comes first.

    Args:
        app: the commands; they return nothing, or raise `typer.Exit` with a code.
        name: of the program, for messages.
        argv: arguments after the program's name; default: the process's own.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = typer.main.get_command(app)
    if argv is None:  # else the process is another program's
        keep_freed_memory()
        limit_threads(os.environ)
    try:
        if os.environ.get(_completion_variable(name)):  # a shell asks what may come next
            _complete(command, name)
        with _ended_as_interrupted(is_own=argv is None), command.make_context(name, arguments) as context:
            command.invoke(context)
        return DONE
    except typer.Exit as end:
        return end.exit_code
    except BrokenPipeError:  # whoever read our results has seen enough
        return FAILED
    except KeyboardInterrupt as error:
        with suppress(OSError):  # the terminal may be what ended
            tell(" ".join(["Interrupted.", *getattr(error, "__notes__", ())]))
        return SIGNALLED + (error.number if isinstance(error, _Interrupt) else signal.SIGINT)
    except Exception as error:
        if "--debug" in arguments:
            tell("".join(traceback.format_exception(error)).rstrip())
        if isinstance(error, ImageError):
            skipped = _SKIPPED if _takes(command, arguments, "--on-error") else ""
            tell(f"{printable(str(error), is_one_line=True)}. {_IMAGE_REMEDY}{skipped}.")
        else:
            tell(_sentence(error, name))
        if isinstance(error, IncompleteError):
            return INCOMPLETE
        return WRONG_USAGE if _is_wrong_usage(error) else FAILED


def show(text: str) -> None:
    """Prints a result."""
    _write(text, sys.stdout)


def show_json(value: Json) -> None:
    """Prints a result for machines; numbers that aren't finite, which JSON lacks, are null.

    ASCII, since file names need not be valid in any encoding.
    """
    _write(json.dumps(_finite(value), indent=1, allow_nan=False), sys.stdout)


def tell(text: str) -> None:
    """Says something to the person who runs the program."""
    _write(text, sys.stderr)


def tell_all(lines: Sequence[str], *, indent: str = "") -> None:
    """Says `lines`, at most `MOST_LISTED` of them, each on one line whatever names it holds."""
    for line in lines[:MOST_LISTED]:
        tell(indent + printable(line, is_one_line=True))
    if len(lines) > MOST_LISTED:
        tell(f"{indent}... and {len(lines) - MOST_LISTED:,} more")


def table(rows: Sequence[Mapping[str, Json]]) -> str:
    """Rows of equal columns, aligned under the columns' names; numbers to the right, None as ``-``, lists as shapes.

    >>> print(table([{"cut": "layer4", "rows": 1200}, {"cut": "avgpool", "rows": 7}]))
    cut       rows
    layer4   1,200
    avgpool      7
    """
    names = list(rows[0]) if rows else []
    columns = []
    for name in names:
        is_number = any(isinstance(row[name], int | float) for row in rows)
        cells = [name, *(_cell(row[name]) for row in rows)]
        width = max(map(len, cells))
        columns.append([cell.rjust(width) if is_number else cell.ljust(width) for cell in cells])
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


def facts_table(facts: Json) -> str:
    """Nested facts, one line each, their names joined by dots.

    >>> print(facts_table({"dtype": "float16", "view": {"size": 224, "policy": None}}))
    dtype        float16
    view.size    224
    view.policy  -
    """
    lines = list(_flat("", facts))
    width = max((len(name) for name, _ in lines), default=0)
    return "\n".join(f"{name:{width}}  {value}".rstrip() for name, value in lines)


def one_of(flag: str, value: str, known: Sequence[Word]) -> Word:
    """`value`, if it is one of `known`; else ValueError that names the flag and lists them."""
    for word in known:
        if value == word:
            return word
    raise ValueError(f"{flag} is {value!r}. Expected {', '.join(known[:-1])} or {known[-1]}.")


def _finite(value: Json) -> Json:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Json) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return "x".join(map(str, value))
    if isinstance(value, float):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else printable(str(value), is_one_line=True)


def _flat(prefix: str, value: Json) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(f"{prefix}.{name}" if prefix else name, inner)
    elif isinstance(value, list):
        yield prefix, printable(", ".join(map(str, value)), is_one_line=True) or "-"
    else:
        yield prefix, "-" if value is None else printable(str(value), is_one_line=True)


def _complete(command: Any, name: str) -> None:
    """Answers a shell, and ends the process as typer does.

    No value is made of what is typed so far: nothing that completes a word looks at one, and typer would load pydantic.
    """
    for each in (command, *getattr(command, "commands", {}).values()):
        each.context_settings.setdefault("default_map", _NOT_GIVEN)
        for parameter in each.params:
            parameter.process_value = lambda _, value: value
    command.main([], prog_name=name)


def _completion_variable(name: str) -> str:
    """The environment variable with which typer's scripts for shells ask the program `name`."""
    return f"_{name}_COMPLETE".replace("-", "_").upper()


class _Interrupt(KeyboardInterrupt):
    """An interrupt by the signal `number`."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def _ended_as_interrupted(*, is_own: bool) -> Iterator[None]:
    """Takes SIGTERM and SIGHUP as Ctrl-C: what was computed is filed. A second signal ends the process at once.

    Schedulers send the one at the end of a job's time, a terminal or ssh session that closes sends the other. What
    whoever started the program wants ignored (nohup) stays ignored.

    Args:
        is_own: whether the process is there for this program alone, and has nothing to do after an interrupt but end.
    """
    if threading.current_thread() is not threading.main_thread():  # no other may set what signals do
        yield
        return
    since: float | None = None

    def end(number: int, _: object) -> None:
        nonlocal since
        now = time.monotonic()
        if since is None:
            since = now
            raise _Interrupt(number)
        if now - since > TWICE_SECONDS:
            os._exit(SIGNALLED + number)

    # Windows has no SIGHUP.
    ends = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = {each: signal.getsignal(each) for each in ends if signal.getsignal(each) != signal.SIG_IGN}
    for each in before:
        signal.signal(each, end)
    try:
        yield
    finally:
        if since is None or not is_own:  # else the interpreter, too, is ended by a second one without a word
            for each, handler in before.items():
                signal.signal(each, signal.SIG_DFL if handler is None else handler)  # None: not set from Python


def _sentence(error: Exception, name: str) -> str:
    if isinstance(error, _UsageError):
        return _usage_sentence(error, name)
    if isinstance(error, FeatureStoreError) and isinstance(error.remedy, Command):
        return f"{error.lead} {error.remedy}"  # a full stop would be pasted along
    if isinstance(error, FeatureStoreError | FloatingPointError) or _is_wrong_usage(error):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}." if error.filename and error.strerror else str(error)
    first = (str(error).strip().splitlines() or [""])[0]
    notes = "".join(f", {printable(note, is_one_line=True)}" for note in getattr(error, "__notes__", ()))
    return f"{type(error).__name__}: {first}{notes} (--debug shows where)"


_IMAGE_REMEDY = "Repair, remove or bring back the file"
_SKIPPED = ", or leave such images out with --on-error skip"


def _takes(app: Any, arguments: Sequence[str], flag: str) -> bool:
    """Whether the command among the arguments has that flag."""
    commands = getattr(app, "commands", {})  # a program may be a single one
    command = next((commands[each] for each in arguments if each in commands), app)
    return any(flag in option.opts for option in command.params)


def _usage_sentence(error: Any, name: str) -> str:
    text = str(error.format_message())
    command = name if error.ctx is None else error.ctx.command_path
    if text.startswith("Usage:"):  # no arguments at all: the message is the help
        return text
    end = "" if text.endswith((".", "?")) else "."
    return f"{text}{end} {command} --help lists what can be given."


def _is_wrong_usage(error: Exception) -> bool:
    """Whether the command line is to blame: what typer refused, or a ValueError or TypeError that we raised."""
    if isinstance(error, _UsageError):
        return True
    return isinstance(error, ValueError | TypeError) and _raised_in(error).split(".")[0] in ("featstore", "training")


def _raised_in(error: Exception) -> str:
    """The module whose code raised `error`."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__", ""))


def _write(text: str, stream: TextIO) -> None:
    encoding = stream.encoding or "utf-8"  # a file name may hold what the terminal, or UTF-8 itself, can't say
    print(printable(text).encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
