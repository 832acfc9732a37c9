"""Trains many networks at once on the handwritten digits, one for each seed, and scores them.

The networks of all seeds are slices of one model. The first axis of each kernel is the seed, and
the loss is the sum over seeds. SGD and all averages of this package work element by element. So
each network learns exactly as it would alone, with its own first weights and its own order of
pictures. Twenty networks take hardly longer than one.
"""

import keras
import numpy as np
import sklearn.datasets

import keras_avg

BATCH_SIZE = 32
HIDDEN = 64
# In units of the learning rate. With a momentum m, SGD moves 1 / (1 - m) times as far for the same
# gradient. So its weight decay is larger by the same factor, to have the same effect.
WEIGHT_DECAY = 0.001
MOMENTUM = 0.9


def parts():
    """Pictures and digits in three parts: for training, for the choice of rates, for the test.

    They are in the order of their writers.
    """
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    x = x.astype("float32") / 16
    edges = (0, 1024, 1280, len(x))
    return [(x[a:b], y[a:b]) for a, b in zip(edges[:-1], edges[1:], strict=True)]  # noqa: RUF007


def to_train_on_all():
    """All pictures except those of the test, and those of the test."""
    train, choice, test = parts()
    return tuple(map(np.concatenate, zip(train, choice, strict=True))), test


def networks(seeds, first_seed):
    """Networks with one hidden layer each, and Glorot's uniform first weights."""
    keras.utils.set_random_seed(first_seed)
    layers = [keras.Input((seeds, 64))]
    for inputs, outputs, activation in ((64, HIDDEN, "relu"), (HIDDEN, 10, None)):
        bound = (6 / (inputs + outputs)) ** 0.5
        layers.append(
            keras.layers.EinsumDense(
                "bsi,sio->bso",
                output_shape=(seeds, outputs),
                bias_axes="so",
                activation=activation,
                kernel_initializer=keras.initializers.RandomUniform(-bound, bound),
            )
        )
    return keras.Sequential(layers)


def compiled(optimizer, seeds, first_seed=0):
    model = networks(seeds, first_seed)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss=loss, loss_weights=[float(seeds)])  # a sum over the networks
    return model


def in_own_order(known, seeds, first_seed):
    """The pictures and digits for each network. Each network has its own order."""
    random = np.random.default_rng(first_seed)
    order = np.stack([random.permutation(len(known[0])) for _ in range(seeds)], axis=1)
    return known[0][order], known[1][order]


def fit(model, known, epochs, first_seed=0, initial_epoch=0):
    seeds = model.output_shape[1]
    x, y = in_own_order(known, seeds, first_seed)
    model.fit(x, y, batch_size=BATCH_SIZE, initial_epoch=initial_epoch, epochs=epochs, verbose=0)
    return model


def scores(model, unseen):
    """Lists of accuracy in percent and negative log-likelihood, of the weights in the model."""
    x, y = unseen
    seeds = model.output_shape[1]
    logits = model.predict(np.repeat(x[:, None], seeds, axis=1), batch_size=512, verbose=0)
    logits = logits - logits.max(axis=-1, keepdims=True)
    logarithms = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    right = logits.argmax(axis=-1) == y[:, None]
    return {
        "accuracy (%)": (100 * right.mean(axis=0)).tolist(),
        "negative log-likelihood": (-logarithms[np.arange(len(y)), :, y].mean(axis=0)).tolist(),
    }


def average_scores(model, unseen, optimizer=None):
    """The scores of the averages of `optimizer`. Default: those of the outermost wrapper."""
    with (optimizer or model.optimizer).average_weights():
        return scores(model, unseen)


def sgd(rate):
    return keras.optimizers.SGD(rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY / (1 - MOMENTUM))


def cosine(rate, steps):
    return sgd(keras.optimizers.schedules.CosineDecay(rate, decay_steps=steps))


def schedule_free(rate):
    return keras_avg.ScheduleFree(keras.optimizers.SGD(rate, weight_decay=WEIGHT_DECAY))


def ema_and_swa(rate, steps):
    """Two averages of one training. SWA begins in the middle."""
    ema = keras_avg.MovingAverage(sgd(rate), average_decay=0.99)
    return keras_avg.SWA(ema, start_averaging=steps // 2, average_period=10)


def steps(known, epochs):
    return len(known[0]) // BATCH_SIZE * epochs


def best(rates, likelihood):
    """The rate with the smallest mean negative log-likelihood, and the mean of each rate.

    Args:
        rates: The rates to try.
        likelihood: Function of a rate. It returns the negative log-likelihoods on the pictures
            for the choice.
    """
    found = {rate: float(np.mean(likelihood(rate))) for rate in rates}
    return min(found, key=lambda rate: found[rate] if np.isfinite(found[rate]) else np.inf), found
