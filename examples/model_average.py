"""Workers train on their own shards, and average their models at intervals.

Each worker is a process. It learns scikit-learn's handwritten digits from its own part of them.
Every 20 steps all workers take the mean of their weights. At the end, each worker prints the
accuracy of its own weights and of the center. The chief also trains a model on its part alone, for
comparison. Start the script by the launcher of your backend. docs/workers.md has the three command
lines. The script also runs as one process:

    python examples/model_average.py
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # no start-up messages

import keras_avg

communicator = keras_avg.distributed.initialize(timeout=120)  # before anything of Keras is made

import keras  # noqa: E402
import sklearn.datasets  # noqa: E402

SEED = 0
EPOCHS = 6
BATCH_SIZE = 16
TRAIN_SIZE = 1280
INTERVAL = 20


def load_digits():
    """Pictures as rows of 64 numbers between 0 and 1: this worker's part for training, the test."""
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    x = x.astype("float32") / 16
    mine = slice(communicator.rank, TRAIN_SIZE, communicator.size)
    return (x[mine], y[mine]), (x[TRAIN_SIZE:], y[TRAIN_SIZE:])


def build_model(optimizer):
    layers = [keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10)]
    model = keras.Sequential([keras.Input((64,)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"])
    return model


def accuracy(model, test):
    return 100 * model.evaluate(*test, verbose=0, return_dict=True)["accuracy"]


def main():
    keras.utils.set_random_seed(SEED + communicator.rank)
    train, test = load_digits()

    sgd = keras.optimizers.SGD(0.1, momentum=0.9)
    model = build_model(keras_avg.ModelAverage(sgd, interval_steps=INTERVAL))
    workers = keras_avg.callbacks.SynchronizeWorkers()
    model.fit(*train, batch_size=BATCH_SIZE, epochs=EPOCHS, verbose=0, callbacks=[workers])

    own = accuracy(model, test)
    with model.optimizer.average_weights():
        center = accuracy(model, test)
    print(
        f"worker {communicator.rank} of {communicator.size}: {len(train[0])} pictures, "
        f"{int(model.optimizer.iterations)} steps, {model.optimizer.num_snapshots} rounds, "
        f"accuracy {own:.1f} %, center {center:.1f} %",
        flush=True,
    )
    if communicator.is_chief:
        alone = build_model(keras.optimizers.SGD(0.1, momentum=0.9))
        alone.fit(*train, batch_size=BATCH_SIZE, epochs=EPOCHS, verbose=0)
        print(f"on the chief's pictures alone: accuracy {accuracy(alone, test):.1f} %", flush=True)
    communicator.barrier()


if __name__ == "__main__":
    main()
