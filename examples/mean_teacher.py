"""
Title: Consistency training with a mean teacher
Description: Learning digits from fifty labels, with the averaged weights as the teacher.
Accelerator: None
"""

"""
## Introduction

Labels are dear, pictures are cheap. Consistency training learns from both: whatever the digit in a
picture is, it stays the same when the picture is shifted a little or has a hole in it. So a network
can teach itself. It looks at a picture, says what it sees, and has to say the same of a distorted
copy.

The catch is that a network that believes itself too early learns its own mistakes. Two remedies
have lasted:

* **The teacher is an average** of the student's weights over many steps. It is better than the
  student at each moment, and does not follow its every move
  ([mean teacher](https://arxiv.org/abs/1703.01780)).
* **Only confident answers count** ([FixMatch](https://arxiv.org/abs/2001.07685)).

The average is kept by `keras_avg.MovingAverage`, a wrapper around the optimizer, and is read in the
middle of training by `reading_averages()`: inside this context the model answers with the averaged
weights, without a second model, a copy, or a swap.

The data are scikit-learn's handwritten digits of 8 x 8 pixels. Start this script as it is, in under
two minutes on two processor cores:

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
AVERAGE_DECAY = 0.99  # the teacher is an average over some hundred steps

keras.utils.set_random_seed(0)
random = np.random.default_rng(0)

"""
## Prepare the data

The first 1280 pictures are for training. Five of each digit, drawn by lot, keep their labels, the
others lose them. The remaining 517 pictures, by other writers, are for the test.
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

The teacher sees a picture that is shifted by up to a pixel. The student sees one that is shifted,
has a dark or bright hole of 3 x 3 pixels and some noise. A strong distortion leaves the digit what
it is, and makes it harder to tell.
"""


def shifted(pictures):
    """Each picture moved by -1, 0 or 1 pixels in both directions, on a dark ground."""
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

A small convolutional network. The optimizer is Adam, wrapped so that it keeps the average, which is
all that the teacher needs.
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

With labels, a step is what it always is. Without, the teacher says what it sees in the weakly
shifted pictures. Its answers are the targets for the strongly distorted ones, and those that it is
not sure of get a weight of 0.

`dynamic_decay=True` lets the average begin short and grow: a teacher made of the first few steps
would know nothing for long.
"""


def labelled_batch():
    chosen = random.integers(len(x_labelled), size=LABELLED_IN_BATCH)
    return distorted(x_labelled[chosen]), y_labelled[chosen], np.ones(len(chosen), "float32")


def taught_batch(model):
    """Unlabelled pictures, and what the averaged weights see in them."""
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
    model.train_on_batch(*labelled_batch())  # from here on there is an average to read
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

Both see the fifty labels equally often.
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

The average of the run on labels alone is shown too, to tell apart what averaging gives and what
teaching gives.
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

The teacher is called outside of the compiled step here, which works the same on TensorFlow, JAX and
PyTorch. In a `train_step` of your own `reading_averages()` works on TensorFlow, in a `tf.function`
too, and on PyTorch. In a compiled JAX step the teacher is a function of the state:
`model.stateless_call(optimizer.stateless_average(state), non_trainable_variables, x)`.

The file that `model.save` writes has both copies in it. Deploy the teacher: call
`keras_avg.assign_average_vars(model)` before you save.
"""
