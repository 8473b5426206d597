"""The most memory that this process has held: on the GPU, or resident."""

from pathlib import Path

import torch


STATUS = Path("/proc/self/status")


def reset_peak_memory(device: torch.device) -> None:
    """Lets the next peak begin at what is held now. On CPUs, Linux alone has this."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident set


def peak_memory(device: torch.device) -> float:
    """GB (1e9 bytes) at most since the last reset, or the process's start: allocated on the GPU, or resident.

    Raises:
        OSError: the device is not a GPU of CUDA's, and the system does not tell: it has no /proc (macOS, Windows), or
            one without this figure (gVisor).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    for line in STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e9
    raise OSError(f"{STATUS} has no VmHWM: this system does not tell the peak of resident memory")
