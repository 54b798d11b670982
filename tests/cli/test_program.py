"""A program's run: what it says about errors, and how a message ends."""

from __future__ import annotations

import pytest

from featstore import FeatureStoreError
from featstore.cli.program import new_app, run
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
