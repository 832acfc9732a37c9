"""The methods with which users read averages, swap them into a model, and save them."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_avg import _backend, _keras_internals
from keras_avg._types import Config, Tensor, Variable
from keras_avg._wrapping import arguments, bindings, fitting, nesting
from keras_avg._wrapping.files import StateFile
from keras_avg._wrapping.optimizer_wrapper import OptimizerWrapper
from keras_avg._wrapping.reading import Reading
from keras_avg._wrapping.store import Ring, Store
from keras_avg._wrapping.swap import Swap, supersede


class ShowsAverages(OptimizerWrapper):
    """Keeps stores beside the variables, and can put the averages from them into the model.

    Args:
        average_dtype: Dtype of the stores. None: float32 for low-precision variables, and the
            variable's own dtype for all others.
        exclude: List of regular expressions. A variable whose path matches has no store.
        **arguments: As for `OptimizerWrapper`.
    """

    def __init__(
        self, average_dtype: str | None, exclude: Sequence[str] | None, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self.average_dtype = average_dtype
        self.exclude = exclude
        #: The stores, by the names that `stores()` gives them. Empty before `build`.
        self.kept: dict[str, Store] = {}
        #: The rings, by the same names.
        self.rings: dict[str, Ring] = {}
        self._starting = Store([], [])  # all variables of the stores that begin with the model's
        self._state_file = StateFile(self, self._own_variables, self._parts_on_file)
        self._swap: Swap | None = None

    def stores(self) -> Mapping[str, str | int]:
        """The names of the stores to keep beside each variable. Rules override it.

        A store has the variable's shape and sharding. It is float32 or wider for low-precision
        variables. It is saved by its name, and `get_slot` finds it by this name.

        A ring keeps the last few values beside each variable. It has one row for each value.

        Returns:
            Dict from the name to the first values: `"variable"` for the variable's value just
            before the first update, or `"zeros"`. An integer asks for a ring instead: 5 for the
            last five values, whose rows are zeros at first. Default: one store, `"average"`, that
            begins with the variable.
        """
        return {"average": "variable"}

    def averages(self) -> list[Tensor]:
        """The values that the model holds while it is swapped. Rules override it.

        It may run in compiled code.

        Returns:
            List of tensors, one for each averaged variable, in the same order and with the same
            shape. Default: the values of the store `"average"`.
        """
        return self.kept["average"].values()

    def kept_variables(self) -> list[Variable]:
        """The variables of all stores and rings. Empty before `build`."""
        all_kept: list[Store | Ring] = [*self.kept.values(), *self.rings.values()]
        return [variable for each in all_kept for variable in each.kept]

    def assign_average_vars(self, var_list: Sequence[Variable]) -> None:
        """Assign the averages to the variables for good. The raw values are lost.

        Args:
            var_list: List of variables, such as `model.variables`. Variables without an average
                (such as batch-normalization statistics) do not change.

        Raises:
            ValueError: If none of the variables has an average, or there is no snapshot yet.
            RuntimeError: If the averages are in the model already, while the raw values are kept.

        Example:

        ```python
        model.compile(optimizer=keras_avg.SWA("sgd", start_averaging=100), loss="mse")
        model.fit(x, y, epochs=10)
        model.optimizer.assign_average_vars(model.variables)
        model.save("averaged.keras")
        ```
        """
        swap = self._checked_swap("assign_average_vars")
        asked = {_keras_internals.variable_index(self, variable) for variable in var_list} - {None}
        if not any(_keras_internals.variable_index(self, v) in asked for v in swap.variables):
            raise ValueError(
                f"None of the variables has an average in '{self.name}': nothing can be assigned. "
                f"Received: {[_keras_internals.path_of(v) for v in var_list]}. Pass the variables "
                "that the optimizer trains, such as `model.variables`."
            )
        self._refuse_without_snapshot("to assign")
        swap.refuse_while_in("assigning them for good")
        pairs = [
            (variable, _backend.copy(average))
            for variable, average in zip(swap.variables, self.averages(), strict=True)
            if _keras_internals.variable_index(self, variable) in asked
        ]
        for variable, average in pairs:
            self.assign(variable, average)
        self._after_averages_were_assigned()

    def swap_weights(self) -> None:
        """Exchange the raw and the averaged values in the model.

        A second call restores every bit of the raw values. The averages in the optimizer do not
        change. If a swapped model is saved, its file has the averages as weights, and the raw
        values too. The second call also restores the batch-normalization statistics that
        `keras_avg.update_batch_norm` has recomputed while the averages were in the model.

        Raises:
            ValueError: If there is no snapshot yet.
            RuntimeError: If the model was trained while the averages were in it. If another wrapper
                has its averages in the same variables. If the raw values are lost: `set_weights`,
                Orbax or `tf.train.Checkpoint` has restored a copy that was taken while swapped.

        Example:

        ```python
        model.optimizer.swap_weights()
        print(model.evaluate(x, y))  # of the averages
        model.optimizer.swap_weights()
        ```
        """
        swap = self._checked_swap("swap_weights")
        _keras_internals.check_attached([*self._own_variables.by_name.values(), *swap.variables])
        if swap.is_in():
            swap.put_back()
        else:
            self._refuse_without_snapshot("to put into the model")
            swap.put_in(self.averages)

    @contextlib.contextmanager
    def average_weights(self) -> Iterator[None]:
        """Context in which the model holds the averages.

        When the context ends, the model holds again what it held before. This includes the
        batch-normalization statistics that `keras_avg.update_batch_norm` has recomputed in it.

        Example:

        ```python
        with model.optimizer.average_weights():
            keras_avg.update_batch_norm(model, x)
            model.save("averaged.keras")
        ```
        """
        if self._swap is not None and self.averages_in_model:
            self._swap.raw_or_refuse()
            yield
            return
        self.swap_weights()
        try:
            yield
        finally:
            if self.averages_in_model:
                self.swap_weights()

    @contextlib.contextmanager
    def reading_averages(self) -> Iterator[None]:
        """Context in which every read of a variable returns its average. Nothing is swapped.

        With it a train step can call the model as a teacher (mean teacher, BYOL, DINO). No copy is
        made, and training goes on as if nothing had been read. Values that are assigned inside
        (batch-normalization statistics, seeds) are lost, so call the model with `training=False`.

        On TensorFlow this also works in a `tf.function` that enters the context itself. A function
        that was compiled outside of the context reads the raw values. On JAX the context works only
        outside of compiled code. In a compiled JAX step, call the teacher with the averages from
        the state:
        `model.stateless_call(optimizer.stateless_average(state), non_trainable, x)`.

        Raises:
            ValueError: If there is no snapshot yet. (In compiled code this is not checked.) If a
                variable is not a Keras variable, because then Keras cannot replace its value.
            RuntimeError: In a compiled JAX step. If a step is taken inside.

        Example:

        ```python
        with optimizer.reading_averages():
            targets = model(x, training=False)
        ```
        """
        swap = self._checked_swap("reading_averages")
        _keras_internals.refuse_stateless_scope("reading_averages", but=Reading)
        _keras_internals.check_attached([*self._own_variables.by_name.values(), *swap.variables])
        if _backend.concrete(self._snapshots.read()) == 0:
            self._refuse_without_snapshot("to read")
        if native := [v.name for v in swap.variables if not isinstance(v, keras.Variable)]:
            raise ValueError(
                f"Only Keras variables can be read with another value in their place. Received: "
                f"{native}, which are variables of the framework. Use `average_weights()`."
            )
        with Reading(swap.variables, self.averages(), bindings.models_of([self])):
            yield

    @contextlib.contextmanager
    def showing(self, values: Callable[[], Sequence[Tensor]]) -> Iterator[None]:
        """Context in which the model holds other values.

        When the context ends, the model holds again what it held before. Rules use it to show more
        than one average. Inside the context, `averages_in_model` is True.

        Args:
            values: Function without arguments. It returns a list of tensors, one for each averaged
                variable.

        Raises:
            ValueError: If there is no snapshot yet.
            RuntimeError: As for `swap_weights`.
        """
        swap = self._checked_swap("showing")
        _keras_internals.check_attached([*self._own_variables.by_name.values(), *swap.variables])
        self._refuse_without_snapshot("to show")
        with swap.showing(values):
            yield

    def raw_weights(self) -> contextlib.AbstractContextManager[None]:
        """Context in which the model holds the raw weights.

        When the context ends, the averages are in the model again if they were before. Raw weights,
        averages and iterations may change inside the context.
        """
        if self._swap is None:
            return contextlib.nullcontext()
        return self._swap.raw_again(self.averages)

    def keep_averages(self) -> None:
        """End a swap, and leave the averages in the model for good. The raw values are lost.

        Training goes on from the averages.

        Raises:
            RuntimeError: If the averages are not in the model.
        """
        swap = self._checked_swap("keep_averages")
        if not self.averages_in_model:
            raise RuntimeError(
                f"The model does not hold the averages of '{self.name}'. Use "
                "`assign_average_vars(model.variables)`, which puts them in for good."
            )
        swap.end()
        self._after_averages_were_assigned()

    def bind_model(self, model: keras.Model) -> None:
        """Say which model was loaded with the averages in it, so that `swap_weights` works.

        The file may contain batch-normalization statistics of the raw weights. The optimizer must
        know the model to which they belong. `keras_avg.swap_weights(model)` and the callbacks call
        this method by themselves.

        Args:
            model: A `keras.Model`.

        Raises:
            ValueError: If the statistics do not fit the model.
        """
        if self._swap is not None and self._swap.raw is not None:
            self._swap.raw.bind_statistics(model)

    @property
    def averages_in_model(self) -> bool:
        """Whether the model holds the averages now. For use outside compiled code."""
        if self._swap is None:
            return False
        _keras_internals.check_attached(self._own_variables.by_name.values())
        return self._swap.is_in()

    @property
    def num_snapshots(self) -> int:
        """The number of averagings so far. For use outside compiled code."""
        if not self.built:
            return 0
        _keras_internals.check_attached(self._own_variables.by_name.values())
        return int(self._snapshots.read())

    def count_snapshots(self, number: int | Tensor) -> None:
        """Add `number` to the number of snapshots. It is an integer or a bool, or such a tensor."""
        self._snapshots.advance(number)

    @property
    def has_average(self) -> bool:
        """Whether there was a snapshot. For use outside compiled code."""
        return self.num_snapshots > 0

    @property
    def averaged_variables(self) -> list[Variable]:
        """The model's variables that have an average, in order. Empty before `build`."""
        return [] if self._swap is None else list(self._swap.variables)

    def why_without_averages(self) -> str:
        """A sentence that says why the loaded file has no averages, or "" if that is not so."""
        return self._state_file.why_without_averages()

    def stateless_average(
        self,
        optimizer_variables: Sequence[Tensor],
        trainable_variables: Sequence[Tensor] | None = None,
        optimizer: OptimizerWrapper | None = None,
    ) -> list[Tensor]:
        """The averages from a list of values of `variables`. It can be compiled by `jax.jit`.

        Args:
            optimizer_variables: List of tensors, one for each of `variables`. `stateless_apply`
                takes and returns such a list.
            trainable_variables: List of tensors, the raw values, one for each variable with which
                the optimizer was built. If they are given, this returns them, in the averages'
                dtype, before the first snapshot. Default None: before the first snapshot, the
                values of the stores are returned. For `SWA` these are zeros.
            optimizer: A wrapper inside this one, to return its averages. The lists must still be
                those of the outer optimizer. Default None: this wrapper.

        Returns:
            List of tensors, one for each variable that has an average, in order.

        Raises:
            ValueError: If a list has the wrong length, or if `optimizer` is not inside this one.

        Example:

        ```python
        trainable, state = optimizer.stateless_apply(state, gradients, trainable)
        averages = optimizer.stateless_average(state, trainable)
        ```
        """
        wrapper: Any = optimizer or self
        state = self._state_of(wrapper, optimizer_variables)
        built = _keras_internals.built_variables(self)
        if trainable_variables is not None and len(trainable_variables) != len(built):
            raise ValueError(
                f"'{self.name}' was built for {len(built)} variables. Received: a list of "
                f"{len(trainable_variables)}. Pass one value for each of them, in order."
            )
        pairs = zip(built, trainable_variables or (), strict=False)
        raw = [(v, value) for v, value in pairs if isinstance(v, keras.Variable)]
        with keras.StatelessScope([*state, *raw]):
            averages = wrapper.averages()
            if trainable_variables is None:
                return averages
            is_there = wrapper._snapshots.read() > 0
            return [
                ops.where(is_there, average, _backend.value(variable, average.dtype))
                for variable, average in zip(wrapper.averaged_variables, averages, strict=True)
            ]

    def stateless_num_snapshots(
        self, optimizer_variables: Sequence[Tensor], optimizer: OptimizerWrapper | None = None
    ) -> Tensor:
        """The number of averagings, from a list of values of `variables`. `jax.jit` can compile it.

        Args:
            optimizer_variables: List of tensors, one for each of `variables`. `stateless_apply`
                takes and returns such a list.
            optimizer: A wrapper inside this one, to return its number. Default None: this wrapper.

        Returns:
            Integer scalar tensor.

        Raises:
            ValueError: If the list has the wrong length, or if `optimizer` is not inside this one.

        Example:

        ```python
        if optimizer.stateless_num_snapshots(state) > 0:
            averages = optimizer.stateless_average(state)
        ```
        """
        wrapper: Any = optimizer or self
        state = self._state_of(wrapper, optimizer_variables)
        counter = wrapper._own_variables.by_name["snapshots"]
        return next(ops.convert_to_tensor(value) for v, value in state if v is counter)

    def _state_of(self, wrapper: Any, values: Sequence[Tensor]) -> list[tuple[Any, Any]]:
        """Pairs of `variables` and their values. `wrapper` must be this wrapper or inside it."""
        variables = self.variables
        if len(values) != len(variables):
            raise ValueError(
                f"'{self.name}' has {len(variables)} variables. Received: a list of "
                f"{len(values)}. Pass one value for each of `optimizer.variables`."
            )
        _keras_internals.check_attached(values)
        if not (isinstance(wrapper, ShowsAverages) and nesting.is_inside(wrapper, self)):
            raise ValueError(
                f"The averages of {wrapper!r} are not in the state of '{self.name}'. Pass as "
                "`optimizer` an averaging wrapper inside it."
            )
        return list(zip(variables, values, strict=True))

    def shadow_copy(self, variables: Iterable[Variable]) -> None:
        """Make the averages before training begins, with the values of the variables.

        `assign_average_vars` and `swap_weights` still need a first snapshot.

        Args:
            variables: List of variables, such as `model.variables`. Variables that are not
                trainable are ignored.

        Raises:
            ValueError: If the optimizer was built with other variables.
        """
        variables = [v for v in variables if getattr(v, "trainable", True)]
        for variable in variables if self.built else ():
            self._built_variable(variable)
        self.build(variables)
        _keras_internals.check_attached(self.variables)
        for store in self.kept.values():
            store.start(self._updates.read())

    @property
    def has_shadow_copy(self) -> bool:
        """Whether the averages have been made."""
        return self.built

    def save_own_variables(self, store: MutableMapping[str, np.ndarray]) -> None:
        """Write the wrapper's own variables, and the raw values if the averages are in the model.

        Keras writes the inner optimizer's variables. If averages do not fit the saved model, they
        are left out, and the file says why. This happens if the model's variables were replaced (by
        `quantize`, for example). It also happens if a layer does not store its variables as they
        are (a LoRA layer stores a merged kernel).

        Raises:
            RuntimeError: If the averages are in the model, but the raw values are lost, or belong
                to another update than the rest of the state.
        """
        _keras_internals.check_attached(self._own_variables.by_name.values())
        if self._swap is not None:
            self._state_file.save(store, self._swap)

    def load_own_variables(self, store: Mapping[str, np.ndarray]) -> None:
        """Read the wrapper's own variables, or raise and change nothing.

        The file's index is checked first. If it does not fit, no array is read.

        Raises:
            ValueError: If the stored state does not fit this wrapper.
        """
        _keras_internals.check_attached(self.variables)
        self._state_file.load(store, self._swap)
        self._after_state_was_set()

    def check_file(self, store: Mapping[str, np.ndarray]) -> None:
        """Refuse a file whose part for this optimizer does not fit. Only the index is read.

        Raises:
            ValueError: If the stored state does not fit this wrapper.
        """
        self._state_file.check(store, self._swap)

    def finalize_variable_values(self, var_list: list[Variable]) -> None:
        """Called by `fit` when training ends.

        Raises:
            RuntimeError: If the model was trained while the averages were in it. Code that was
                compiled before the swap can do that.
        """
        if not _keras_internals.reattach_state(self):
            return  # `fit` is already raising. Do not replace its error.
        if self._swap is not None:
            if self.averages_in_model:
                self._swap.refuse_training_meanwhile()
            self._swap.refuse_training_under_another()
        with self.raw_weights():  # `use_ema` of Keras must write its average over the raw weights.
            self.inner_optimizer.finalize_variable_values(var_list)
            if getattr(nesting.innermost(self), "use_ema", False):
                # On JAX, Keras' average and the variables would share buffers. The next `fit` would
                # then fail, so the variables get buffers of their own.
                _backend.assign_quotients(var_list, 1.0, var_list)

    def get_config(self) -> Config:
        return super().get_config() | {
            "average_dtype": self.average_dtype,
            "exclude": self.exclude and list(self.exclude),
        }

    def _make_state(self, variables: list[Any]) -> None:
        names = ("updates", "snapshots", "averages_in_model")
        updates, snapshots, flag = map(self._own_variables.counter, names)
        self._updates, self._snapshots = _backend.Counter(updates), _backend.Counter(snapshots)
        excluded = arguments.excluded(
            self.exclude,
            variables,
            self.name,
            bindings.names_of_models(self),
            _keras_internals.is_loading_model(),
        )
        averaged = {
            i: v
            for i, v in enumerate(variables)
            if i not in excluded and _keras_internals.is_averageable(v)
        }
        dtypes = {i: self.average_dtype or _wide_enough(v) for i, v in averaged.items()}
        first_values = self.stores()
        for name, first in first_values.items():
            own = self._own_variables.add_store(name, averaged, dtypes, first)
            if isinstance(first, str):
                self.kept[name] = Store(own, list(averaged.values()))
            else:
                self.rings[name] = Ring(own, list(averaged.values()))
        starting = [store for s, store in self.kept.items() if first_values[s] == "variable"]
        self._starting = Store(
            [v for store in starting for v in store.kept],
            [v for store in starting for v in store.variables],
        )
        self._swap = Swap(self, list(averaged.values()), flag, self.updates_so_far)

    def _after_build(self) -> None:
        supersede(self)

    def _before_state_is_read(self) -> None:
        # The JAX trainer asks for the variables before it takes their values away.
        if self._swap is not None:
            self._swap.notice_restored_state()

    def _after_state_was_set(self) -> None:
        if self._swap is not None:
            self._swap.note_state()

    def _before_inner_step(self) -> None:
        """At the first update, copy the variables into the stores that begin with them."""
        if self._starting.kept:
            self._starting.start(self._updates.read())

    def _refuse_training(self) -> None:
        if any(isinstance(scope, Reading) for scope in _keras_internals.scopes()):
            raise RuntimeError(
                f"'{self.name}' cannot train in `reading_averages()`: what is assigned there is "
                "lost. End the context before the step."
            )
        if self._swap is not None:
            self._swap.refuse_while_in("training")

    def _after_averages_were_assigned(self) -> None:
        """Hook for subclasses, because training now goes on from the averages."""

    def _parts_on_file(self) -> dict[str, Any]:
        """The optimizers that Keras saves inside this one, by the names of their attributes."""
        return {"inner_optimizer": self.inner_optimizer}

    def _refuse_without_snapshot(self, what_for: str) -> None:
        if not self.has_average:
            raise ValueError(
                f"'{self.name}' has taken no snapshot yet: there are no averages {what_for}. "
                f"Received: {self.updates_so_far()} updates so far. Train on, or let averaging "
                f"start earlier.{self.why_without_averages()}"
            )

    def _checked_swap(self, member: str) -> Swap:
        self._check_built(member)
        assert self._swap is not None
        return self._swap


def _wide_enough(variable: Any) -> str:
    dtype = keras.backend.standardize_dtype(variable.dtype)
    return "float32" if dtype in fitting.LOW_PRECISION else dtype
