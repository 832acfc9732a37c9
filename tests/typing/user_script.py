"""A user's script. mypy reads it, and finds no error. It uses each public symbol as the docs do."""

import pathlib
from collections.abc import Sequence

import keras
import numpy as np

import keras_avg
from keras_avg import callbacks, checkpoints, decays, distributed, schedules

x, y = np.zeros((8, 3)), np.zeros((8, 1))
model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
rate = schedules.SWALearningRate(0.1, 0.05, start_step=10, anneal_steps=5)
config: dict[str, object] = {"class_name": "SGD", "config": {}}

wrappers: list[keras_avg.AveragedOptimizerWrapper] = [
    keras_avg.SWA("sgd", start_averaging=5, average_period=2, skip_nonfinite=True),
    keras_avg.SWAG(keras.optimizers.SGD(rate), rank=3),
    keras_avg.LAWA(config, window=3, clipnorm=1.0, average_dtype="float32"),
    keras_avg.SWA("sgd", learning_rate=rate, decay=0.1, exclude=None),
    keras_avg.BEMA("adam", power=0.5, average_period=50),
    keras_avg.Lookahead("sgd", sync_period=6, slow_step_size=0.5),
    keras_avg.MovingAverage("adam", average_decay=0.99, exclude=["bias"]),
    keras_avg.MovingAverage("adam", average_decay=decays.HalfLife(100)),
    keras_avg.MovingAverage("adam", average_decay=decays.PowerWarmup(0.999)),
    keras_avg.MovingAverage("adam", average_decay=decays.PowerFunction(0.1)),
    keras_avg.MovingAverage(keras_avg.SWA("adam"), average_decay=rate),
    keras_avg.PrimalAverage("sgd", interpolation=0.7),
    keras_avg.ScheduleFree("sgd", interpolation=0.9),
    keras_avg.ModelAverage(
        "sgd",
        interval_steps=10,
        outer_optimizer=keras.optimizers.SGD(1.0),
        communicator=distributed.LocalCommunicator(),
    ),
]


class EveryOther(keras_avg.AveragedOptimizerWrapper):
    def is_due(self, step: int) -> bool:
        return step % 2 == 0

    def value_weight(self, step: int) -> float:
        return 0.1


class Slower(decays.Decay):
    def value_weight(self, t: int, period: int) -> float:
        return period / (t + 1)


class Twice(distributed.Communicator):
    rank, size = 0, 1

    def all_reduce_sum(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [np.array(array) for array in arrays]


wrappers += [EveryOther("adam"), keras_avg.MovingAverage("adam", average_decay=Slower())]
keras_avg.ModelAverage("sgd", communicator=Twice())
communicator: distributed.Communicator = distributed.initialize(timeout=60)
is_chief: bool = communicator.is_chief
sums: list[np.ndarray] = communicator.all_reduce_sum([x, y])

optimizer = wrappers[0]
model.compile(optimizer=optimizer, loss="mse")
optimizer.build(model.trainable_variables)
optimizer.learning_rate = 0.01
optimizer.learning_rate = rate
optimizer.minimize(lambda: model(x), model.trainable_variables)
optimizer.apply_gradients([(np.zeros((3, 1)), model.trainable_variables[0])])
taken: int = optimizer.num_snapshots + optimizer.updates_so_far()
paths: list[str] = [variable.path for variable in optimizer.variables]
slot: str = optimizer.get_slot(model.variables[0], "average").path
inner: keras.optimizers.Optimizer = optimizer.inner_optimizer
copied: keras_avg.SWA = keras_avg.SWA.from_config(keras_avg.SWA("sgd").get_config())
halved: decays.HalfLife = decays.HalfLife.from_config(decays.HalfLife(5).get_config())
values = optimizer.stateless_average(optimizer.variables, model.trainable_variables)
optimizer.assign_average_vars(model.trainable_variables)
with optimizer.average_weights():
    model.evaluate(x, y)
with keras_avg.SWAG("sgd").sample_weights(seed=0):
    model.predict(x)

keras_avg.swap_weights(model)
with keras_avg.average_weights(model):
    model.predict(x)
keras_avg.assign_average_vars(model)
keras_avg.update_batch_norm(model, x, batch_size=4, verbose=0)
keras_avg.summary(model, print_fn=print)
names: list[str] = [wrapper.name for wrapper in keras_avg.averaging_optimizers(model)]

folder = pathlib.Path("run")
model.fit(
    x,
    y,
    callbacks=[
        callbacks.SwapAverageWeights(batch_norm_data=x, optimizer=optimizer),
        callbacks.AverageModelCheckpoint(False, folder / "best.keras", monitor="loss"),
        callbacks.BackupAndRestore(folder / "backup", save_freq=100),
        callbacks.SaveAverages(folder / "averages", every_steps=10),
        callbacks.SynchronizeWorkers(),
    ],
)

files = sorted(folder.glob("*.weights.h5"))
checkpoints.average(model, files, checkpoints.merge_weights(len(files), "1-sqrt"))
checkpoints.average(model, files, checkpoints.merge_weights(len(files), lambda share: 1.0 - share))
soup: list[pathlib.Path] = checkpoints.greedy_soup(model, files, lambda m: float(m.count_params()))
row: dict[str, float] = checkpoints.synthesize(model, "run/averages", 0.1)
checkpoints.window(model, "early.keras", folder / "late.keras")

cycles: list[keras.optimizers.schedules.LearningRateSchedule] = [
    schedules.CyclicalLearningRate(0.01, 0.1, 100, lambda cycle: 1.0 / cycle),
    schedules.TriangularCyclicalLearningRate(0.01, 0.1, 100),
    schedules.Triangular2CyclicalLearningRate(0.01, 0.1, 100),
    schedules.ExponentialCyclicalLearningRate(0.01, 0.1, 100, gamma=0.99),
    schedules.SWALearningRate(keras.optimizers.schedules.CosineDecay(0.1, 9), 0.1, 5, 2),
]
keras.optimizers.SGD(cycles[0])
