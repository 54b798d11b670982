"""Ray shares: the settings of a sweep shared out among tasks of a Ray cluster, each the command on its own share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from featstore.errors import FeatureStoreError
from featstore.extraction.ray_actors import Ray, joined


def run_shares(words: Sequence[str], engine: Ray) -> None:
    """Runs ``featstore-train`` with `words` as so many tasks, each with its ``--shard i/n``; returns when all have.

    Tasks work in this process's folder, which all nodes must have under its path; a task that ends with its node is
    started again by Ray, and goes on from what is finished.

    Raises:
        ModuleNotFoundError: without Ray.
        FeatureStoreError: if a share failed; names its exit code, and the last that it said.
    """
    with joined(engine) as ray:
        task = ray.remote(num_gpus=engine.gpus_per_actor)(_share)
        waiting = [
            task.remote([*words, "--shard", f"{number}/{engine.actors}"], os.getcwd())
            for number in range(engine.actors)
        ]
        ended = ray.get(waiting)
    failed = [(number, code, words) for number, (code, words) in enumerate(ended) if code != 0]
    if failed:
        number, code, said = failed[0]
        raise FeatureStoreError(f"Share {number} of {engine.actors} ended with exit code {code}: {said}")


def _share(words: list[str], folder: str) -> tuple[int, str]:
    """Exit code of the command, and the last that it said."""
    ran = subprocess.run([sys.executable, "-m", "training", *words], cwd=folder, capture_output=True, text=True)
    return ran.returncode, (ran.stderr.strip().splitlines() or [""])[-1]
