"""Rules as users could write them, with the public hooks only."""

import keras
from keras import ops

from keras_avg import AveragedOptimizerWrapper


@keras.saving.register_keras_serializable(package="keras_avg_tests")
class LastThree(AveragedOptimizerWrapper):
    """Shows the mean of the last three snapshots. It keeps them in a ring."""

    def is_due(self, step):
        return step % 2 == 1

    def stores(self):
        return {f"snapshot_{i}": "zeros" for i in range(3)}

    def accumulate(self, due, step):
        place = self.snapshots_so_far % 3
        for i in range(3):
            here = ops.logical_and(due, place == i)
            self.kept[f"snapshot_{i}"].assign_if(here, lambda kept, variable: variable)

    def averages(self):
        rings = zip(*(store.values() for store in self.kept.values()), strict=True)
        number = ops.clip(self.snapshots_so_far, 1, 3)
        return [sum(ring) / ops.cast(number, ring[0].dtype) for ring in rings]


@keras.saving.register_keras_serializable(package="keras_avg_tests")
class WithSquares(AveragedOptimizerWrapper):
    """An average of squares beside the average."""

    def stores(self):
        return {"average": "zeros", "square": "zeros"}

    def accumulate(self, due, step):
        weight = 1.0 / ops.cast(self.snapshots_so_far + 1, "float32")

        def mean_of(function):
            return lambda kept, variable: (
                kept + ops.cast(weight, kept.dtype) * (function(variable) - kept)
            )

        self.kept["average"].assign_if(due, mean_of(lambda v: v))
        self.kept["square"].assign_if(due, mean_of(lambda v: v * v))


@keras.saving.register_keras_serializable(package="keras_avg_tests")
class Corrected(AveragedOptimizerWrapper):
    """Shows `average + 0.5 (variable - start)`, with the variable at the last averaging."""

    def value_weight(self, step):
        return 0.25

    def stores(self):
        return {"average": "variable", "start": "variable", "last": "variable"}

    def accumulate(self, due, step):
        super().accumulate(due, step)
        self.kept["last"].lerp_if(due, lambda: 1.0)

    def averages(self):
        columns = (self.kept[name].values() for name in ("average", "last", "start"))
        return [a + 0.5 * (last - start) for a, last, start in zip(*columns, strict=True)]


@keras.saving.register_keras_serializable(package="keras_avg_tests")
class PlainSWA(AveragedOptimizerWrapper):
    """SWA, written without a private name."""

    average_starts_at_variable = False

    def __init__(self, optimizer, start=0, period=10, name="PlainSWA", **kwargs):
        super().__init__(optimizer, name=name, **kwargs)
        self.start = start
        self.period = period

    def is_due(self, step):
        return (step >= self.start) & ((step - self.start) % self.period == 0)

    def value_weight(self, step):
        return 1.0 / ops.cast(self.snapshots_so_far + 1, "float32")

    def get_config(self):
        return super().get_config() | {"start": self.start, "period": self.period}


@keras.saving.register_keras_serializable(package="keras_avg_tests")
class MeanByStep(AveragedOptimizerWrapper):
    """Weighs by the step. If the inner optimizer has stepped before, the first step is not 0."""

    average_starts_at_variable = False

    def value_weight(self, step):
        return 1.0 / (ops.cast(step, "float32") + 1)
