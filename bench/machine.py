"""The machine a benchmark ran on, and the versions of what took part: figures mean nothing without them."""

import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import nbdmap
from bench.site import REPOSITORY

PROGRAMS: Final = ("nbdkit", "qemu-nbd", "nbd-server", "fio", "nbdcopy")


def facts() -> dict[str, Any]:
    """What the report says of the machine; `load_after` is added at the end."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cores": len(os.sched_getaffinity(0)),
        "cpu": _first(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) or platform.machine(),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {"nbdmap": _own_version(), "uvloop": importlib.metadata.version("uvloop")}
        | {name: version(name) for name in PROGRAMS},
        "load_before": list(os.getloadavg()),
    }


def version(program: str) -> str | None:
    """What a program says its version is."""
    if shutil.which(program) is None:
        return None
    option = "-V" if program == "nbd-server" else "--version"
    said = subprocess.run([program, option], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    return _first(r"(\d+\.\d[\w.]*)", said.stdout + said.stderr) or "?"


def _own_version() -> str:
    """The package's, and the commit where there is one."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return nbdmap.__version__
    return f"{nbdmap.__version__} {said.stdout.strip()}".strip()


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1].strip() if found else ""


def line(machine: dict[str, Any]) -> str:
    """The facts for people."""
    versions = ", ".join(f"{name} {version or '(not installed)'}" for name, version in machine["versions"].items())
    loads = f"load {machine['load_before'][0]:.2f} before" + (
        f" and {machine['load_after'][0]:.2f} after" if "load_after" in machine else ""
    )
    return (
        f"{machine['cores']} cores ({machine['cpu']}), {machine['memory'] >> 30} GiB, Linux {machine['kernel']}, "
        f"Python {machine['python']}; {versions}; {machine['date']}; {loads}."
    )
