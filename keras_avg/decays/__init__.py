"""Decays for `MovingAverage(average_decay=...)`. A decay says how the average forgets."""

from keras_avg.decays.decay import Decay
from keras_avg.decays.half_life import HalfLife
from keras_avg.decays.power_function import PowerFunction
from keras_avg.decays.power_warmup import PowerWarmup

__all__ = ["Decay", "HalfLife", "PowerFunction", "PowerWarmup"]
