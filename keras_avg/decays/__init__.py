"""How an exponential average forgets: what `MovingAverage(average_decay=...)` takes."""

from keras_avg.decays.decay import Decay
from keras_avg.decays.half_life import HalfLife
from keras_avg.decays.power_function import PowerFunction
from keras_avg.decays.power_warmup import PowerWarmup

__all__ = ["Decay", "HalfLife", "PowerFunction", "PowerWarmup"]
