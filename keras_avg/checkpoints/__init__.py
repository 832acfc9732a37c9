"""Averages of files: means, soups, windows, and averages whose length is chosen after training."""

from keras_avg.checkpoints._average import average
from keras_avg.checkpoints._greedy_soup import greedy_soup
from keras_avg.checkpoints._merge_weights import merge_weights
from keras_avg.checkpoints._synthesize import synthesize
from keras_avg.checkpoints._window import window

__all__ = ["average", "greedy_soup", "merge_weights", "synthesize", "window"]
