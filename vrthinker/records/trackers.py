"""Sends the metrics of a run to an experiment tracker: trackio, wandb or tensorboard.

    with open_tracker(None, run=run, name="cold start", config=settings) as tracker:
        tracker.log({"loss/sft": 1.42}, step=120)

`metrics.jsonl` (`metrics_file`) always has everything, with or without a tracker.

Invariant: a tracker never ends a run. If it is not installed, does not start, or fails later, one line on
stderr says so, and nothing more is sent. A tracker writes nothing to stdout.

- `trackio` keeps runs in a local database (`trackio show`). It is the default if it is installed.
- `tensorboard` writes event files to `RUN/tensorboard` (`tensorboard --logdir RUN`).
- `wandb` writes to its server if this machine is logged in, or else to `RUN/wandb`, from where `wandb sync`
  sends it. `WANDB_MODE` decides otherwise.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from vrthinker.errors import one_line
from vrthinker.progress import Progress

TrackerName = Literal["trackio", "wandb", "tensorboard", "none"]
PROJECT = "vrthinker"


class _Backend(Protocol):
    """What is needed of a tracker."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """An open tracker, or what is left of one that failed. No method raises.

    Args:
        name: The tracker's name, for the message if it fails.
        start: A function that starts it; None for no tracker.
    """

    def __init__(self, name: str, start: Callable[[], _Backend] | None) -> None:
        self._name = name
        self._backend: _Backend | None = None
        if start is not None:
            self._backend = self._guarded("did not start", start)

    @property
    def is_open(self) -> bool:
        """Whether metrics still go somewhere."""
        return self._backend is not None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Sends a step's metrics. Values that are not finite are left out.

        Args:
            metrics: Slash name (`loss/sft`) -> value.
            step: The number of finished steps.
        """
        backend = self._backend
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        if backend is not None and finite:
            self._guarded("failed", lambda: backend.log(finite, step))

    def close(self) -> None:
        """Sends what is not sent yet. Closing twice is harmless."""
        backend = self._backend
        if backend is not None:
            self._guarded("did not end well", backend.close)
        self._backend = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _guarded(self, what: str, act: Callable[[], Any]) -> Any:
        """Runs a part of a tracker. If it fails, this is said in one line, and the tracker is given up."""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                return act()
        except (Exception, SystemExit) as error:
            self._backend = None
            reason = one_line(str(error) or type(error).__name__)
            if isinstance(error, ImportError):
                reason += "; pip install 'vrthinker[trackers]'"
            Progress().say(f"tracker {self._name} {what} ({reason}); metrics.jsonl has everything")
            return None


def open_tracker(
    name: TrackerName | None,
    *,
    run: Path,
    title: str,
    config: Mapping[str, Any],
    first_step: int = 0,
) -> Tracker:
    """Opens a tracker for a run. A resumed run goes on under the same name.

    Args:
        name: The tracker; None for trackio if it is installed, and otherwise none.
        run: The run's folder. Its absolute path decides which run of the tracker this is.
        title: What is trained, for the run's name there.
        config: The run's settings, as JSON values.
        first_step: The number of steps that were finished before. Later ones that a killed process had logged
            are logged again; tensorboard hides the older ones.
    """
    if name is None:
        name = "trackio" if importlib.util.find_spec("trackio") is not None else "none"
    folder = run.absolute()
    # Two runs may have equal folder names.
    key = hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]
    label = f"{folder.name}-{key}"
    starts: dict[str, Callable[[], _Backend]] = {
        "trackio": lambda: _Trackio(label, title, config),
        "wandb": lambda: _Wandb(label, title, config, folder),
        "tensorboard": lambda: _Tensorboard(folder / "tensorboard", first_step),
    }
    return Tracker(name, starts.get(name))


class _Trackio:
    def __init__(self, label: str, title: str, config: Mapping[str, Any]) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(
            project=PROJECT, name=label, config={"stage": title, **config}, resume="allow", embed=False
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(metrics), step=step)

    def close(self) -> None:
        self._trackio.finish()


class _Wandb:
    def __init__(self, label: str, title: str, config: Mapping[str, Any], run: Path) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE")
        if mode is None and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
            mode = "offline"  # it would ask for a key and wait
        self._run = wandb.init(
            project=PROJECT,
            id=label,
            name=label,
            job_type=title,
            config=dict(config),
            dir=str(run),
            resume="allow",
            mode=mode,
            settings=wandb.Settings(console="off"),
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class _Tensorboard:
    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
