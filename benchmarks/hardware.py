"""What kind of machine this is, in words that name no machine."""

import importlib.metadata
import os

SOFTWARE = (
    "keras",
    "numpy",
    "tensorflow",
    "tensorflow-cpu",
    "jax",
    "flax",
    "optax",
    "torch",
    "timm",
    "ema-pytorch",
    "lightning",
    "pytorch-lightning",
)


def name() -> str:
    """Such as "2 CPU cores, 24 GiB"."""
    cores = len(os.sched_getaffinity(0))
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cores} CPU cores, {-(-gib // 4) * 4:.0f} GiB"  # part of it is the system's own


def versions() -> dict[str, str]:
    """Of what is installed."""
    found = {}
    for package in SOFTWARE:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def file_name(hardware: str) -> str:
    """The hardware's name as part of a file's."""
    return "-".join(hardware.lower().replace(",", "").split())


def peak_memory() -> int:
    """Bytes: the most that this process has had resident since `forget_peak`."""
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


def forget_peak() -> None:
    """Let the peak be what is resident now."""
    with open("/proc/self/clear_refs", "w") as control:
        control.write("5")
