"""Hub: a saved run as a repository of a model hub, with a card for people."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from featstore import __version__
from featstore.digest import Json
from featstore.errors import FeatureStoreError
from featstore.models.runs import FACTS, check_free, read_facts, read_file, read_run
from featstore.words import printable
from training import saved
from training.scores.metrics import scores_line
from training.sidecar import FILE as RUN

CARD = "README.md"
_MOST_CLASSES = 100
_MOST_FACTS = 1 << 26
_MARKS = re.compile(r"([\\`*_{}\[\]()#+\-.!|~>])")  # what Markdown may take for more than a character


def push(
    run: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    endpoint: str | None = None,
    token: str | None = None,
) -> str:
    """Uploads the run in a folder with a model card, in one commit; returns the commit's address.

    All files of the run go along: its table of validation predictions names images, run.json the store's folder, and
    run.toml what a command was given, paths among it.

    Args:
        run: the folder; it is checked before anything is sent.
        repo: ``user/name``; it is made if there is none.
        private: whether a new one is.
        revision: a branch that is there. Default: the main one.
        endpoint: of the hub. Default: huggingface_hub's own.
        token: likewise.

    Raises:
        FeatureStoreError: if it is no run, is damaged, or the hub refuses it.
    """
    folder = Path(run)
    facts = read_run(folder).facts
    contents = {name: content for name in _files(facts, folder) if (content := read_file(folder, name)) is not None}
    contents[FACTS] = (folder / FACTS).read_bytes()
    contents[CARD] = card(folder, repo).encode("utf-8", "backslashreplace")
    with _asked(repo) as library:
        api = _api(library, endpoint, token)
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.create_commit(
            repo,
            [
                library.CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
                for name, content in contents.items()
            ],
            commit_message=f"A run of featstore {__version__}",
            revision=revision,
        )
    return str(done.commit_url)


def pull(
    repo: str,
    out: str | Path,
    *,
    revision: str | None = None,
    endpoint: str | None = None,
    token: str | None = None,
) -> Path:
    """Downloads the run of a repository into a folder of its own, whole and checked, or not at all.

    No code comes along and none is run: what the files of a run may do here is asked where it is loaded.

    Args:
        repo: ``user/name``.
        out: the new folder.
        revision: a branch, tag or commit. Default: the main branch.
        endpoint: of the hub. Default: huggingface_hub's own.
        token: likewise.

    Raises:
        FeatureStoreError: if the folder isn't free, the hub doesn't give it, or it holds no run, or a damaged one.
    """
    folder = Path(out)
    check_free(folder, overwrite=False)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as made:
        whole, run = Path(made) / "pulled", Path(made) / "run"
        run.mkdir()
        with _asked(repo) as library:
            api = _api(library, endpoint, token)
            commit = api.model_info(repo, revision=revision).sha  # what comes later is of the same one
            api.snapshot_download(repo, revision=commit, local_dir=whole, allow_patterns=[FACTS])
            if not (whole / FACTS).is_file():
                raise FeatureStoreError(
                    f"{repo} holds no run: it has no {FACTS}. Expected what featstore-train push uploads."
                )
            if (size := (whole / FACTS).stat().st_size) > _MOST_FACTS:
                raise FeatureStoreError(
                    f"{repo} has a {FACTS} of {size:,} bytes; a run's facts are {_MOST_FACTS:,} at most. Nothing of "
                    "it is kept: ask whoever uploaded it."
                )
            shutil.copyfile(whole / FACTS, run / FACTS)
            try:
                names = _files(read_facts(run), run)
                api.snapshot_download(repo, revision=commit, local_dir=whole, allow_patterns=names)
                for name in names:
                    if (whole / name).is_file():
                        shutil.copyfile(whole / name, run / name)
                read_run(run)
            except FeatureStoreError as error:  # the folder that it names is gone by then
                raise type(error)(str(error).replace(str(run), repo)) from error
        if folder.exists():  # empty
            folder.rmdir()
        run.rename(folder)
    return folder


def card(run: str | Path, repo: str) -> str:
    """The model card of a run: YAML for the hub, then what people want to know, in Markdown."""
    folder = Path(run)
    facts = read_facts(folder)
    saved.check_facts(facts, folder)
    model, classes = facts["model"], [str(each) for each in facts["classes"]]
    scored = saved.read_scores(folder)
    about = _json(read_file(folder, RUN))
    versions = about.get("versions") or about  # of before run.json had a format
    header = {
        "library_name": "featstore",
        **({} if facts["task"] == "regression" else {"pipeline_tag": "image-classification"}),
        "tags": ["featstore", _plain(model["name"])],
        **({} if scored is None else {"metrics": [name for name in scored if name not in ("loss", "images")]}),
    }
    frozen = model["frozen"]
    lines = [
        "---",
        *(f"{name}: {json.dumps(value)}" for name, value in header.items()),  # JSON is YAML
        "---",
        f"# {_text(repo)}",
        "",
        f"A model made by featstore {_text(versions.get('featstore', ''))}: {_text(model['name'])} up to "
        f"{_text(model['default_cut'])}, reduction {_text(model['reduction'])}, head {_text(facts['head']['name'])}.",
        "",
        *([] if scored is None else [f"* scores: {_text(scores_line('valid', scored))}"]),
        f"* task: {_text(facts['task'])}",
        f"* view: {_text(_view_words(model['view']))}",
        f"* frozen: {_text('nothing' if frozen is None else f'up to {frozen}')}",
        f"* trunk of its features (their store's key has it): {_text(model['digests'].get(model['default_cut']))}",
        f"* trained on: {_text('; '.join(str(about.get('inputs')).splitlines()))}",
        f"* torch: {_text(versions.get('torch'))}",
        "",
        "## Classes",
        "",
        *(f"{number}. {_text(name)}" for number, name in enumerate(classes[:_MOST_CLASSES])),
        *([f"\nand {len(classes) - _MOST_CLASSES:,} more, in {FACTS}"] if len(classes) > _MOST_CLASSES else []),
        "",
        "## Use",
        "",
        "```",
        "pip install 'featstore[hub]'",
        f"featstore-train pull --repo {repo} --out run",
        "featstore-train predict --model run photos",
        "```",
        "",
        "```python",
        "from training import Learner",
        "",
        'Learner.load("run").predict("photos")',
        "```",
    ]
    return "\n".join(lines) + "\n"


@contextmanager
def _asked(repo: str) -> Iterator[Json]:
    """The library, while it is asked about a repository; what it refuses is a sentence."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise FeatureStoreError(
            "Model hubs are reached by huggingface_hub, and it isn't installed. Install it: pip install "
            "'featstore[hub]'."
        ) from error
    try:
        yield huggingface_hub
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        told = printable(" ".join(str(error).split())[:300], is_one_line=True)
        raise FeatureStoreError(
            f"The hub didn't do what was asked about {repo}: {told} Check the name, and that you may use it: hf auth "
            "login, or HF_TOKEN."
        ) from error


def _api(library: Json, endpoint: str | None, token: str | None) -> Json:
    """The hub; the library reads the variable only once, when something has imported it."""
    where = endpoint or os.environ.get("HF_ENDPOINT")
    return library.HfApi(endpoint=where, token=token, library_name="featstore", library_version=__version__)


def _files(facts: Mapping[str, Json], folder: Path) -> list[str]:
    """What the facts list, plain names alone; runs of version 1 list nothing.

    Raises:
        FeatureStoreError: for a name that would lead out of the folder, or stands for others.
    """
    files = facts.get("files") or {}
    names = list(files) if isinstance(files, dict) else [str(files)]
    wrong = [name for name in names if not _NAME.fullmatch(name) or name in (FACTS, CARD)]
    if wrong or not names:
        what = f"lists {wrong[0][:60]!r}" if wrong else "lists no files, as runs of version 1"
        raise FeatureStoreError(
            f"{folder / FACTS} {what}, and a run that is shared has all its files by their own names. Load the run "
            "(Learner.load) and save it anew."
        )
    return names


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
"""Of a run's files, on any system; and nothing that the hub's library takes for a pattern of names."""


def _json(content: bytes | None) -> dict[str, Json]:
    return {} if content is None else dict(json.loads(content))


def _view_words(view: Mapping[str, Json]) -> str:
    return ", ".join(f"{name} {value}" for name, value in view.items() if value is not None)


def _plain(text: str) -> str:
    return printable(text, is_one_line=True)


def _text(value: Json) -> str:
    """A text that Markdown and HTML show as it is, on one line."""
    return _MARKS.sub(r"\\\1", html.escape(_plain("-" if value is None else str(value)), quote=False))
