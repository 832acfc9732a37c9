"""Kills one of two workers at a random moment of training and saving, and starts the job again."""

import functools
import json
import pathlib
import shutil
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "integration_tests"))
import workers

# Each epoch ends with a round, as the documentation of SynchronizeWorkers asks for.
OPTIONS = {"batches": [6, 6], "epochs": 8, "interval": 3, "timeout": 10, "slow": [0, 0.01]}
LONGEST = 120  # seconds for a whole job


@functools.cache
def undisturbed():
    return workers.run("train.py", 2, json.dumps(OPTIONS))


def one(chance):
    """What a job did that was started again after one of its workers was killed."""
    right = undisturbed()
    with tempfile.TemporaryDirectory() as folder:
        options = json.dumps(OPTIONS | {"folder": folder})
        processes = workers.start("train.py", 2, options)
        killed = chance.randrange(2)
        wait_for(pathlib.Path(folder, f"backup_{killed}", "latest.weights.h5"), processes[killed])
        time.sleep(chance.uniform(0, right[0]["seconds"]))
        processes[killed].kill()
        workers.finish(processes, LONGEST)

        found = workers.finish(workers.start("train.py", 2, options), LONGEST)
        if all("differ in their step" in str(result.get("error")) for _, result, _ in found):
            return after_copying(folder, killed, options)
        if any(code or result["error"] for code, result, _ in found):
            return "cannot be opened"
        same = all(
            result[what] == expected[what]
            for (_, result, _), expected in zip(found, right, strict=True)
            for what in ("weights", "center", "rounds", "steps")
        )
        return "ends where it would have" if same else "ends elsewhere"


def wait_for(path, process):
    while process.poll() is None and not path.exists():
        time.sleep(0.01)


def after_copying(folder, killed, options):
    """The backups are of different epochs. The documentation says: copy one worker's folder."""
    source, target = (pathlib.Path(folder, f"backup_{rank}") for rank in (killed, 1 - killed))
    shutil.rmtree(target, ignore_errors=True)
    if source.exists():
        shutil.copytree(source, target)
    found = workers.finish(workers.start("train.py", 2, options), LONGEST)
    if any(code or result["error"] for code, result, _ in found):
        return "cannot be opened"
    (_, first, _), (_, second, _) = found
    is_whole = first["center"] == second["center"] and first["steps"] == second["steps"]
    return "is refused, and ends well with one backup for all" if is_whole else "ends elsewhere"
