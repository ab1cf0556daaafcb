"""The harness itself: what a job is given, what comes back from it, and how it fails."""

from pathlib import Path

import pytest

from tests.vm import harness, image
from tests.vm.harness import GuestFailed, Kernel, Unavailable


def test_one_boot(kernel: Kernel, tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(b"host".ljust(1 << 20, b"\0"))
    job = """
        section release; uname -r
        section programs; for p in PROGRAMS; do command -v $p >/dev/null || echo $p; done
        section read; head -c 4 /dev/vdb; printf guest | dd of=/dev/vdb bs=5 seek=1 conv=notrunc 2>/dev/null
        section loop; modprobe loop; disk loop0 1048576 --read-only; blockdev --getsize64 --getro /dev/loop0
        section dm; dmsetup create z --table '0 8 zero'; dmsetup info -c --noheadings -o name,major,minor z
        section links; for p in dmsetup lvm fio nbd-client; do /lib64/ld-linux* --list /bin/$p | grep 'not found'; done
        exit 7
    """
    result = kernel.run(job.replace("PROGRAMS", " ".join(image.PROGRAMS)), [disk])
    assert result.status == 7
    assert result.sections() == {
        "release": f"{kernel.version}\n",
        "programs": "",
        "read": "host",
        "loop": "1048576\n1\n",
        "dm": "z:254:0\n",
        "links": "",
    }
    assert disk.read_bytes()[5:10] == b"guest"
    assert "device-mapper: ioctl:" in result.console


def test_a_guest_that_takes_too_long(kernel: Kernel) -> None:
    with pytest.raises(GuestFailed, match=r"stopped after 2 s"):
        kernel.run("sleep 100", seconds=2)


def test_a_missing_program_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(image.PROGRAMS, "no-such-program", "no-such-package")
    with pytest.raises(Unavailable, match="no-such-package"):
        harness.prepare()
