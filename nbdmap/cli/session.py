"""What a command works with: the server, the options, where its output goes, and what it is told of its surroundings."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

from nbdmap.cli import names, render
from nbdmap.cli.errors import CommandFailed, UsageError
from nbdmap.cli.grammar import Options
from nbdmap.cli.rpc_client import Refused, Server


def execute(arguments: Sequence[str]) -> None:
    """Runs a program and waits for it; one that cannot be run is passed over, as dmsetup does."""
    try:
        child = os.posix_spawnp(arguments[0], list(arguments), os.environ)
    except OSError:
        return
    os.waitpid(child, 0)


class Surroundings(NamedTuple):
    """Everything of the process that a command uses."""

    stdin: TextIO
    stdout: TextIO
    stderr: TextIO
    environment: Mapping[str, str]
    directory: str
    execute: Callable[[Sequence[str]], None] = execute
    sleep: Callable[[float], None] = time.sleep

    @property
    def utf(self) -> bool:
        """Whether the locale's characters are UTF-8. A C locale that Python itself has turned into C.UTF-8 does not count."""
        environment = self.environment
        language = environment.get("LANG", "")
        kind = environment.get("LC_CTYPE", "")
        if kind == "C.UTF-8" and language in ("", "C", "POSIX"):
            kind = ""
        locale = environment.get("LC_ALL") or kind or language
        return locale.lower().replace("-", "").endswith("utf8")

    @property
    def width(self) -> int:
        """Columns that a line may have."""
        try:
            columns = os.get_terminal_size(self.stdout.fileno()).columns
        except (OSError, ValueError):
            return 80
        return columns - 3 if columns > 3 else 80


class Session:
    """One command being done."""

    def __init__(self, server: Server, options: Options, around: Surroundings) -> None:
        self.server = server
        self.options = options
        self.around = around

    def write(self, text: str) -> None:
        """Prints `text`, which ends its lines itself."""
        self.around.stdout.write(text)

    def name(self, word: str) -> str:
        """The server's name for a device that is named by `word`."""
        if "/" in word:
            return names.unmangle(names.without_directory(word))
        return names.given(word, self.options.mangling)

    def uuid(self) -> str:
        """The uuid of --uuid."""
        return names.given(self.options.get("uuid") or "", self.options.mangling, "UUID")

    def device(self, word: str | None) -> dict[str, str]:
        """Parameters that name a device: by `word`, or by --uuid or --major and --minor. Raises UsageError."""
        if word is not None:
            return {"name": self.name(word)}
        if "uuid" in self.options:
            return {"uuid": self.uuid()}
        if "major" in self.options:
            return {"name": f"{self.options.number('major')}:{self.options.number('minor')}"}
        raise UsageError("No device specified.")

    def devices(self, words: Sequence[str]) -> Iterator[dict[str, str]]:
        """Parameters that name each device of `words`, or that of the options; none, which is all devices, otherwise."""
        if words:
            yield from map(self.device, words)
        else:
            yield self.device(None) if self.options.names_device else {}

    def call(self, method: str, **params: Any) -> Any:
        """A verb's result. Raises CommandFailed with the server's own words."""
        try:
            return self.server.call(method, params)
        except Refused as error:
            raise CommandFailed(error.message) from error

    def ioctl(self, operation: str, method: str, device: Mapping[str, str], **params: Any) -> Any:
        """A verb's result; its failure looks like that of dmsetup's ioctl `operation`, with the server's reason behind."""
        try:
            return self.server.call(method, {**device, **params})
        except Refused as error:
            raise self.failed(operation, device, error) from error

    def failed(self, operation: str, device: Mapping[str, str], error: Refused) -> CommandFailed:
        """dmsetup's line for a failed ioctl: `device-mapper: remove ioctl on NAME UUID(MAJOR:MINOR) failed: REASON`."""
        name, uuid, number = device.get("name", ""), device.get("uuid", ""), error.number
        if not error.errno:
            return CommandFailed(error.message)
        if name == f"{self.options.get('major')}:{self.options.get('minor')}":
            name, number = "", name
        number = f"({number}) " if number else " "
        reason = os.strerror(error.errno)
        return CommandFailed(f"device-mapper: {operation} ioctl on {name} {uuid}{number}failed: {reason}: {error.message}")

    def infos(self, device: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
        """The state of one device, or of all, with names as they are to be shown. Raises CommandFailed."""
        params: dict[str, Any] = {**(device or {}), **self.inactive()}
        try:
            return [self.shown(info) for info in self.server.call("info", params)]
        except Refused as error:
            raise CommandFailed("Device does not exist." if error.errno else error.message) from error

    def inactive(self) -> dict[str, bool]:
        """The parameter for --inactive."""
        return {"inactive": True} if "inactive" in self.options else {}

    def shown(self, info: dict[str, Any]) -> dict[str, Any]:
        """`info` with the name and uuid as --manglename wants them."""
        if self.options.mangling != "none":
            return info
        return {**info, "name": names.mangle(info["name"]), "uuid": names.mangle(info["uuid"])}

    def verbose(self, info: dict[str, Any]) -> None:
        """With -v, prints the state of a device that was changed."""
        if self.options.verbosity:
            self.write(render.info_long(self.shown(info)))
