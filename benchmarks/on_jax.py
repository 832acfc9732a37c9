"""Optimizer steps on JAX: those of Keras, and those with the averages of JAX libraries."""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras

from benchmarks import averages

MODES = ("jit",)


def triad(count: int) -> Callable[[], None]:
    add = jax.jit(lambda a, b, c: a + b, donate_argnums=2, keep_unused=True)
    return _into_the_last(add, jnp.ones(count), jnp.ones(count), jnp.ones(count))


def copy(count: int) -> Callable[[], None]:
    # Doubled, because the compiler would remove a bare copy.
    double = jax.jit(lambda a, b: a * 2, donate_argnums=1, keep_unused=True)
    return _into_the_last(double, jnp.ones(count), jnp.ones(count))


def _into_the_last(function: Callable[..., Any], *arrays: Any) -> Callable[[], None]:
    *sources, target = arrays

    def run() -> None:
        nonlocal target
        target = function(*sources, target).block_until_ready()

    return run


class Steps:
    """Compiled steps of several optimizers. Each step continues from the values of the last."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: str, mode: str) -> None:
        self.variables = [keras.Variable(jnp.ones(s, dtype), dtype=dtype) for s in shapes]
        self.values = [jnp.ones(shape, dtype) for shape in shapes]
        self.gradients = [jnp.full(shape, 1e-3, dtype) for shape in shapes]

    def of(self, optimizer: Any) -> Callable[[], None]:
        optimizer.build(self.variables)

        def step(values: Any, state: Any, gradients: Any) -> Any:
            return optimizer.stateless_apply(state, gradients, values)

        return self._compiled(step, [variable.value for variable in optimizer.variables])

    def rivals(self) -> dict[str, Callable[[], Callable[[], None]]]:
        found = {}
        if importlib.util.find_spec("optax"):
            found["optax incremental_update"] = self._optax
        if importlib.util.find_spec("flax") and hasattr(_nnx(), "EMA"):
            found["flax nnx.EMA"] = self._flax
        return found

    def _compiled(self, step: Callable[..., Any], state: Any) -> Callable[[], None]:
        compiled = jax.jit(step, donate_argnums=(0, 1))

        def run() -> None:
            nonlocal state
            self.values, state = compiled(self.values, state, self.gradients)
            jax.block_until_ready((self.values, state))

        return run

    def _bare(self) -> tuple[Callable[..., Any], Any]:
        optimizer = averages.optimizers(keras.optimizers.SGD)[averages.BARE]()
        optimizer.build(self.variables)
        return optimizer.stateless_apply, [variable.value for variable in optimizer.variables]

    def _optax(self) -> Callable[[], None]:
        optax = importlib.import_module("optax")
        apply, state = self._bare()

        def step(values: Any, state: Any, gradients: Any) -> Any:
            own, average = state
            values, own = apply(own, gradients, values)
            average = optax.incremental_update(values, average, 1 - averages.DECAY)
            return values, (own, average)

        return self._compiled(step, (state, [jnp.array(v, copy=True) for v in self.values]))

    def _flax(self) -> Callable[[], None]:
        nnx = _nnx()
        apply, state = self._bare()

        def model(values: Any) -> Any:
            return nnx.List([nnx.Param(value) for value in values])

        graph, average = nnx.split(nnx.EMA(model(self.values), averages.DECAY))
        average = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), average)

        def step(values: Any, state: Any, gradients: Any) -> Any:
            own, average = state
            values, own = apply(own, gradients, values)
            ema = nnx.merge(graph, average)
            ema.update(model(values))
            return values, (own, nnx.state(ema))

        return self._compiled(step, (state, average))


def _nnx() -> Any:
    return importlib.import_module("flax.nnx")
