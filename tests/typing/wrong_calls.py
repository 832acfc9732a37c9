"""Wrong calls. mypy finds the error in each one: otherwise its `type: ignore` would be unused."""

import keras

import keras_avg
from keras_avg import callbacks, checkpoints, decays, schedules

model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])

keras_avg.SWA("sgd", average_period="x")  # type: ignore[arg-type]
keras_avg.SWA(0.1)  # type: ignore[arg-type]
keras_avg.SWA("sgd", clipnorm="1")  # type: ignore[arg-type]
keras_avg.SWAG("sgd", exclude=3)  # type: ignore[arg-type]
keras_avg.LAWA("sgd", windows=3)  # type: ignore[call-arg]
keras_avg.ModelAverage("sgd", use_ema=True)  # type: ignore[call-arg]
keras_avg.MovingAverage("sgd", decay=0.9)  # type: ignore[call-arg]
keras_avg.MovingAverage("sgd", average_decay="0.99")  # type: ignore[arg-type]
keras_avg.MovingAverage("sgd", num_updates=[3])  # type: ignore[arg-type]
keras_avg.ModelAverage("sgd", communicator="gloo")  # type: ignore[arg-type]
keras_avg.AveragedOptimizerWrapper("sgd", exclude=3)  # type: ignore[arg-type]
keras_avg.SWA("sgd").bind_model("model.keras")  # type: ignore[arg-type]
keras_avg.SWA("sgd").no_such_method()  # type: ignore[attr-defined]
keras_avg.swap_weights(keras_avg.SWA("sgd"))  # type: ignore[arg-type]
keras_avg.update_batch_norm(model, [0.0], batch_size="all")  # type: ignore[arg-type]
checkpoints.average(model, [3])  # type: ignore[list-item]
checkpoints.merge_weights(3, 0.5)  # type: ignore[arg-type]
checkpoints.window(model, 1, 2)  # type: ignore[arg-type]
callbacks.SwapAverageWeights(optimizer="sgd")  # type: ignore[arg-type]
callbacks.SaveAverages(3)  # type: ignore[arg-type]
decays.HalfLife("long")  # type: ignore[arg-type]
schedules.SWALearningRate("cosine", 0.1, 5, 2)  # type: ignore[arg-type]
text: str = keras_avg.SWA("sgd").num_snapshots  # type: ignore[assignment]
