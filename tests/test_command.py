"""`python -m keras_avg` averages files and describes them without a script."""

import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import small_training as small

from keras_avg import SWA, MovingAverage, average_weights, checkpoints
from keras_avg.__main__ import main
from keras_avg.callbacks import SaveAverages
from keras_avg.decays import PowerFunction


def written(folder, number=3, kind="keras"):
    files = []
    for i in range(number):
        model = small.model("adam")
        random = np.random.default_rng(i)
        model.set_weights([random.normal(size=w.shape) for w in model.weights])
        files.append(str(folder / f"{i}.{kind}"))
        (model.save if kind == "keras" else model.save_weights)(files[-1])
    return files


def values_in(file):
    model = keras.saving.load_model(file)
    assert getattr(model, "optimizer", None) is None
    return [small.numpy(variable) for variable in model.variables]


def mean(files, weights=None):
    model = small.model()
    checkpoints.average(model, files, weights, verbose=0)
    return [small.numpy(variable) for variable in model.variables]


class TestAverage:
    @pytest.mark.parametrize(
        ("arguments", "last", "weights"),
        [
            ([], 3, None),
            (["--weights", "1-sqrt"], 3, checkpoints.merge_weights(3, "1-sqrt")),
            (["--weights", "1,2,3"], 3, [1, 2, 3]),
            (["--last", "2"], 2, None),
            (["--last", "2", "--weights", "cosine"], 2, checkpoints.merge_weights(2, "cosine")),
        ],
        ids=str,
    )
    def test_the_command_writes_the_mean(self, tmp_path, capsys, arguments, last, weights):
        files, out = written(tmp_path), str(tmp_path / "soup.keras")
        assert main(["average", *files, "--out", out, *arguments]) == 0
        small.assert_same_bits(values_in(out), mean(files[-last:], weights))
        printed = capsys.readouterr()
        assert f"the mean of {last} files" in printed.out
        assert printed.err == ""

    @pytest.mark.slow_on("tensorflow")
    def test_the_command_can_write_only_weights(self, tmp_path):
        files, out = written(tmp_path), str(tmp_path / "soup.weights.h5")
        (tmp_path / "more").mkdir()
        files += written(tmp_path / "more", 1, "weights.h5")
        assert main(["average", *files, "--out", out]) == 0
        small.assert_same_bits(mean([out]), mean(files))

    @pytest.mark.slow_on("tensorflow")
    def test_the_command_does_not_use_the_optimizer(self, tmp_path):
        model = small.fit(small.model(SWA(MovingAverage("adam"), 0, 2)))
        model.save(tmp_path / "a.keras")
        out = str(tmp_path / "soup.keras")
        assert main(["average", str(tmp_path / "a.keras"), "--out", out]) == 0
        small.assert_same_bits(values_in(out), [small.numpy(v) for v in model.variables])

    @pytest.mark.slow_on("tensorflow")
    @pytest.mark.parametrize("kind", ["keras", "weights.h5"])
    def test_an_error_while_writing_keeps_the_old_file(self, tmp_path, monkeypatch, capsys, kind):
        files, out = written(tmp_path), tmp_path / f"soup.{kind}"
        out.write_bytes(b"an older soup")
        before = sorted(tmp_path.iterdir())

        def fails(model, filepath):
            pathlib.Path(filepath).write_bytes(b"half")
            raise OSError("no space left")

        for name in ("save", "save_weights"):
            monkeypatch.setattr(keras.Sequential, name, fails)
        assert main(["average", *files, "--out", str(out)]) == 2
        assert "no space left" in capsys.readouterr().err
        assert out.read_bytes() == b"an older soup"
        assert sorted(tmp_path.iterdir()) == before

    @pytest.mark.slow_on("tensorflow")
    def test_the_command_warns_if_files_are_sorted_as_text(self, tmp_path, capsys):
        files = written(tmp_path, 11)
        files.sort()  # 0, 1, 10, 2
        out = str(tmp_path / "soup.keras")
        assert main(["average", *files, "--out", out]) == 0  # The order does not matter.
        assert capsys.readouterr().err == ""
        assert main(["average", *files, "--out", out, "--last", "3"]) == 0
        assert "not in the order of the numbers" in capsys.readouterr().err


@pytest.mark.slow_on("tensorflow")
@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["average", "0.keras", "none.keras", "--out", "soup.keras"], "none.keras"),
        (["average", "0.keras", "bad.keras", "--out", "soup.keras"], "bad.keras"),
        (["average", "0.keras", "--out", "soup.txt"], "soup.txt"),
        (["average", "0.keras", "--out", "soup.weights.json"], "must end in .keras or .weights.h5"),
        (["average", "0.keras", "--out", "0.keras"], "must not be one of the files"),
        (["average", "0.keras", "--out", "none/soup.keras"], "no directory"),
        (["average", "0.keras", "--out", "soup.keras", "--weights", "sqrt"], "--weights"),
        (["average", "0.keras", "--out", "soup.keras", "--weights", "1,2"], "one number for each"),
        (["average", "0.keras", "--out", "soup.keras", "--weights", "0"], "must not be 0"),
        (["average", "0.keras", "--out", "soup.keras", "--last", "2"], "--last 2 of 1"),
        (["average", "0.keras", "--out", "soup.keras", "--last", "x"], "--last"),
        (["average", "0.weights.h5", "--out", "soup.keras"], ".keras file"),
        (["average", "0.keras"], "--out"),
        (["average", "--out", "soup.keras"], "FILE"),
        (["info", "none.keras"], "none.keras"),
        (["info", "bad.keras"], "bad.keras"),
        (["info", "bad.weights.h5"], "bad.weights.h5"),
        (["info", "bad.txt"], "must end in"),
        (["info", "averages-0000000001.h5"], "averages-0000000001.h5"),
        (["info", "old.h5"], "not written by SaveAverages"),
        (["mean"], "mean"),
        ([], "COMMAND"),
    ],
    ids=" ".join,
)
def test_an_error_prints_one_line_and_returns_status_2(
    tmp_path, monkeypatch, capsys, arguments, match
):
    monkeypatch.chdir(tmp_path)
    small.model().save("0.keras")
    small.model().save_weights("0.weights.h5")
    small.model().save("old.h5")
    for name in ("bad.keras", "bad.weights.h5", "bad.txt", "averages-0000000001.h5"):
        (tmp_path / name).write_text("no file of Keras")
    try:
        status = main(arguments)
    except SystemExit as leaves:
        status = leaves.code
    assert status == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("keras_avg: error: ")
    assert match in error
    assert not (tmp_path / "soup.keras").exists()


class TestInfo:
    @pytest.mark.slow_on("tensorflow")
    @pytest.mark.parametrize("kind", ["keras", "weights.h5", "weights.json"])
    @pytest.mark.parametrize("swapped", [False, True])
    def test_info_describes_the_averages_in_a_file(self, tmp_path, capsys, kind, swapped):
        inner = MovingAverage("adam", average_decay=PowerFunction(0.1))
        model = small.fit(small.model(SWA(inner, 0, 4)))
        file = str(tmp_path / f"m.{kind}")
        arguments = {"max_shard_size": 2e-7} if kind == "weights.json" else {}
        save = model.save if kind == "keras" else model.save_weights
        if swapped:
            with average_weights(model):
                save(file, **arguments)
        else:
            save(file, **arguments)
        assert main(["info", file]) == 0
        printed = capsys.readouterr().out
        outer, inner = printed.partition("optimizer/inner_optimizer:")[::2]
        if kind == "keras":
            assert "SWA(start_averaging=0, average_period=4)" in " ".join(outer.split())
            assert "MovingAverage(" in inner
            assert "average_decay=PowerFunction(sigma_rel=0.1)" in inner
        else:
            assert "unknown rule" in outer
        assert "updates: 12\n  snapshots: 3\n" in outer
        assert "updates: 12\n  snapshots: 12\n" in inner
        assert "average: 6 arrays, 55 numbers" in outer
        held = "the averages of optimizer" if swapped else "the raw weights"
        assert printed.splitlines()[-1] == f"in the model: {held}"

    @pytest.mark.slow_on("tensorflow")
    def test_info_describes_a_snapshot_of_save_averages(self, tmp_path, capsys):
        decay = PowerFunction(0.1)
        model = small.model(MovingAverage("adam", average_decay=decay, start_step=2))
        small.fit(model, epochs=2, callbacks=[SaveAverages(tmp_path)])
        file = tmp_path / "averages-0000000012.h5"
        assert main(["info", str(file)]) == 0
        head, updates, run, *rest = capsys.readouterr().out.splitlines()
        assert head == f"{file}: a snapshot of SaveAverages, for keras_avg.checkpoints.synthesize"
        assert updates == "updates: 12"
        assert run.startswith("run: ")
        assert rest == [
            f"average_0: PowerFunction(gamma={decay.gamma:.6g}, sigma_rel=0.1)",
            "  updates: 10, from step 2 on",
            "  average: 6 arrays, 55 numbers, float16",
            f"without an average: {len(model.non_trainable_variables)} arrays",
        ]

    @pytest.mark.slow_on("tensorflow")
    def test_info_says_that_a_file_has_no_averages(self, tmp_path, capsys):
        small.model("adam").save(tmp_path / "m.keras")
        assert main(["info", str(tmp_path / "m.keras")]) == 0
        assert "averages: none\nin the model: the raw weights\n" in capsys.readouterr().out


@pytest.mark.slow_on("jax", "tensorflow")
def test_python_runs_the_package_as_a_command(tmp_path):
    program = [sys.executable, "-m", "keras_avg", "info", str(tmp_path / "none.keras")]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "none.keras" in done.stderr.splitlines()[-1]
