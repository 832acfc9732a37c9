"""A description of this kind of machine, without the name of the machine."""

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
    """A text such as "2 CPU cores, 24 GiB"."""
    cores = len(os.sched_getaffinity(0))
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cores} CPU cores, {-(-gib // 4) * 4:.0f} GiB"  # the system keeps a part of it


def versions() -> dict[str, str]:
    """The versions of the installed packages."""
    found = {}
    for package in SOFTWARE:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def file_name(hardware: str) -> str:
    """The name of the hardware as a part of a file name."""
    return "-".join(hardware.lower().replace(",", "").split())


def peak_memory() -> int:
    """The peak of this process' resident memory since `forget_peak`, in bytes."""
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


def forget_peak() -> None:
    """Set the peak to the memory that is resident now."""
    with open("/proc/self/clear_refs", "w") as control:
        control.write("5")
