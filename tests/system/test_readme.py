"""The console blocks of the README and of documents, run in one shell from the top to the bottom, print what stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.support.programs import need

REPOSITORY: Final = Path(__file__).parent.parent.parent
MARK: Final = "--next--"


def steps(text: str) -> list[tuple[str, str]]:
    """(command, output) of each `$` line of the console blocks."""
    found: list[tuple[str, str]] = []
    for block in re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], ""))
            else:
                found[-1] = (found[-1][0], found[-1][1] + line + "\n")
    return found


def files(text: str) -> dict[str, str]:
    """The YAML files that are shown with their names."""
    return dict(re.findall(r"^`(\S+\.yaml)`:\n\n```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


@pytest.mark.system
@pytest.mark.parametrize(
    "document",
    ["README.md", "docs/faults.md", "docs/luks.md", "docs/thin.md", "docs/crypt.md", "docs/multipath.md", "docs/events.md"],
)
def test_the_tour(document: str, tmp_path: Path) -> None:
    need("nbdinfo", "libnbd-bin")
    need("qemu-io", "qemu-utils")
    need("nbdkit", "nbdkit")
    wrapper = tmp_path / "nbdmap"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} -m nbdmap "$@"\n')
    wrapper.chmod(0o755)
    need("cryptsetup", "cryptsetup-bin")
    need("thin_check", "thin-provisioning-tools")
    text = (REPOSITORY / document).read_text()
    tour = steps(text)
    assert len(tour) > 5
    for name, content in files(text).items():
        (tmp_path / name).write_text(content)
    script = "exec 2>&1\n" + "".join(f"{command}\necho {MARK}\n" for command, _ in tour)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY), "LC_ALL": "C.UTF-8"}
    shell = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, timeout=60, check=False
    )
    printed = shell.stdout.split(f"{MARK}\n")
    for (command, expected), got in zip(tour, printed, strict=False):
        assert got == expected, f"$ {command}\n{got}"
