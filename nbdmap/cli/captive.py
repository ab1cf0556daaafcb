"""The command of `--run`: a shell command that is served alone, and whose end is the server's.

    nbdmap serve --run 'qemu-img info "$uri"'

Variables as nbdkit(1)'s: $uri and $nbd, $unixsocket, $port, $exportname and $tls (2: required); and $NBDMAP_SOCKET, so that
`nbdmap ls` in it asks this server.
"""

import asyncio
import os
import signal
from asyncio.subprocess import Process
from typing import Final, Self

from nbdmap.errors import from_os_error
from nbdmap.nbd.uri import Uri

STOP_SECONDS: Final = 0.5
"""What the command has after SIGTERM; then it is killed."""


class Captive:
    """A command that runs."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, command: str, uri: Uri, admin: str) -> Self:
        """Runs `command` in a shell with the server's addresses in its environment."""
        told = {
            "uri": str(uri), "nbd": str(uri), "unixsocket": uri.socket, "port": "" if uri.socket else str(uri.port),
            "exportname": uri.export, "tls": "2" if uri.tls else "", "NBDMAP_SOCKET": admin,
        }  # fmt: skip
        environment = os.environ | {name: value for name, value in told.items() if value or name != "NBDMAP_SOCKET"}
        try:
            process = await asyncio.create_subprocess_exec("/bin/sh", "-c", command, env=environment)
        except OSError as error:
            raise from_os_error(error, "--run: /bin/sh") from error
        return cls(process)

    async def wait(self) -> int:
        """Waits for its end; its exit status, 128 + n if signal n has killed it."""
        status = await self._process.wait()
        return status if status >= 0 else 128 - status

    async def stop(self) -> int:
        """Ends it if it still runs; its status."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.returncode is None:
                self._process.send_signal(number)
            try:
                async with asyncio.timeout(STOP_SECONDS):
                    return await self.wait()
            except TimeoutError:
                continue
        return 128 + signal.SIGKILL
