"""The line that every benchmark prints first: when it ran, and on what."""

import os
import platform
import time
from pathlib import Path

import torch


def machine(device="cpu"):
    name, cpuinfo = platform.processor(), Path("/proc/cpuinfo")  # the file is Linux's, and says more
    if device == "cuda":
        name = torch.cuda.get_device_name()
    elif cpuinfo.exists():
        models = [line.split(": ")[1] for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{time.strftime('%Y-%m-%d')}, {name}, {os.cpu_count()} cores, {versions}"
