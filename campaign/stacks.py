"""Random stacks of wrappers, and a second computation of each average in NumPy.

A follower computes the rule of one wrapper a second time, in NumPy float64. Its input is the values
of the variables after each real update of a model that was trained without wrappers.
"""

import keras
import numpy as np
from hypothesis import strategies as st
from keras import optimizers

import keras_avg
from keras_avg._wrapping import nesting


class Snapshots:
    """The mean of all snapshots, or of the last few."""

    def __init__(self, start, period, window=None):
        self.start, self.period, self.window = start, period, window
        self.taken = []

    def begin(self, values): ...

    def is_due(self, i):
        return i >= self.start and (i - self.start) % self.period == 0

    def follow(self, i, values):
        self.taken.append(values)

    def shown(self):
        taken = self.taken[-self.window :] if self.window else self.taken
        return [np.mean(np.stack(each), axis=0) for each in zip(*taken, strict=True)]


class Moving:
    """The exponential moving average."""

    def __init__(self, decay, period=1, start_step=0, warm=False):
        self.decay, self.period, self.start_step, self.warm = decay, period, start_step, warm
        self.average = None

    def begin(self, values):
        self.average = values

    def is_due(self, i):
        return (i + 1) % self.period == 0

    def weight(self, i):
        if i < self.start_step:
            return 1.0
        s = i - self.start_step
        decay = min(self.decay, (1 + s) / (10 + s)) if self.warm else self.decay
        return 1.0 - decay**self.period

    def follow(self, i, values):
        weight = self.weight(i)
        self.average = [a + weight * (v - a) for a, v in zip(self.average, values, strict=True)]

    def shown(self):
        return self.average


class Bema(Moving):
    """The exponential moving average with the correction of the paper."""

    def begin(self, values):
        self.average = self.first = self.read = values

    def weight(self, i):
        return (10.0 + (i + 1)) ** -0.5

    def follow(self, i, values):
        super().follow(i, values)
        share = (10.0 + (i + 1)) ** -0.2
        each = zip(self.average, values, self.first, strict=True)
        self.read = [a + share * (v - f) for a, v, f in each]

    def shown(self):
        return self.read


class Synchronized:
    """The value at the last step on which an average flowed back with weight 1."""

    def __init__(self, period, starts_with_variable):
        self.period, self.starts_with_variable = period, starts_with_variable
        self.last = None

    def begin(self, values):
        self.last = values

    def is_due(self, i):
        return (i + 1) % self.period == 0

    def follow(self, i, values):
        self.last = values

    def shown(self):
        return self.last


small = st.integers(1, 3)
starts = st.integers(0, 3)
decays = st.sampled_from([0.5, 0.9, 0.99])


@st.composite
def wrapper(draw, kinds):
    """Two functions: one wraps an optimizer, with keywords, and one makes the follower."""
    kind = draw(st.sampled_from(kinds))
    period, start = draw(small), draw(starts)
    if kind == "SWA":
        return lambda o, **kw: keras_avg.SWA(o, start, period, **kw), lambda: Snapshots(
            start, period
        )
    if kind == "LAWA":
        return lambda o, **kw: keras_avg.LAWA(o, 2, start, period, **kw), lambda: Snapshots(
            start, period, 2
        )
    if kind == "SWAG":
        return lambda o, **kw: keras_avg.SWAG(o, start, period, rank=2, **kw), lambda: Snapshots(
            start, period
        )
    if kind == "MovingAverage":
        decay, warm = draw(decays), draw(st.booleans())
        how = {"average_period": period, "start_step": start, "dynamic_decay": warm}
        return lambda o, **kw: keras_avg.MovingAverage(o, average_decay=decay, **how, **kw), (
            lambda: Moving(decay, period, start, warm)
        )
    if kind == "BEMA":
        return lambda o, **kw: keras_avg.BEMA(o, average_period=period, **kw), lambda: Bema(
            0.0, period
        )
    if kind == "Lookahead":
        return lambda o, **kw: keras_avg.Lookahead(o, period, 1.0, **kw), lambda: Synchronized(
            period, True
        )
    if kind == "ModelAverage":
        return lambda o, **kw: keras_avg.ModelAverage(o, interval_steps=period, **kw), (
            lambda: Synchronized(period, True)
        )
    opaque = {
        "ScheduleFree": keras_avg.ScheduleFree,
        "PrimalAverage": keras_avg.PrimalAverage,
        "slow Lookahead": lambda o, **kw: keras_avg.Lookahead(o, period, 0.5, **kw),
    }
    return opaque[kind], lambda: None


NOTHING_FLOWS_BACK = ["SWA", "LAWA", "SWAG", "MovingAverage", "BEMA"]
TRANSPARENT = [*NOTHING_FLOWS_BACK, "Lookahead", "ModelAverage"]
IN_MEMBERS = [*NOTHING_FLOWS_BACK, "Lookahead"]
OPAQUE = ["ScheduleFree", "PrimalAverage", "slow Lookahead"]


def _multi(**keywords):
    rest = optimizers.SGD(0.05, momentum=0.5, **keywords)
    kernels = {".*kernel": optimizers.Adam(0.01, **keywords)}
    return optimizers.MultiOptimizer(optimizers.OptimizerMap(rest, kernels))


INNER = {
    "sgd": lambda **kw: optimizers.SGD(0.05, **kw),
    "momentum": lambda **kw: optimizers.SGD(0.05, momentum=0.9, nesterov=True, **kw),
    "adam": lambda **kw: optimizers.Adam(0.01, **kw),
    "adamw": lambda **kw: optimizers.AdamW(0.01, weight_decay=0.1, **kw),
    "accumulation": lambda **kw: optimizers.Adam(0.01, gradient_accumulation_steps=2, **kw),
    "clipped": lambda **kw: optimizers.SGD(0.05, global_clipnorm=0.5, **kw),
    "scaled": lambda **kw: optimizers.SGD(0.05, loss_scale_factor=64.0, **kw),
    "schedule": lambda **kw: optimizers.SGD(optimizers.schedules.CosineDecay(0.1, 8), **kw),
}
if hasattr(optimizers, "MultiOptimizer"):
    INNER["multi"] = _multi


class Stack:
    """One optimizer with wrappers, and the same optimizer without.

    Args:
        inner: String, a key of `INNER`.
        wrappers: List of pairs as `wrapper` draws them, innermost first.
        outermost: Keywords of the outermost wrapper.
        loss_scale: Bool. Whether a `LossScaleOptimizer` is around all of them.
        is_transparent: Bool. Whether training must equal that of the inner optimizer.
    """

    def __init__(self, inner, wrappers, outermost, loss_scale, is_transparent):
        self.inner, self.wrappers, self.outermost = inner, wrappers, outermost
        self.loss_scale, self.is_transparent = loss_scale, is_transparent

    def __repr__(self):
        around = "LossScaleOptimizer, " * self.loss_scale
        kinds = [f"{type(w).__name__}({w.rule()})" for w in _wrappers_in(self.wrapped())]
        return f"<{around}{', '.join(kinds)} of {self.inner}; {self.outermost}>"

    def wrapped(self):
        optimizer = INNER[self.inner]()
        for i, (make, _) in enumerate(self.wrappers):
            last = i == len(self.wrappers) - 1
            optimizer = make(optimizer, **(self.outermost if last else {}))
        return self._around(optimizer)

    def twin(self):
        """The bare optimizer. For stacks that change training, a second equal stack."""
        if not self.is_transparent:
            return self.wrapped()
        clipping = {k: v for k, v in self.outermost.items() if "clip" in k}
        return self._around(INNER[self.inner](**clipping))

    def followers(self):
        """The followers, outermost first, in the order of `averaging_optimizers`."""
        return [make() for _, make in reversed(self.wrappers)]

    def _around(self, optimizer):
        if not self.loss_scale:
            return optimizer
        return optimizers.LossScaleOptimizer(optimizer, initial_scale=8.0, dynamic_growth_steps=3)


class Members(Stack):
    """A `MultiOptimizer` with two wrapped members: one for kernels, and one for all others.

    Args:
        rest: List of pairs as `wrapper` draws them, of the member for all others.
        kernels: The same, of the member for kernels.
    """

    def __init__(self, rest, kernels):
        super().__init__("members", [], {}, False, True)
        self.rest, self.kernels = rest, kernels

    def __repr__(self):
        kinds = [f"{type(w).__name__}({w.rule()})" for w in _wrappers_in(self.wrapped())]
        return f"<MultiOptimizer of {', '.join(kinds)}>"

    def wrapped(self):
        return self._of(
            _wrap(optimizers.SGD(0.05, momentum=0.5), self.rest),
            _wrap(optimizers.Adam(0.01), self.kernels),
        )

    def twin(self):
        return self._of(optimizers.SGD(0.05, momentum=0.5), optimizers.Adam(0.01))

    def followers(self):
        return [make() for _, make in [*reversed(self.kernels), *reversed(self.rest)]]

    def _of(self, rest, kernels):
        return optimizers.MultiOptimizer(optimizers.OptimizerMap(rest, {".*kernel": kernels}))


def _wrap(optimizer, wrappers):
    for make, _ in wrappers:
        optimizer = make(optimizer)
    return optimizer


def _wrappers_in(optimizer):
    return [each for each in nesting.walk(optimizer) if hasattr(each, "rule")]


@st.composite
def stacks(draw):
    if hasattr(optimizers, "MultiOptimizer") and draw(st.integers(0, 5)) == 0:
        some = st.lists(wrapper(IN_MEMBERS), min_size=1, max_size=2)
        return Members(draw(some), draw(some))
    is_transparent = draw(st.integers(0, 4)) > 0
    inner = draw(st.sampled_from(sorted(INNER)))
    wrappers = draw(st.lists(wrapper(TRANSPARENT), min_size=1, max_size=3))
    if not is_transparent:
        around = st.lists(wrapper(NOTHING_FLOWS_BACK), max_size=2)
        wrappers = [draw(wrapper(OPAQUE)), *draw(around)]
        inner = "momentum" if inner == "multi" else inner  # ScheduleFree needs one rate
    outermost = {}
    if draw(st.booleans()):
        outermost["skip_nonfinite"] = True
    if draw(st.integers(0, 3)) == 0:
        outermost["exclude"] = draw(st.sampled_from([["norm"], ["bias"], ["hidden/kernel"]]))
    if draw(st.integers(0, 3)) == 0:
        wide = "float64" if keras.backend.backend() != "jax" else "float32"
        outermost["average_dtype"] = draw(st.sampled_from(["float32", wide]))
    if inner in ("sgd", "momentum", "adam") and draw(st.integers(0, 3)) == 0:
        outermost[draw(st.sampled_from(["clipnorm", "clipvalue", "global_clipnorm"]))] = 0.1
    loss_scale = inner not in ("scaled", "accumulation") and draw(st.integers(0, 3)) == 0
    return Stack(inner, wrappers, outermost, loss_scale, is_transparent)
