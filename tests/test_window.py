"""The mean of the snapshots between two files of one run."""

import keras
import numpy as np
import pytest
import small_training as small

from keras_avg import SWA, Lookahead, MovingAverage, checkpoints, swap_weights

ROUNDING = 1e-5  # Relative error of a difference of float32 means.


class Snapshots(keras.callbacks.Callback):
    """Keeps the weights after each step that is due. SWA should have averaged these."""

    def __init__(self, start, period):
        super().__init__()
        self.start, self.period, self.step, self.taken = start, period, 0, []

    def on_train_batch_end(self, batch, logs=None):
        since = self.step - self.start
        if since >= 0 and since % self.period == 0:
            self.taken.append([small.numpy(v) for v in self.model.trainable_variables])
        self.step += 1


def run(folder, kinds=("keras", "keras"), optimizer=None, swapped=False, start=2, period=2):
    """Two files of one run, and the snapshots between them."""
    model = small.model(optimizer or SWA(keras.optimizers.Adam(0.01), start, period))
    snapshots = Snapshots(start, period)
    files, counts = [], []
    for name, kind in zip(("earlier", "later"), kinds, strict=True):
        small.fit(model, epochs=3, callbacks=[snapshots])
        files.append(folder / f"{name}.{kind}")
        counts.append(len(snapshots.taken))
        if swapped:
            swap_weights(model)
        arguments = {"max_shard_size": 2e-7} if kind.endswith("json") else {}
        (model.save if kind == "keras" else model.save_weights)(files[-1], **arguments)
        if swapped:
            swap_weights(model)
    return files, snapshots.taken[counts[0] :], model


def expect_mean(model, snapshots):
    expected = [np.mean(v, axis=0, dtype="float64") for v in zip(*snapshots, strict=True)]
    for variable, mean in zip(model.trainable_variables, expected, strict=True):
        np.testing.assert_allclose(small.numpy(variable), mean, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    "kinds",
    [("keras", "keras"), ("weights.h5", "weights.json"), ("weights.json", "keras")],
    ids=" ".join,
)
def test_a_window_is_the_mean_of_the_snapshots_between_two_files(tmp_path, kinds, swapped):
    files, snapshots, _ = run(tmp_path, kinds, swapped=swapped)
    assert len(snapshots) == 9
    model = small.model()
    assert checkpoints.window(model, *files) is None
    expect_mean(model, snapshots)
    far_off = [[value + 1e-3 for value in each] for each in snapshots]
    with pytest.raises(AssertionError):
        expect_mean(model, far_off)


@pytest.mark.slow_on("tensorflow")
def test_a_window_is_computed_in_float64_and_rounded_once(tmp_path):
    files, _, _ = run(tmp_path)
    loaded = [keras.saving.load_model(file).optimizer for file in files]
    n1, n2 = (optimizer.num_snapshots for optimizer in loaded)
    a1, a2 = ([small.numpy(a).astype("float64") for a in o.averages()] for o in loaded)
    expected = [
        ((n2 * late - n1 * early) / (n2 - n1)).astype("float32")
        for early, late in zip(a1, a2, strict=True)
    ]
    model = small.model()
    checkpoints.window(model, *files)
    small.assert_same_bits([small.numpy(v) for v in model.trainable_variables], expected)


@pytest.mark.slow_on("tensorflow")
def test_a_window_takes_statistics_from_the_later_file(tmp_path):
    files, _, trained = run(tmp_path)
    model = small.model()
    checkpoints.window(model, *files)
    small.assert_same_bits(
        [small.numpy(v) for v in model.non_trainable_variables],
        [small.numpy(v) for v in trained.non_trainable_variables],
    )


@pytest.mark.slow_on("tensorflow")
def test_the_earlier_file_may_be_from_before_the_first_snapshot(tmp_path):
    files, snapshots, trained = run(tmp_path, start=20)
    model = small.model()
    checkpoints.window(model, *files)
    expect_mean(model, snapshots)
    with trained.optimizer.average_weights():
        expected = [small.numpy(v) for v in trained.trainable_variables]
    small.assert_same_bits([small.numpy(v) for v in model.trainable_variables], expected)


@pytest.mark.slow_on("jax", "tensorflow")
@pytest.mark.parametrize("kind", ["keras", "weights.h5"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda: MovingAverage(SWA("adam", 2, 2)),
        lambda: SWA(MovingAverage("adam"), 2, 2),
        lambda: keras.optimizers.LossScaleOptimizer(SWA("adam", 2, 2), initial_scale=1.0),
    ],
    ids=["inside", "outside", "scaled"],
)
def test_a_window_finds_swa_among_other_wrappers(tmp_path, kind, wrap):
    files, snapshots, _ = run(tmp_path, (kind, kind), optimizer=wrap())
    model = small.model(wrap())
    model.optimizer.build(model.trainable_variables)
    state = [small.numpy(v) for v in model.optimizer.variables]
    checkpoints.window(model, *files)
    expect_mean(model, snapshots)
    small.assert_same_bits([small.numpy(v) for v in model.optimizer.variables], state)
    if kind == "keras":
        model = small.model("sgd")  # The file itself says which averages are of SWA.
        checkpoints.window(model, *files)
        expect_mean(model, snapshots)


@pytest.mark.slow_on("tensorflow")
@pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"), reason="MultiOptimizer came with Keras 3.15"
)
def test_a_window_finds_swa_inside_a_multi_optimizer(tmp_path):
    model = small.model()
    make = lambda: SWA(keras.optimizers.Adam(0.01), 2, 2)  # noqa: E731
    members = keras.optimizers.OptimizerMap(make(), {".*kernel": make()})
    model.compile(keras.optimizers.MultiOptimizer(members), "mse")
    snapshots, files = Snapshots(2, 2), []
    for name in ("earlier", "later"):
        small.fit(model, epochs=3, callbacks=[snapshots])
        files.append(tmp_path / f"{name}.keras")
        model.save(files[-1])
    other = small.model()
    checkpoints.window(other, *files)
    expect_mean(other, snapshots.taken[8:])


@pytest.mark.slow_on("tensorflow")
def test_a_window_takes_excluded_variables_from_the_later_file(tmp_path):
    optimizer = SWA(keras.optimizers.Adam(0.01), 2, 2, exclude=["bias"])
    files, snapshots, trained = run(tmp_path, optimizer=optimizer)
    last = [small.numpy(v) for v in trained.trainable_variables]
    model = small.model()
    checkpoints.window(model, *files)
    is_bias = ["bias" in v.path for v in model.trainable_variables]
    assert 0 < sum(is_bias) < len(is_bias)
    held = [[b if e else v for v, b, e in zip(s, last, is_bias, strict=True)] for s in snapshots]
    expect_mean(model, held)


class TestRefused:
    def expect(self, model, earlier, later, match):
        before = [small.numpy(v) for v in model.variables]
        with pytest.raises(ValueError, match=match):
            checkpoints.window(model, earlier, later)
        small.assert_same_bits([small.numpy(v) for v in model.variables], before)

    @pytest.mark.slow_on("tensorflow")
    def test_files_in_the_wrong_order_are_refused(self, tmp_path):
        files, _, _ = run(tmp_path)
        self.expect(small.model(), *reversed(files), r"more snapshots.*17 in .*later.* 8 in")
        self.expect(small.model(), files[0], files[0], r"more snapshots")

    @pytest.mark.slow_on("tensorflow")
    @pytest.mark.parametrize("wrap", [lambda o: o, MovingAverage, Lookahead])
    def test_files_without_swa_are_refused(self, tmp_path, wrap):
        files, _, _ = run(tmp_path, optimizer=wrap(keras.optimizers.Adam()))
        self.expect(small.model(), *files, r"earlier\.keras.* has no averages of SWA")

    @pytest.mark.slow_on("tensorflow")
    def test_a_file_is_refused_if_the_rule_of_its_averages_is_unknown(self, tmp_path):
        make = lambda: SWA(MovingAverage("adam"), 2, 2)  # noqa: E731
        files, _, _ = run(tmp_path, ("weights.h5", "weights.h5"), optimizer=make())
        self.expect(small.model(), *files, "compile the model as it was trained")

    @pytest.mark.slow_on("tensorflow")
    def test_a_window_of_another_model_is_refused(self, tmp_path):
        files, _, _ = run(tmp_path)
        layers = [keras.Input((5,)), keras.layers.Dense(3), keras.layers.Dense(1)]
        self.expect(keras.Sequential(layers), *files, r"later\.keras")

    @pytest.mark.slow_on("tensorflow")
    def test_a_cut_file_and_a_missing_file_are_refused(self, tmp_path):
        files, _, _ = run(tmp_path)
        self.expect(small.model(), tmp_path / "none.keras", files[1], r"none\.keras")
        self.expect(small.model(), files[0], tmp_path / "none.keras", r"none\.keras")
        files[1].write_bytes(files[1].read_bytes()[:-500])
        self.expect(small.model(), *files, r"later\.keras")

    @pytest.mark.slow_on("tensorflow")
    def test_a_model_that_holds_averages_takes_no_window(self, tmp_path):
        files, _, trained = run(tmp_path)
        swap_weights(trained)
        with pytest.raises(RuntimeError, match="holds the averages of 'SWA'"):
            checkpoints.window(trained, *files)
