"""How a wrapper's averages and the raw values take turns in the model."""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

from keras import ops

from keras_avg import _backend
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
        held = self._known_in_model() is True
        if not held and self._raw is not None:
            self._hold(None)  # a state from outside the swap was restored over it
        return held

    def swap_weights(self) -> None:
        """Exchange the raw and the averaged values in the model; twice gives every raw bit back.

        The averages stay in the optimizer, untouched. A model that is saved while swapped holds the
        averages, and its file the raw values too.

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

        Example:

        ```python
        with model.optimizer.average_weights():
            model.export("averaged")
        ```
        """
        if self.averages_in_model:
            yield
            return
        self.swap_weights()
        try:
            yield
        finally:
            self.swap_weights()

    def _put_averages_in(self) -> None:
        if not self.has_average:
            raise ValueError(
                f"'{self.name}' has taken no snapshot yet: there are no averages to put into the "
                f"model. Received: {self._updates_so_far()} updates so far. Train on, or let "
                "averaging start earlier."
            )
        averages, variables = self._averages_and_variables()
        _refuse_second_swap(self, variables)
        raw = RawValues(variables, [_backend.copy(v) for v in variables], self._updates_so_far())
        try:
            for average, variable in zip(averages, variables, strict=True):
                variable.assign(_backend.copy(average))
        except BaseException:
            raw.put_back()
            raise
        self._hold(raw)
        self._swapped.advance(1)

    def _put_raw_values_back(self) -> None:
        raw = self._raw_or_refuse()
        self._refuse_training_meanwhile()
        if raw.statistics:
            raise RuntimeError(
                f"The file that '{self.name}' was loaded from holds batch-normalization statistics "
                "of the raw weights, and the optimizer does not know their layers. Let "
                "keras_avg.callbacks.SwapAverageWeights(batch_norm_data=...) swap back, in `fit`."
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

    def _known_in_model(self) -> bool | None:
        """What the state says, where it can be read; what Python knows, while code is compiled."""
        flag = _backend.concrete(self._swapped.read())
        if flag is None:
            return self._raw is not None
        return bool(flag)

    def _raw_or_refuse(self) -> RawValues:
        if self._raw is None:
            raise RuntimeError(
                f"The state of '{self.name}' says that the model holds the averages, but the raw "
                "weights are not there: it was copied while swapped and restored by a route that "
                "does not carry them. Load a `.keras` or `.weights.h5` file, which holds both, or "
                "a copy taken while the raw weights were in the model."
            )
        return self._raw

    def _refuse_training_meanwhile(self) -> None:
        raw, now = self._raw_or_refuse(), self._updates_so_far()
        if now != raw.updates:
            before, raw.updates = raw.updates, now
            raise RuntimeError(
                f"The model was trained while it held the averages of '{self.name}'. Received: "
                f"{now - before} updates since they were put in. The raw weights of update "
                f"{before} are kept: `swap_weights()` now puts them back; those updates are lost."
            )

    def _refuse_while_in_model(self, what: str) -> None:
        if self._known_in_model():
            self._raw_or_refuse()
            raise RuntimeError(
                f"The model holds the averages of '{self.name}', so {what} is refused. Call "
                "`swap_weights()` to put the raw weights back first."
            )

    def _updates_so_far(self) -> int:
        return int(ops.convert_to_numpy(self.iterations))


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


def _holding(variables: list[Any]) -> list[Any]:
    """The wrappers whose averages are in some of the variables."""
    ours = {id(variable) for variable in variables}
    return [
        wrapper
        for wrapper in list(_WRAPPERS_IN_A_MODEL)
        if any(id(variable) in ours for variable in wrapper._raw.variables)
    ]


def bind_statistics(wrapper: Any, variables: list[Any]) -> None:
    """Tell a wrapper that was loaded while swapped where its statistics belong."""
    if wrapper._raw is not None:
        wrapper._raw.bind_statistics(variables)


def set_statistics_aside(wrapper: Any, variables: list[Any]) -> None:
    """Let a wrapper whose averages are in the model keep the raw statistics too."""
    wrapper._raw.add_statistics(variables)
