"""Config: the flags of a command as a TOML file, by which it can be given again."""

from __future__ import annotations

import difflib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

_OF_ONE_RUN = ("out", "snapshots", "overwrite", "resume", "json", "debug", "config", "help")
_ASKED_EACH_TIME = ("trust-code",)  # whoever gets a file from somebody else hasn't said that code may run


def _configured(context: typer.Context, value: str | None) -> str | None:
    """Gives the flags in the file `value` to a command, for those that the command line doesn't have."""
    if value is not None:
        context.default_map = {**(context.default_map or {}), **_read(Path(value), context)}
    return value


ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FILE.toml",
        help="Flags by their names (a saved run's run.toml); those given here win.",
        is_eager=True,
        callback=_configured,
    ),
]


def flags_as_toml(context: typer.Context) -> str:
    """All flags of a command as it was called, but for where its run goes: paths are as they were given."""
    values = {name: context.params[each.name] for name, each in _flags(context).items()}
    lines = [
        f"{name} = {_written(value)}"
        for name, value in values.items()
        if value is not None and value is not False and name not in (*_OF_ONE_RUN, *_ASKED_EACH_TIME)
    ]
    return "\n".join([f"# {context.command_path} --config THIS_FILE --out DIR", *lines]) + "\n"


def _flags(context: typer.Context) -> dict[str, Any]:
    """Name of a flag, without its dashes -> the command's parameter."""
    return {
        name[2:]: each for each in context.command.params for name in getattr(each, "opts", ()) if name.startswith("--")
    }


def _read(path: Path, context: typer.Context) -> dict[str, Any]:
    """Name of a parameter -> its value in the file.

    Raises:
        ValueError: for what isn't TOML, a name that no flag has, or a value that its flag can't have.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is no TOML: {error}. Expected a line a flag, such as epochs = 5.") from error
    known = {name: each for name, each in _flags(context).items() if name not in ("config", "help")}
    for name, value in found.items():
        if name in _ASKED_EACH_TIME:
            raise ValueError(f"{path} has {name}, which has to be said each time. Give --{name} with the command.")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"{path} has {name}, and {context.command_path} has no flag --{name}.{hint} "
                f"{context.command_path} --help lists them."
            )
        is_switch = bool(getattr(known[name], "is_flag", False))
        if is_switch != isinstance(value, bool) or not isinstance(value, str | int | float):
            expected = "true or false" if is_switch else "a text or a number, as the flag takes it"
            raise ValueError(f"{path} has {name} = {value!r}; expected {expected}.")
    # As text, which is read as that of the command line is: 5.5 is no number of epochs.
    return {known[name].name: value if isinstance(value, bool) else str(value) for name, value in found.items()}


def _written(value: str | int | float | bool) -> str:
    """As JSON has it, which for these is TOML as well, but for one control character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
