"""`nbdmap luks`: its commands in this process, passphrases from files, pipes and a terminal, and what is refused before anything
is written."""

import json
import os
import pty
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdmap.cli import luks_secrets
from nbdmap.cli.errors import CommandFailed
from nbdmap.cli.luks_secrets import ask, key_file
from nbdmap.cli.main import main
from nbdmap.errors import InvalidArgument
from nbdmap.luks import keyfile, volume
from nbdmap.luks.image import FileImage
from tests.support.luks import UUID, cryptsetup, disk_file

CHEAP = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
Said = Callable[[], tuple[str, str]]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, text in (("key", "secret"), ("two", "two"), ("wrong", "secret\n")):
        (tmp_path / name).write_text(text)
    os.truncate(os.open("new.img", os.O_CREAT | os.O_RDWR), 18 << 20)
    disk_file(tmp_path / "1.img", 1)
    disk_file(tmp_path / "2.img", 2)
    return tmp_path


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    def read() -> tuple[str, str]:
        out = capsys.readouterr()
        return out.out, out.err

    return read


def luks(*words: str, stdin: bytes | None = None) -> int:
    """The exit status; `stdin` is a pipe with these bytes."""
    if stdin is None:
        return main(["luks", *words])
    reading, writing = os.pipe()
    os.write(writing, stdin)
    os.close(writing)
    before = os.dup(0)
    os.dup2(reading, 0)
    shown = sys.stdin
    sys.stdin = os.fdopen(0, closefd=False)
    try:
        return main(["luks", *words])
    finally:
        sys.stdin = shown
        os.dup2(before, 0)
        os.close(before)
        os.close(reading)


def opens(image: str, key: str) -> bool:
    status = luks("open", image, "--test-passphrase", "--key-file", key)
    assert status in (0, 2)
    return status == 0


# --- info ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", ["1.img", "2.img"])
def test_info_is_luksdumps(image: str, said: Said) -> None:
    assert luks("info", image) == 0
    assert said()[0] == cryptsetup("luksDump", image)[1]


def test_info_of_everything_that_can_be_in_a_header(said: Said) -> None:
    cryptsetup("luksFormat", "-q", "new.img", "--key-file", "key", "--label", "lab", "--subsystem", "sub", *CHEAP)
    cryptsetup("luksAddKey", "-q", "new.img", "two", "--key-file", "key", "--pbkdf", "argon2i", "--pbkdf-memory", "64",
               "--pbkdf-parallel", "1", "--pbkdf-force-iterations", "4")  # fmt: skip
    cryptsetup("luksAddKey", "-q", "--unbound", "--key-size", "256", "new.img", "wrong", "--key-file", "key", *CHEAP)
    cryptsetup("config", "new.img", "--key-slot", "1", "--priority", "prefer")
    cryptsetup("token", "add", "new.img", "--key-description", "some")
    cryptsetup("token", "import", "new.img", stdin='{"type":"mine","keyslots":["0","1"],"x":1}')
    assert luks("info", "new.img") == 0
    wanted = cryptsetup("luksDump", "new.img")[1]
    assert "Priority:   preferred" in wanted
    assert said()[0] == wanted
    assert luks("info", "new.img", "--json") == 0
    assert json.loads(said()[0]) == json.loads(cryptsetup("luksDump", "--dump-json-metadata", "new.img")[1])


def test_info_warns_of_a_damaged_copy(place: Path, said: Said) -> None:
    data = bytearray((place / "2.img").read_bytes())
    data[16384 + 5000] ^= 1
    (place / "2.img").write_bytes(data)
    assert luks("info", "2.img") == 0
    assert said()[1] == "warning: 2.img: LUKS2 header at 16384: the checksum is wrong\n"


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (("info", "key"), 1, "nbdmap luks info: key is not a LUKS disk\n"),
        (("info", "none"), 1, "nbdmap luks info: none: no such file\n"),
        (("info", "."), 1, "nbdmap luks info: . is neither a file nor a block device\n"),
        (("info", "1.img", "--json"), 1, "nbdmap luks info: 1.img: a LUKS1 header has no JSON\n"),
        (("info",), 2, "the following arguments are required: IMAGE"),
        ((), 2, "the following arguments are required: COMMAND"),
        (("nosuch",), 2, "invalid choice"),
        (("open", "2.img"), 2, "nbdmap luks open: NAME is missing (or --run, or --listen)\n"),
        (("open", "2.img", "--run", "x", "--listen", "y"), 2, "do not go together|does not go together"),
        (("open", "2.img", "n", "-d", "key"), 1, "No server answers at"),
        (("open", "2.img", "--test-passphrase", "-d", "none"), 1, "key file none: No such file"),
        (("open", "2.img", "--test-passphrase", "-d", "wrong"), 2, "2.img: no key available with this passphrase\n"),
        (("open", "2.img", "--run", "true", "-d", "wrong"), 2, "2.img: no key available with this passphrase\n"),
        (("open", "2.img", "--test-passphrase", "-d", "key", "-S", "4"), 1, "key slot 4 is not in use"),
    ],
)
def test_what_is_refused(words: tuple[str, ...], status: int, text: str, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBDMAP_SOCKET", "/nonexistent/socket")
    assert luks(*words) == status
    err = said()[1]
    assert any(one in err for one in text.split("|"))


# --- format ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["luks1", "luks2"])
def test_format(kind: str, said: Said) -> None:
    words = ("--type", kind, "--uuid", UUID, "--key-file", "key", *CHEAP)
    assert luks("format", "new.img", *words) == 0
    assert opens("new.img", "key")
    assert not opens("new.img", "wrong")
    said()
    assert luks("info", "new.img") == 0
    text = said()[0]
    assert text == cryptsetup("luksDump", "new.img")[1]
    assert UUID in text


def test_format_with_all_options(place: Path) -> None:
    (place / "volume").write_bytes(bytes(range(32)))
    status = luks(
        "format", "new.img", "-q", "-c", "aes-cbc-essiv:sha256", "-s", "256", "--sector-size", "1024", "--label", "l",
        "--subsystem", "s", "-o", "32768", "--luks2-metadata-size", "65536", "--luks2-keyslots-size", "1048576",
        "--keyslot-cipher", "aes-xts-plain64", "--keyslot-key-size", "512", "-S", "5", "--volume-key-file", "volume",
        "-d", "key", "-l", "4", "--keyfile-offset", "1", "--hash", "sha512", "--pbkdf", "argon2i", "-i", "10",
        "--pbkdf-memory", "64", "--pbkdf-parallel", "1",
    )  # fmt: skip
    assert status == 0
    with FileImage("new.img") as image:
        header = volume.read(image)
        assert header.version == 2
        assert header.segment() == ("aes-cbc-essiv:sha256", 16 << 20, None, 0, 1024, ())
        assert header.unlock(bytearray(b"ecre")) == (5, bytes(range(32)))
    assert cryptsetup("open", "--test-passphrase", "new.img", "-d", "key", "-l", "4", "--keyfile-offset", "1")[0] == 0


def test_format_chooses_the_sector_size(place: Path, said: Said) -> None:
    for size, sector in ((18 << 20, 4096), ((18 << 20) + 512, 512)):
        os.truncate("new.img", size)
        assert luks("format", "new.img", "-d", "key", *CHEAP) == 0
        with FileImage("new.img") as image:
            assert volume.read(image).segment().sector_size == sector


def test_format_takes_the_time_it_is_told(said: Said) -> None:
    assert luks("format", "new.img", "-d", "key", "-i", "20", "--pbkdf", "pbkdf2") == 0
    assert opens("new.img", "key")
    assert luks("format", "new.img", "-d", "key", "-i", "20", "--pbkdf-memory", "2048") == 0
    assert opens("new.img", "key")


@pytest.mark.parametrize("kind", ["luks1", "luks2"])
def test_format_with_a_detached_header(kind: str, place: Path) -> None:
    assert luks("format", "key", "--type", kind, "--header", "header", "-d", "two", *CHEAP) == 1, "5 bytes of data"
    before = (place / "new.img").read_bytes()
    assert luks("format", "new.img", "--type", kind, "--header", "header", "-d", "two", *CHEAP) == 0
    assert (place / "new.img").read_bytes() == before
    assert cryptsetup("open", "--test-passphrase", "--header", "header", "new.img", "-d", "two")[0] == 0
    assert luks("open", "new.img", "--header", "header", "--test-passphrase", "-d", "two") == 0
    assert luks("add-key", "new.img", "key", "--header", "header", "-d", "two", *CHEAP) == 0
    assert opens("header", "key")


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (("--cipher", "rot13-xts-plain64"), 1, "rot13"),
        (("--cipher", "aes"), 1, ""),
        (("--key-size", "100"), 2, "--key-size 100: should be a multiple of 8"),
        (("--key-size", "64"), 1, ""),
        (("--hash", "md4"), 2, "the hash 'md4'"),
        (("--uuid", "x"), 2, "--uuid x: is not a uuid"),
        (("--type", "luks1", "--pbkdf", "argon2i"), 2, "LUKS1 has pbkdf2 only"),
        (("--type", "luks1", "--label", "x"), 2, "LUKS1 has no label"),
        (("--label", "x" * 48), 1, "the label"),
        (("--offset", "8"), 1, "bytes for key slots"),
        (("--offset", "65536"), 1, "the data begins at 33554432"),
        (("--luks2-metadata-size", "4096"), 1, "a header of 4096 bytes"),
        (("--pbkdf-force-iterations", "3"), 2, "the iterations, 3"),
        (("--pbkdf-memory", "1"), 2, "the memory"),
        (("--volume-key-file", "two"), 1, "should have the 64 bytes of the volume key"),
        (("--key-file", "none"), 1, "key file none"),
        (("--keyslot-cipher", "nosuch"), 1, "nosuch"),
    ],
)
def test_format_refuses_before_it_writes(words: tuple[str, ...], status: int, text: str, said: Said, place: Path) -> None:
    if words[:2] != ("--cipher", "aes"):
        assert luks("format", "new.img", "--key-file", "key", *words) == status
        assert text in said()[1]
    assert not any((place / "new.img").read_bytes())


def test_a_disk_that_is_too_small(place: Path, said: Said) -> None:
    assert luks("format", "key", "-d", "key", *CHEAP) == 1
    assert "key has 6 bytes; the data begins at 16777216" in said()[1]
    assert (place / "key").read_text() == "secret"


# --- keys ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", ["1.img", "2.img"])
def test_keys(image: str, said: Said) -> None:
    assert luks("add-key", image, "two", "--key-file", "key", *CHEAP) == 0
    assert cryptsetup("open", "--test-passphrase", image, "-d", "two")[0] == 0
    assert luks("remove-key", image, "key") == 0
    assert cryptsetup("open", "--test-passphrase", image, "-d", "key")[0] == 2
    assert cryptsetup("luksAddKey", "-q", image, "wrong", "-d", "two", *CHEAP)[0] == 0
    assert opens(image, "wrong")
    assert luks("remove-key", image, "key") == 2
    assert luks("remove-key", image, "-S", "6") == 1
    assert luks("remove-key", image, "-S", "1", "-d", "two") == 2, "only the one to be removed is known"
    assert opens(image, "two")
    assert luks("remove-key", image, "-S", "1", "-d", "wrong") == 0
    assert not opens(image, "two")
    assert luks("add-key", image, "two", "-d", "key") == 2


def test_add_key_by_the_volume_key(place: Path) -> None:
    for image in ("1.img", "2.img"):
        (place / "volume").write_bytes(bytes(range(64)))
        assert luks("add-key", image, "two", "--volume-key-file", "volume", "-S", "7" if image == "1.img" else "3", *CHEAP) == 0
        assert opens(image, "two")
        (place / "volume").write_bytes(bytes(64))
        assert luks("add-key", image, "two", "--volume-key-file", "volume", *CHEAP) == 2


def test_add_key_takes_part_of_a_file(place: Path) -> None:
    (place / "long").write_bytes(b"junk two junk")
    words = ("--new-keyfile-offset", "5", "--new-keyfile-size", "3")
    assert luks("add-key", "2.img", "long", "-d", "key", *words, *CHEAP) == 0
    assert opens("2.img", "two")


# --- where passphrases come from -------------------------------------------------------------------------------------------


def test_standard_input_is_lines_or_a_key_file(said: Said) -> None:
    assert luks("open", "2.img", "--test-passphrase", stdin=b"secret\nmore") == 0
    assert luks("open", "2.img", "--test-passphrase", stdin=b"secret") == 0
    assert luks("open", "2.img", "--test-passphrase", "-d", "-", stdin=b"secret") == 0
    assert luks("open", "2.img", "--test-passphrase", "-d", "-", stdin=b"secret\n") == 2
    assert luks("open", "2.img", "--test-passphrase", stdin=b"\n") == 2
    assert luks("add-key", "2.img", *CHEAP, stdin=b"secret\ntwo\n") == 0
    assert opens("2.img", "two")
    said()
    assert luks("open", "2.img", "--test-passphrase", stdin=b"") == 1
    assert "Nothing to read on input." in said()[1]
    assert luks("open", "2.img", "--test-passphrase", stdin=b"x" * 600) == 1
    assert "at most 512 bytes" in said()[1]


@pytest.mark.parametrize(
    ("size", "offset", "wanted"), [(None, 0, b"secret"), (3, 0, b"sec"), (2, 4, b"et"), (None, 2, b"cret"), (6, 0, b"secret")]
)
def test_parts_of_key_files(size: int | None, offset: int, wanted: bytes) -> None:
    assert key_file("key", size, offset) == wanted


@pytest.mark.parametrize(("size", "offset"), [(7, 0), (1, 6), (None, 6), (None, 100)])
def test_key_files_that_are_too_short(size: int | None, offset: int) -> None:
    with pytest.raises(InvalidArgument, match="ends before what is asked of it"):
        key_file("key", size, offset)


def test_a_key_file_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyfile, "MAX_KEY_FILE", 100000)
    with pytest.raises(InvalidArgument, match="more than 100000 bytes"):
        key_file("/dev/zero")
    assert key_file("/dev/zero", 70000) == bytes(70000)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The other end of a terminal, which is both standard input and what is asked."""
    ours, theirs = pty.openpty()
    monkeypatch.setattr(luks_secrets, "TERMINAL", os.ttyname(theirs))
    monkeypatch.setattr(sys, "stdin", os.fdopen(os.dup(theirs)))
    yield ours
    sys.stdin.close()
    os.close(ours)
    os.close(theirs)


class Typist(threading.Thread):
    """Waits for each prompt before it types the answer; a copy of what appears is in `screen`."""

    def __init__(self, terminal: int, *answers: tuple[str, str]) -> None:
        super().__init__(daemon=True)
        self.terminal, self.answers, self.screen = terminal, answers, ""
        self.start()

    def run(self) -> None:
        for prompt, answer in self.answers:
            seen = ""
            while not seen.endswith(prompt):
                seen += os.read(self.terminal, 1).decode()
            self.screen += seen
            os.write(self.terminal, f"{answer}\n".encode())


def test_a_terminal_is_asked_without_echo(terminal: int) -> None:
    typist = Typist(terminal, ("Passphrase? ", "secret"), ("Passphrase? ", "one"), ("Verify passphrase: ", "one"))
    assert ask("Passphrase? ") == b"secret"
    assert ask("Passphrase? ", verify=True) == b"one"
    typist.join(10)
    assert "secret" not in typist.screen


def test_passphrases_that_do_not_match(terminal: int) -> None:
    Typist(terminal, ("? ", "one"), ("Verify passphrase: ", "two"))
    with pytest.raises(CommandFailed, match="do not match"):
        ask("? ", verify=True)


def test_three_tries(terminal: int, said: Said) -> None:
    prompt = "Enter passphrase for 2.img: "
    Typist(terminal, (prompt, "a"), (prompt, "b"), (prompt, "secret"))
    assert luks("open", "2.img", "--test-passphrase") == 0
    assert said()[1] == "2.img: no key available with this passphrase\n" * 2
    Typist(terminal, (prompt, "a"), (prompt, "b"), (prompt, "c"))
    assert luks("open", "2.img", "--test-passphrase") == 2


@pytest.mark.parametrize(("answer", "status"), [("yes", 1), ("YES", 0)])
def test_format_asks_first(terminal: int, answer: str, status: int, place: Path) -> None:
    os.write(terminal, f"{answer}\n".encode())
    assert luks("format", "new.img", "-d", "key", *CHEAP) == status
    assert any((place / "new.img").read_bytes()) == (status == 0)


@pytest.mark.parametrize(("answer", "status", "left"), [("no", 1, 1), ("YES", 0, 0)])
def test_the_last_key_is_asked_for(terminal: int, answer: str, status: int, left: int) -> None:
    os.write(terminal, f"{answer}\n".encode())
    assert luks("remove-key", "2.img", "key") == status
    with FileImage("2.img") as image:
        assert len(volume.read(image).slots) == left


@pytest.mark.parametrize("image", ["1.img", "2.img"])
def test_the_last_key_slot_by_its_number(image: str) -> None:
    assert luks("remove-key", image, "-S", "0", "-d", "wrong") == 2
    assert opens(image, "key")
    assert luks("remove-key", image, "-S", "0", "-d", "key") == 0
    assert luks("open", image, "--test-passphrase", "-d", "key") == 1


def test_a_prompt_is_interrupted(terminal: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 130, no traceback, and the terminal as it was."""
    before = termios.tcgetattr(terminal)

    def interrupted(fd: int) -> bytearray:
        assert not termios.tcgetattr(fd)[3] & termios.ECHO
        raise KeyboardInterrupt

    monkeypatch.setattr(luks_secrets, "_line", interrupted)
    assert luks("open", "2.img", "--test-passphrase") == 130
    assert termios.tcgetattr(terminal) == before


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("info", "open", "format", "add-key", "remove-key"):
        assert luks(command, "--help") == 0
        assert f"example:\n  nbdmap luks {command} " in capsys.readouterr().out
