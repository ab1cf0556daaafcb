"""LUKS beside the programs that made it: cryptsetup, qemu and nbdkit, each reading and writing what the other did.

cryptsetup cannot decrypt data without a kernel's device mapper: that is in tests/vm/test_luks.py. Here it says what the volume
key is; qemu and nbdkit read and write the data themselves.
"""

import contextlib
import io
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from nbdmap.cli.main import main
from nbdmap.errors import Unsupported
from nbdmap.luks import volume
from nbdmap.luks.image import FileImage
from nbdmap.luks.kdf import HASHES
from nbdmap.luks.luks2 import Luks2
from tests.support.clients import attempt, run, wait_until
from tests.support.luks import KEY, cryptsetup, disk_file
from tests.support.server import PROGRAM, REPOSITORY, Server, serving

MIB: Final = 1 << 20
CHEAP: Final = {
    "pbkdf2": ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"),
    **{kind: ("--pbkdf", kind, "--pbkdf-memory", "64", "--pbkdf-parallel", "1", "--pbkdf-force-iterations", "4")
       for kind in ("argon2i", "argon2id")},
}  # fmt: skip
KINDS: Final = [("luks1", 512, "pbkdf2"), *(("luks2", size, kdf) for size in (512, 4096) for kdf in CHEAP)]
SECRET: Final = ("--object", "secret,id=s,data=secret")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "key").write_bytes(b"secret")
    (tmp_path / "two").write_bytes(b"\0\xff two\n")
    (tmp_path / "text").write_bytes(b"of text")
    (tmp_path / "volume").write_bytes(KEY)
    with (tmp_path / "disk.img").open("wb") as file:
        file.truncate(18 * MIB)
    return tmp_path


def nbdmap(*words: str, status: int = 0) -> str:
    """What a command that needs no server prints, in this process."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        assert main(words) == status, f"{words}: {said.getvalue()}"
    return said.getvalue()


def words(kind: str, sector_size: int, kdf: str) -> tuple[str, ...]:
    size = ("--sector-size", str(sector_size)) if kind == "luks2" else ()
    return ("--type", kind, *size, *CHEAP[kdf], "--key-file", "key", "--volume-key-file", "volume")


@pytest.mark.parametrize(("kind", "sector_size", "kdf"), KINDS)
def test_cryptsetup_makes_it(kind: str, sector_size: int, kdf: str) -> None:
    assert cryptsetup("luksFormat", "-q", "disk.img", *words(kind, sector_size, kdf)) == (0, "")
    assert cryptsetup("luksAddKey", "-q", "disk.img", "two", "--key-file", "key", *CHEAP[kdf]) == (0, "")
    for key, slot in (("key", 0), ("two", 1)):
        with FileImage("disk.img") as image:
            header = volume.read(image)
            assert header.unlock(bytearray(Path(key).read_bytes())) == (slot, KEY)
            assert header.segment().sector_size == sector_size
            assert header.is_key(bytearray(KEY))


@pytest.mark.parametrize(("kind", "sector_size", "kdf"), KINDS)
def test_nbdmap_makes_it(kind: str, sector_size: int, kdf: str) -> None:
    nbdmap("luks", "format", "disk.img", *words(kind, sector_size, kdf))
    nbdmap("luks", "add-key", "disk.img", "two", "--key-file", "key", *CHEAP[kdf])
    for key, slot in (("key", 0), ("two", 1)):
        status, text = cryptsetup("open", "--test-passphrase", "-v", "disk.img", "--key-file", key)
        assert (status, f"Key slot {slot} unlocked." in text) == (0, True), text
        Path("out").unlink(missing_ok=True)
        dump = ("luksDump", "-q", "--dump-volume-key", "--volume-key-file", "out")
        status, text = cryptsetup(*dump, "disk.img", "--key-file", key)
        assert status == 0, text
        assert Path("out").read_bytes() == KEY
    assert cryptsetup("luksKillSlot", "-q", "disk.img", "0", "--key-file", "two") == (0, "")
    assert cryptsetup("luksAddKey", "-q", "disk.img", "key", "--key-file", "two", *CHEAP[kdf]) == (0, "")
    nbdmap("luks", "open", "disk.img", "--test-passphrase", "--key-file", "key")


@pytest.mark.parametrize("name", [*HASHES])
def test_hashes(name: str) -> None:
    """cryptsetup means the same by each name."""
    nbdmap("luks", "format", "disk.img", "--hash", name, *words("luks1", 512, "pbkdf2"))
    assert cryptsetup("open", "--test-passphrase", "disk.img", "--key-file", "key") == (0, "")
    forced = ("--pbkdf-force-iterations", "1000")
    assert cryptsetup("luksAddKey", "-q", "disk.img", "two", "--key-file", "key", *forced) == (0, "")
    nbdmap("luks", "open", "disk.img", "--test-passphrase", "--key-file", "two")


def test_a_detached_header(place: Path) -> None:
    for kind in ("luks1", "luks2"):
        nbdmap("luks", "format", "disk.img", "--header", f"{kind}.header", *words(kind, 512, "pbkdf2"))
        assert cryptsetup("open", "--test-passphrase", "--header", f"{kind}.header", "disk.img", "--key-file", "key") == (0, "")
        said = through_nbdmap("disk.img", "qemu-io", "-f", "raw", "-c", "'write -P 5 0 18M'", '"$uri"', header=f"{kind}.header")
        assert "wrote 18874368" in said
        assert len({*(place / "disk.img").read_bytes()[:4096]}) == 256, "ciphertext from its first byte on"


def test_cryptsetup_repairs_and_converts_what_nbdmap_made(place: Path) -> None:
    """It checks more when it does that: the JSON rules of its own, and both copies."""
    nbdmap("luks", "format", "disk.img", *words("luks2", 512, "pbkdf2"))
    assert cryptsetup("convert", "-q", "disk.img", "--type", "luks1") == (0, "")
    nbdmap("luks", "open", "disk.img", "--test-passphrase", "--key-file", "key")
    assert cryptsetup("convert", "-q", "disk.img", "--type", "luks2") == (0, "")
    nbdmap("luks", "open", "disk.img", "--test-passphrase", "--key-file", "key")
    nbdmap("luks", "add-key", "disk.img", "two", "--key-file", "key", *CHEAP["argon2id"])
    data = bytearray((place / "disk.img").read_bytes())
    data[5000] ^= 1
    (place / "disk.img").write_bytes(data)
    assert "at 0: the checksum is wrong" in nbdmap("luks", "info", "disk.img")
    status, text = cryptsetup("open", "--test-passphrase", "disk.img", "--key-file", "two")
    assert status == 0, text
    assert "checksum" not in nbdmap("luks", "info", "disk.img"), "cryptsetup has repaired it"


def test_a_reencryption_in_progress_is_refused() -> None:
    run("cryptsetup", "luksFormat", "-q", "disk.img", *words("luks2", 512, "pbkdf2"))
    run("cryptsetup", "reencrypt", "-q", "--init-only", "disk.img", "--key-file", "key", "--key-slot", "0", *CHEAP["pbkdf2"])
    for command in (("open", "disk.img", "--test-passphrase"), ("add-key", "disk.img", "two"), ("remove-key", "disk.img")):
        assert "a reencryption is in progress" in nbdmap("luks", *command, "--key-file", "key", status=1)
    assert "Requirements:\tonline-reencrypt" in nbdmap("luks", "info", "disk.img")
    with FileImage("disk.img") as image, pytest.raises(Unsupported):
        volume.read(image).segment()


# --- data ------------------------------------------------------------------------------------------------------------------


def pattern(size: int) -> bytes:
    return random.Random(5).randbytes(size)


def through_nbdmap(image: str, *command: str, header: str = "") -> str:
    """What a client says of the decrypted disk."""
    environment = {"PYTHONPATH": str(REPOSITORY)}
    detached = ("--header", header) if header else ()
    return run(*PROGRAM, "luks", "open", image, *detached, "--key-file", "key", "--run", " ".join(command), extra=environment)


def same_to_qemu(opened: str) -> bool:
    """Whether qemu finds in a LUKS disk what is in the file `plain`."""
    done = attempt("qemu-img", "compare", *SECRET, "--image-opts", opened, "driver=raw,file.filename=plain")
    return done.stdout == "Images are identical.\n"


def test_qemu_reads_what_nbdmap_wrote_and_the_other_way_round(place: Path) -> None:
    nbdmap("luks", "format", "disk.img", *words("luks1", 512, "pbkdf2"))
    (place / "plain").write_bytes(pattern(3 * MIB) + bytes(13 * MIB))
    through_nbdmap("disk.img", "nbdcopy", "plain", '"$uri"')
    opened = "driver=luks,key-secret=s,file.filename=disk.img"
    assert same_to_qemu(opened)
    run("qemu-io", *SECRET, "--image-opts", opened, "-c", "write -P 7 1M 64k")
    assert "read 65536" in through_nbdmap("disk.img", "qemu-io", "-f", "raw", "-c", "'read -P 7 1M 64k'", '"$uri"')


def test_nbdmap_opens_what_qemu_made(place: Path) -> None:
    for _ in range(5):  # its measuring of PBKDF2 takes some seconds, and fails now and then on a busy machine
        done = attempt("qemu-img", "create", "-q", "-f", "luks", *SECRET, "-o", "key-secret=s,iter-time=100", "q.img", "4M")
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stderr
    (place / "plain").write_bytes(pattern(4 * MIB))
    through_nbdmap("q.img", "nbdcopy", "plain", '"$uri"')
    opened = "driver=luks,key-secret=s,file.filename=q.img"
    assert same_to_qemu(opened)
    nbdmap("luks", "add-key", "q.img", "text", "--key-file", "key", *CHEAP["pbkdf2"])
    run("qemu-io", "--object", "secret,id=s,file=text", "--image-opts", opened, "-c", "write -P 1 0 4k")
    through_nbdmap("q.img", "nbdcopy", '"$uri"', "plain")
    assert (place / "plain").read_bytes() == b"\1" * 4096 + pattern(4 * MIB)[4096:]


def test_nbdkit_reads_and_writes_what_nbdmap_made(place: Path) -> None:
    nbdmap("luks", "format", "disk.img", *words("luks1", 512, "pbkdf2"))
    through_nbdmap("disk.img", "qemu-io", "-f", "raw", "-c", "'write -P 5 0 1M'", '"$uri"')
    script = 'qemu-io -f raw -c "read -P 5 0 1M" -c "write -P 6 8k 32k" "$uri"'
    said = run("nbdkit", "-U", "-", "file", "disk.img", "--filter=luks", "passphrase=secret", "--run", script)
    assert "failed" not in said
    said = through_nbdmap("disk.img", "qemu-io", "-f", "raw", "-c", "'read -P 6 8k 32k'", "-c", "'read -P 5 0 8k'", '"$uri"')
    assert "failed" not in said


# --- the server ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[Server]:
    with serving("disks: {ram: {memory: 1MiB}}\ndevices: {}") as running:
        yield running


def test_open_on_a_running_server(server: Server, place: Path) -> None:
    disk_file(place / "2.img")
    assert server.try_verb("luks", "open", str(place / "2.img"), "home", stdin="wrong\n").returncode == 2
    server.verb("luks", "open", str(place / "2.img"), "home", stdin="secret\n")
    run("qemu-io", "-f", "raw", "-c", "write -P 3 0 64k", server.uri("home"))
    assert "CRYPT-LUKS2-6c7083e788544234bea609164338c040-home" in server.verb("info", "home")
    assert KEY.hex() not in server.verb("table", "--showkeys") + server.verb("dump-config") + server.log()
    again = server.try_verb("luks", "open", str(place / "2.img"), "home", stdin="secret\n")
    assert (again.returncode, "in use" in again.stderr) == (1, True)
    refused = server.try_verb("luks", "open", "ram", "other", stdin="secret\n")
    assert (refused.returncode, refused.stderr) == (1, "nbdmap luks open: ram is not a LUKS disk\n")
    server.verb("remove", "home")
    server.verb("luks", "open", str(place / "2.img"), "home", "-r", "--key-file", str(place / "key"))
    assert "read 65536" in run("qemu-io", "-r", "-f", "raw", "-c", "read -P 3 0 64k", server.uri("home"))


def test_a_stop_does_not_wait_for_a_passphrase(place: Path) -> None:
    """A KDF of some seconds is under way; the server ends as always, with 0, in time (`serving` sees to that)."""
    assert cryptsetup("luksFormat", "-q", "disk.img", "--key-file", "key", *CHEAP["pbkdf2"])[0] == 0
    with FileImage("disk.img", write=True) as image:
        header = volume.read(image)
        assert isinstance(header, Luks2)
        header.metadata.root.plain["keyslots"]["0"]["kdf"]["iterations"] = 60_000_000
        header.write()
    with serving("disks: {ram: {memory: 1MiB}}\ndevices: {}") as server:
        opening = subprocess.Popen(
            [*PROGRAM, "luks", "open", str(place / "disk.img"), "home", "--key-file", "key"], env=server.environment,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_until(lambda: processor_seconds(server.process.pid) > 1.5, server.process)
    assert opening.wait(20) == 1


def processor_seconds(pid: int) -> float:
    """User time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / os.sysconf("SC_CLK_TCK")


def test_a_server_is_not_held_up_by_a_passphrase(server: Server, place: Path) -> None:
    """Clients are served while it is tried: a KDF of half a second."""
    nbdmap("luks", "format", "disk.img", "--key-file", "key", "--pbkdf", "pbkdf2", "--iter-time", "500")
    server.verb("create", "z", "--table", "0 2048 zero")
    opening = subprocess.Popen(
        [*PROGRAM, "luks", "open", str(place / "disk.img"), "home", "--key-file", "key"], env=server.environment
    )
    slowest = 0.0
    while opening.poll() is None:
        said = run("qemu-io", "-f", "raw", "-c", "read 0 4k", server.uri("z"))
        seconds = said.split("ops; ")[1].split(" sec")[0].split(":")
        slowest = max(slowest, float(seconds[-1]))
    assert opening.wait() == 0
    assert slowest < 0.4
