"""The device that is measured on, and what a result carries of it."""

import importlib.metadata
import platform
import re
from datetime import date
from typing import Any

import torch


def device() -> torch.device:
    """The current CUDA device, or the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def device_name(where: torch.device) -> str:
    """The vendor's name of it."""
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    with open("/proc/cpuinfo") as file:
        return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), platform.processor() or "CPU")


def short_name(name: str) -> str:
    """A GPU's name for a file: `h100` for `NVIDIA H100 80GB HBM3`, the whole name in small letters where nothing looks like a model."""
    model = re.search(r"\b[A-Z]{1,3}\d{2,4}\w*\b", name)
    return (model.group() if model else re.sub(r"\W+", "_", name).strip("_")).lower()


def machine(where: torch.device) -> dict[str, Any]:
    """What every row carries of the place and the day it was measured on; `gpu` is `cpu: MODEL` where there was none."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # it exists on Linux alone
        triton = None
    name = device_name(where) if where.type == "cuda" else f"cpu: {device_name(where)}"
    return {"torch": torch.__version__, "triton": triton, "gpu": name, "date": date.today().isoformat()}


def software() -> dict[str, str]:
    """Versions that a whole run depends on besides those of `machine`: Python's and Lightning's."""
    return {"python": platform.python_version(), "lightning": importlib.metadata.version("lightning")}


def synchronize(where: torch.device) -> None:
    """Wait for the device."""
    if where.type == "cuda":
        torch.cuda.synchronize(where)
