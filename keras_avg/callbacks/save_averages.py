"""Saves snapshots of averages during training. Other averages can be computed from them later."""

import os
import pathlib
import warnings
from typing import Any

import keras

from keras_avg import _checks
from keras_avg._optimizers.moving_average import MovingAverage
from keras_avg._types import Logs, Path
from keras_avg._wrapping import finding
from keras_avg.checkpoints import _runs, _snapshot_files
from keras_avg.checkpoints._profiles import Profile
from keras_avg.checkpoints._runs import Run
from keras_avg.checkpoints._snapshot_files import Kept, Snapshot
from keras_avg.decays import PowerFunction


class SaveAverages(keras.callbacks.Callback):
    """Saves the power-function averages at regular steps, for `keras_avg.checkpoints.synthesize`.

    Each snapshot is one file in the directory, such as `averages-0000001200.h5` after 1200 updates.
    It contains the averages of each `MovingAverage` whose decay is a `PowerFunction`, and their
    profiles. For several lengths, nest these wrappers. The file also contains the variables that
    have no average. About 32 snapshots of the lengths 0.05 and 0.10 are enough to compute any
    length between 0.05 and 0.15 within 0.3 %.

    A file is written under another name, flushed to the disk and then renamed. If training is
    killed meanwhile, the earlier files stay whole, and the unfinished file is never read. The model
    may hold the averages or the raw weights.

    Use one directory for each run and each worker. A resumed run goes on in its directory: it
    writes the files of later updates again. A run that begins anew in the directory of an earlier
    one causes a warning. It overwrites files of the same names, and `synthesize` leaves out the
    others. So the snapshots of two runs are never mixed.

    Args:
        directory: Path of the directory. It is made if it does not exist.
        every_steps: Integer in [1, 2**31), the number of steps (updates) between snapshots. A
            snapshot is taken after the first batch that reaches a multiple of it. If
            `steps_per_execution` is set, it is taken after the first execution that does. Default
            None: a snapshot at the end of each epoch.
        dtype: `"float16"`, `"float32"` or `"float64"`, the dtype of the averages in the files.
            Averages that are too large for float16 are saved in float32. Default `"float16"`.

    Raises:
        ValueError: If an argument is out of range. When training begins, if the model's optimizer
            has no `MovingAverage` whose decay is a `PowerFunction`, or if it goes on from an update
            of which the directory has other averages.

    Warns:
        UserWarning: When training begins, if the directory has snapshots of an earlier run only.

    Example:

    ```python
    inner = keras_avg.MovingAverage("adam", average_decay=keras_avg.decays.PowerFunction(0.05))
    optimizer = keras_avg.MovingAverage(inner, average_decay=keras_avg.decays.PowerFunction(0.10))
    model.compile(optimizer=optimizer, loss="mse")
    saved = keras_avg.callbacks.SaveAverages("run/averages")  # after each epoch
    model.fit(x, y, epochs=20, callbacks=[saved])
    keras_avg.checkpoints.synthesize(model, "run/averages", 0.07)
    ```

    Reference:
        Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models,
        https://arxiv.org/abs/2312.02696, section 3.2.
    """

    def __init__(
        self, directory: Path, every_steps: int | None = None, dtype: str = "float16"
    ) -> None:
        super().__init__()
        if not isinstance(directory, str | os.PathLike):
            raise ValueError(f"`directory` must be a path. Received: directory={directory!r}.")
        if every_steps is not None:
            every_steps = _checks.whole_number("every_steps", every_steps, minimum=1)
        self.directory = pathlib.Path(directory)
        self.every_steps = every_steps
        self.dtype = _checks.one_of("dtype", dtype, ("float16", "float32", "float64"))
        self._saved: list[Profile] = []
        self._run: Run | None = None
        self._due = 0  # The next snapshot is due after this number of updates.
        self._batches = self._batches_before = 0
        self._earliest = 0  # The number of updates cannot reach `_due` before this batch.

    def on_train_begin(self, logs: Logs = None) -> None:
        """Called at the start of training."""
        if not self._averages():
            raise ValueError(
                "SaveAverages saves averages of MovingAverage(average_decay=PowerFunction(...)). "
                f"Received: optimizer={getattr(self.model, 'optimizer', None)!r}."
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        self._saved, self._run = [], None

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Called at the start of an epoch. If there is a backup, it has been restored before."""
        if self._run is None:
            self._run = self._begun()
        self._batches_before = self._batches
        self._wait()

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        """Called after a batch, or several. It reads the model only if a snapshot may be due."""
        self._batches = self._batches_before + batch + 1
        if self.every_steps is None or self._batches < self._earliest:
            return
        if self._updates() >= self._due:
            self._save()
        self._wait()

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Called at the end of an epoch."""
        if self.every_steps is None:
            self._save()

    def _begun(self) -> Run:
        """A new run, after a check that the snapshots in the directory do not contradict it."""
        found = _snapshot_files.all_described(self.directory)
        run = _runs.begun(found, self._updates(), self.directory)
        before = [each for each in found if run.has(each)]
        if before:
            self._refuse_other_run(before[-1])
        elif found:
            warnings.warn(
                f"The directory {str(self.directory)!r} has snapshots of an earlier run: "
                f"{_runs.names(found)}. Files of the same names are overwritten, and `synthesize` "
                "leaves out the others. To keep that run, use another directory.",
                stacklevel=2,
            )
        return run

    def _refuse_other_run(self, snapshot: Snapshot) -> None:
        """Raise if the last snapshot before this training cannot be of the same run."""
        mine = {(w.average_decay.gamma, w.start_step): w for w in self._averages()}
        for average in snapshot.averages:
            wrapper = mine.get((average.profile.gamma, average.start))
            if wrapper is None:
                why = f"it has an average of gamma={average.profile.gamma:.6g}, which is not kept"
            elif snapshot.updates == self._updates() and not _snapshot_files.are_in(
                average, self._values(wrapper)
            ):
                why = f"its averages differ, though both are of {snapshot.updates} updates"
            else:
                continue
            raise ValueError(
                f"The snapshot {str(snapshot.file)!r} is not of the run that goes on here: {why}. "
                f"Received: directory={str(self.directory)!r}. Use one directory for each run."
            )

    # On JAX, the state must be written back before the optimizer can be read, and this costs time.
    # A batch does at most one update. It does none if gradients are accumulated or if loss scaling
    # skips the step. So, if n updates are missing, nothing can be due before n more batches.

    def _wait(self) -> None:
        if self.every_steps is not None:
            updates = self._updates()
            self._due = (updates // self.every_steps + 1) * self.every_steps
            self._earliest = self._batches + self._due - updates

    def _updates(self) -> int:
        return max(wrapper.updates_so_far() for wrapper in self._averages())

    def _averages(self) -> list[MovingAverage]:
        """The wrappers whose averages are saved."""
        return [
            wrapper
            for wrapper in finding.wrappers_of(self.model)
            if isinstance(wrapper, MovingAverage)
            and isinstance(wrapper.average_decay, PowerFunction)
        ]

    def _save(self) -> None:
        kept = [
            Kept(profile, wrapper.start_step, self._values(wrapper))
            for wrapper in self._averages()
            if (profile := _profile(wrapper)).time > 0
        ]
        profiles = [each.profile for each in kept]
        if profiles and profiles != self._saved:  # If they are equal, nothing new was averaged.
            path = _snapshot_files.path_of(self.directory, self._updates())
            assert self._run is not None
            _snapshot_files.write(path, self.model, kept, self.dtype, self._run)
            self._saved = profiles

    def _values(self, wrapper: MovingAverage) -> dict[int, Any]:
        """The averages of a wrapper, by the places of their variables in the model."""
        places = {id(variable): i for i, variable in enumerate(self.model.variables)}
        pairs = zip(wrapper.averaged_variables, wrapper.averages(), strict=True)
        return {places[id(variable)]: average for variable, average in pairs}


def _profile(wrapper: MovingAverage) -> Profile:
    """The profile of a wrapper's average at its last averaging."""
    updates = wrapper.updates_so_far()
    last = updates - updates % wrapper.average_period
    return Profile(wrapper.average_decay.gamma, last - wrapper.start_step)
