"""Starts the workers of a job as processes on the loopback interface, for any backend."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile

import keras

PROGRAMS = pathlib.Path(__file__).parent / "programs"


def environments(size):
    """The environment variables that the backend's launcher sets, for each worker."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(size)]
        addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
    return [_environment(rank, addresses) for rank in range(size)]


def _environment(rank, addresses):
    common = {"TF_CPP_MIN_LOG_LEVEL": "3"}
    if keras.backend.backend() == "tensorflow":
        task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}
        return common | {"TF_CONFIG": json.dumps(task)}
    if keras.backend.backend() == "jax":
        return common | {
            "KERAS_DISTRIBUTION_JOB_ADDRESSES": addresses[0],
            "KERAS_DISTRIBUTION_NUM_PROCESSES": str(len(addresses)),
            "KERAS_DISTRIBUTION_PROCESS_ID": str(rank),
        }
    host, port = addresses[0].split(":")
    return common | {
        "RANK": str(rank),
        "WORLD_SIZE": str(len(addresses)),
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        "GLOO_SOCKET_IFNAME": "lo",
    }


def start(program, size, *arguments, absent=()):
    """Start the processes, except for absent ones. Return them by rank."""
    command = [sys.executable, str(PROGRAMS / program), *map(str, arguments)]
    return [
        subprocess.Popen(
            command, env=os.environ | e, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank, e in enumerate(environments(size))
        if rank not in absent
    ]


def finish(processes, timeout=120):
    """The return code, the JSON in the last line (if it is JSON) and stderr of each worker."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            process.wait()
    return [
        (p.returncode, _result(out), err) for p, (out, err) in zip(processes, outputs, strict=True)
    ]


def _result(out):
    lines = out.strip().splitlines()
    return json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {"output": out}


def run(program, size, *arguments):
    """The JSON that each worker printed. Fail if a worker has failed."""
    results = finish(start(program, size, *arguments))
    for code, _, err in results:
        assert code == 0, err
    return [result for _, result, _ in results]


def torchrun(program, size, *arguments, restarts=0):
    """The JSON that each worker printed. Torch's own launcher starts the workers.

    If a worker fails, the launcher ends the others and starts all again, at most `restarts` times.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = environments(1)[0]["MASTER_PORT"]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size)]
        command += ["--master-addr", "127.0.0.1", "--master-port", port]
        command += ["--max-restarts", str(restarts), "--redirects", "1", "--log-dir", folder]
        command += [str(PROGRAMS / program), *map(str, arguments)]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        logs = sorted(pathlib.Path(folder).rglob("stdout.log"))  # The last attempt comes last.
        last = {int(path.parent.name): path for path in logs}
        return [_result(last[rank].read_text()) for rank in range(size)]
