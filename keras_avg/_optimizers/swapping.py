"""How a wrapper's averages and the raw values take turns in the model."""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

from keras import ops

from keras_avg import _backend, _keras_internals
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

    def _put_averages_in(self) -> None:
        if not self.has_average:
            raise ValueError(
                f"'{self.name}' has taken no snapshot yet: there are no averages to put into the "
                f"model. Received: {self._updates_so_far()} updates so far. Train on, or let "
                "averaging start earlier."
            )
        _, variables = self._averages_and_variables()
        _refuse_second_swap(self, variables)
        raw = RawValues(variables, [_backend.copy(v) for v in variables], self._updates_so_far())
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
        else:
            _WRAPPERS_IN_A_MODEL.add(self)

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
                "a copy taken while the raw weights were in the model."
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
        for other in _holding(self._averages_and_variables()[1]):
            if not (_is_inside(self, other) or _is_inside(other, self)):
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
            for other in _holding(self._averages_and_variables()[1]):
                raise _refusal(other, what)

    def _updates_so_far(self) -> int:
        return int(ops.convert_to_numpy(self.iterations))


def _is_inside(inner: Any, outer: Any) -> bool:
    """Whether an optimizer is another, or is at work inside it."""
    if inner is outer:
        return True
    inside = [outer.inner_optimizer] if hasattr(outer, "inner_optimizer") else []
    inside = inside or list(getattr(outer, "optimizers", ()))
    return any(_is_inside(inner, each) for each in inside)


def supersede(variables: list[Any]) -> None:
    """Let a new optimizer have variables that hold another's averages: they are its start.

    So it is when a model is compiled anew after `SwapAverageWeights` left the averages in it. The
    other keeps its raw values, but is no longer in the way.
    """
    for other in _holding(variables):
        _WRAPPERS_IN_A_MODEL.discard(other)


def _refuse_second_swap(wrapper: Any, variables: list[Any]) -> None:
    for other in _holding(variables):
        raise RuntimeError(
            f"The model holds the averages of '{other.name}' already. Received: swap_weights() "
            f"of '{wrapper.name}'. Swap the first back before."
        )


def _refusal(holder: Any, what: str) -> RuntimeError:
    return RuntimeError(
        f"The model holds the averages of '{holder.name}', so {what} is refused. Call its "
        "`swap_weights()` to put the raw weights back first."
    )


def _holding(variables: list[Any]) -> list[Any]:
    """The wrappers whose averages are in some of the variables."""
    for wrapper in list(_WRAPPERS_IN_A_MODEL):
        wrapper._notice_restored_state()
    ours = {id(variable) for variable in variables}
    return [
        wrapper
        for wrapper in list(_WRAPPERS_IN_A_MODEL)
        if any(id(variable) in ours for variable in wrapper._raw.variables)
    ]


def bind_statistics(wrapper: Any, model: Any) -> None:
    """Tell a wrapper that was loaded while swapped where its statistics belong."""
    if wrapper._raw is not None:
        wrapper._raw.bind_statistics(model)


def set_statistics_aside(wrappers: list[Any], model: Any, variables: list[Any]) -> None:
    """Let a wrapper whose averages are in the model, if one is, keep the raw statistics too."""
    for wrapper in wrappers:
        if wrapper.averages_in_model and wrapper._raw is not None:
            wrapper._raw.add_statistics(model, variables)
            return
