"""The verbs that change something. Each takes the session and one device's word, or all words where it takes more."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from nbdmap.cli import names
from nbdmap.cli.concise import parse_concise
from nbdmap.cli.errors import CommandFailed, UsageError
from nbdmap.cli.rpc_client import Refused
from nbdmap.cli.session import Session

MAX_TYPE_NAME: Final = 15
RETRIES: Final = 24
RETRY_PAUSE: Final = 0.2
"""Seconds."""
_EBUSY: Final = 16
_LINE: Final = re.compile(r"\s*[+-]?\d+\s+[+-]?\d+\s*(\S+)")
_GEOMETRY: Final = ((65535, "cylinders"), (255, "heads"), (255, "sectors"), ((1 << 64) - 1, "start"))


# --- tables ----------------------------------------------------------------------------------------------------------------


def read_table(session: Session, file: str | None) -> str:
    """The text of --table, of a file, or of standard input, as the server is to have it. Raises CommandFailed."""
    table = session.options.get("table")
    if table is not None:
        return checked_table(table, "")
    if file is None:
        return checked_table(session.around.stdin.read(), "on stdin")
    try:
        with open(file, encoding="utf-8", errors="surrogateescape") as opened:
            return checked_table(opened.read(), file)
    except OSError:
        raise CommandFailed(f"Couldn't open '{file}' for reading.") from None


def checked_table(text: str, source: str) -> str:
    """`text` without the comments behind lines. Raises CommandFailed where dmsetup itself cannot read a line."""
    lines = text.split("\n")
    for index, line in enumerate(lines):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.match(line)
        if match is None:
            raise CommandFailed(f"Invalid format on line {index + 1} of table {source}.")
        if len(match[1]) > MAX_TYPE_NAME:
            raise CommandFailed(f"Target type name {match[1]} is too long.")
        lines[index] = line[: match.end()] + line[match.end() :].partition("#")[0]
    return "\n".join(lines)


def _is_empty(table: str) -> bool:
    return all(not line.strip() or line.lstrip().startswith("#") for line in table.split("\n"))


# --- devices ---------------------------------------------------------------------------------------------------------------


def create(session: Session, words: Sequence[str]) -> None:
    """create NAME [TABLE_FILE], or --concise [DEVICES]."""
    options = session.options
    if "concise" in options:
        if {"table", "notable", "minor", "uuid", "inactive"} & set(options):
            raise UsageError("--concise is incompatible with --[no]table, --minor, --uuid and --inactive.")
        if len(words) > 1:
            raise UsageError("create --concise takes at most one argument")
        for device in parse_concise(words[0] if words else session.around.stdin.read()):
            minor = {} if device.minor is None else {"minor": device.minor}
            create_one(session, device.name, checked_table(device.table, ""), device.uuid, device.read_only, minor)
        return
    if not words:
        raise UsageError("Please provide a name for the new device.")
    if "/" in words[0]:
        raise CommandFailed(f'Name "{words[0]}" invalid. It contains "/".')
    table = None if "notable" in options else read_table(session, words[1] if len(words) > 1 else None)
    minor = {"minor": options.number("minor")} if "minor" in options else {}
    create_one(session, words[0], table, session.uuid(), "readonly" in options, minor)


def create_one(
    session: Session, name: str, table: str | None, uuid: str, read_only: bool, minor: Mapping[str, int]
) -> None:
    """Makes one device; a table without targets is none."""
    params: dict[str, Any] = {"name": names.given(name, session.options.mangling), **minor}
    params |= {"uuid": uuid} if uuid else {}
    params |= {"read_only": True} if read_only else {}
    params |= {"export": False} if "noexport" in session.options else {}
    if table is not None and not _is_empty(table):
        params["table"] = table
    try:
        info = session.server.call("create", {**params, "directory": session.around.directory})
    except Refused as error:
        if error.stage:  # the device was made and is gone again
            raise session.failed(error.stage, {"name": name}, error) from error
        if "minor" in minor and error.errno:
            error.number = f"254:{minor['minor']}"
        raise session.failed("create", {"name": name, "uuid": uuid}, error) from error
    session.verbose(info)


def remove(session: Session, word: str | None) -> None:
    """remove DEVICE, after the table with --force, repeatedly with --retry."""
    device = session.device(word)
    params = {key: True for key in ("force", "deferred") if key in session.options}
    if "force" in params:
        session.ioctl("table", "info", device)  # dmsetup looks at it first
    for _ in range(RETRIES if "retry" in session.options else 0):
        try:
            session.server.call("remove", {**device, **params})
            return
        except Refused as error:
            if error.errno != _EBUSY:
                raise session.failed("remove", device, error) from error
        session.around.sleep(RETRY_PAUSE)
    session.ioctl("remove", "remove", device, **params)


def remove_all(session: Session, _: Sequence[str]) -> None:
    """remove_all."""
    params = {key: True for key in ("force", "deferred") if key in session.options}
    session.call("remove_all", **params)
    left = len(session.call("info")) if "force" in params else 0
    if left:
        session.around.stderr.write(f"Unable to remove {left} device(s).\n")


def load(session: Session, words: Sequence[str]) -> None:
    """load DEVICE [TABLE_FILE]."""
    options = session.options
    if "notable" in options:
        raise UsageError("--notable only available when creating new device.")
    word, files = (None, words) if options.names_device else (words[0] if words else None, words[1:])
    if word is None and not options.names_device:
        raise UsageError("Please specify device.")
    if len(files) > 1:
        raise UsageError("Too many command line arguments.")
    device = session.device(word)
    params: dict[str, Any] = {"table": read_table(session, files[0] if files else None)}
    params |= {"read_only": True} if "readonly" in options else {}
    session.verbose(session.ioctl("reload", "load", device, **params, directory=session.around.directory))


def clear(session: Session, word: str | None) -> None:
    """clear DEVICE."""
    session.verbose(session.ioctl("clear", "clear", session.device(word)))


def _noflush(session: Session) -> dict[str, bool]:
    return {"noflush": True} if "noflush" in session.options else {}


def suspend(session: Session, word: str | None) -> None:
    """suspend DEVICE."""
    session.verbose(session.ioctl("suspend", "suspend", session.device(word), **_noflush(session)))


def resume(session: Session, word: str | None) -> None:
    """resume DEVICE."""
    session.verbose(session.ioctl("resume", "resume", session.device(word), **_noflush(session)))


def wipe_table(session: Session, word: str | None) -> None:
    """wipe_table DEVICE."""
    device = session.device(word)
    session.ioctl("table", "info", device)  # dmsetup looks at it first
    noflush = {"noflush": True} if "force" in session.options else _noflush(session)
    session.ioctl("reload", "wipe_table", device, **noflush)


def rename(session: Session, words: Sequence[str]) -> None:
    """rename DEVICE NEW_NAME, or --setuuid UUID."""
    device = session.device(words[0] if len(words) == 2 else None)
    if "setuuid" in session.options:
        uuid = names.given(words[-1], session.options.mangling, "new UUID")
        name = device.get("name") or session.infos(device)[0]["name"]
        session.ioctl("rename", "set_uuid", {"name": name}, new_uuid=uuid)
        return
    if "/" in words[-1]:
        raise CommandFailed(f'Name "{words[-1]}" invalid. It contains "/".')
    if not words[-1]:
        raise CommandFailed("Non empty new name is required.")
    new_name = names.given(words[-1], session.options.mangling, "new name")
    session.ioctl("rename", "rename", device, new_name=new_name)


def message(session: Session, words: Sequence[str]) -> None:
    """message DEVICE SECTOR WORD..."""
    word = None if session.options.names_device else words[0]
    rest = words if word is None else words[1:]
    device = session.device(word)
    if not re.fullmatch(r"[0-9]{1,20}", rest[0]):
        raise CommandFailed("Invalid sector.")
    answer = session.ioctl("message", "message", device, sector=int(rest[0]), message=" ".join(rest[1:]))
    session.write(answer if not answer or answer.endswith("\n") else answer + "\n")


def setgeometry(session: Session, words: Sequence[str]) -> None:
    """setgeometry DEVICE C H S START: checked, and of no consequence."""
    device = session.device(words[0])
    session.ioctl("setgeometry", "info", device)
    for word, (most, what) in zip(words[1:], _GEOMETRY, strict=True):
        if not re.fullmatch(r"[0-9]{1,20}", word) or int(word) > most:
            error = Refused(f"{what}: {word!r} is not in the range 0 to {most}", 22)
            raise session.failed("setgeometry", device, error)
    cylinders, heads, sectors, start = map(int, words[1:])
    if start > cylinders * heads * sectors:
        raise session.failed("setgeometry", device, Refused(f"start {start} is beyond the geometry", 22))


def wait(session: Session, words: Sequence[str]) -> None:
    """wait DEVICE [EVENT]; without EVENT for the first one, as dmsetup does."""
    word = None if session.options.names_device else words[0] if words else None
    device = session.device(word)
    rest = words if word is None else words[1:]
    number = re.match(r"\s*([0-9]{1,10})", rest[-1]) if rest else None
    info = session.ioctl("waitevent", "wait", device, event=int(number[1]) if number else 0)
    session.verbose({**info, **(device if word is not None else {})})  # the name that was given, though it may be another now


def export(session: Session, words: Sequence[str]) -> None:
    """export DEVICE."""
    device = session.device(words[0] if words else None)
    params: dict[str, Any] = {"read_only": "readonly" in session.options}
    params["export_name"] = session.options.get("export-name") or ""
    params["description"] = session.options.get("description") or ""
    if "max-connections" in session.options:
        params["max_connections"] = session.options.number("max-connections")
    session.call("export", **device, **params)


def unexport(session: Session, word: str | None) -> None:
    """unexport DEVICE."""
    session.call("unexport", **session.device(word))


def nothing(_: Session, __: Sequence[str]) -> None:
    """What has no meaning here."""
