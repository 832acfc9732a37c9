"""How a wrapper's averages and the raw values take turns in the model."""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

from keras import ops

from keras_avg import _backend, _keras_internals
from keras_avg._optimizers import bindings, nesting, train_guard
from keras_avg._optimizers.averages import HasAverages
from keras_avg._optimizers.raw_values import RawValues
from keras_avg._optimizers.storage import check_attached

_WRAPPERS_IN_A_MODEL: weakref.WeakSet = weakref.WeakSet()


class SwapsWeights(HasAverages):
    """Exact swaps: averages stay where they are, raw values are set aside and put back."""

    iterations: Any
    _raw: RawValues | None
    _swapped: _backend.Counter

    @property
    def averages_in_model(self) -> bool:
        """Whether the model holds the averages at the moment. For use outside compiled code."""
        if not self.built:
            return False
        check_attached(self._own_variables.values())
        self._notice_restored_state()
        return bool(_backend.concrete(self._swapped.read()))

    def swap_weights(self) -> None:
        """Exchange the raw and the averaged values in the model; twice gives every raw bit back.

        The averages stay in the optimizer, untouched. A model that is saved while swapped holds the
        averages, and its file the raw values too. Batch-normalization statistics that
        `keras_avg.update_batch_norm` computes meanwhile go out with the averages.

        Raises:
            ValueError: If there is no snapshot yet.
            RuntimeError: If the model was trained while the averages were in it, if another wrapper
                has its averages in the same variables, or if the raw values were lost on the way
                (by `set_weights`, Orbax or `tf.train.Checkpoint` of a copy taken while swapped).

        Example:

        ```python
        model.optimizer.swap_weights()
        print(model.evaluate(x, y))  # of the averages
        model.optimizer.swap_weights()
        ```
        """
        self._check_built("swap_weights")
        check_attached([*self._own_variables.values(), *self._averages_and_variables()[1]])
        if self.averages_in_model:
            self._put_raw_values_back()
        else:
            self._put_averages_in()

    @contextlib.contextmanager
    def average_weights(self) -> Iterator[None]:
        """Context in which the model holds the averages; outside what it held before.

        Batch-normalization statistics that `keras_avg.update_batch_norm` computes in it for the
        averages go out with them.

        Example:

        ```python
        with model.optimizer.average_weights():
            keras_avg.update_batch_norm(model, x)
            model.export("averaged")
        ```
        """
        if self.averages_in_model:
            self._raw_or_refuse()
            yield
            return
        self.swap_weights()
        try:
            yield
        finally:
            if self.averages_in_model:
                self.swap_weights()

    @contextlib.contextmanager
    def raw_weights(self) -> Iterator[None]:
        """Context in which the model holds the raw weights; outside what it held before.

        Raw weights, averages and iterations may change in it.
        """
        if not self.averages_in_model:
            yield
            return
        raw = self._raw_or_refuse()
        raw.exchange()
        try:
            yield
        finally:
            raw.exchange()
            self._assign_averages()

    def keep_averages(self) -> None:
        """End a swap with the averages in the model for good; the raw values are gone.

        Training goes on from the averages.

        Raises:
            RuntimeError: If the averages are not in the model.
        """
        self._check_built("keep_averages")
        if not self.averages_in_model:
            raise RuntimeError(
                f"The model does not hold the averages of '{self.name}'. Use "
                "`assign_average_vars(model.variables)`, which puts them in for good."
            )
        self._hold(None)
        self._swapped.advance(-1)

    def _put_averages_in(self) -> None:
        if not self.has_average:
            raise ValueError(
                f"'{self.name}' has taken no snapshot yet: there are no averages to put into the "
                f"model. Received: {self._updates_so_far()} updates so far. Train on, or let "
                f"averaging start earlier.{self._without_averages()}"
            )
        _, variables = self._averages_and_variables()
        _refuse_second_swap(self, variables)
        raw = RawValues(variables, [_backend.copy(v) for v in variables], self._updates_so_far())
        raw.updates_of_others = self._updates_of_others()
        try:
            self._assign_averages()
        except BaseException:
            raw.put_back()
            raise
        self._swapped.advance(1)
        self._hold(raw)  # last: another thread takes raw values without the flag for restored over

    def _assign_averages(self) -> None:
        for average, variable in zip(*self._averages_and_variables(), strict=True):
            self.assign(variable, _backend.copy(average))  # which casts; a `tf.Variable` does not

    def _put_raw_values_back(self) -> None:
        raw = self._raw_or_refuse()
        self._refuse_training_meanwhile()
        if raw.statistics:
            raise RuntimeError(
                f"What '{self.name}' was loaded from holds batch-normalization statistics "
                "of the raw weights, and the optimizer does not know the model. Load the whole "
                "model's file, or let keras_avg.callbacks.SwapAverageWeights swap back, in `fit`."
            )
        raw.put_back()
        self._hold(None)
        self._swapped.advance(-1)

    def _hold(self, raw: RawValues | None) -> None:
        self._raw = raw
        if raw is None:
            _WRAPPERS_IN_A_MODEL.discard(self)
            train_guard.open_again(self._models_concerned(), id(self))
        else:
            _WRAPPERS_IN_A_MODEL.add(self)
            train_guard.close(self._models_concerned(), id(self), self._refuse_compiled_training)

    def _models_concerned(self) -> list[Any]:
        """The models of all wrappers over the variables, as far as they are known."""
        return bindings.models_of(bindings.wrappers_over(_keras_internals.built_variables(self)))

    def _updates_of_others(self) -> dict[int, int]:
        """How many updates other wrappers over the same variables have done, by their ids."""
        return {
            id(other): other._updates_so_far()
            for other in bindings.wrappers_over(_keras_internals.built_variables(self))
            if other is not self
            and not _keras_internals.is_purged(_keras_internals.step_counter(other))
        }

    def _refuse_compiled_training(self) -> None:
        self._notice_restored_state()
        if self._raw is not None and self in _WRAPPERS_IN_A_MODEL:
            raise _refusal(self, "training")

    def _known_in_model(self) -> bool:
        """What the state says, where it can be read; what Python knows, while code is compiled."""
        self._notice_restored_state()
        flag = _backend.concrete(self._swapped.read())
        return self._raw is not None if flag is None else bool(flag)

    def _notice_restored_state(self) -> None:
        """A state from outside the swap, restored over it by whatever route, has ended it."""
        if self._raw is None:
            return
        flag = _keras_internals.stored_value(self._own_variables["averages_in_model"])
        if flag is not None and _backend.concrete(flag) == 0:
            self._hold(None)

    def _raw_or_refuse(self) -> RawValues:
        if self._raw is None:
            raise RuntimeError(
                f"The state of '{self.name}' says that the model holds the averages, but the raw "
                "weights are not there: it was copied while swapped and restored by a route that "
                "does not carry them. Load a `.keras` or `.weights.h5` file, which holds both, or "
                "a copy taken while the raw weights were in the model; or go on from the averages: "
                f"`keras_avg.assign_average_vars(model)`.{self._without_averages()}"
            )
        return self._raw

    def _refuse_training_meanwhile(self, even_if_told: bool = False) -> None:
        raw, now = self._raw_or_refuse(), self._updates_so_far()
        if now == raw.updates or (now == raw.updates_told_of and not even_if_told):
            return
        raw.updates_told_of = now
        raise RuntimeError(
            f"The model was trained, or another state restored, while it held the averages of "
            f"'{self.name}'. Received: {now - raw.updates} updates since they were put in. The raw "
            f"weights of update {raw.updates} are kept: `swap_weights()` now puts them back; those "
            "updates are lost."
        )

    def _refuse_training_under_another(self) -> None:
        for other in holding(self._averages_and_variables()[1]):
            related = nesting.is_inside(self, other) or nesting.is_inside(other, self)
            before = other._raw.updates_of_others.get(id(self), 0)
            if not related and self._updates_so_far() != before:
                raise RuntimeError(
                    f"The model was trained by '{self.name}' while it held the averages of "
                    f"'{other.name}', in code compiled before. The raw weights from before are "
                    f"kept: `swap_weights()` of '{other.name}' puts them back; what was trained "
                    "since is lost."
                )

    def _refuse_while_in_model(self, what: str) -> None:
        if self._known_in_model():
            self._raw_or_refuse()
            raise _refusal(self, what)
        if _WRAPPERS_IN_A_MODEL:
            for other in holding(self._averages_and_variables()[1]):
                raise _refusal(other, what)

    def _updates_so_far(self) -> int:
        return int(ops.convert_to_numpy(self.iterations))


def supersede(wrapper: Any) -> None:
    """Let a new optimizer have variables that hold another's averages: they are its start.

    So it is when a model is compiled anew after `SwapAverageWeights` left the averages in it. The
    other keeps its raw values, but is no longer in the way. Another model that shares some of the
    variables is another matter: what it trains would be undone by the first one's next swap.
    """
    for other in holding(_keras_internals.built_variables(wrapper)):
        if _train_the_same_model(wrapper, other):
            _WRAPPERS_IN_A_MODEL.discard(other)


def _train_the_same_model(wrapper: Any, other: Any) -> bool:
    ours, theirs = bindings.models_of([wrapper]), bindings.models_of([other])
    if ours and theirs:
        return any(model is another for model in ours for another in theirs)
    built = _keras_internals.built_variables
    return all(_keras_internals.variable_index(other, v) is not None for v in built(wrapper)) or (
        all(_keras_internals.variable_index(wrapper, v) is not None for v in built(other))
    )


def _refuse_second_swap(wrapper: Any, variables: list[Any]) -> None:
    for other in holding(variables):
        raise RuntimeError(
            f"The model holds the averages of '{other.name}' already. Received: swap_weights() "
            f"of '{wrapper.name}'. Swap the first back before."
        )


def _refusal(holder: Any, what: str) -> RuntimeError:
    return RuntimeError(
        f"The model holds the averages of '{holder.name}', so {what} is refused. To put the raw "
        "weights back, call `keras_avg.swap_weights(model)`. To go on from the averages, call "
        "`keras_avg.assign_average_vars(model)`, or compile the model anew. (A model that shares "
        f"layers with it waits too: `model` is the one that '{holder.name}' trains.)"
    )


def holding(variables: list[Any]) -> list[Any]:
    """The wrappers whose averages are in some of the variables."""
    for wrapper in list(_WRAPPERS_IN_A_MODEL):
        wrapper._notice_restored_state()
    return [
        wrapper
        for wrapper in list(_WRAPPERS_IN_A_MODEL)
        if any(_keras_internals.variable_index(wrapper, v) is not None for v in variables)
    ]


def bind_statistics(wrapper: Any, model: Any) -> None:
    """Tell a wrapper that was loaded while swapped where its statistics belong."""
    if wrapper._raw is not None:
        wrapper._raw.bind_statistics(model)


def set_statistics_aside(model: Any, variables: list[Any]) -> None:
    """Let a wrapper whose averages are in the model, if one is, keep the raw statistics too."""
    for wrapper in holding(model.variables) or _holding_for(variables):
        if wrapper._raw is not None:
            wrapper._raw.add_statistics(model, variables)
            return


def _holding_for(statistics: list[Any]) -> list[Any]:
    """The wrappers that have averages in a model with these statistics."""
    ours = {id(variable) for variable in statistics}
    return [
        wrapper
        for wrapper in list(_WRAPPERS_IN_A_MODEL)
        for model in bindings.models_of([wrapper])
        if any(id(variable) in ours for variable in model.variables)
    ]
