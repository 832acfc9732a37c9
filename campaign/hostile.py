"""Loads files that were changed on purpose, and counts the outcomes.

python campaign/hostile.py [--files 5000] [--seed 0]

A changed file must be refused by a clear error, or load harmlessly: no code runs, no optimizer is
partly loaded, memory stays bounded, and no load hangs. If one of these does not hold, the program
fails and prints the seed.
"""

import argparse
import collections
import contextlib
import copy
import io
import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile

import h5py
import keras
import numpy as np
from keras import ops

import keras_avg

SECONDS = 60  # for one file, on a machine with other programs
ALONE = 10  # seconds for h5py alone to read the labels of one file
MEGABYTES = 512  # the most that one file may add to the peak of memory
VIRTUAL = 24 * 2**30  # bytes of address space, so that a fault does not use up the machine's memory
FORBIDDEN = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "pickle.find_class")
CLEAR = (ValueError, TypeError, RuntimeError, OSError)
HOSTILE = [
    None, True, -1, 0, 2**31, 2**63, 1e308, float("nan"), "", "sgd", "../../x", [], {}, [[]],
    {"class_name": "function", "config": "system", "module": "os", "registered_name": "system"},
    {"class_name": "Popen", "config": {"args": ["true"]}, "module": "subprocess",
     "registered_name": "subprocess>Popen"},
    {"class_name": "__lambda__", "config": {"value": ["4wAA", None, None]}},
]  # fmt: skip

_events = []


def _audit(event, arguments):
    if event in FORBIDDEN:
        _events.append((event, str(arguments)[:200]))


def build(optimizer):
    keras.utils.set_random_seed(1)
    layers = [keras.Input((3,)), keras.layers.Dense(4), keras.layers.BatchNormalization()]
    model = keras.Sequential([*layers, keras.layers.Dense(1)], name="hostile")
    model.compile(optimizer, "mse")
    return model


STACKS = [
    lambda: keras_avg.SWA(keras_avg.MovingAverage("adam"), 0, 2),
    lambda: keras_avg.LAWA("sgd", 2, 0, 1),
    lambda: keras_avg.BEMA(keras_avg.SWAG("sgd", 0, 1, rank=2)),
    lambda: keras.optimizers.LossScaleOptimizer(keras_avg.MovingAverage("adam")),
    lambda: keras_avg.ScheduleFree("sgd"),
    lambda: keras_avg.ModelAverage("sgd", interval_steps=2, outer_optimizer="sgd"),
    lambda: keras_avg.MovingAverage("adam", average_decay=keras_avg.decays.HalfLife(10)),
]


def trained(stack, epochs=1):
    model = build(stack())
    x = np.ones((8, 3), "float32")
    model.fit(x, x[:, :1], batch_size=2, epochs=epochs, verbose=0)
    return model


# Changes of bytes.


def cut(content, chance):
    return content[: chance.randrange(len(content))]


def flip(content, chance):
    changed = bytearray(content)
    for _ in range(chance.choice([1, 3, 30])):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def overwrite(content, chance):
    start, length = chance.randrange(len(content)), chance.randrange(1, 200)
    noise = chance.choice([b"\0", b"\xff"]) * length
    return content[:start] + noise + content[start + length :]


def insert(content, chance):
    start = chance.randrange(len(content))
    return content[:start] + chance.randbytes(chance.randrange(1, 100)) + content[start:]


# Changes of arrays.


def put(group, name, **how):
    del group[name]
    return group.create_dataset(name, **how)


ARRAYS = {
    "gone": lambda g, n, c: g.__delitem__(n),
    "renamed": lambda g, n, c: g.move(n, c.choice(["x", "raw_0", "raw_statistic_00001", "slot_a_0",
        "weight_w", "variable_7", "average_99", "raw_", "slot_a_99", "raw_statistic_x"])),
    "of another shape": lambda g, n, c: put(g, n, data=np.zeros(c.choice([0, (2, 2), (4, 3, 1)]))),
    "of text": lambda g, n, c: put(g, n, data=np.full(g[n].shape, b"text")),
    "of strings": lambda g, n, c: put(g, n, shape=g[n].shape, dtype=h5py.string_dtype()),
    "complex": lambda g, n, c: put(g, n, data=np.full(g[n].shape, 1j)),
    "of objects": lambda g, n, c: put(g, n, shape=g[n].shape, dtype=h5py.vlen_dtype("int32")),
    "of records": lambda g, n, c: put(g, n, shape=g[n].shape, dtype=[("a", "f4"), ("b", "i8")]),
    "of arrays": lambda g, n, c: put(g, n, shape=g[n].shape, dtype=c.choice(["(3,)f4", "(9,)f4"])),
    "of bytes": lambda g, n, c: put(g, n, shape=g[n].shape, dtype="V1000"),
    "numbered otherwise": lambda g, n, c: g.move(n, n.replace("_", "_0", 1)),
    "of references": lambda g, n, c: put(g, n, shape=g[n].shape, dtype=h5py.ref_dtype),
    "of booleans": lambda g, n, c: put(g, n, data=np.ones(g[n].shape, bool)),
    "NaN": lambda g, n, c: put(g, n, data=np.full(g[n].shape, np.nan)),
    "a number": lambda g, n, c: put(g, n, data=np.full(g[n].shape, c.choice(
        [-1.0, 0.5, 2.0**31, 2.0**53, 1e300, np.inf, -np.inf]))),
    "an integer": lambda g, n, c: put(g, n, data=np.full(g[n].shape, c.choice(
        [-1, 2**31 - 1, 2**31, 2**62, 2, 7]))),
    "empty": lambda g, n, c: put(g, n, data=h5py.Empty("f4")),
    "of terabytes": lambda g, n, c: put(g, n, shape=(2**20, 2**20), dtype="f4", chunks=(1, 2**16)),
    "of terabytes, named": lambda g, n, c: g.create_dataset(
        c.choice(["weight_w", "slot_a_0", "raw_statistic_00001", "variable_3", "average_0_"]),
        shape=(2**22, 2**20), dtype="f4", chunks=(1, 2**16)),
    "too many": lambda g, n, c: g.create_dataset(
        c.choice(["x", "raw_0", "raw_9", "weight_w", "slot_a_0", "slot_a_99", "variable_0",
            "swapped_after", "raw_statistic_00004", "raw_statistic_99999", "average_", "weight_a/b",
            "slot_/_0"]), data=np.zeros(c.choice([(), (1,), (3, 4)]))),
    "a group": lambda g, n, c: (g.__delitem__(n), g.create_group(n)),
    "a link to nothing": lambda g, n, c: (g.__delitem__(n), g.__setitem__(n, h5py.SoftLink("/no"))),
    "a link to itself": lambda g, n, c: (g.__delitem__(n), g.__setitem__(n, h5py.SoftLink(
        f"{g.name}/{n}"))),
    "a link to another file": lambda g, n, c: (g.__delitem__(n), g.__setitem__(n,
        h5py.ExternalLink("/etc/passwd", "/"))),
    "in another file": lambda g, n, c: put(g, n, shape=(4,), dtype="u1",
        external=[("/etc/hostname", 0, 4)]),
    "a label": lambda g, n, c: g[n].attrs.__setitem__(c.choice(["path", "why_none", "gone",
        "paths", "dtype", "averages"]), c.choice(["x", 7, "[", "merged", "replaced", "null",
        '{"a": 1}', "9" * 9000])),
}  # fmt: skip


def arrays_in(file):
    names = []
    file.visititems(lambda n, o: names.append(n) if isinstance(o, h5py.Dataset) else None)
    return names


def tamper(content, chance):
    """A file with one to three changed arrays. Most of them belong to an optimizer."""
    file = io.BytesIO(content)
    kinds = []
    with h5py.File(file, "r+") as opened:
        for _ in range(chance.choice([1, 1, 1, 2, 3])):
            names = arrays_in(opened)
            own = [n for n in names if n.startswith("optimizer")]
            name = chance.choice(own if own and chance.random() < 0.9 else names)
            kind = chance.choice(sorted(ARRAYS))
            group, _, last = name.rpartition("/")
            try:
                ARRAYS[kind](opened[group], last, chance)
            except (ValueError, TypeError, OSError, KeyError, RuntimeError, MemoryError):
                continue  # HDF5 itself refuses to write it
            kinds.append(kind)
    return file.getvalue()


def tamper_labels(content, chance):
    file = io.BytesIO(content)
    with h5py.File(file, "r+") as opened:
        labelled = []
        opened.visititems(lambda n, o: labelled.extend((n, a) for a in o.attrs))
        if labelled:
            name, label = chance.choice(labelled)
            old = opened[name].attrs[label]
            text = old if isinstance(old, str) else str(old)
            new = [
                text[: len(text) // 2],
                "x" + text,
                "",
                7,
                np.nan,
                np.zeros(3),
                "[" * 5000,
                "[[0]]",
            ]
            opened[name].attrs[label] = chance.choice(new)
    return file.getvalue()


# Changes of configs and archives.


def leaves(thing, path=()):
    items = thing.items() if isinstance(thing, dict) else enumerate(thing)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, (dict, list)) and value:
            yield from leaves(value, (*path, key))


def tamper_config(config, chance):
    config = copy.deepcopy(config)
    for _ in range(chance.choice([1, 1, 2])):
        paths = list(leaves(config))
        own = [p for p in paths if p[0] == "compile_config"]
        *path, key = chance.choice(own if chance.random() < 0.9 else paths)
        place = config
        for step in path:
            place = place[step]
        kind = chance.choice(["put", "put", "put", "delete", "add", "nest"])
        if kind == "delete":
            del place[key]
        elif kind == "add" and isinstance(place, dict):
            place[
                chance.choice(["x", "learning_rate", "name", "optimizer", "exclude", "decay"])
            ] = chance.choice(HOSTILE)
        elif kind == "nest":
            place[key] = [place[key]]
        else:
            place[key] = chance.choice(HOSTILE)
    return config


def archive(members):
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as opened:
        warnings.simplefilter("ignore")
        for name, content in members:
            opened.writestr(name, content)
    return file.getvalue()


def change_archive(content, chance):
    with zipfile.ZipFile(io.BytesIO(content)) as opened:
        members = {name: opened.read(name) for name in opened.namelist()}
    kind = chance.choice(
        ["config"] * 5 + ["weights"] * 3 + ["slip", "twice", "gone", "npz", "bomb"]
    )
    extra = []
    if kind == "config":
        config = tamper_config(json.loads(members["config.json"]), chance)
        members["config.json"] = json.dumps(config).encode()
    elif kind == "weights":
        change = chance.choice([tamper, tamper_labels, flip, cut])
        members["model.weights.h5"] = change(members["model.weights.h5"], chance)
    elif kind == "slip":
        extra = [(chance.choice(["../slipped", "/tmp/slipped", "assets/../../slipped"]), b"x")]
    elif kind == "twice":
        name = chance.choice(sorted(members))
        extra = [(name, cut(members[name], chance))]
    elif kind == "gone":
        del members[chance.choice(sorted(members))]
    elif kind == "npz":
        arrays = io.BytesIO()
        np.savez(arrays, __root__=np.array([Evil()], dtype=object))
        members["model.weights.npz"] = arrays.getvalue()
        del members["model.weights.h5"]
    else:
        members["config.json"] = b"[" * 10_000_000
    return f"archive, {kind}", archive([*members.items(), *extra])


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("true",)


READS_ALL = """
import h5py, sys
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if "VmHWM" in line)
before = peak()
def read(name, each):
    for label in each.attrs:
        try:
            each.attrs[label]
        except Exception:
            pass
try:
    with h5py.File(sys.argv[1]) as file:
        file.visititems(read)
except Exception:
    pass
print((peak() - before) / 1024)
"""


def megabytes_of_h5py(path):
    """The memory that h5py itself takes to read all labels of a file. See SECURITY.md."""
    command = [sys.executable, "-c", READS_ALL, path]
    return float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def h5py_alone_hangs(path):
    """Whether h5py itself reads the labels of a file without an end. See SECURITY.md.

    HDF5 cannot be interrupted, so another process tries it.
    """
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(ALONE)
        sys.argv = ["", path]
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            exec(READS_ALL, {})
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM


BYTES = {"cut": cut, "flipped": flip, "overwritten": overwrite, "inserted": insert}


class FaultError(AssertionError):
    """A file had an effect that no file may have."""


class Campaign:
    """The unchanged files, and the models that load changed copies of them."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.sources, self.models = [], []
        self.counts = collections.Counter()
        for number, stack in enumerate(STACKS):
            for swapped in (False, True):
                model = trained(stack)
                if swapped:
                    keras_avg.swap_weights(model)
                files = []
                for name in ("m.weights.h5", "m.keras"):
                    (model.save if name == "m.keras" else model.save_weights)(self.folder / name)
                    files.append((self.folder / name).read_bytes())
                self.sources.append((number, files, own_states(model)))
            self.models.append(trained(stack, epochs=2))
        self.first = [[numpy(v) for v in everything(model)] for model in self.models]

    def one(self, seed):
        chance = random.Random(seed)
        for earlier in self.folder.glob("changed.*"):
            earlier.unlink()  # If it is still open somewhere, HDF5 would read it again.
        number, (weights, whole), source = chance.choice(self.sources)
        if chance.random() < 0.65:
            kinds = [*BYTES, "arrays", "arrays", "arrays", "arrays", "labels"]
            kind = chance.choice(kinds)
            change = {"arrays": tamper, "labels": tamper_labels}.get(kind) or BYTES[kind]
            path = self.folder / "changed.weights.h5"
            path.write_bytes(change(weights, chance))
            if kind in BYTES and h5py_alone_hangs(path):
                self.counts[f"{kind}: HDF5 itself hangs"] += 1
                return
            into = self.models[number]
            load = lambda: into.load_weights(path) or into  # noqa: E731
        else:
            kind, content = change_archive(whole, chance)
            if chance.random() < 0.3:
                kind = chance.choice(sorted(BYTES))
                content = BYTES[kind](whole, chance)
            path = self.folder / "changed.keras"
            path.write_bytes(content)
            into = None
            load = lambda: keras.saving.load_model(path)  # noqa: E731
        self.counts[self.outcome(kind, path, load, into, number, source)] += 1

    def outcome(self, kind, path, load, into, number, source):
        before = into and own_states(into)
        memory, began = peak(), time.perf_counter()
        _events.clear()
        signal.alarm(SECONDS)
        try:
            model = load()
            result = "loaded"
        except Exception as error:
            model, result = into, type(error).__name__
            self.check_error(error)
        finally:
            signal.alarm(0)
        if _events:
            raise FaultError(f"code ran: {_events}")
        if peak() - memory > MEGABYTES:
            if megabytes_of_h5py(path) < MEGABYTES:
                seconds = time.perf_counter() - began
                raise FaultError(f"{peak() - memory:.0f} MB more after {seconds:.1f} s")
            kind = "memory that HDF5 alone takes"
        if (self.folder.parent / "slipped").exists():
            raise FaultError("a file was written outside the folder")
        if into is not None:
            if result != "loaded":
                self.check_halves(into, before, source)
            self.check_use(into)
            self.give_back(number)
        elif getattr(model, "optimizer", None) is not None:
            self.check_use(model)
        return f"{kind}: {result}"

    def check_error(self, error):
        frames = traceback.extract_tb(error.__traceback__)
        ours = "keras_avg" in frames[-1].filename and "campaign" not in frames[-1].filename
        inside = any("/keras_avg/" in f.filename for f in frames)
        # An error about the model's state has no "Received", because no argument was wrong.
        received = "Received" in str(error) or "not recognized: {" in str(error)
        says_why = isinstance(error, RuntimeError) or received
        clear = isinstance(error, CLEAR) and (not ours or says_why)
        if (ours or inside) and not clear:
            raise FaultError(f"unclear: {type(error).__name__}: {error}") from error

    def check_halves(self, model, before, source):
        """Of the arrays that differ in the file, an optimizer must load all or none."""
        states = zip(before, own_states(model), source, strict=True)
        for (name, old), (_, now), (_, filed) in states:
            if len(old) != len(now):
                raise FaultError(f"{name} has another number of variables after an error")
            taken = [
                not np.array_equal(a, b, equal_nan=True)
                for a, b, c in zip(old, now, filed, strict=True)
                if not np.array_equal(a, c, equal_nan=True)
            ]
            if any(taken) and not all(taken):
                raise FaultError(f"{name} loaded {sum(taken)} of {len(taken)} arrays: {taken}")

    def check_use(self, model):
        """The model can be swapped, trained and saved, or raises a clear error."""
        x = np.ones((2, 3), "float32")
        uses = [
            lambda: keras_avg.swap_weights(model),
            lambda: keras_avg.swap_weights(model),
            lambda: model.fit(x, x[:, :1], verbose=0),
            lambda: model.save_weights(self.folder / "again.weights.h5"),
        ]
        for use in uses:
            try:
                use()
            except Exception as error:
                self.check_error(error)

    def give_back(self, number):
        """Put the model into its first state. If that may not be possible, make a new one."""
        model, first = self.models[number], self.first[number]
        is_swapped = any(w.averages_in_model for w in keras_avg.averaging_optimizers(model))
        if is_swapped or len(everything(model)) != len(first):
            self.models[number] = trained(STACKS[number], epochs=2)
            return
        for variable, value in zip(everything(model), first, strict=True):
            variable.assign(value)


def everything(model):
    scale = getattr(model.optimizer, "dynamic_scale", None)
    return [*model.variables, *model.optimizer.variables, *([] if scale is None else [scale])]


def numpy(variable):
    return np.array(ops.convert_to_numpy(variable))


def own_states(model):
    wrappers = keras_avg.averaging_optimizers(model)
    return [(w.name, [numpy(v) for v in w.variables]) for w in wrappers]


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _hangs(number, frame):
    raise FaultError(f"a load took longer than {SECONDS} s")


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--files", type=int, default=5000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--seconds", type=float, default=float("inf"))
    chosen = options.parse_args()
    warnings.simplefilter("ignore")
    keras.config.disable_traceback_filtering()  # The last frame says in whose code an error is.
    signal.signal(signal.SIGALRM, _hangs)
    resource.setrlimit(resource.RLIMIT_AS, (VIRTUAL, VIRTUAL))
    sys.addaudithook(_audit)
    began, faults, done = time.perf_counter(), 0, 0
    with tempfile.TemporaryDirectory() as parent:
        folder = pathlib.Path(parent, "files")
        folder.mkdir()
        campaign = Campaign(folder)
        first = peak()
        while done < chosen.files and time.perf_counter() - began < chosen.seconds:
            try:
                campaign.one(chosen.seed + done)
            except FaultError as fault:
                faults += 1
                print(f"--- seed {chosen.seed + done}: {fault}", flush=True)
                traceback.print_exc(limit=-5)
                campaign.models = [trained(stack, epochs=2) for stack in STACKS]
            done += 1
    result = {"backend": keras.backend.backend(), "files": done, "faults": faults,
        "seconds": round(time.perf_counter() - began), "megabytes more": round(peak() - first),
        "outcomes": dict(sorted(campaign.counts.items()))}  # fmt: skip
    print(json.dumps(result, indent=1))
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
