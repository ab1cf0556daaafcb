"""How a command fails: one line for the user, and an exit status."""


class CommandFailed(Exception):
    """The command was refused; exit status 1."""

    status = 1

    def __init__(self, line: str) -> None:
        super().__init__(line)
        self.line = line


class UsageError(CommandFailed):
    """The command line says something that cannot be; exit status 2."""

    status = 2


class NoServer(CommandFailed):
    """No server listens on the admin socket."""
