"""
Title: Consistency training with a mean teacher
Description: Learn digits from fifty labels. The averaged weights are the teacher.
Accelerator: None
"""

"""
## Introduction

Labels are expensive, and pictures are cheap. Consistency training uses pictures with and without
labels. If a picture is shifted a little or has a hole in it, its digit stays the same. So a network
can teach itself: its prediction for a picture is the target for a distorted copy of the picture.

But if the network uses wrong predictions as targets, it learns its own errors. Two methods help:

* **The teacher is an average** of the student's weights over many steps. It is usually better than
  the student, and it changes more slowly ([mean teacher](https://arxiv.org/abs/1703.01780)).
* **Only confident predictions count** ([FixMatch](https://arxiv.org/abs/2001.07685)).

`keras_avg.MovingAverage`, a wrapper around the optimizer, keeps the average. `reading_averages()`
reads it during training: inside this context the model predicts with the averaged weights, without
a second model, a copy, or a swap.

The data are scikit-learn's handwritten digits of 8 x 8 pixels. The script runs in under two minutes
on two processor cores:

    KERAS_BACKEND=jax python examples/mean_teacher.py

## Setup
"""

import os
import pathlib
import sys

import keras
import matplotlib.pyplot as plt
import numpy as np
import sklearn.datasets
from keras import layers, ops

import keras_avg

EPOCHS = int(os.environ.get("EPOCHS", "30"))
STEPS_OF_AN_EPOCH = 40
LABELS = 50  # five of each digit
LABELLED_IN_BATCH = 16
UNLABELLED_IN_BATCH = 64
CONFIDENT = 0.9
AVERAGE_DECAY = 0.99  # the teacher is an average over a few hundred steps

keras.utils.set_random_seed(0)
random = np.random.default_rng(0)

"""
## Prepare the data

The first 1280 pictures are for training. Five random pictures of each digit keep their labels. The
others lose their labels. The remaining 517 pictures, by other writers, are for the test.
"""

x, y = sklearn.datasets.load_digits(return_X_y=True)
x = x.reshape(-1, 8, 8, 1).astype("float32") / 16
y = np.eye(10, dtype="float32")[y]
x_test, y_test = x[1280:], y[1280:]
x, y = x[:1280], y[:1280]

labelled = np.concatenate(
    [random.choice(np.flatnonzero(digit), LABELS // 10, replace=False) for digit in y.T]
)
x_labelled, y_labelled = x[labelled], y[labelled]
print(f"{len(x)} pictures, {len(x_labelled)} of them with a label")

"""
## Two kinds of distortion

The teacher gets a picture that is shifted by up to a pixel. The student gets a picture that is also
shifted, and has a dark or bright hole of 3 x 3 pixels and some noise. A strong distortion does not
change the digit, but makes it harder to recognize.
"""


def shifted(pictures):
    """Each picture moved by -1, 0 or 1 pixels in both directions, on a dark background."""
    padded = np.pad(pictures, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows, columns = random.integers(3, size=(2, len(pictures), 1))
    rows, columns = rows + np.arange(8), columns + np.arange(8)
    return padded[np.arange(len(pictures))[:, None, None], rows[:, :, None], columns[:, None]]


def distorted(pictures):
    pictures = shifted(pictures)
    pictures = pictures + random.normal(scale=0.1, size=pictures.shape).astype("float32")
    for picture, (row, column), shade in zip(
        pictures,
        random.integers(6, size=(len(pictures), 2)),
        random.uniform(size=len(pictures)),
        strict=True,
    ):
        picture[row : row + 3, column : column + 3] = shade
    return np.clip(pictures, 0.0, 1.0)


"""
## Build the model

The model is a small convolutional network. The optimizer is Adam in a wrapper that keeps the
average. The teacher needs nothing else.
"""


def build_model():
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dropout(0.3),
            layers.Dense(10, activation="softmax"),
        ]
    )
    optimizer = keras_avg.MovingAverage(
        keras.optimizers.Adam(2e-3), average_decay=AVERAGE_DECAY, dynamic_decay=True
    )
    model.compile(optimizer, loss="categorical_crossentropy", weighted_metrics=["accuracy"])
    return model


"""
## The training step

With labels, a step is an ordinary training step. Without labels, the teacher predicts the digits of
the weakly distorted pictures. Its predictions are the targets for the strongly distorted pictures.
Targets of low confidence get the weight 0.

With `dynamic_decay=True` the average is short at first, and its length grows. Otherwise the first
weights would stay in the teacher for many steps.
"""


def labelled_batch():
    chosen = random.integers(len(x_labelled), size=LABELLED_IN_BATCH)
    return distorted(x_labelled[chosen]), y_labelled[chosen], np.ones(len(chosen), "float32")


def taught_batch(model):
    """Unlabelled pictures, and the predictions of the averaged weights for them."""
    chosen = x[random.integers(len(x), size=UNLABELLED_IN_BATCH)]
    with model.optimizer.reading_averages():
        answers = ops.convert_to_numpy(model(shifted(chosen), training=False))
    digits, confidence = np.eye(10, dtype="float32")[answers.argmax(axis=1)], answers.max(axis=1)
    return distorted(chosen), digits, (confidence > CONFIDENT).astype("float32")


def accuracies(model):
    """Test accuracies of the student and of the teacher, in percent."""

    def accuracy():
        return 100 * model.evaluate(x_test, y_test, verbose=0, return_dict=True)["accuracy"]

    student = accuracy()
    with keras_avg.average_weights(model):
        return student, accuracy()


def train(with_teacher):
    """Returns the accuracies of student and teacher at the end of each epoch."""
    model, history = build_model(), []
    model.train_on_batch(*labelled_batch())  # from here on there is an average
    for _ in range(EPOCHS):
        for _ in range(STEPS_OF_AN_EPOCH):
            parts = [labelled_batch()]
            if with_teacher:
                parts.append(taught_batch(model))
            model.train_on_batch(*map(np.concatenate, zip(*parts, strict=True)))
        history.append(accuracies(model))
    return np.array(history)


"""
## Train, with labels alone and with a teacher

Both trainings use the fifty labels equally often.
"""

labels_alone = train(with_teacher=False)
taught = train(with_teacher=True)

for name, (student, teacher) in {
    "labels alone": labels_alone[-1],
    "with a teacher": taught[-1],
}.items():
    print(f"{name:<16} raw weights {student:.1f} %, averaged weights {teacher:.1f} %")

"""
## Look at the result

The picture also has the average of the run on labels alone. It separates the effect of averaging
from the effect of the teacher.
"""

epochs = range(1, EPOCHS + 1)
figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
axes.plot(epochs, taught[:, 1], color="tab:orange", label="teacher: the average")
axes.plot(epochs, taught[:, 0], color="tab:orange", alpha=0.45, lw=1, label="its student")
axes.plot(epochs, labels_alone[:, 1], color="tab:blue", label="average, labels alone")
axes.plot(epochs, labels_alone[:, 0], color="tab:blue", alpha=0.45, lw=1, label="labels alone")
axes.set(title=f"Handwritten digits, {LABELS} labels", xlabel="epoch", ylabel="test accuracy (%)")
axes.grid(alpha=0.3)
axes.legend(loc="lower right", ncols=2)
picture = sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).with_suffix(".png")
figure.savefig(picture, dpi=150)
print(f"Picture: {picture}")

"""
## Where to go from here

Here the teacher is called outside the compiled step. This works in the same way on TensorFlow, JAX
and PyTorch. In your own `train_step`, `reading_averages()` works on PyTorch and on TensorFlow, also
in a `tf.function`. In a compiled JAX step the teacher is a function of the state:
`model.stateless_call(optimizer.stateless_average(state), non_trainable_variables, x)`.

A file that `model.save` writes has both copies. To deploy only the teacher, call
`keras_avg.assign_average_vars(model)` before you save.
"""
