"""How the workers of a ModelAverage begin together and meet at its rounds."""

import zlib
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np
from keras import ops

from keras_avg import _backend, _keras_internals
from keras_avg._optimizers import nested_averages, nesting
from keras_avg._optimizers.minimizing import variables_in
from keras_avg._optimizers.storage import check_attached
from keras_avg.distributed._weighted_sum import PRESENT, weighted_sum

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
    outer_optimizer: Any
    averages_in_model: bool
    last_due_step: Callable[[int], int]
    _snapshots: _backend.Counter
    _updates: _backend.Counter
    _clock: _backend.Counter
    _averages_and_variables: Callable[[], tuple[list[Any], list[Any]]]
    _inner_slots: Callable[[], list[tuple[Any, Any]]]
    _averaged_slots: Callable[[], list[Any]]
    _finish_round: Callable[[list[Any], float], None]
    build: Callable[[list[Any]], None]
    _step: Callable[[Any], Any]
    _updates_so_far: Callable[[], int]
    _variables_for: Callable[[list[Any], Any], list[Any]]

    _callback: Any = None  # the SynchronizeWorkers of the last training that had one
    _met_until: int | None = None  # the step up to which no round is missing; None: not known

    def _apply(self, grads: list[Any], variables: list[Any] | None, aggregate: bool) -> None:
        if grads and self.communicator.size > 1:
            # Asked before `build`: TensorFlow would leave variables of a trace that is refused.
            compiled = self._is_being_compiled()
            if (compiled or self._met_until is None) and not self._meets_between_batches():
                if compiled:
                    raise RuntimeError(self._forgotten("the train step is compiled"))
                variables = self._variables_for(grads, variables)
                self.start_together()
        super()._apply(grads, variables, aggregate)  # type: ignore[misc]

    def _before_first_gradients(self, var_list: Any) -> None:
        if self.communicator.size == 1 or self._is_being_compiled():
            return
        if not callable(var_list):
            self.build(variables_in(var_list))
        if _keras_internals.built_variables(self):
            self.start_together()

    def _is_being_compiled(self) -> bool:
        variable = _keras_internals.step_counter(self)
        check_attached([variable])
        counter = self._clock if self.built else _backend.Counter(variable)
        return _backend.concrete(counter.read()) is None

    def start_together(self, others: Sequence[Any] = ()) -> None:
        """Once, before the first step: compare the workers, and take the chief's variables.

        Args:
            others: List of variables (non-trainable ones) to take from the chief too.

        Raises:
            ValueError: If the optimizer has not been built; or if the workers differ in model,
                interval or step, on every worker.
        """
        self._refuse_without_variables("start_together")
        if self._met_until is not None or self.communicator.size == 1:
            return
        _, variables = self._averages_and_variables()
        travelling = [*variables, *others]
        step, before_training = self._updates_so_far(), int(self._updates.read()) == 0
        self._compare(travelling, step)
        if before_training:
            travelling += self._slots_in_use()
            values, total = weighted_sum(
                self.communicator, travelling, float(self.communicator.is_chief)
            )
            if total:
                _backend.assign_quotients(values, total, travelling)
        self._met_until = step

    def no_round_is_missing(self) -> None:
        """Called when `fit` begins, or a state was loaded in it: rounds count from here."""
        self._met_until = self._updates_so_far()

    def meet(self, others: Sequence[Any] = (), is_training: bool = True) -> bool:
        """One round with all workers: mean, center, variables.

        Args:
            others: List of float variables that take the mean over the workers too.
            is_training: Bool. False for a worker that has run out of data, and only keeps the
                others company: its values have no weight.

        Returns:
            Whether any worker was still training.

        Raises:
            ValueError: If the optimizer has not been built.
        """
        self._refuse_without_variables("meet")
        _, variables = self._averages_and_variables()
        riding, nested = [*self._averaged_slots(), *others], self._wrappers_inside()
        brought = [array for wrapper in nested for array in nested_averages.brought(wrapper)]
        has_values = is_training and not (self.skip_nonfinite and _has_nonfinite(variables))
        weight = 1.0 if has_values else PRESENT if is_training else 0.0
        arrays = [*variables, *riding, *brought]
        arrays, total = weighted_sum(self.communicator, arrays, weight)
        if number := round(total):
            sums = iter(arrays)
            self._finish_round(list(islice(sums, len(variables))), float(number))
            _backend.assign_quotients(list(islice(sums, len(riding))), float(number), riding)
            for wrapper in nested:
                nested_averages.take(wrapper, sums)
            self._snapshots.advance(1)
        if is_training:
            self._met_until = self._updates_so_far()
        return total > 0

    def load_own_variables(self, store: Any) -> None:
        """Read the wrapper's own variables, all or none; the workers then compare themselves."""
        super().load_own_variables(store)  # type: ignore[misc]
        self._met_until = None

    def set_weights(self, weights: Any) -> None:
        """Set `variables`, all or none; the workers then compare themselves."""
        super().set_weights(weights)  # type: ignore[misc]
        self._met_until = None

    def finalize_variable_values(self, var_list: list[Any]) -> None:
        """Called by `fit` when training ends.

        Raises:
            RuntimeError: If a round was missed, in code compiled for `SynchronizeWorkers`.
        """
        super().finalize_variable_values(var_list)  # type: ignore[misc]
        if self.communicator.size == 1 or any(map(_keras_internals.is_purged, var_list)):
            return
        if self._meets_between_batches():
            return  # `fit` ended well, or (JAX' calls this then too) with an error of its own
        met, now = self._met_until or 0, self._updates_so_far()
        if self.last_due_step(now) > met:
            self._met_until = now
            raise RuntimeError(self._forgotten(f"no round since step {met}, now at step {now}"))

    def _meets_between_batches(self) -> bool:
        """Whether SynchronizeWorkers is there to meet the others, so that `apply` need not."""
        return self._callback is not None and self._callback.is_at_work()

    def _due_if_finite(self, due: Any) -> Any:
        # Over workers a round is due for all or none: one with such weights takes part without any.
        if self.communicator.size > 1:
            return due
        return super()._due_if_finite(due)  # type: ignore[misc]

    def _average_over_workers(self, due: Any) -> None:
        if _backend.concrete(due) and not self._meets_between_batches():
            self.meet()

    def _compare(self, variables: list[Any], step: int) -> None:
        """Raise the same error on every worker if they are not alike."""
        mine = {
            "number of elements": sum(int(np.prod(tuple(v.shape))) for v in variables),
            "shapes (checksum)": zlib.crc32(str([tuple(v.shape) for v in variables]).encode()),
            "interval_steps": self.interval_steps,
            "start_step": self.start_step,
            "inner_state (checksum)": zlib.crc32(self.inner_state.encode()),
            "outer_optimizer (checksum)": zlib.crc32(type(self.outer_optimizer).__name__.encode()),
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

    def _wrappers_inside(self) -> list[Any]:
        return [o for o in nesting.workers_inside(self) if nesting.wraps(o)]

    def _slots_in_use(self) -> list[Any]:
        """The inner optimizer's slots but for those that are zero on every worker.

        Before training these are few: such as begin with the variables' values.
        """
        slots = [slot for slot, _ in self._inner_slots()]
        if not slots:
            return []
        used = np.array([ops.convert_to_numpy(ops.any(slot != 0)) for slot in slots], "float32")
        (workers,) = self.communicator.all_reduce_sum([used])
        return [s for s, n in zip(slots, ops.convert_to_numpy(workers), strict=True) if n]

    def _refuse_without_variables(self, member: str) -> None:
        if not _keras_internals.built_variables(self):
            raise ValueError(
                f"'{self.name}' was not built for any variables, so `{member}` has none to share. "
                "Call `optimizer.build(model.trainable_variables)` first, of a model whose weights "
                "are made: one with a `keras.Input`."
            )

    def _forgotten(self, what: str) -> str:
        return (
            f"'{self.name}' averages over {self.communicator.size} workers between batches. "
            f"Received: {what}, without the callback. Pass "
            "`callbacks=[keras_avg.callbacks.SynchronizeWorkers()]` to `fit`, or train eagerly."
        )


def _digits(numbers: list[int]) -> np.ndarray:
    return np.array([n >> 4 * place & 15 for n in numbers for place in range(DIGITS)], "float32")


def _has_nonfinite(variables: list[Any]) -> bool:
    return not _backend.concrete(_backend.all_finite(variables))
