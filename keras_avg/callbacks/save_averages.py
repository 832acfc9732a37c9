"""Snapshots of averages while training, from which others are made up afterwards."""

import os
import pathlib

import keras

from keras_avg import _checks
from keras_avg._optimizers.moving_average import MovingAverage
from keras_avg._types import Logs, Path
from keras_avg._wrapping import finding
from keras_avg.checkpoints import _snapshot_files
from keras_avg.checkpoints._profiles import Profile
from keras_avg.checkpoints._snapshot_files import Kept
from keras_avg.decays import PowerFunction


class SaveAverages(keras.callbacks.Callback):
    """Saves the power-function averages at regular steps, for `keras_avg.checkpoints.synthesize`.

    Each snapshot is one file in the directory, `averages-0000001200.h5` after 1200 updates: all
    averages of `MovingAverage`s whose decay is a `PowerFunction` (nest them for several lengths),
    their profiles, and the variables that have no average. About 32 snapshots of the lengths 0.05
    and 0.10 make up any length between 0.05 and 0.15 within 0.3 %.

    A file is written beside its place, flushed to the disk and then renamed. If training is killed
    meanwhile, the earlier files are whole, and what was half written is never read. A resumed run
    writes the files of later updates anew. Use a directory of its own for each run, and for each
    worker. Which copy the model holds does not matter.

    Args:
        directory: Path of the directory. It is made if it is not there.
        every_steps: Integer in [1, 2**31), in steps (updates), between snapshots; they are taken
            after the first batch, or the first `steps_per_execution` batches, that reaches a
            multiple of it. Default None: at the end of each epoch.
        dtype: `"float16"`, `"float32"` or `"float64"`: of the averages in the files. Numbers that
            are too large for float16 are kept in float32. Default `"float16"`.

    Raises:
        ValueError: If an argument is out of range. When training begins, if the model's optimizer
            has no `MovingAverage` whose decay is a `PowerFunction`.

    Example:

    ```python
    inner = keras_avg.MovingAverage("adam", average_decay=keras_avg.decays.PowerFunction(0.05))
    optimizer = keras_avg.MovingAverage(inner, average_decay=keras_avg.decays.PowerFunction(0.10))
    model.compile(optimizer=optimizer, loss="mse")
    saved = keras_avg.callbacks.SaveAverages("run/averages", every_steps=500)
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
        self._due = 0  # updates at which the next snapshot is due
        self._batches = self._batches_before = 0
        self._earliest = 0  # batch before which so many updates cannot have been done

    def on_train_begin(self, logs: Logs = None) -> None:
        """Called at the start of training."""
        if not self._averages():
            raise ValueError(
                "SaveAverages saves averages of MovingAverage(average_decay=PowerFunction(...)). "
                f"Received: optimizer={getattr(self.model, 'optimizer', None)!r}."
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        self._saved = []

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Called at the start of an epoch; a backup has been restored by then."""
        self._batches_before = self._batches
        self._wait()

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        """Called after a batch, or several. The model is looked at only where one may be due."""
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

    # On JAX looking at the optimizer costs a round trip of the state. A batch does one update at
    # most (none, where gradients are accumulated or the loss scale skips it), so there is nothing
    # to see before as many batches as updates are missing.

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
        model = self.model
        places = {id(variable): i for i, variable in enumerate(model.variables)}
        kept = [
            Kept(
                profile,
                wrapper.start_step,
                {
                    places[id(variable)]: average
                    for variable, average in zip(
                        wrapper.averaged_variables, wrapper.averages(), strict=True
                    )
                },
            )
            for wrapper in self._averages()
            if (profile := _profile(wrapper)).time > 0
        ]
        profiles = [each.profile for each in kept]
        if profiles and profiles != self._saved:  # nothing was averaged since
            path = _snapshot_files.path_of(self.directory, self._updates())
            _snapshot_files.write(path, model, kept, self.dtype)
            self._saved = profiles


def _profile(wrapper: MovingAverage) -> Profile:
    """How its average counts the updates up to the last averaging."""
    updates = wrapper.updates_so_far()
    last = updates - updates % wrapper.average_period
    return Profile(wrapper.average_decay.gamma, last - wrapper.start_step)
