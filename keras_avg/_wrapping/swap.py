"""Swaps raw values and averages in a model's variables."""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from keras import ops

from keras_avg import _backend, _keras_internals
from keras_avg._wrapping import bindings, nesting, train_function
from keras_avg._wrapping.raw_values import RawValues
from keras_avg._wrapping.weak import WeakList

Values = Callable[[], Sequence[Any]]  # returns the values to show, as tensors

# Swaps whose averages are in a model. The references are weak: if the optimizer is deleted, the
# model just keeps the averages.
_under_way = WeakList()


class Swap:
    """Shows values in the model, and puts the raw values back, bit for bit.

    To show values, it sets the raw values aside and assigns copies of the shown values. It knows
    nothing about averages: callers pass a function that returns the values to show.

    Args:
        owner: The wrapper whose averages are shown. The swap uses its name and its models.
        variables: List of the model's variables in which it shows values.
        flag: Integer variable, part of the state. It is 1 while the model holds the shown values.
        updates: Function without arguments. It returns the number of updates, an integer.
    """

    def __init__(
        self, owner: Any, variables: Sequence[Any], flag: Any, updates: Callable[[], int]
    ) -> None:
        self._owner = owner
        self._flag = flag
        self._counter = _backend.Counter(flag)
        self._updates = updates
        self.variables = list(variables)
        self.raw: RawValues | None = None
        self._is_raw_lost = False  # True if a restored state says so
        self.why_raw_values_are_lost = ""  # a sentence, if a loaded file gives the reason

    def is_in(self) -> bool:
        """Whether the model holds the shown values, according to the state."""
        self.notice_restored_state()
        return bool(_backend.concrete(self._counter.read()))

    def put_in(self, values: Values) -> None:
        """Set the raw values aside, and show other values.

        Raises:
            RuntimeError: If some of the variables hold the averages of another wrapper.
        """
        for other in holding(self.variables):
            raise RuntimeError(
                f"The model holds the averages of '{other._owner.name}' already. Received: "
                f"swap_weights() of '{self._owner.name}'. Swap the first back before."
            )
        raw = RawValues(self.variables, _backend.set_aside(self.variables), self._updates())
        raw.updates_of_others = self._updates_of_others()
        try:
            self.show(values)
        except BaseException:
            raw.put_back()
            raise
        self._counter.advance(1)
        # Must come last: a thread that sees the raw values without the flag would conclude that a
        # state was restored, and drop them.
        self.hold(raw)

    def put_back(self) -> None:
        """Put the raw values back into the model.

        Raises:
            RuntimeError: If they are lost, or if the model was trained since they were set aside.
        """
        raw = self.raw_or_refuse()
        self.refuse_training_meanwhile()
        if raw.statistics:
            raise RuntimeError(
                f"What '{self._owner.name}' was loaded from holds batch-normalization statistics "
                "of the raw weights, and the optimizer does not know the model. Call "
                "`keras_avg.swap_weights(model)`, or let keras_avg.callbacks.SwapAverageWeights "
                "swap back, in `fit`."
            )
        raw.put_back()
        self.end()

    def end(self) -> None:
        """End the swap, and leave the shown values in the model. The raw values are lost."""
        self.hold(None)
        self.why_raw_values_are_lost = ""
        self._counter.advance(-1)

    def show(self, values: Values) -> None:
        """Assign copies of the values to the variables."""
        _backend.assign_all(self.variables, [_backend.to_assign(value) for value in values()])

    @contextlib.contextmanager
    def showing(self, values: Values) -> Iterator[None]:
        """Context in which the model holds some values. It may hold raw or shown values outside."""
        if not self.is_in():
            self.put_in(values)
            try:
                yield
            finally:
                if self.is_in():
                    self.put_back()
            return
        raw = self.raw_or_refuse()
        before, mark = _backend.set_aside(self.variables), raw.mark()
        self.show(values)
        try:
            yield
        finally:
            if self.raw is raw:
                self.show(lambda: before)
                raw.rewind(mark)

    @contextlib.contextmanager
    def raw_again(self, values: Values) -> Iterator[None]:
        """Context in which the model holds the raw values. It may hold shown values outside.

        Raw values, averages and counters may change inside the context.
        """
        if not self.is_in():
            yield
            return
        raw = self.raw_or_refuse()
        raw.exchange()
        try:
            yield
        finally:
            # Must come before the exchange: a rule may compute these values from the variables.
            shown = [_backend.copy(value) for value in values()]
            raw.exchange()
            self.show(lambda: shown)

    def hold(self, raw: RawValues | None) -> None:
        """Keep the raw values until they are in the model again. None: they are in the model."""
        self.raw, self._is_raw_lost = raw, False
        models = bindings.models_of(bindings.wrappers_over(self.variables))
        if raw is None:
            _under_way.discard(self)
            for model in models:
                train_function.leave(model, id(self))
        else:
            _under_way.add(self)
            refuse = _refusing(self)
            for model in models:
                train_function.watch(model, id(self), refuse)
                train_function.watch_eager_steps(model, id(self), refuse, _training(self._owner))

    def note_state(self) -> None:
        """Call it after a complete state was set.

        If the state says that the model holds averages, the raw values are still aside, or lost.
        """
        is_in = self.is_in()
        if not is_in:
            self.hold(None)
        self._is_raw_lost = is_in and self.raw is None

    def notice_restored_state(self) -> None:
        """End the swap if its flag is 0 now: then a state without the swap was restored."""
        if self.raw is None:
            return
        flag = _keras_internals.stored_value(self._flag)
        if flag is not None and _backend.concrete(flag) == 0:
            self.hold(None)

    def raw_or_refuse(self) -> RawValues:
        """The raw values. Raise if they are lost."""
        if self.raw is None:
            raise RuntimeError(
                f"The state of '{self._owner.name}' says that the model holds the averages, but "
                "the raw weights are not there: it was copied while swapped and restored by a "
                "route that does not carry them. Load a `.keras` or `.weights.h5` file, which "
                "holds both, or a copy taken while the raw weights were in the model; or go on "
                "from the averages: `keras_avg.assign_average_vars(model)`."
                f"{self.why_raw_values_are_lost}"
            )
        return self.raw

    def refuse_while_in(self, what: str) -> None:
        """Refuse an operation while the variables hold averages of this or another wrapper."""
        self.notice_restored_state()
        # While code is compiled, the flag has no value. Then the fields of this object decide.
        flag = _backend.concrete(self._counter.read())
        if flag or (flag is None and (self.raw is not None or self._is_raw_lost)):
            self.raw_or_refuse()
            raise self._refusal(what)
        for other in holding(self.variables) if _under_way else ():
            if not bindings.has_replaced(self._owner, other._owner):
                raise other._refusal(what)
            _under_way.discard(other)

    def refuse_compiled_training(self) -> None:
        """Refuse a train step that was compiled before the swap. It is called before each step."""
        self.notice_restored_state()
        if self in _under_way:
            _keras_internals.keep_state_of_refused_step()
            raise self._refusal("training")

    def refuse_training_meanwhile(self, even_if_told: bool = False) -> None:
        """Raise if there were updates since the swap. Compiled code does not see the swap."""
        raw, now = self.raw_or_refuse(), self._updates()
        if now == raw.updates or (now == raw.updates_told_of and not even_if_told):
            return
        raw.updates_told_of = now
        raise RuntimeError(
            f"The model was trained, or another state restored, while it held the averages of "
            f"'{self._owner.name}'. Received: {now - raw.updates} updates since they were put in. "
            f"The raw weights of update {raw.updates} are kept: `swap_weights()` now puts them "
            "back; those updates are lost."
        )

    def refuse_training_under_another(self) -> None:
        """Raise if this wrapper has trained variables that hold another wrapper's averages."""
        for other in holding(self.variables):
            related = nesting.is_inside(self._owner, other._owner) or nesting.is_inside(
                other._owner, self._owner
            )
            before = other.raw.updates_of_others.get(id(self._owner), 0) if other.raw else 0
            if not related and self._updates() != before:
                raise RuntimeError(
                    f"The model was trained by '{self._owner.name}' while it held the averages of "
                    f"'{other._owner.name}', in code compiled before. The raw weights from before "
                    f"are kept: `swap_weights()` of '{other._owner.name}' puts them back; what was "
                    "trained since is lost."
                )

    def _updates_of_others(self) -> dict[int, int]:
        """The numbers of updates of other wrappers over the same variables, by their ids."""
        return {
            id(other): int(ops.convert_to_numpy(other.iterations))
            for other in bindings.wrappers_over(self.variables)
            if other is not self._owner
            and not _keras_internals.is_purged(_keras_internals.step_counter(other))
        }

    def _refusal(self, what: str) -> RuntimeError:
        name = self._owner.name
        return RuntimeError(
            f"The model holds the averages of '{name}', so {what} is refused. To put the raw "
            "weights back, call `keras_avg.swap_weights(model)`. To go on from the averages, call "
            "`keras_avg.assign_average_vars(model)`, or compile the model anew. (A model that "
            f"shares layers with it waits too: `model` is the one that '{name}' trains.)"
        )


def _refusing(swap: Swap) -> Callable[[], contextlib.AbstractContextManager]:
    """A function that refuses each train step during the swap. It has a weak reference to it."""
    weakly = weakref.ref(swap)

    def refuse() -> contextlib.AbstractContextManager:
        if (alive := weakly()) is not None:
            alive.refuse_compiled_training()
        return contextlib.nullcontext()

    return refuse


def _training(wrapper: Any) -> Callable[[Any], bool]:
    """A function that says whether a model is compiled with the wrapper, if that still exists."""
    weakly = weakref.ref(wrapper)

    def is_trained(model: Any) -> bool:
        return (alive := weakly()) is not None and bindings.is_at_work(alive, model)

    return is_trained


def holding(variables: Sequence[Any]) -> list[Swap]:
    """The swaps whose averages are in at least one of the variables."""
    for swap in _under_way:
        swap.notice_restored_state()
    return [
        swap
        for swap in _under_way
        if any(_keras_internals.variable_index(swap._owner, v) is not None for v in variables)
    ]


def refuse_while_held(variables: Sequence[Any], what: str) -> None:
    """Refuse to do something to variables of which some hold averages."""
    for other in holding(variables):
        raise other._refusal(what)


def supersede(wrapper: Any) -> None:
    """Let a new optimizer train variables that hold another wrapper's averages.

    `SwapAverageWeights` may leave the averages in the model. If the model is then compiled with a
    new optimizer, training starts from these averages. The old wrapper keeps its raw values, but
    does not refuse training any more. It still does if the new optimizer trains another model that
    only shares variables: the next swap of the old wrapper would undo this training.
    """
    for other in holding(_keras_internals.built_variables(wrapper)):
        if bindings.work_for_the_same(wrapper, other._owner):
            _under_way.discard(other)


def set_statistics_aside(model: Any, variables: Sequence[Any]) -> None:
    """If a swap has its averages in the model, let it keep the raw statistics too."""
    for swap in holding(model.variables) or _holding_for(variables):
        if swap.raw is not None:
            swap.raw.add_statistics(model, list(variables))
            return


def _holding_for(statistics: Sequence[Any]) -> list[Swap]:
    """The swaps that have averages in a model to which these statistics belong."""
    ours = {id(variable) for variable in statistics}
    return [
        swap
        for swap in _under_way
        for model in bindings.models_of([swap._owner])
        if any(id(variable) in ours for variable in model.variables)
    ]
