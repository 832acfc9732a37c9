"""How the workers of a ModelAverage begin together and meet at its rounds."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_avg import _backend, _keras_internals
from keras_avg._optimizers import arguments
from keras_avg.distributed._weighted_sum import weighted_sum

DIGITS = 12  # hexadecimal ones, of the numbers by which workers are compared


class MeetsWorkers:
    """The start, the rounds and the end of training that workers have in common."""

    communicator: Any
    built: bool
    name: str
    interval_steps: int
    start_step: int
    inner_state: str
    skip_nonfinite: bool
    inner_optimizer: Any
    averages_in_model: bool
    last_due_step: Callable[[int], int]
    _snapshots: _backend.Counter
    _updates: _backend.Counter
    _clock: _backend.Counter
    _averages_and_variables: Callable[[], tuple[list[Any], list[Any]]]
    _finish_round: Callable[[list[Any], float], None]
    _step: Callable[[Any], Any]
    _updates_so_far: Callable[[], int]
    _variables_for: Callable[[list[Any], Any], list[Any]]

    _meets_between_batches = False  # in SynchronizeWorkers, instead of in `apply`
    _met_until: int | None = None  # the step up to which no round is missing; None: not begun
    _initial_slots: list[Any]

    def _apply(self, grads: list[Any], variables: list[Any] | None, aggregate: bool) -> None:
        if grads and self.communicator.size > 1:
            variables = self._variables_for(grads, variables)
            step = _backend.concrete(self._step(self._clock.read()))
            if self._meets_between_batches:
                self._refuse_missed_rounds(step)
            elif step is None:
                raise RuntimeError(self._forgotten("the train step is compiled"))
            else:
                self.start_together()
        super()._apply(grads, variables, aggregate)  # type: ignore[misc]

    def start_together(self, others: Sequence[Any] = ()) -> None:
        """Once, before the first step: compare the workers, and take the chief's variables.

        Args:
            others: List of variables (non-trainable ones) to take from the chief too.

        Raises:
            ValueError: If the workers differ in model, interval or step; on every worker.
        """
        if self._met_until is not None or self.communicator.size == 1:
            return
        _, variables = self._averages_and_variables()
        travelling = [*variables, *others]
        step, before_training = self._updates_so_far(), int(self._updates.read()) == 0
        self._compare(travelling, step)
        if before_training:
            values, total, _ = self._sum(travelling, weight=float(self.communicator.is_chief))
            if total:
                _backend.assign_quotients(travelling, values, total)
        self._met_until = step

    def meet(self, others: Sequence[Any] = (), is_training: bool = True) -> bool:
        """One round with all workers: mean, center, variables.

        Args:
            others: List of float variables that take the mean over the workers too.
            is_training: Bool. False for a worker that has run out of data, and only keeps the
                others company: its values have no weight.

        Returns:
            Whether any worker was still training.
        """
        _, variables = self._averages_and_variables()
        riding = [*self._averages_inside(), *self._averaged_slots(), *others]
        weight = float(is_training and not (self.skip_nonfinite and _has_nonfinite(variables)))
        sums, total, training = self._sum([*variables, *riding], weight, is_training)
        if total:
            self._finish_round(sums[: len(variables)], total)
            _backend.assign_quotients(riding, sums[len(variables) :], total)
            self._snapshots.advance(1)
        if is_training:
            self._met_until = self._updates_so_far()
        return bool(training)

    def finalize_variable_values(self, var_list: list[Any]) -> None:
        """Called by `fit` when training ends.

        Raises:
            RuntimeError: If a round was missed, in code compiled for `SynchronizeWorkers`.
        """
        super().finalize_variable_values(var_list)  # type: ignore[misc]
        if self.communicator.size == 1 or any(map(_keras_internals.is_purged, var_list)):
            return
        self._refuse_missed_rounds(self._updates_so_far())

    def _refuse_missed_rounds(self, now: int | None) -> None:
        met = self._met_until or 0
        if now is not None and met != _FAILED and self.last_due_step(now) > met:
            self._met_until = now
            raise RuntimeError(self._forgotten(f"no round since step {met}, now at step {now}"))

    def _due_if_finite(self, due: Any) -> Any:
        # Over workers a round is due for all or none: one with such weights takes part without any.
        if self.communicator.size > 1:
            return due
        return super()._due_if_finite(due)  # type: ignore[misc]

    def _average_over_workers(self, due: Any) -> None:
        if not self._meets_between_batches and _backend.concrete(ops.convert_to_tensor(due)):
            self.meet()

    def _sum(
        self, variables: list[Any], weight: float, is_training: bool = True
    ) -> tuple[list[Any], float, int]:
        try:
            return weighted_sum(self.communicator, variables, weight, is_training)
        except RuntimeError:
            self._met_until = _FAILED
            raise

    def _compare(self, variables: list[Any], step: int) -> None:
        """Raise the same error on every worker if they are not alike."""
        mine = {
            "number of elements": sum(int(np.prod(tuple(v.shape))) for v in variables),
            "shapes (checksum)": zlib.crc32(str([tuple(v.shape) for v in variables]).encode()),
            "interval_steps": self.interval_steps,
            "start_step": self.start_step,
            "inner_state (checksum)": zlib.crc32(self.inner_state.encode()),
            "step": step,
        }
        if self._all_alike(list(mine.values())):
            return
        for name, of_workers in zip(mine, self._of_workers(list(mine.values())), strict=True):
            if len(set(of_workers)) > 1:
                raise ValueError(
                    f"The workers of '{self.name}' differ in their {name}. Received, by rank: "
                    f"{of_workers}. Build the same model on all of them, with the same "
                    "ModelAverage, and load the same file."
                )

    def _all_alike(self, numbers: list[int]) -> bool:
        # Equal numbers are those without variance:  N * sum(d^2) == sum(d)^2.  Of hexadecimal
        # digits both are exact in float32, for more workers than there will be.
        digits = _digits(numbers)
        (sums,) = self.communicator.all_reduce_sum([np.stack([digits, digits**2])])
        first, second = ops.convert_to_numpy(sums).astype("float64")
        return bool(np.all(self.communicator.size * second == first**2))

    def _of_workers(self, numbers: list[int]) -> list[list[int]]:
        table = np.zeros((self.communicator.size, DIGITS * len(numbers)), "float32")
        table[self.communicator.rank] = _digits(numbers)
        (table,) = self.communicator.all_reduce_sum([table])
        digits = ops.convert_to_numpy(table).astype("int64").reshape(len(table), -1, DIGITS)
        return (digits @ 16 ** np.arange(DIGITS)).T.tolist()

    def _averages_inside(self) -> list[Any]:
        found, optimizer = [], self.inner_optimizer
        while hasattr(optimizer, "inner_optimizer"):
            found += optimizer._averages_and_variables()[0]
            optimizer = optimizer.inner_optimizer
        return found

    def _averaged_slots(self) -> list[Any]:
        return self._inner_slots() if self.inner_state == "average" else []

    def _inner_slots(self) -> list[Any]:
        inner = arguments.innermost(self)
        return _float_slots(inner, _keras_internals.built_variables(self))

    def _values_of_new_slots(self, variables: list[Any]) -> list[Any]:
        """What the inner optimizer's slots begin with; one number where that is all."""
        inner = arguments.innermost(self)
        new = type(inner).from_config(inner.get_config())
        new.build(variables)
        values = [ops.convert_to_numpy(slot) for slot in _float_slots(new, variables)]
        return [value.flat[0] if np.all(value == value.flat[0]) else value for value in values]

    def _forgotten(self, what: str) -> str:
        return (
            f"'{self.name}' averages over {self.communicator.size} workers between batches. "
            f"Received: {what}, without the callback. Pass "
            "`callbacks=[keras_avg.callbacks.SynchronizeWorkers()]` to `fit`, or train eagerly."
        )


_FAILED = -1


def _digits(numbers: list[int]) -> np.ndarray:
    return np.array([n >> 4 * place & 15 for n in numbers for place in range(DIGITS)], "float32")


def _float_slots(optimizer: Any, variables: list[Any]) -> list[Any]:
    slots = [s for v in variables for s in _keras_internals.slots(optimizer, v).values()]
    return [slot for slot in slots if keras.backend.is_float_dtype(slot.dtype)]


def _has_nonfinite(variables: list[Any]) -> bool:
    return not _backend.concrete(_backend.all_finite(variables))
