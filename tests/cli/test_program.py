"""A program's run: what it says about errors, and how a message ends."""

from __future__ import annotations

import json
import os
import signal
import sys

import pytest

from featstore import FeatureStoreError, ImageError
from featstore.cli.program import FAILED, new_app, run, show_json, tell_all
from featstore.remedies import Call, Command, Steps


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            FeatureStoreError("Set them aside:", remedy=Command("featstore", "verify", "--store", "my feats")),
            "Set them aside: featstore verify --store 'my feats'",
        ),
        (
            FeatureStoreError("List them:", remedy=Command("featstore", "ls", "--store", "a dog's")),
            "List them: featstore ls --store 'a dog'\"'\"'s'",
        ),
        (
            FeatureStoreError("Compute them with", remedy=Command("featstore", "extract")),
            "Compute them with featstore extract",
        ),
        (
            FeatureStoreError("Extract them:", remedy=Call(function="extract", options={"cuts": "['layer4']"})),
            "Extract them: extract(model, cuts=['layer4']).",
        ),
        (
            FeatureStoreError(
                "Extract them:",
                remedy=Steps(first=Call(function="learn.attach"), then=Call(function="extract", model="learn.model")),
            ),
            "Extract them: learn.attach(model), then extract(learn.model).",
        ),
        (
            FeatureStoreError("It has format version 3. Upgrade featstore."),
            "It has format version 3. Upgrade featstore.",
        ),
        (
            FeatureStoreError("Run featstore verify --store feats, then look."),
            "Run featstore verify --store feats, then look.",
        ),
    ],
)
def test_only_a_command_at_the_end_loses_the_full_stop(
    capsys: pytest.CaptureFixture[str], error: FeatureStoreError, said: str
) -> None:
    app = new_app()

    @app.command()
    def fail() -> None:
        raise error

    @app.command()
    def another() -> None:
        """With one command alone, there would be no names of commands."""

    assert run(app, "featstore", ["fail"]) == 1
    assert capsys.readouterr().err == f"{said}\n"
    assert str(error) == said.removesuffix(".") + "."


def test_json_has_null_for_what_is_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    show_json([{"loss": float("nan"), "end": [float("-inf"), 0.5, 3, True]}])
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == [
        {"loss": None, "end": [None, 0.5, 3, True]}
    ]


def test_leaving_images_out_is_proposed_where_the_command_can(capsys: pytest.CaptureFixture[str]) -> None:
    app = new_app()

    @app.command()
    def tolerant(on_error: str = "raise") -> None:
        raise ImageError("a.jpg", "it is cut short")

    @app.command()
    def strict() -> None:
        raise ImageError("a.jpg", "it is cut short")

    said = "a.jpg: it is cut short. Repair, remove or bring back the file"
    assert run(app, "program", ["tolerant"]) == FAILED
    assert capsys.readouterr().err == f"{said}, or leave such images out with --on-error skip.\n"
    assert run(app, "program", ["strict"]) == FAILED
    assert capsys.readouterr().err == f"{said}.\n"


def test_names_write_no_lines_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    tell_all(["a\n12,345 rows computed: it is cut short"])
    assert capsys.readouterr().err == "a\\n12,345 rows computed: it is cut short\n"
    app = new_app()

    @app.command()
    def fail(debug: bool = False) -> None:
        raise ImageError("a\n12,345 rows\x1b[2J.jpg", "it is cut short")

    @app.command()
    def odd() -> None:
        error = RuntimeError("it broke")
        error.add_note("while rendering a\n.jpg")
        raise error

    assert run(app, "program", ["fail"]) == FAILED
    said = capsys.readouterr().err
    assert said.startswith("a\\n12,345 rows\\x1b[2J.jpg: it is cut short.")
    assert said.count("\n") == 1
    assert run(app, "program", ["fail", "--debug"]) == FAILED
    assert "\x1b" not in capsys.readouterr().err
    assert run(app, "program", ["odd"]) == FAILED
    assert capsys.readouterr().err == "RuntimeError: it broke, while rendering a\\n.jpg (--debug shows where)\n"


def test_what_whoever_started_the_program_ignores_does_not_end_it() -> None:
    app = new_app()
    seen: list[bool] = []

    @app.command()
    def work() -> None:
        signal.raise_signal(signal.SIGHUP)
        seen.append(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert run(app, "tool", []) == 0
        assert seen == [True]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("heeds_signals")
def test_a_program_whose_terminal_has_closed_ends_as_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    app = new_app()
    ours, its = os.openpty()
    terminal = os.fdopen(its, "w", buffering=1)

    @app.command()
    def work() -> None:
        os.close(ours)
        signal.raise_signal(signal.SIGHUP)

    with monkeypatch.context() as with_terminal:
        with_terminal.setattr(sys, "stderr", terminal)
        assert run(app, "tool", []) == 128 + signal.SIGHUP
    with pytest.raises(OSError, match="Input/output error"):  # what is said there reaches nobody
        print("anybody?", file=terminal)
    with pytest.raises(OSError, match="Input/output error"):
        terminal.close()
