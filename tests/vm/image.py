"""What the guest of `tests.vm.harness` is made of: Debian's kernel, an initramfs and a disk with programs.

    vmlinux      the kernel, taken out of its bzImage: under emulation, unpacking XZ takes longer than booting
    boot.cpio    busybox and the few modules that reach the disk; not packed, for the same reason
    tools.img    an ext4 file system with every program of PROGRAMS, its libraries, and the modules of MODULES

A run puts one more archive behind boot.cpio (the kernel unpacks any number of them): the job.
"""

import fnmatch
import lzma
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
SEARCH: Final = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", "/usr/bin", "/bin"])

# Each program and the Debian package that has it.
HOST: Final = {
    "qemu-system-x86_64": "qemu-system-x86",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "depmod": "kmod",
    "zstd": "zstd",
    "ldd": "libc-bin",
}
PROGRAMS: Final = {
    "busybox": "busybox-static",
    "dmsetup": "dmsetup",
    "nbd-client": "nbd-client",
    "cryptsetup": "cryptsetup-bin",
    "mdadm": "mdadm",
    "thin_check": "thin-provisioning-tools",
    "thin_dump": "thin-provisioning-tools",
    "lvm": "lvm2",
    "fio": "fio",
    "mkfs.ext4": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "losetup": "mount",
    "blockdev": "util-linux",
    "blkdiscard": "util-linux",
}
EXTRA: Final = ("/etc/mke2fs.conf", "/lib/x86_64-linux-gnu/libgcc_s.so.1")

# Modules by the pattern of their name, or by the folder that holds them; what they depend on comes along.
BOOT_MODULES: Final = ("dm-mod", "virtio_pci", "virtio_blk", "crc32c_generic", "ext4")
MODULES: Final = (
    *("dm-*", "raid*", "linear", "md-mod", "nbd", "loop", "brd", "ext4", "xfs", "virtio*", "libcrc32c", "crc32c*"),
    *("kernel/crypto/*", "kernel/arch/x86/crypto/*", "kernel/net/core/*"),
)


def find_program(name: str) -> Path | None:
    found = shutil.which(name, path=SEARCH)
    return Path(found) if found else None


def missing_packages() -> list[str]:
    return sorted({package for name, package in (HOST | PROGRAMS).items() if find_program(name) is None})


def call(*command: str | Path, folder: Path | None = None) -> str:
    """What the command printed; CalledProcessError has its errors when it fails."""
    words = [str(find_program(str(command[0])) or command[0]), *(str(word) for word in command[1:])]
    done = subprocess.run(words, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=folder)
    return done.stdout


# The kernel


def unpack_kernel(image: Path, vmlinux: Path) -> None:
    """Writes the ELF kernel that the bzImage carries (Documentation/arch/x86/boot.rst: payload_offset)."""
    data = image.read_bytes()
    setup_sectors = data[0x1F1] or 4
    start, length = struct.unpack_from("<II", data, 0x248)
    vmlinux.write_bytes(unpack(data[(setup_sectors + 1) * 512 + start :][:length]))


def unpack(data: bytes) -> bytes:
    """What was packed with XZ (Debian 12) or Zstandard (13), or is not packed; what follows a bzImage's is dropped."""
    if data.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMADecompressor().decompress(data)
    if data.startswith(b"\x28\xb5\x2f\xfd"):
        done = subprocess.run([str(find_program("zstd")), "-dcq"], input=data, capture_output=True, check=False)
        return done.stdout    # the length of the kernel follows, which is not Zstandard
    return data


class Modules:
    """The modules under a `lib/modules/VERSION`, by name, and what each one depends on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._paths = {_module_name(path): path for path in sorted(folder.glob("kernel/**/*.ko*"))}

    def read(self, path: Path) -> bytes:
        """The module at the path that `matching` gave, unpacked."""
        return unpack((self._folder / path).read_bytes())

    def matching(self, patterns: Iterable[str]) -> list[Path]:
        """Paths below the folder of the modules that match and all they need, each behind what it needs."""
        ordered: dict[str, Path] = {}
        for pattern in patterns:
            for name, path in self._paths.items():
                relative = path.relative_to(self._folder)
                subject = str(relative) if "/" in pattern else path.name.partition(".")[0]
                if fnmatch.fnmatchcase(subject, pattern):
                    self._visit(name, ordered)
        return list(ordered.values())

    def _visit(self, name: str, ordered: dict[str, Path]) -> None:
        if name in ordered or name not in self._paths:    # a dependency that is built in has no file
            return
        path = self._paths[name]
        depends = re.search(rb"\0depends=([^\0]*)\0", unpack(path.read_bytes()))
        for other in depends[1].decode().split(",") if depends else []:
            self._visit(other.replace("-", "_"), ordered)
        ordered[name] = path.relative_to(self._folder)


def _module_name(path: Path) -> str:
    return path.name.partition(".")[0].replace("-", "_")


# The archives and the disk


def cpio(files: Mapping[str, bytes | Path], *, folders: Iterable[str] = (), links: Mapping[str, str] | None = None) -> bytes:
    """A `newc` archive, in which every file may be executed."""
    entries = [(folder, 0o040755, b"") for folder in folders]
    entries += [(name, 0o120777, target.encode()) for name, target in (links or {}).items()]
    entries += [
        (name, 0o100755, content.read_bytes() if isinstance(content, Path) else content)
        for name, content in files.items()
    ]
    parts: list[bytes] = []
    for inode, (name, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], start=1):
        fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        parts += [head, bytes(-len(head) % 4), data, bytes(-len(data) % 4)]
    return b"".join(parts)


def build_boot_archive(modules_folder: Path, archive: Path) -> None:
    """What is needed before the tools image can be mounted."""
    modules = Modules(modules_folder)
    paths = modules.matching(BOOT_MODULES)
    busybox = find_program("busybox")
    assert busybox is not None
    files: dict[str, bytes | Path] = {f"modules/{path.name}": modules.read(path) for path in paths}
    files |= {library.lstrip("/"): Path(library) for library in libraries([busybox])}
    files |= {
        "bin/busybox": busybox,
        "init": HERE / "boot.sh",
        "boot.modules": "".join(f"/modules/{path.name}\n" for path in paths).encode(),
    }
    folders = {str(parent) for name in files for parent in Path(name).parents if str(parent) != "."}
    folders |= {"proc", "sys", "dev", "root"}
    applets = ("sh", "mount", "insmod", "cp", "switch_root", "poweroff", "echo")
    links = {f"bin/{applet}": "busybox" for applet in applets}
    archive.write_bytes(cpio(files, folders=sorted(folders), links=links))


def build_tools_image(modules_folder: Path, root: Path, image: Path) -> None:
    """Fills the folder `root`, and makes the ext4 image of it."""
    for folder in ("bin", "sbin", "etc", "proc", "sys", "dev", "run", "tmp", "mnt", "root", "usr/bin", "usr/sbin"):
        (root / folder).mkdir(parents=True)
    _copy_programs(root)
    for script in ("guest.sh", "job.sh"):
        shutil.copy(HERE / script, root / script)
        (root / script).chmod(0o755)
    (root / "etc/mtab").symlink_to("/proc/mounts")
    target = root / "lib/modules" / modules_folder.name
    modules = Modules(modules_folder)
    for path in modules.matching(MODULES):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).with_name(path.name.removesuffix(".xz")).write_bytes(modules.read(path))
    for listing in modules_folder.glob("modules.[bo]*"):
        shutil.copy(listing, target)
    call("depmod", "-b", root, modules_folder.name)
    used = sum(path.lstat().st_size + 4096 for path in root.rglob("*"))
    call(
        *("mkfs.ext4", "-q", "-F", "-O", "^has_journal,^resize_inode", "-m", "0", "-E", "root_owner=0:0"),
        *("-d", root, image, f"{used // 1024 * 5 // 4 + 16384}k"),
    )


def _copy_programs(root: Path) -> None:
    programs = {name: path for name in PROGRAMS if (path := find_program(name))}
    for name, path in programs.items():
        shutil.copy(path, root / "bin" / name)
    for file in [*libraries(programs.values()), *EXTRA]:
        if Path(file).exists():
            (root / file.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, root / file.lstrip("/"))
    for applet in call("busybox", "--list").split():
        if not (root / "bin" / applet).exists():
            (root / "bin" / applet).symlink_to("busybox")
    for name in ("modprobe", "init"):    # the kernel itself calls /sbin/modprobe
        (root / "sbin" / name).symlink_to("../bin/busybox")


def libraries(programs: Iterable[Path]) -> list[str]:
    """The paths of all shared libraries that the programs are linked with; none for a static one."""
    words = [str(find_program("ldd")), *map(str, programs)]
    listing = subprocess.run(words, capture_output=True, text=True, check=False).stdout
    return sorted(set(re.findall(r"^\s+(?:\S+ => )?(/\S+) \(0x", listing, re.MULTILINE)))
