"""Backups are whole at any moment. Resumed training ends where undisturbed training ends."""

import os

import h5py
import keras
import pytest
import small_training as small

import keras_avg
from keras_avg import SWA, MovingAverage
from keras_avg.callbacks import AverageModelCheckpoint, BackupAndRestore, SwapAverageWeights

EPOCHS = 4


def model(**compile_arguments):
    """A model with Dropout. Keras does not save the seed of Dropout."""
    keras.utils.set_random_seed(3)
    layers = [
        keras.Input((5,)),
        keras.layers.Dense(6, activation="tanh"),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.3, seed=1),
        keras.layers.Dense(1),
    ]
    new = keras.Sequential(layers)
    optimizer = SWA(MovingAverage(keras.optimizers.Adam(0.02)), 3, 2)
    new.compile(optimizer, "mse", metrics=["mae"], **compile_arguments)
    return new


class Dies(keras.callbacks.Callback):
    def __init__(self, epoch, batch):
        super().__init__()
        self.at, self.epoch = (epoch, batch), None

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == self.at:
            raise KeyboardInterrupt


def fit(trained, *callbacks, **arguments):
    return small.fit(trained, EPOCHS, callbacks=list(callbacks), **arguments)


def state(trained):
    keras_avg.swap_weights(trained)
    arrays = [*trained.get_weights(), *trained.optimizer.get_weights()]
    return arrays + [small.numpy(v) for v in trained.variables]


def resumed(tmp_path, at, make=model, **arguments):
    """Interrupt the training of a model, and go on with it in a new model."""
    backup = lambda: BackupAndRestore(tmp_path / "backup", **arguments)  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        fit(make(), SwapAverageWeights(), backup(), Dies(*at))
    return fit(make(), SwapAverageWeights(), backup())


@pytest.mark.sample(12, jax=4, tensorflow=2)
@pytest.mark.parametrize("save_freq", ["epoch", 1, 4, 6])
@pytest.mark.parametrize("at", [(1, 0), (1, 5), (2, 2)])
def test_interrupted_training_ends_where_undisturbed_training_ends(tmp_path, save_freq, at):
    undisturbed = fit(model(), SwapAverageWeights())
    went_on = resumed(tmp_path, at, save_freq=save_freq)
    small.assert_same_bits(state(went_on), state(undisturbed))
    assert not (tmp_path / "backup").exists()


@pytest.mark.slow_on("jax", "tensorflow")
def test_an_interrupted_epoch_has_the_metrics_of_all_its_batches(tmp_path):
    undisturbed = fit(model(), SwapAverageWeights())
    went_on = resumed(tmp_path, (1, 3), save_freq=2)
    assert went_on.history.epoch == [1, 2, 3]
    for name, values in undisturbed.history.history.items():
        assert went_on.history.history[name] == values[1:], name


@pytest.mark.slow_on("jax", "tensorflow")
def test_the_next_training_begins_with_the_first_epoch(tmp_path):
    went_on = resumed(tmp_path, (2, 2))
    updates = went_on.optimizer.updates_so_far()
    fit(went_on, SwapAverageWeights())
    assert went_on.history.epoch == [0, 1, 2, 3]
    assert went_on.optimizer.updates_so_far() == updates + EPOCHS * small.BATCHES


@pytest.mark.slow_on("jax", "tensorflow")
@pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch runs one step at a time")
def test_training_goes_on_with_several_steps_per_execution(tmp_path):
    make = lambda: model(steps_per_execution=2)  # noqa: E731
    undisturbed = fit(make(), SwapAverageWeights())
    went_on = resumed(tmp_path, (1, 3), make, save_freq=2)
    small.assert_same_bits(state(went_on), state(undisturbed))


@pytest.mark.slow_on("jax", "tensorflow")
def test_a_generator_is_read_up_to_the_batch_where_training_goes_on(tmp_path):
    def batches():
        while True:
            for i in range(0, len(small.X), small.BATCH_SIZE):
                yield small.X[i : i + small.BATCH_SIZE], small.Y[i : i + small.BATCH_SIZE]

    def train(*callbacks):
        trained = model()
        how = {"epochs": EPOCHS, "steps_per_epoch": small.BATCHES, "shuffle": False, "verbose": 0}
        trained.fit(batches(), callbacks=list(callbacks), **how)
        return trained

    undisturbed = train(SwapAverageWeights())
    with pytest.raises(KeyboardInterrupt):
        train(SwapAverageWeights(), BackupAndRestore(tmp_path, save_freq=2), Dies(1, 3))
    went_on = train(SwapAverageWeights(), BackupAndRestore(tmp_path, save_freq=2))
    small.assert_same_bits(state(went_on), state(undisturbed))


class StopsWhileWriting:
    """Makes `save_weights` of a model write half a file, like a process that is killed."""

    def __init__(self, trained, monkeypatch):
        def half(path, **arguments):
            with open(path, "wb") as file:
                file.write(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(trained, "save_weights", half)
        monkeypatch.setattr(trained, "save", half)


@pytest.mark.parametrize("double", [True, False])
def test_the_old_backup_stays_until_the_new_one_is_whole(tmp_path, monkeypatch, double):
    trained = model()
    backup = BackupAndRestore(tmp_path, double_checkpoint=double, delete_checkpoint=False)
    fit(trained, backup)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"latest.weights.h5"} | ({"previous.weights.h5"} if double else set())
    with monkeypatch.context() as patch:
        StopsWhileWriting(trained, patch)
        with pytest.raises(KeyboardInterrupt):
            backup.on_epoch_end(0)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.slow_on("jax", "tensorflow")
def test_unfinished_files_of_a_killed_process_are_removed(tmp_path):
    left = tmp_path / ".aside-latest.weights.h5-abc"
    left.mkdir()
    (left / "latest.weights.h5").write_bytes(b"half")
    fit(model(), BackupAndRestore(tmp_path, delete_checkpoint=False))
    assert [path.name for path in tmp_path.iterdir()] == ["latest.weights.h5"]


@pytest.mark.slow_on("jax", "tensorflow")
def test_the_previous_backup_is_used_if_the_last_one_is_damaged(tmp_path):
    backup = lambda: BackupAndRestore(tmp_path, 2, double_checkpoint=True)  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        fit(model(), SwapAverageWeights(), backup(), Dies(1, 4))
    (tmp_path / "latest.weights.h5").write_bytes(b"half")
    went_on = fit(model(), SwapAverageWeights(), backup())
    small.assert_same_bits(state(went_on), state(fit(model(), SwapAverageWeights())))


@pytest.mark.slow_on("jax", "tensorflow")
def test_a_damaged_backup_without_a_previous_one_raises_an_error(tmp_path):
    (tmp_path / "latest.weights.h5").write_bytes(b"half")
    with pytest.raises(OSError, match=r"cannot be read. Received: .*latest.* Delete the folder"):
        fit(model(), BackupAndRestore(tmp_path))


@pytest.mark.slow_on("jax", "tensorflow")
def test_a_backup_of_keras_own_callback_is_read(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(small.model("adam"), keras.callbacks.BackupAndRestore(str(tmp_path)), Dies(2, 1))
    went_on = fit(small.model("adam"), BackupAndRestore(tmp_path))
    undisturbed = fit(small.model("adam"))
    assert went_on.history.epoch == [2, 3]
    small.assert_same_bits(went_on.get_weights(), undisturbed.get_weights())


@pytest.mark.parametrize("save_freq", [0, -1, 0.5, "batch", None])
def test_a_wrong_save_freq_is_refused(tmp_path, save_freq):
    with pytest.raises(ValueError, match="save_freq"):
        BackupAndRestore(tmp_path, save_freq)


def test_a_folder_that_is_not_local_is_refused():
    with pytest.raises(ValueError, match=r"takes a local folder. Received: backup_dir='gs://a/b'"):
        BackupAndRestore("gs://a/b")


@pytest.mark.slow_on("jax", "tensorflow")
def test_no_backup_is_made_if_save_freq_is_false(tmp_path):
    fit(model(), BackupAndRestore(tmp_path / "backup", False, delete_checkpoint=False))
    assert not (tmp_path / "backup").exists()


class TestAverageModelCheckpoint:
    @pytest.mark.slow_on("jax", "tensorflow")
    @pytest.mark.parametrize("name", ["m.keras", "m.weights.h5"])
    def test_the_old_checkpoint_stays_until_the_new_one_is_whole(self, tmp_path, monkeypatch, name):
        trained = model()
        weights_only = name.endswith(".weights.h5")
        callback = AverageModelCheckpoint(False, tmp_path / name, save_weights_only=weights_only)
        fit(trained, callback)
        before, weights = (tmp_path / name).read_bytes(), trained.get_weights()
        with monkeypatch.context() as patch:
            StopsWhileWriting(trained, patch)
            with pytest.raises(KeyboardInterrupt):
                callback.on_epoch_end(9, {})
        assert [path.name for path in tmp_path.iterdir()] == [name]
        assert (tmp_path / name).read_bytes() == before
        small.assert_same_bits(trained.get_weights(), weights)

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_a_checkpoint_that_is_a_link_stays_a_link(self, tmp_path):
        os.symlink(tmp_path / "m.keras", tmp_path / "best.keras")
        fit(model(), AverageModelCheckpoint(False, tmp_path / "best.keras"))
        assert (tmp_path / "best.keras").is_symlink()
        keras.saving.load_model(tmp_path / "m.keras")


@pytest.mark.slow_on("jax", "tensorflow")
def test_the_backup_file_contains_the_position_in_training(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(model(), BackupAndRestore(tmp_path, 2), Dies(1, 4))
    with h5py.File(tmp_path / "latest.weights.h5") as file:
        position = file["keras_avg_backup"].attrs["position"]
        assert position == '{"epoch": 1, "batches": 4}'
        assert len(file["keras_avg_backup/integers"]) == 1  # the seed of Dropout
