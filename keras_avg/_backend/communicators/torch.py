"""The engine is torch.distributed: gloo on CPUs, NCCL on GPUs. The launcher is torchrun."""

import atexit
import contextlib
import datetime
import errno
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

# It has no public name. DistributedDataParallel unpacks its buckets with it.
from torch._utils import _unflatten_dense_tensors

from keras_avg import _backend
from keras_avg._backend.communicators import UnreachableError, host_memory, place, variables

PAUSE = 0.1  # seconds between two attempts to connect
LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched() -> tuple[int, int] | None:
    if dist.is_initialized():  # The user has done that.
        return dist.get_rank(), dist.get_world_size()
    found = variables(*LAUNCHER)
    if found is None:
        return None
    return place("RANK", found["RANK"], "WORLD_SIZE", found["WORLD_SIZE"])


class Engine:
    def __init__(self, timeout: float) -> None:
        self._timeout = datetime.timedelta(seconds=timeout)
        with _failures():
            if not dist.is_initialized():
                _start(self._timeout)
                # If a process ends before its groups are destroyed, gloo's threads abort it.
                atexit.register(_stop)
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            # Only gloo has `monitored_barrier`, which says which worker is missing.
            self._meetings = dist.new_group(backend="gloo", timeout=self._timeout)

    def meet(self, numbers: Sequence[int]) -> list[list[int]]:
        rows = torch.zeros(self.size, len(numbers), dtype=torch.int64)
        rows[self.rank] = torch.tensor(numbers)
        with _failures():
            dist.monitored_barrier(self._meetings, self._timeout, wait_all_ranks=True)
            dist.all_reduce(rows, group=self._meetings)
        return rows.tolist()

    @torch.no_grad()
    def sum(self, arrays: Sequence[Any], dtype: str) -> list[torch.Tensor]:
        tensors = _backend.detached(arrays)
        flat = _memory(sum(map(torch.numel, tensors)), dtype, tensors[0].device)
        # One call makes all views. Their creation in Python takes longer than a small copy.
        parts = list(_unflatten_dense_tensors(flat, tensors))
        _backend.assign_quotients(tensors, 1.0, parts)
        with _failures():
            dist.all_reduce(flat)
        return parts


def _memory(size: int, dtype: str, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return torch.from_numpy(host_memory(size, dtype))
    return torch.empty(size, dtype=getattr(torch, dtype), device=device)


def _start(timeout: datetime.timedelta) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # Then the launcher has already made the store.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        if os.environ.get("GROUP_WORLD_SIZE") != "1":  # torchrun runs on several machines.
            dist.init_process_group(backend, timeout=timeout)
            return
        store = dist.TCPStore(host, port, size, is_master=False, timeout=timeout)
        # After a restart by torchrun, the store may still have the addresses of dead workers.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"keras_avg_attempt_{attempt}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        return
    listener = _listener(host, port).detach() if rank == 0 else None
    if rank > 0:
        _wait_for_listener(host, port, timeout.total_seconds())
    store = dist.TCPStore(
        host, port, size, is_master=rank == 0, timeout=timeout, master_listen_fd=listener
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _listener(host: str, port: int) -> socket.socket:
    """A socket that listens only on the launcher's interface. By default torch listens on all."""
    try:
        return socket.create_server((socket.gethostbyname(host), port))
    except OSError as error:
        # The address may be that of another machine, which forwards it to this one.
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        return socket.create_server(("", port))


def _wait_for_listener(host: str, port: int, seconds: float) -> None:
    """Wait until worker 0 listens, for `seconds` at most.

    torch itself doubles its pauses, and may wait three times as long as its timeout.
    """
    deadline = time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        try:
            return socket.create_connection((host, port), max(left, PAUSE)).close()
        except OSError as error:
            if left <= PAUSE:
                raise ConnectionError(f"nobody listens at {host}:{port} ({error})") from error
        time.sleep(PAUSE)


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError) as error:
        named = re.search(r"Ranks? ([\d, ]+) failed to pass", str(error))
        ranks = named[1].replace(",", " ").split() if named else ()
        raise UnreachableError(error, tuple(map(int, ranks))) from error
