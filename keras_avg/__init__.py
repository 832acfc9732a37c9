"""Weight averaging for Keras 3, on TensorFlow, JAX and PyTorch."""

from keras_avg import callbacks, checkpoints, decays, distributed, schedules
from keras_avg._optimizers.averaged_optimizer_wrapper import AveragedOptimizerWrapper
from keras_avg._optimizers.bema import BEMA
from keras_avg._optimizers.lawa import LAWA
from keras_avg._optimizers.lookahead import Lookahead
from keras_avg._optimizers.model_average import ModelAverage
from keras_avg._optimizers.moving_average import MovingAverage
from keras_avg._optimizers.primal_average import PrimalAverage
from keras_avg._optimizers.schedule_free import ScheduleFree
from keras_avg._optimizers.swa import SWA
from keras_avg._optimizers.swag import SWAG
from keras_avg._wrapping.finding import averaging_optimizers
from keras_avg._wrapping.summary import summary
from keras_avg._wrapping.swap_weights import assign_average_vars, average_weights, swap_weights
from keras_avg.batch_norm import update_batch_norm

__version__ = "0.2.0"

__all__ = [
    "BEMA",
    "LAWA",
    "SWA",
    "SWAG",
    "AveragedOptimizerWrapper",
    "Lookahead",
    "ModelAverage",
    "MovingAverage",
    "PrimalAverage",
    "ScheduleFree",
    "assign_average_vars",
    "average_weights",
    "averaging_optimizers",
    "callbacks",
    "checkpoints",
    "decays",
    "distributed",
    "schedules",
    "summary",
    "swap_weights",
    "update_batch_norm",
]
