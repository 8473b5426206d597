"""The most memory that this process has held: on the GPU, or resident."""

from pathlib import Path

import torch


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
        OSError: the device is not a GPU of CUDA's, and the system has no /proc (other than Linux).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024 / 1e9
