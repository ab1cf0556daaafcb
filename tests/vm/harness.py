"""Boots Debian's stock kernel under QEMU, without KVM, and runs a shell script in it: the oracle for all that dm does.

    kernel = prepare()
    kernel.run("section table; dmsetup create z --table '0 8 zero'; dmsetup table z").sections()["table"]

- The guest has every program of `image.PROGRAMS`, busybox for the rest, and the functions of job.sh. No udev runs there:
  libdevmapper makes the nodes itself (DM_DISABLE_UDEV is set).
- Image N is /dev/vdb, /dev/vdc, ... and what the job writes to it is kept. The host's 127.0.0.1 is 10.0.2.2.
- What is built lies in .cache/vm under a hash of all that goes into it; two processes may ask for it at once. One guest runs
  at a time: more would share few processors and reach their time limits.
- The kernel is the one of the package linux-image-amd64, or of its backport: `prepare(backports=True)`.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.vm import image

REPOSITORY: Final = Path(__file__).resolve().parents[2]
CACHE: Final = REPOSITORY / ".cache" / "vm"
MARK: Final = "@@@"
COMMAND_LINE: Final = "console=ttyS0 panic=-1 oops=panic mitigations=off cryptomgr.notests random.trust_cpu=on"


class Unavailable(Exception):
    """This machine cannot boot the guest; the text says what is missing."""


class GuestFailed(Exception):
    """The guest ended without having run the job to its end; the text has the end of its console."""


@dataclass(frozen=True, slots=True)
class Result:
    stdout: str    # the job's stdout and stderr
    status: int
    console: str    # the kernel's messages

    def sections(self) -> dict[str, str]:
        """What was printed behind each `section NAME`."""
        pieces = re.split(rf"^{MARK}section (.*)\n", self.stdout, flags=re.MULTILINE)
        return {name: text.removesuffix("\n") for name, text in zip(pieces[1::2], pieces[2::2], strict=True)}


@dataclass(frozen=True, slots=True)
class Kernel:
    folder: Path
    version: str    # as `uname -r` prints it

    def run(
        self,
        job: str,
        images: Sequence[Path] = (),
        *,
        seconds: float = 300,
        memory_mib: int = 1024,
        processors: int = 2,    # the kernel's NBD client uses at most one connection for each
    ) -> Result:
        """Boots, runs the job, powers off; GuestFailed when that takes longer than `seconds`, or the kernel crashes."""
        with tempfile.TemporaryDirectory(prefix="nbdmap-vm-") as scratch, _locked(CACHE / "running.lock"):
            folder = Path(scratch)
            initrd, output, console = folder / "initrd", folder / "output", folder / "console"
            initrd.write_bytes((self.folder / "boot.cpio").read_bytes() + image.cpio({"job": job.encode() + b"\n"}))
            output.touch()
            console.touch()
            machine = ["-smp", str(processors), "-m", str(memory_mib)]
            command = self._command(initrd, output, console, images, machine)
            ended = "QEMU ended"
            try:
                done = subprocess.run(
                    command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds, check=False
                )
            except subprocess.TimeoutExpired:
                ended = f"stopped after {seconds} s"
            else:
                ended += f" with status {done.returncode}: {done.stderr}" if done.returncode else ""
            return _result(output.read_bytes(), console.read_bytes(), ended)

    def _command(
        self, initrd: Path, output: Path, console: Path, images: Sequence[Path], machine: Sequence[str]
    ) -> list[str]:
        qemu = image.find_program("qemu-system-x86_64")
        drives = [f"file={self.folder / 'tools.img'},format=raw,if=virtio,readonly=on"]
        drives += [f"file={path},format=raw,if=virtio,cache=unsafe,discard=unmap" for path in images]
        return [
            *(str(qemu), "-no-user-config", "-nodefaults", "-no-reboot", "-display", "none"),
            *("-accel", "tcg,thread=multi", "-cpu", "Westmere,+rdrand", *machine),
            *("-kernel", str(self.folder / "vmlinux"), "-initrd", str(initrd), "-append", COMMAND_LINE),
            *("-serial", f"file:{console}", "-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net"),
            *("-device", "virtio-serial-pci", "-chardev", f"file,id=output,path={output}"),
            *("-device", "virtserialport,chardev=output,name=output"),
            *(word for drive in drives for word in ("-drive", drive)),
        ]


def _result(output: bytes, console: bytes, ended: str) -> Result:
    text = output.decode(errors="backslashreplace")
    messages = console.decode(errors="backslashreplace").replace("\r", "")
    found = re.search(rf"\n{MARK}status (\d+)\n\Z", text)
    if found is None:
        raise GuestFailed(f"{ended}\nconsole: ...{messages[-3000:]}\noutput: ...{text[-3000:]}")
    return Result(text[: found.start()], int(found[1]), messages)


def prepare(*, backports: bool = False) -> Kernel:
    """The kernel and its tools, from the cache or built there; Unavailable when the machine lacks something."""
    if missing := image.missing_packages():
        raise Unavailable(f"Debian packages are missing: {' '.join(missing)}")
    CACHE.mkdir(parents=True, exist_ok=True)
    with _locked(CACHE / "build.lock"):
        package = _kernel_package(backports)
        folder = CACHE / _fingerprint(package)
        if not folder.exists():
            with tempfile.TemporaryDirectory(prefix="building-", dir=CACHE) as scratch:
                (finished := Path(scratch) / "finished").mkdir()
                _build(package, Path(scratch), finished)
                finished.rename(folder)
            _prune()
        return Kernel(folder, (folder / "version").read_text())


def _prune() -> None:
    """Keeps the four newest builds: another checkout's tests may be running on one of them."""
    builds = sorted(CACHE.glob("*/version"), key=lambda path: path.stat().st_mtime)
    for version in builds[:-4]:
        shutil.rmtree(version.parent)


def _build(package: Path, scratch: Path, finished: Path) -> None:
    kernel = scratch / "kernel"
    image.call("dpkg-deb", "-x", package, kernel)
    (vmlinuz,) = kernel.glob("boot/vmlinuz-*")
    (modules,) = kernel.glob("lib/modules/*")
    image.unpack_kernel(vmlinuz, finished / "vmlinux")
    image.build_boot_archive(modules, finished / "boot.cpio")
    image.build_tools_image(modules, scratch / "root", finished / "tools.img")
    (finished / "version").write_text(modules.name)


def _fingerprint(package: Path) -> str:
    """A name for all that the build depends on."""
    digest = hashlib.sha256(package.name.encode())
    for source in sorted(image.HERE.glob("*.sh")):
        digest.update(source.read_bytes())
    digest.update((image.HERE / "image.py").read_bytes())
    for name in image.PROGRAMS:
        path = image.find_program(name)
        assert path is not None
        state = path.stat()
        digest.update(f"{path} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _kernel_package(backports: bool) -> Path:
    """The package file of the kernel: downloaded once; without a network, the newest one that was."""
    folder = CACHE / ("backports" if backports else "stock")
    folder.mkdir(exist_ok=True)
    kept = sorted(folder.glob("linux-image-*.deb"), key=lambda path: path.stat().st_mtime)
    try:
        return _download(folder, kept, _backports_options() if backports else [])
    except subprocess.CalledProcessError as error:
        if kept:
            return kept[-1]
        raise Unavailable(
            f"the kernel package linux-image-amd64 cannot be downloaded ({error.stderr.strip()}); try: apt-get update"
        ) from error


def _backports_options() -> list[str]:
    """What makes apt know this release's backports and nothing else, without touching the system's own lists."""
    apt = CACHE / "apt"
    (apt / "lists/partial").mkdir(parents=True, exist_ok=True)
    (apt / "cache/archives/partial").mkdir(parents=True, exist_ok=True)
    codename = re.search(r"^VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text(), re.MULTILINE)
    keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
    suite = f"{codename[1] if codename else 'bookworm'}-backports"
    (apt / "sources.list").write_text(f"deb [signed-by={keys}] http://deb.debian.org/debian {suite} main\n")
    places = {
        "Dir::Etc::sourcelist": apt / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": apt / "lists",
        "Dir::Cache": apt / "cache",
    }
    return [word for name, path in places.items() for word in ("-o", f"{name}={path}")]


def _download(folder: Path, kept: list[Path], options: list[str]) -> Path:
    name, version = _newest_kernel(options, may_update=bool(options) or os.geteuid() == 0)
    for path in kept:
        if path.name.startswith(f"{name}_{version.replace(':', '%3a')}_"):
            return path
    with tempfile.TemporaryDirectory(prefix="download-", dir=folder) as scratch:
        command = [*options, "-o", "APT::Sandbox::User=root", "download", f"{name}={version}"]
        image.call("apt-get", "-qq", *command, folder=Path(scratch))
        (package,) = Path(scratch).glob("*.deb")
        return package.rename(folder / package.name)


def _newest_kernel(options: list[str], *, may_update: bool) -> tuple[str, str]:
    """Name and version of the package that linux-image-amd64 stands for, asking the archive when nothing is known of it."""
    for attempt in range(2):
        if attempt and may_update:
            image.call("apt-get", "-qq", *options, "-o", "APT::Sandbox::User=root", "update")
        command = ["apt-cache", *options, "show", "--no-all-versions", "linux-image-amd64"]
        shown = subprocess.run(command, capture_output=True, text=True, check=False)
        if found := re.search(r"^Depends: (linux-image-\S+) \(= (\S+)\)", shown.stdout, re.MULTILINE):
            return found[1], found[2]
    raise subprocess.CalledProcessError(1, command, stderr=shown.stderr)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
