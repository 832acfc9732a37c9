"""The workers of a ModelAverage start together, take rounds, and end together."""

import zlib
from collections.abc import Sequence
from itertools import islice
from typing import Any, Protocol

import numpy as np
from keras import ops

from keras_avg import _backend
from keras_avg._workers import alike, nested_averages
from keras_avg._workers.inner_state import InnerState
from keras_avg._workers.rounds import Rounds
from keras_avg._wrapping import nesting
from keras_avg.distributed._weighted_sum import PRESENT, weighted_sum


class Callback(Protocol):
    """The callback that runs the rounds between the batches of `fit`: a SynchronizeWorkers."""

    def is_at_work(self) -> bool:
        """Whether Keras will call it after the current step."""

    def is_in_fit(self) -> bool:
        """Whether the last training of the model has this callback."""

    def keep_company(self) -> None:
        """Join the rounds with weight 0 until all workers have finished."""


class Center(Protocol):
    """The wrapper whose variables the workers share."""

    name: str
    skip_nonfinite: bool

    @property
    def averaged_variables(self) -> list[Any]:
        """The variables that the workers share."""

    def updates_so_far(self) -> int:
        """The number of updates on this worker."""

    def has_trained(self) -> bool:
        """Whether there was an update since the wrapper was made."""

    def finish_round(self, sums: list[Any], total: float) -> None:
        """Move the center towards the means, `sums / total`. Then set the variables to it."""

    def count_snapshots(self, number: int) -> None:
        """Add to the number of rounds."""


class Meeting:
    """Runs the start, the rounds and the end of training together with the other workers.

    Args:
        center: The wrapper whose variables are shared.
        communicator: A `keras_avg.distributed.Communicator`.
        rounds: When rounds take place.
        inner_state: The inner optimizers' slots.
        more_alike: Dict from a description to a further number that must be equal on all workers.
    """

    def __init__(
        self,
        center: Center,
        communicator: Any,
        rounds: Rounds,
        inner_state: InnerState,
        more_alike: dict[str, int],
    ) -> None:
        self._center = center
        self.communicator = communicator
        self.rounds = rounds
        self._inner_state = inner_state
        self._more_alike = more_alike
        self.callback: Callback | None = None  # the callback of the last training that had one
        #: The step up to which no round is missing. None: it is not known.
        self.met_until: int | None = None

    @property
    def is_of_several(self) -> bool:
        """Whether there are several workers."""
        return self.communicator.size > 1

    def is_between_batches(self) -> bool:
        """Whether SynchronizeWorkers runs the rounds, so that `apply` must not."""
        return self.callback is not None and self.callback.is_at_work()

    def is_in_fit(self) -> bool:
        """Whether the last `fit` has a SynchronizeWorkers callback."""
        return self.callback is not None and self.callback.is_in_fit()

    def keep_company(self) -> None:
        """Let the callback join the rounds until all workers have finished."""
        if self.callback is not None:
            self.callback.keep_company()

    def start_together(self, others: Sequence[Any] = ()) -> None:
        """Compare the workers, and take the chief's variables. Only before the first step."""
        self._refuse_without_variables("start_together")
        if self.met_until is not None or not self.is_of_several:
            return
        travelling = [*self._center.averaged_variables, *others]
        step, has_trained = self._center.updates_so_far(), self._center.has_trained()
        self._compare(travelling, step)
        if not has_trained:
            travelling += self._slots_in_use()
            is_chief = float(self.communicator.is_chief)
            values, total = weighted_sum(self.communicator, travelling, is_chief)
            if total:
                _backend.assign_quotients(values, total, travelling)
        self.met_until = step

    def no_round_is_missing(self) -> None:
        """Count rounds from this step on. Called when `fit` begins, or loads a state."""
        self.met_until = self._center.updates_so_far()

    def forget(self) -> None:
        """Called when a state was loaded. The workers are compared again before the next step."""
        self.met_until = None

    def meet(self, others: Sequence[Any] = (), is_training: bool = True) -> bool:
        """Take a round with all workers. Returns whether any of them was still training."""
        self._refuse_without_variables("meet")
        variables = self._center.averaged_variables
        riding = [*self._inner_state.averaged(), *others]
        nested = [o for o in nesting.workers_inside(self._center) if nesting.wraps(o)]
        brought = [array for wrapper in nested for array in nested_averages.brought(wrapper)]
        arrays = [*variables, *riding, *brought]
        arrays, total = weighted_sum(self.communicator, arrays, self._weight(is_training))
        if number := round(total):
            sums = iter(arrays)
            self._center.finish_round(list(islice(sums, len(variables))), float(number))
            _backend.assign_quotients(list(islice(sums, len(riding))), float(number), riding)
            for wrapper in nested:
                nested_averages.take(wrapper, sums)
            self._center.count_snapshots(1)
        if is_training:
            self.no_round_is_missing()
        return total > 0

    def _weight(self, is_training: bool) -> float:
        """This worker's weight in a round.

        All workers must join every round. A worker with non-finite weights adds nothing to it.
        """
        if not is_training:
            return 0.0
        center = self._center
        is_bad = center.skip_nonfinite and _has_nonfinite(center.averaged_variables)
        return PRESENT if is_bad else 1.0

    def refuse_missed_round(self) -> None:
        """Raise if a round was due since the last one, but did not take place."""
        if not self.is_of_several or self.is_in_fit():
            return  # `fit` ended well, or is already raising: on JAX this is called then too.
        met, now = self.met_until or 0, self._center.updates_so_far()
        if self.rounds.last_due(now) > met:
            self.met_until = now
            raise self.forgotten(f"no round since step {met}, now at step {now}")

    def forgotten(self, what: str) -> RuntimeError:
        """The error for training without the callback."""
        return RuntimeError(
            f"'{self._center.name}' averages over {self.communicator.size} workers between "
            f"batches. Received: {what}, without the callback. Pass "
            "`callbacks=[keras_avg.callbacks.SynchronizeWorkers()]` to `fit`, or train eagerly."
        )

    def _compare(self, variables: list[Any], step: int) -> None:
        """Raise if the workers differ. Every worker raises the same error."""
        mine = {
            "number of elements": sum(int(np.prod(tuple(v.shape))) for v in variables),
            "shapes (checksum)": zlib.crc32(str([tuple(v.shape) for v in variables]).encode()),
            **self.rounds._asdict(),
            **self._more_alike,
            "step": step,
        }
        if self._all_alike(list(mine.values())):
            return
        for name, of_workers in zip(mine, self._of_workers(list(mine.values())), strict=True):
            if len(set(of_workers)) > 1:
                raise ValueError(
                    f"The workers of '{self._center.name}' differ in their {name}. Received, by "
                    f"rank: {of_workers}. Build the same model on all of them, with the same "
                    "ModelAverage, and load the same file."
                )

    def _all_alike(self, numbers: list[int]) -> bool:
        (sums,) = self.communicator.all_reduce_sum([alike.with_squares(numbers)])
        return alike.are_equal(ops.convert_to_numpy(sums), self.communicator.size)

    def _of_workers(self, numbers: list[int]) -> list[list[int]]:
        table = np.zeros((self.communicator.size, alike.DIGITS * len(numbers)), "float32")
        table[self.communicator.rank] = alike.digits(numbers)
        (table,) = self.communicator.all_reduce_sum([table])
        return alike.numbers_in(ops.convert_to_numpy(table)).T.astype("int64").tolist()

    def _slots_in_use(self) -> list[Any]:
        """The inner optimizer's slots, without those that are zero on every worker.

        Before training, most slots are zero. Only slots that begin with their variables' values are
        left.
        """
        slots = self._inner_state.slots()
        if not slots:
            return []
        used = np.array([ops.convert_to_numpy(ops.any(slot != 0)) for slot in slots], "float32")
        (workers,) = self.communicator.all_reduce_sum([used])
        return [s for s, n in zip(slots, ops.convert_to_numpy(workers), strict=True) if n]

    def _refuse_without_variables(self, member: str) -> None:
        if not self._center.averaged_variables:
            raise ValueError(
                f"'{self._center.name}' was not built for any variables, so `{member}` has none to "
                "share. Call `optimizer.build(model.trainable_variables)` first, of a model whose "
                "weights are made: one with a `keras.Input`."
            )


def _has_nonfinite(variables: list[Any]) -> bool:
    return not _backend.concrete(_backend.all_finite(variables))
