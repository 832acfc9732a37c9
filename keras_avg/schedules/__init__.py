"""Learning rates for weight averaging: they end constant, or go up and down in cycles."""

from keras_avg.schedules.cyclical_learning_rate import (
    CyclicalLearningRate,
    ExponentialCyclicalLearningRate,
    Triangular2CyclicalLearningRate,
    TriangularCyclicalLearningRate,
)
from keras_avg.schedules.swa_learning_rate import SWALearningRate

__all__ = [
    "CyclicalLearningRate",
    "ExponentialCyclicalLearningRate",
    "SWALearningRate",
    "Triangular2CyclicalLearningRate",
    "TriangularCyclicalLearningRate",
]
