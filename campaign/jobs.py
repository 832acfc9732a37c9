"""Runs jobs of several workers on this machine, with failures.

python campaign/jobs.py [--sizes 4 8] [--only NAME] [--timeout 20]

If a worker is dead or stalled, all others get an error within the timeout. Only the steps since the
last backup are lost. A job that is started again ends with the same values as a job without a
failure.
"""

import argparse
import json
import pathlib
import signal
import sys
import tempfile
import time

import keras
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "integration_tests"))
import workers

EPOCHS, BATCHES, INTERVAL = 3, 9, 3
LONGEST = 600  # seconds for a whole job
MEGABYTES = 64  # of each worker in a large sum; far more than the buffers of a connection
CHIEF_DIES_WITH_ALL = keras.backend.backend() == "jax"  # the chief runs its coordination service


def run(size, absent=(), **options):
    options = {"epochs": EPOCHS, "interval": INTERVAL, "batches": [BATCHES] * size} | options
    began = time.perf_counter()
    processes = workers.start("train.py", size, json.dumps(options), absent=absent)
    failing = set(np.ravel(options["failing"][0])) if options.get("failing") else set()
    others = [p for rank, p in enumerate(processes) if rank not in failing]
    found = workers.finish(others, LONGEST)
    for rank in failing:
        processes[rank].kill()
        processes[rank].communicate()
    return found, time.perf_counter() - began


def fails(size, timeout, ranks, fault):
    """Some workers fail in the second epoch. Then the job is started again."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"folder": folder, "timeout": timeout, "failing": [ranks, fault, BATCHES + 4]}
        found, _ = run(size, **options)
        if not (CHIEF_DIES_WITH_ALL and 0 in ranks):
            for code, result, err in found:
                assert code == 0, err
                assert result["error"].startswith("RuntimeError"), result
                assert result["steps"] >= BATCHES + INTERVAL, result
        marks = pathlib.Path(folder).glob("failed_*")  # The workers made them just before.
        began = max(mark.stat().st_mtime for mark in marks)
        seconds = [result["failed_at"] - began for _, result, _ in found if "failed_at" in result]
        lost = [result["steps"] - BATCHES for _, result, _ in found if "steps" in result]
        named = sum(any(f"{rank}" in r.get("error", "") for rank in ranks) for _, r, _ in found)
        again, _ = run(size, **{k: v for k, v in options.items() if k != "failing"})
        expected, _ = run(size, timeout=timeout)
        for (code, result, err), (_, right, _) in zip(again, expected, strict=True):
            assert code == 0, err
            assert result["error"] is None, result
            assert result["weights"] == right["weights"]
            assert result["center"] == right["center"]
            assert result["steps"] == EPOCHS * BATCHES
    if not seconds:
        return {"ended by": "the coordination service of JAX, which was in the chief"}
    return {"seconds until all others knew": round(max(seconds), 1),
        "errors that name the worker": named, "steps lost": max(lost)}  # fmt: skip


def goes_on(size, timeout, **options):
    """No worker fails. All end with the same center."""
    found, seconds = run(size, timeout=timeout, **options)
    for code, result, err in found:
        assert code == 0, err
        assert result["error"] is None, result
    centers = [result["center"] for _, result, _ in found]
    assert all(center == centers[0] for center in centers)
    return {"seconds": round(seconds, 1), "rounds": found[0][1]["rounds"]}


def freezes(size, timeout):
    """One worker freezes while large sums are under way, so that network buffers are full."""
    with tempfile.TemporaryDirectory() as folder:
        processes = workers.start("large_sums.py", size, MEGABYTES, timeout, folder)
        while not pathlib.Path(folder, "summed_1").exists():
            time.sleep(0.1)
            assert processes[1].poll() is None, processes[1].communicate()
        time.sleep(0.5)  # Sums are under way without a pause.
        processes[1].send_signal(signal.SIGSTOP)
        others = [p for rank, p in enumerate(processes) if rank != 1]
        found = workers.finish(others, LONGEST)
        processes[1].kill()
        processes[1].communicate()
    for code, result, err in found:
        assert code == 0, err
        assert "has lost" in result["error"], result
        assert result["kept"], result
    return {"seconds until all others knew": round(max(r["waited"] for _, r, _ in found), 1)}


def restarts(size, timeout):
    """Torch's launcher starts the job again after one worker was killed."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"epochs": EPOCHS, "interval": INTERVAL, "batches": [BATCHES] * size,
            "folder": folder, "timeout": timeout, "failing": [1, "kill", BATCHES + 4]}  # fmt: skip
        again = workers.torchrun("train.py", size, json.dumps(options), restarts=1)
        assert pathlib.Path(folder, "failed_1").exists()
    expected, _ = run(size, timeout=timeout)
    for result, (_, right, _) in zip(again, expected, strict=True):
        assert result["error"] is None, result
        assert result["weights"] == right["weights"]
        assert result["center"] == right["center"]
        assert result["steps"] == EPOCHS * BATCHES
    return {"restarts": 1}


SCENARIOS = {
    "one is killed": lambda n, t: fails(n, t, [1], "kill"),
    "one stalls": lambda n, t: fails(n, t, [1], "stall"),
    "two are killed": lambda n, t: fails(n, t, [1, n - 1], "kill"),
    "the chief is killed": lambda n, t: fails(n, t, [0], "kill"),
    "one is slow": lambda n, t: goes_on(n, t, slow=[1, 0.1]),
    "one has no data": lambda n, t: goes_on(n, t, batches=[BATCHES] * (n - 1) + [0]),
    "one freezes in a large sum": freezes,
    "uneven shards": lambda n, t: goes_on(n, t, batches=[3 + 2 * i for i in range(n)]),
}
if keras.backend.backend() == "torch":
    SCENARIOS["one is killed, and torchrun starts again"] = restarts


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--sizes", type=int, nargs="+", default=[4, 8])
    options.add_argument("--only", default="")
    options.add_argument("--timeout", type=float, default=20)
    chosen = options.parse_args()
    for size in chosen.sizes:
        for name, scenario in SCENARIOS.items():
            if chosen.only in name:
                figures = scenario(size, chosen.timeout)
                job = {"backend": keras.backend.backend(), "workers": size, "what": name}
                print(json.dumps(job | figures), flush=True)


if __name__ == "__main__":
    sys.exit(main())
