"""Makes backups that are whole at any moment, and goes on with training at the exact batch."""

import contextlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import keras

from keras_avg import _atomic, _backend, _keras_internals
from keras_avg._types import Logs, Path
from keras_avg._wrapping import train_function
from keras_avg.callbacks import _backup_file


class BackupAndRestore(keras.callbacks.BackupAndRestore):
    """Goes on with training from the last backup. The process may be killed at any moment.

    It replaces Keras' callback of this name. Keras' callback overwrites its only file. If the
    process is killed while it writes, no file is left that could be loaded. This callback writes a
    backup under another name, flushes it to disk and renames it. So the previous backup stays until
    the new one is whole. The position in training is part of the same file.

    If the data come in the same order again, training ends bit for bit where it would have ended
    without the interruption. So do not use `shuffle`, or let the order depend on the epoch alone.
    With an integer `save_freq`, the finished batches of the epoch are read again and skipped:
    callbacks are called for them, but no step is taken. (Keras' callback trains on them twice.) The
    backup contains the seeds of layers such as Dropout, and the metrics of the current epoch. It
    does not contain the state of other callbacks. The callback also reads a folder with a backup of
    Keras' callback.

    Only one process may use the folder. Each of several workers needs a folder of its own.

    Args:
        backup_dir: String or path of a local folder. It is made if it does not exist. Do not use it
            for anything else.
        save_freq: When to make a backup. `"epoch"`: at the end of each epoch. An integer >= 1:
            after this number of batches. False: never. Default `"epoch"`.
        double_checkpoint: Bool. Whether to also keep the backup before the last one. It is used if
            the disk has damaged the last one. Default False.
        delete_checkpoint: Bool. Whether to delete the backups when training ends. Default True.

    Raises:
        ValueError: If `backup_dir` is empty or not local, or if `save_freq` is something else. When
            training begins, if the model is not built, or if the backup is of another model.
        OSError: When training begins, if the backup is damaged and there is no earlier one.

    Example:

    ```python
    backup = keras_avg.callbacks.BackupAndRestore("backup", save_freq=100)
    model.fit(x, y, epochs=10, shuffle=False, callbacks=[backup])
    ```

    Reference:
        `keras.callbacks.BackupAndRestore`.
    """

    def __init__(
        self,
        backup_dir: Path,
        save_freq: str | int | bool = "epoch",
        double_checkpoint: bool = False,
        delete_checkpoint: bool = True,
    ) -> None:
        backup_dir = os.fspath(backup_dir)
        _refuse_remote(backup_dir)
        super().__init__(backup_dir, save_freq, double_checkpoint, delete_checkpoint)
        _check_frequency(save_freq)
        self._folder = pathlib.Path(backup_dir)
        self._latest = self._folder / "latest.weights.h5"
        self._previous = self._folder / "previous.weights.h5"
        self._restored: _backup_file.Position | None = None
        self._epoch = 0
        self._first = 0  # The first batch of the current execution.
        self._done = 0  # The number of finished batches in this epoch.
        self._unsaved = 0  # The number of batches since the last backup.

    def on_train_begin(self, logs: Logs = None) -> None:
        """Load the last backup, if there is one."""
        self._restored, self._unsaved = None, 0
        model = self.model
        if not model.built:
            raise ValueError(
                "BackupAndRestore needs a model that is built before `fit`. Received: the unbuilt "
                f"model {model.name!r}. Call it on a batch of data, or give it an `Input`."
            )
        found = [path for path in self._candidates() if path.exists()]
        if not found:
            return
        optimizer = model.optimizer
        if optimizer is not None and not optimizer.built:
            optimizer.build(model.trainable_variables)
        self._restored = self._load_first_whole(model, found)
        if self._restored is not None:
            _keras_internals.set_initial_epoch(model, self._restored.epoch)

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Skip the finished batches if the backup was made within this epoch."""
        self._epoch, self._done = epoch, 0
        self._begin_elsewhere_no_more()
        restored, self._restored = self._restored, None
        if restored is not None and restored.epoch == epoch and restored.batches:
            self._pass_over(self.model, restored)

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        """Remember the batch that comes now."""
        self._first = batch

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        """Make a backup if it is due."""
        self._unsaved += batch + 1 - self._done
        self._done = batch + 1
        if _is_number(self.save_freq) and self._unsaved >= self.save_freq:
            self._save()

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Make a backup if it is due."""
        train_function.leave(self.model, id(self))
        self._epoch, self._done = epoch + 1, 0
        if self.save_freq == "epoch":
            self._save()

    def on_train_end(self, logs: Logs = None) -> None:
        """Delete the backups if `delete_checkpoint` is True."""
        self._begin_elsewhere_no_more()
        if not self.delete_checkpoint:
            return
        for path in self._candidates():
            _atomic.remove_unfinished(path)
            path.unlink(missing_ok=True)
        _metadata_of_keras(self._latest).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # The folder contains something else.
            self._folder.rmdir()

    def _begin_elsewhere_no_more(self) -> None:
        """Let the next `fit` begin at its own `initial_epoch`. Keras would keep the old epoch."""
        _keras_internals.set_initial_epoch(self.model, None)

    def _save(self) -> None:
        with _atomic.written_aside(self._latest) as path:
            _backup_file.save(self.model, path, self._epoch, self._done)
            if self.double_checkpoint and self._latest.exists():
                _atomic.keep_as(self._latest, self._previous)
        _metadata_of_keras(self._latest).unlink(missing_ok=True)
        self._unsaved = 0

    def _candidates(self) -> list[pathlib.Path]:
        return [self._latest, self._previous]

    def _load_first_whole(self, model: Any, paths: list[pathlib.Path]) -> Any:
        try:
            return _backup_file.load(model, paths[0]) or _position_of_keras(paths[0])
        except OSError as error:
            if paths[1:]:
                return self._load_first_whole(model, paths[1:])
            raise OSError(
                f"The backup cannot be read. Received: {str(paths[0])!r}. Delete the folder to "
                "begin training anew."
            ) from error

    def _pass_over(self, model: Any, position: "_backup_file.Position") -> None:
        result, batches = _restore_metrics(model, position), model.steps_per_execution

        def result_now(batch: Any) -> Any:
            nonlocal result
            if result is None:
                _keras_internals.build_metrics(model, batch)
                result = _restore_metrics(model, position) or {}
            return result

        def step(function: Callable[..., Any], *arguments: Any) -> Any:
            if self._first < position.batches:
                return _backend.pass_over(arguments, batches, result_now)
            return function(*arguments)

        train_function.replace(model, id(self), step)


def _restore_metrics(model: Any, position: "_backup_file.Position") -> Any:
    """Restore the metrics, and return their results. None if they are not made yet or differ."""
    variables = model.metrics_variables
    if [tuple(v.shape) for v in variables] != [a.shape for a in position.metrics]:
        return None
    for variable, array in zip(variables, position.metrics, strict=True):
        variable.assign(array)
    return model.get_metrics_result()


def _refuse_remote(backup_dir: str) -> None:
    if not _atomic.is_local(backup_dir):
        raise ValueError(
            "Backups are renamed when they are whole, which takes a local folder. Received: "
            f"backup_dir={backup_dir!r}."
        )


def _check_frequency(save_freq: Any) -> None:
    if _is_number(save_freq) and save_freq < 1:
        raise ValueError(
            "`save_freq` is 'epoch', False, or a number of batches, at least 1. Received: "
            f"save_freq={save_freq!r}."
        )


def _is_number(save_freq: Any) -> bool:
    return save_freq != "epoch" and save_freq is not False


def _metadata_of_keras(path: pathlib.Path) -> pathlib.Path:
    """The file in which Keras' own callback stores the epoch of its backup."""
    return path.with_name("training_metadata.json")


def _position_of_keras(path: pathlib.Path) -> "_backup_file.Position | None":
    try:
        epoch = json.loads(_metadata_of_keras(path).read_text())["epoch"]
    except (OSError, ValueError):
        return None
    return _backup_file.Position(epoch, 0, [])
