"""Batch-normalization statistics for weights that no training step has seen."""

import contextlib
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_avg import _backend, _checks, _keras_internals
from keras_avg._wrapping import swap


def update_batch_norm(
    model: Any,
    x: Any,
    batch_size: int | None = None,
    steps: int | None = None,
    verbose: int | str = "auto",
) -> None:
    """Recompute the statistics of all BatchNormalization layers by one pass over the data.

    Averaged weights give other activations than the weights that the moving statistics were
    collected with. Each layer, at any depth, gets the mean and the variance of all elements that
    it normalizes during the pass: with mean `m_b`, (biased) variance `v_b` and `n_b` elements per
    channel in call `b`, masked ones not counted, and `N = sum(n_b)`,

        moving_mean     = sum(n_b * m_b) / N
        moving_variance = sum(n_b * (v_b + m_b**2)) / N - moving_mean**2

    in float64. Momenta, and the statistics from before, have no part in it. As in training, each
    batch is normalized by its own moments on its way to later layers, and each call of a shared
    layer counts. All other layers run in inference mode, without dropout. Nothing changes but
    these statistics, and not even they do when an exception ends the pass. While a model holds an
    optimizer's averages (`swap_weights`, `average_weights`), those of the raw weights are set aside
    and come back with these.

    `torch.optim.swa_utils.update_bn` takes the plain mean over batches of batch means and of
    unbiased batch variances instead: a short last batch counts like a full one, and the variance
    between the batches' means is lost.

    Layers with `trainable=False` run in inference mode and keep their statistics, as in training.
    A layer that is given `training=False` in somebody's `call` does not: freeze it to keep its
    statistics. `renorm=True` layers are normalized by the batch's moments alone; their statistics
    for training, `renorm_mean` and `renorm_stddev`, stay. `synchronized=True` makes no difference,
    since the pass runs in one process on whole batches: each process pools the data it is given.
    The pass runs eagerly, also what is decorated with `tf.function`; layers inside loops and
    functions that are compiled all the same (`jax.jit`) are refused.

    Args:
        model: Keras model or layer. One not built is built on the first batch.
        x: What `fit` takes as `x`: array or list or dict of arrays, generator, `tf.data.Dataset`,
            torch `DataLoader`, `keras.utils.PyDataset`. Targets and sample weights in its batches
            are ignored. Best the training data, in batches of the size used in training. Not
            touched when there is no layer to update.
        batch_size: Integer >= 1, for arrays only. Default None, which means 32 as in `fit`.
        steps: Integer >= 1, in batches: how many to take. Default None, which means all.
        verbose: `"auto"` or 1 for a progress bar, 2 for one line, 0 for silence. Default `"auto"`.

    Returns:
        None. The model is changed in place.

    Raises:
        ValueError: If there is no data, or no end of it and no `steps`; if `batch_size`, `steps`
            or `verbose` is out of range; or if the moments of a layer cannot be known, because a
            subclass of BatchNormalization does not compute them by the inherited method, or
            because the layer is called in compiled code.

    Example:

    ```python
    model.compile(optimizer=keras_avg.SWA("sgd", start_averaging=750), loss="mse")
    model.fit(x, y, epochs=20)
    model.optimizer.assign_average_vars(model.variables)
    keras_avg.update_batch_norm(model, x, batch_size=32)
    ```

    Reference:
        Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization,
        https://arxiv.org/abs/1803.05407, section 3.2.
    """
    if batch_size is not None:
        batch_size = _checks.whole_number("batch_size", batch_size, minimum=1, unit="samples")
    if steps is not None:
        steps = _checks.whole_number("steps", steps, minimum=1, unit="batches")
    verbose = _checks.verbosity(verbose)
    if _is_built(model) and not _layers_to_update(model):
        return
    _keras_internals.check_attached(model.variables)
    adapter = _adapter(x, batch_size, steps)
    with _backend.random_state_kept(), _keras_internals.batches(adapter) as data:
        pools = _filled_pools(model, _inputs(data, adapter.num_batches, steps, verbose))
    swap.set_statistics_aside(model, statistics(model))
    for pool in pools:
        pool.assign()


def refuse_one_pass_data(argument: str, x: Any) -> None:
    """Refuse data that cannot be gone through from beginning to end again and again."""
    if isinstance(x, Iterator) or _is_endless(x):
        raise ValueError(
            f"`{argument}` is gone through, from beginning to end, whenever the averages have "
            f"changed. Received: {argument} of type {type(x).__name__}, which gives its data only "
            "once or has no end. Pass arrays, a tf.data.Dataset with an end (`dataset.take(100)`) "
            "or a keras.utils.PyDataset."
        )


def statistics(model: Any) -> list[Any]:
    """The variables that `update_batch_norm` sets, in order."""
    return [v for layer in _layers_to_update(model) for v in layer.non_trainable_variables]


class _Pool:
    """Mean and variance, per channel, of all elements that one layer has normalized so far."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._calls = 0
        self._reductions = 0
        self._count: Any = 0.0
        self._mean: Any = 0.0
        self._squares: Any = 0.0  # sum of squared deviations from the mean

    @contextlib.contextmanager
    def filling(self) -> Iterator[None]:
        """Let the layer run as a plain one in training mode, and listen."""
        layer, flags = self._layer, ("renorm", "synchronized")
        before = {name: getattr(layer, name) for name in flags if hasattr(layer, name)}
        try:
            for name in before:
                setattr(layer, name, False)
            with _keras_internals.in_training_mode(layer, self._on_call, self._on_moments):
                yield
        finally:
            for name, value in before.items():
                setattr(layer, name, value)

    def _on_call(self) -> None:
        self._calls += 1

    def _on_moments(self, inputs: Any, mask: Any, mean: Any, variance: Any) -> None:
        self._reductions += 1
        try:
            arrays = _array(mean), _array(variance)
        except (TypeError, NotImplementedError) as error:
            # In the middle of tracing, so that no compiled code is kept that has training mode in.
            raise ValueError(
                f"The moments of {self._layer.path!r} cannot be known. Received: a call from "
                "compiled code, or from a loop that is compiled. Call the layer outside of it, or "
                "set its `trainable = False` to keep its statistics."
            ) from error
        self._add(self._elements(ops.shape(inputs), mask), *arrays)

    def check(self) -> None:
        """Refuse a layer whose calls go past the method that is listened to."""
        if self._calls != self._reductions:
            raise ValueError(
                f"The moments of {self._layer.path!r}, of type {type(self._layer).__name__}, "
                "cannot be known: it does not compute them once a call by the method that it has "
                f"from BatchNormalization. Received: moments {self._reductions} times in "
                f"{self._calls} calls. Let its `call` take `training` and pass it to "
                "`super().call`, or set its `trainable = False` to keep its statistics."
            )

    def _elements(self, shape: tuple[int, ...], mask: Any) -> Any:
        """How many elements a call reduced for each channel: a mask stands for the last axis."""
        axis = self._layer.axis % len(shape)
        if mask is None:
            return np.prod(shape[:axis] + shape[axis + 1 :], dtype=np.float64)
        counted = ops.convert_to_numpy(mask).astype(bool)[..., np.newaxis]
        others = tuple(i for i in range(len(shape)) if i != axis)
        return np.broadcast_to(counted, shape).sum(axis=others, dtype=np.float64)

    # The pool's variance, sum(n_b * (v_b + m_b**2)) / N - mean**2, is a small difference of large
    # numbers where the mean is far from zero. The squares' sum about the mean needs none: with
    # d = m_b - mean, a call of n elements moves the mean of the N so far by d * n / (N + n), and
    # both parts' squares about the new mean are
    #     squares + n * v_b + d**2 * N * n / (N + n).

    def _add(self, count: Any, mean: Any, variance: Any) -> None:
        share = count / np.maximum(self._count + count, 1)
        difference = np.where(count > 0, mean - self._mean, 0)  # moments of nothing may be NaN
        self._mean = self._mean + difference * share
        self._squares = self._squares + np.where(count > 0, count * variance, 0)
        self._squares = self._squares + difference**2 * self._count * share
        self._count = self._count + count

    def assign(self) -> None:
        """Give the layer its statistics, channels with no elements excepted."""
        layer = self._layer
        if not np.all(self._count):
            warnings.warn(
                f"No data reached {layer.path!r}, or not all of its channels, or in compiled code "
                "only: it keeps its statistics there.",
                stacklevel=3,
            )
        if not np.any(self._count):
            return
        variance = self._squares / np.maximum(self._count, 1)
        _assign(layer.moving_mean, self._mean, self._count)
        _assign(layer.moving_variance, variance, self._count)
        if getattr(
            layer, "renorm", False
        ):  # which derives the variance from this one at the next training step
            _assign(layer.moving_stddev, np.sqrt(variance + layer.epsilon), self._count)


def _filled_pools(model: Any, batches: Iterator[Any]) -> list[_Pool]:
    infer = _backend.eager_inference(lambda inputs: model(inputs, training=False))
    first = next(batches)
    if not _is_built(model):
        with keras.StatelessScope():
            infer(first)
    pools = [_Pool(layer) for layer in _layers_to_update(model)]
    with contextlib.ExitStack() as stack:
        for pool in pools:
            stack.enter_context(pool.filling())
        scope = keras.StatelessScope()  # where all assignments of the pass end
        for inputs in itertools.chain([first], batches):
            with scope:
                infer(inputs)
            for pool in pools:
                pool.check()
    return pools


def _is_built(model: Any) -> bool:
    return all(layer.built for layer in _keras_internals.layers_at_any_depth(model))


def _layers_to_update(model: Any) -> list[Any]:
    return [layer for layer in _batch_norms(model) if layer.trainable]


def frozen_batch_norms(model: Any) -> list[Any]:
    """The BatchNormalization layers that keep their statistics in training too, in order."""
    return [layer for layer in _batch_norms(model) if not layer.trainable]


def _batch_norms(model: Any) -> list[Any]:
    layers = _keras_internals.layers_at_any_depth(model)
    return [layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization)]


def _adapter(x: Any, batch_size: int | None, steps: int | None) -> Any:
    if x is None or (isinstance(x, list | tuple | dict) and not x):
        raise _no_data(f"x={x!r}")
    try:
        adapter = _keras_internals.data_adapter(x, batch_size, steps)
    except IndexError as error:  # of older Keras, which looks at a generator's first batch here
        raise _no_data("data that yields no batch") from error
    if adapter.num_batches == 0:
        shapes = keras.tree.map_structure(lambda part: getattr(part, "shape", part), x)
        raise _no_data(f"x of type {type(x).__name__} with no batches: {shapes}")
    if steps is None and _is_endless(x):
        raise ValueError(
            f"The data has no end. Received: x of type {type(x).__name__} and steps=None. Say how "
            "many batches to take, with `steps`."
        )
    return adapter


def _is_endless(x: Any) -> bool:
    if isinstance(x, keras.utils.PyDataset):
        return x.num_batches is None
    cardinality = getattr(x, "cardinality", None)  # `tf.data.INFINITE_CARDINALITY` is -1
    return callable(cardinality) and int(cardinality()) == -1


def _inputs(data: Any, known: int | None, steps: int | None, verbose: int) -> Iterator[Any]:
    """The model's inputs in the batches, with a progress bar that moves after each."""
    target = min((n for n in (known, steps) if n is not None), default=None)
    progress = keras.utils.Progbar(target, verbose=verbose)
    done = 0
    for done, batch in enumerate(itertools.islice(data, steps), start=1):
        yield keras.utils.unpack_x_y_sample_weight(batch)[0]
        progress.update(done, finalize=False)
    if not done:
        raise _no_data("data that yields no batch")
    if steps is not None and done < steps:
        warnings.warn(
            f"Your input ran out of data: the statistics are of {done} batches. Received: "
            f"steps={steps}.",
            stacklevel=2,
        )
    progress.target = done
    progress.update(done, finalize=True)


def _no_data(received: str) -> ValueError:
    return ValueError(
        f"There is no data to compute statistics from. Received: {received}. Pass a batch or more."
    )


def _array(tensor: Any) -> Any:
    return ops.convert_to_numpy(tensor).astype(np.float64).reshape(-1)


def _assign(variable: Any, value: Any, count: Any) -> None:
    before = ops.convert_to_numpy(variable.value).astype(np.float64)
    variable.assign(np.where(count > 0, value, before))
