"""Communication between the workers of one job, for averages over all of them."""

from keras_avg.distributed.communicator import Communicator
from keras_avg.distributed.initialization import initialize
from keras_avg.distributed.local_communicator import LocalCommunicator

__all__ = ["Communicator", "LocalCommunicator", "initialize"]
