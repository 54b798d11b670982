"""Trackers: the epochs of a fit told to TensorBoard, Weights & Biases, MLflow or trackio, as `on_epoch_end` tells them.

Each takes the numbers of a record under their own names, at the epoch's number, and is closed by ``with`` or `close`:

    with TensorBoard("logs/first") as board:
        learn.fit(10, on_epoch_end=[board, print])
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NoReturn, Self

from featstore.errors import FeatureStoreError
from training.loop.history import Record
from training.loop.ranks import is_first


class Tracker(ABC):
    """A function of an epoch's record that has something to close."""

    def __call__(self, record: Record) -> None:
        """Tells the numbers of an epoch; of several processes that train together only the first one's."""
        if not is_first():
            return
        self.tell({name: value for name, value in record.items() if name != "epoch"}, int(record["epoch"]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(is_whole=kind is None)

    @abstractmethod
    def tell(self, numbers: Mapping[str, float], epoch: int) -> None:
        """Tells `numbers` of an epoch, counted from 1."""

    @abstractmethod
    def close(self, *, is_whole: bool = True) -> None:
        """Ends it; `is_whole` says whether the fit came to its end."""


class TensorBoard(Tracker):
    """Scalars in event files; each epoch is in them once it is told.

    Args:
        folder: of the files, one a run: ``tensorboard --logdir`` takes what holds them.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Opens the file; the class describes the arguments."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            _missing("TensorBoard", "tensorboard", error)
        self.writer = SummaryWriter(os.fspath(folder))

    def tell(self, numbers: Mapping[str, float], epoch: int) -> None:
        """Writes a scalar for each number."""
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    def close(self, *, is_whole: bool = True) -> None:
        """Closes the file."""
        self.writer.close()


class WandB(Tracker):
    """A run of Weights & Biases.

    Args:
        options: of ``wandb.init``: project, name, config, mode="offline" and the like.
    """

    def __init__(self, **options: Any) -> None:
        """Begins the run; the class describes the arguments."""
        try:
            import wandb
        except ImportError as error:
            _missing("WandB", "wandb", error)
        self.run = wandb.init(**options)

    def tell(self, numbers: Mapping[str, float], epoch: int) -> None:
        """Logs the numbers; the epoch is the step."""
        self.run.log(dict(numbers), step=epoch)

    def close(self, *, is_whole: bool = True) -> None:
        """Ends the run, as failed where the fit was."""
        self.run.finish(exit_code=0 if is_whole else 1)


class MLflow(Tracker):
    """A run of an MLflow experiment, which isn't made the process's active one.

    Args:
        experiment: its name; it is made where there is none.
        uri: of the tracking server or store; default: MLflow's own.
        name: of the run; default: MLflow thinks one up.
    """

    def __init__(self, experiment: str, *, uri: str | None = None, name: str | None = None) -> None:
        """Begins the run; the class describes the arguments."""
        try:
            from mlflow import MlflowClient
        except ImportError as error:
            _missing("MLflow", "mlflow", error)
        self.client = MlflowClient(tracking_uri=uri)
        found = self.client.get_experiment_by_name(experiment)
        number = self.client.create_experiment(experiment) if found is None else found.experiment_id
        self.run = self.client.create_run(number, run_name=name).info.run_id

    def tell(self, numbers: Mapping[str, float], epoch: int) -> None:
        """Logs each number as a metric."""
        for name, value in numbers.items():
            self.client.log_metric(self.run, name, value, step=epoch)

    def close(self, *, is_whole: bool = True) -> None:
        """Ends the run, as failed where the fit was."""
        self.client.set_terminated(self.run, "FINISHED" if is_whole else "FAILED")


class Trackio(Tracker):
    """A run of trackio, on this machine unless the options say otherwise.

    Args:
        options: of ``trackio.init``: project, name, config and the like.
    """

    def __init__(self, **options: Any) -> None:
        """Begins the run; the class describes the arguments."""
        try:
            import trackio
        except ImportError as error:
            _missing("Trackio", "trackio", error)
        self.run = trackio.init(**options)

    def tell(self, numbers: Mapping[str, float], epoch: int) -> None:
        """Logs the numbers; the epoch is the step."""
        self.run.log(dict(numbers), step=epoch)

    def close(self, *, is_whole: bool = True) -> None:
        """Ends the run."""
        self.run.finish()


def _missing(tracker: str, library: str, error: ImportError) -> NoReturn:
    raise FeatureStoreError(
        f"{tracker} needs {library}, which isn't installed. Install it with pip install 'featstore[{library}]', or "
        "give another function of an epoch's record as on_epoch_end."
    ) from error
