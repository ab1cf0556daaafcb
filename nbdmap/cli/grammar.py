"""The command line: dmsetup's options and verbs as two tables, and how a command line is read.

    nbdmap --noheadings info -c -o name

As getopt_long does: options stand anywhere, before or behind the verb; long ones may be abbreviated; "--" ends them. An
option that a verb does not use does nothing, as with dmsetup. `serve` has options of its own and is not read here.
"""

import getopt
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from nbdmap.cli.errors import UsageError
from nbdmap.cli.names import MODES


class Option(NamedTuple):
    """An option; `value` is what its argument is called, "" for none."""

    long: str
    help: str
    short: str = ""
    value: str = ""


OPTIONS: Final = (
    Option("addnodeoncreate", "accepted, does nothing"),
    Option("addnodeonresume", "accepted, does nothing"),
    Option("checks", "accepted, does nothing"),
    Option("columns", "print columns", "cC"),
    Option("concise", "devices on one line: name,uuid,minor,flags,table;..."),
    Option("count", "accepted, does nothing", value="COUNT"),
    Option("deferred", "remove an open device at its last close"),
    Option("description", "what clients are told of the export", value="TEXT"),
    Option("exec", "run COMMAND with the path of each device", value="COMMAND"),
    Option("export-name", "export under this name instead of the device's", value="NAME"),
    Option("force", "replace the table by one that fails every request first", "f"),
    Option("gid", "accepted, does nothing", "G", "GID"),
    Option("help", "show this help", "h"),
    Option("inactive", "of the inactive table instead of the live one"),
    Option("interval", "accepted, does nothing", value="SECONDS"),
    Option("json", "print JSON"),
    Option("major", "the device by its number, with --minor", "j", "MAJOR"),
    Option("manglename", "how names are mangled: auto, hex or none", value="MODE"),
    Option("max-connections", "clients at once, 0 for no limit", value="COUNT"),
    Option("minor", "the device by its number, with --major; of a new one, its number", "m", "MINOR"),
    Option("mode", "accepted, does nothing", "M", "MODE"),
    Option("nameprefixes", "print DM_FIELD='value' instead of values"),
    Option("noexport", "do not export the new device"),
    Option("noflush", "do not flush"),
    Option("noheadings", "no line of headings, values separated by colons"),
    Option("nolockfs", "accepted, does nothing"),
    Option("noopencount", "accepted, does nothing"),
    Option("notable", "make the device without a table", "n"),
    Option("noudevrules", "accepted, does nothing"),
    Option("noudevsync", "accepted, does nothing"),
    Option("options", "fields, or how devices are named (devno, devname, blkdevname)", "o", "FIELDS"),
    Option("readahead", "accepted, does nothing", value="SECTORS"),
    Option("readonly", "read-only", "r"),
    Option("retry", "try again for some seconds while the device is open"),
    Option("rows", "columns as rows"),
    Option("select", "only devices for which this holds: name=lin, open>0 && uuid=~^LVM", "S", "CONDITION"),
    Option("separator", "what stands between columns", value="TEXT"),
    Option("setuuid", "set the uuid of a device that has none"),
    Option("showkeys", "print encryption keys"),
    Option("socket", "the server's admin socket (default: $NBDMAP_SOCKET)", value="PATH"),
    Option("sort", "sort by these fields, -FIELD the other way round", "O", "FIELDS"),
    Option("table", "the table, lines separated by newlines", value="TABLE"),
    Option("target", "only targets of this type", value="TYPE"),
    Option("tree", "draw who stands on whom"),
    Option("udevcookie", "accepted, does nothing", value="COOKIE"),
    Option("uid", "accepted, does nothing", "U", "UID"),
    Option("unbuffered", "accepted, does nothing"),
    Option("units", "accepted, does nothing", value="UNITS"),
    Option("unquoted", "with --nameprefixes: no quotes"),
    Option("uuid", "the device by its uuid; of a new one, its uuid", "u", "UUID"),
    Option("verbose", "print the device's state afterwards", "v"),
    Option("verifyudev", "accepted, does nothing"),
    Option("version", "print versions"),
    Option("yes", "accepted, does nothing", "y"),
)

_COLUMNS: Final = ("columns", "noheadings", "nameprefixes", "options", "rows", "select", "separator", "sort", "unquoted")
_DEVICE: Final = ("uuid", "major", "minor")


class Verb(NamedTuple):
    """A verb: how many words it takes, whether it is done for each of them, whether -S can choose them, and its help."""

    summary: str
    arguments: str
    example: str
    least: int = 0
    most: int | None = None
    repeats: bool = False
    selects: bool = False
    options: tuple[str, ...] = ()


_ONE_OF_US: Final = "DEVICE..."
VERBS: Final[Mapping[str, Verb]] = {
    "create": Verb(
        "Make a device and export it; the table is --table, a file, or standard input.", "NAME [TABLE_FILE]",
        "nbdmap create lin --table '0 2048 linear /srv/disk.img 0'", 0, 2,
        options=("table", "notable", "concise", "uuid", "major", "minor", "readonly", "noexport", "verbose"),
    ),
    "remove": Verb(
        "Remove devices.", _ONE_OF_US, "nbdmap remove --deferred lin", repeats=True, selects=True,
        options=("force", "deferred", "retry", "select", *_DEVICE),
    ),
    "remove_all": Verb(
        "Remove every device that is not open.", "", "nbdmap remove_all", 0, 0, options=("force", "deferred")
    ),
    "suspend": Verb(
        "Hold new requests, wait for those in flight, and flush.", _ONE_OF_US, "nbdmap suspend lin", repeats=True,
        selects=True, options=("noflush", "select", "verbose", *_DEVICE),
    ),
    "resume": Verb(
        "Make the inactive table live and let requests in.", _ONE_OF_US, "nbdmap resume lin", repeats=True,
        selects=True, options=("noflush", "select", "verbose", *_DEVICE),
    ),
    "load": Verb(
        "Load a table into the inactive slot.", "DEVICE [TABLE_FILE]", "nbdmap load lin --table '0 2048 zero'", 0, 2,
        options=("table", "readonly", "verbose", *_DEVICE),
    ),
    "reload": Verb(
        "The same as load.", "DEVICE [TABLE_FILE]", "nbdmap reload lin --table '0 2048 zero'", 0, 2,
        options=("table", "readonly", "verbose", *_DEVICE),
    ),
    "clear": Verb(
        "Drop the inactive table.", _ONE_OF_US, "nbdmap clear lin", repeats=True, selects=True,
        options=("select", "verbose", *_DEVICE),
    ),
    "wipe_table": Verb(
        "Replace the live table by one that fails every request.", _ONE_OF_US, "nbdmap wipe_table lin", repeats=True,
        selects=True, options=("force", "noflush", "select", *_DEVICE),
    ),
    "rename": Verb(
        "Give a device another name, or its first uuid.", "DEVICE NEW_NAME", "nbdmap rename lin linear", 1, 2,
        options=("setuuid", *_DEVICE),
    ),
    "message": Verb(
        "Send a message to the target at a sector.", "DEVICE SECTOR WORD...", "nbdmap message pool 0 create_thin 0", 2,
        options=_DEVICE,
    ),
    "setgeometry": Verb(
        "Accepted, does nothing.", "DEVICE CYLINDERS HEADS SECTORS START", "nbdmap setgeometry lin 16 255 63 0", 5, 5
    ),
    "wait": Verb(
        "Wait until the event number of a device is not EVENT (default 0).", "DEVICE [EVENT]",
        "nbdmap wait lin $(nbdmap info -c --noheadings -o events lin)", 0, 2, options=("verbose", *_DEVICE),
    ),
    "info": Verb(
        "Print the state of devices.", "[DEVICE...]", "nbdmap info -c -o name,open,uuid", repeats=True,
        options=(*_COLUMNS, "inactive", "json", *_DEVICE),
    ),
    "ls": Verb(
        "List devices.", "", "nbdmap ls --tree", 0, 0, options=("target", "exec", "options", "tree", "json")
    ),
    "table": Verb(
        "Print tables, as create and load take them.", "[DEVICE...]", "nbdmap table lin", repeats=True, selects=True,
        options=("concise", "target", "showkeys", "inactive", "exec", "select", "json", *_DEVICE),
    ),
    "status": Verb(
        "Print what targets say of themselves.", "[DEVICE...]", "nbdmap status --target thin-pool", repeats=True,
        selects=True, options=("target", "inactive", "exec", "select", "json", *_DEVICE),
    ),
    "deps": Verb(
        "Print what devices stand on.", "[DEVICE...]", "nbdmap deps -o devname lin", repeats=True, selects=True,
        options=("options", "inactive", "select", "json", *_DEVICE),
    ),
    "measure": Verb(
        "Print what Linux would tell its integrity log.", "[DEVICE...]", "nbdmap measure lin", repeats=True,
        selects=True, options=("select", *_DEVICE),
    ),
    "targets": Verb("List target types.", "", "nbdmap targets", 0, 0, options=("json",)),
    "target-version": Verb(
        "Print the version of target types.", "TYPE...", "nbdmap target-version linear", 1, repeats=True, options=("json",)
    ),
    "version": Verb("Print versions, as dmsetup does.", "", "nbdmap version", 0, 0, options=("json",)),
    "splitname": Verb(
        "Split a name that LVM made.", "NAME [SUBSYSTEM]", "nbdmap splitname vg0-lv--a", 1, 2, options=_COLUMNS
    ),
    "mangle": Verb("Check that names are mangled as Linux needs it.", "[DEVICE...]", "nbdmap mangle", repeats=True),
    "mknodes": Verb("Accepted, does nothing.", "[DEVICE...]", "nbdmap mknodes", repeats=True),
    "udevcomplete": Verb("Accepted, does nothing.", "COOKIE", "nbdmap udevcomplete 0xd4d0000", 1, 1),
    "udevcomplete_all": Verb("Accepted, does nothing.", "[MINUTES]", "nbdmap udevcomplete_all", 0, 1),
    "udevreleasecookie": Verb("Accepted, does nothing.", "[COOKIE]", "nbdmap udevreleasecookie 0xd4d0000", 0, 1),
    "udevcookies": Verb("Print no cookies: there are none.", "", "nbdmap udevcookies", 0, 0),
    "export": Verb(
        "Export a device over NBD, or change how.", "DEVICE", "nbdmap export lin --export-name disk --readonly", 0, 1,
        options=("export-name", "description", "readonly", "max-connections", *_DEVICE),
    ),
    "unexport": Verb(
        "End the export of devices; connected clients stay.", _ONE_OF_US, "nbdmap unexport lin", repeats=True, options=_DEVICE
    ),
    "events": Verb("Print events as they happen.", "", "nbdmap events --json", 0, 0, options=("json",)),
    "stats": Verb(
        "Print how many requests devices have done.", "[DEVICE...]", "nbdmap stats -o name,reads,writes", repeats=True,
        options=(*_COLUMNS, "json", *_DEVICE),
    ),
    "dump-config": Verb(
        "Print a configuration that makes the present devices again.", "", "nbdmap dump-config >nbdmap.yaml", 0, 0,
        options=("json",),
    ),
    "completion": Verb("Print the shell's completion.", "bash", "source <(nbdmap completion bash)", 1, 1),
    "help": Verb("Print the verbs; with -c, the columns.", "", "nbdmap help -c", 0, 0, options=("columns",)),
}  # fmt: skip

_SHORT: Final = "".join(letter + ":" * bool(option.value) for option in OPTIONS for letter in option.short)
_LONG: Final = [option.long + "=" * bool(option.value) for option in OPTIONS]
_BY_LETTER: Final = {letter: option.long for option in OPTIONS for letter in option.short}


class Options(Mapping[str, str | None]):
    """The options that were given, by long name; of one that was given twice the last counts."""

    def __init__(self, given: Mapping[str, str | None], verbosity: int = 0) -> None:
        self.given = given
        self.verbosity = verbosity

    def __getitem__(self, name: str) -> str | None:
        return self.given[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.given)

    def __len__(self) -> int:
        return len(self.given)

    def number(self, name: str) -> int:
        """The value as a number. Raises UsageError."""
        text = self.given[name] or ""
        if not (text.isascii() and text.isdigit() and len(text) < 11):
            raise UsageError(f"--{name}: {text!r} is not a number")
        return int(text)

    @property
    def names_device(self) -> bool:
        """Whether --uuid or --major and --minor name the device."""
        return "uuid" in self.given or "major" in self.given

    @property
    def mangling(self) -> str:
        """auto, hex or none."""
        return (self.given.get("manglename") or "auto").lower()


class Command(NamedTuple):
    """A command line that was read; `verb` is "" when there is none."""

    verb: str
    words: list[str]
    options: Options


def parse(arguments: Sequence[str]) -> Command:
    """Reads a command line. Raises UsageError."""
    try:
        pairs, words = getopt.gnu_getopt(list(arguments), _SHORT, _LONG)
    except getopt.GetoptError as error:
        raise UsageError(error.msg) from None
    given: dict[str, str | None] = {}
    verbosity = 0
    valued = {option.long for option in OPTIONS if option.value}
    for name, value in pairs:
        long = name[2:] if name.startswith("--") else _BY_LETTER[name[1:]]
        given[long] = value if long in valued else None
        verbosity += long == "verbose"
    options = Options(given, verbosity)
    _check(options)
    return Command(words[0] if words else "", words[1:], options)


def _check(options: Options) -> None:
    if ("major" in options) != ("minor" in options):
        raise UsageError("Please specify both major number and minor number.")
    if "table" in options and "notable" in options:
        raise UsageError("--table and --notable are incompatible.")
    if "addnodeonresume" in options and "addnodeoncreate" in options:
        raise UsageError("--addnodeonresume and --addnodeoncreate are incompatible.")
    if options.mangling not in MODES:
        raise UsageError("Unknown name mangling mode.")


def check_words(command: Command) -> Verb:
    """The verb of a command, if it has the right number of words. Raises UsageError."""
    verb = VERBS.get(command.verb)
    if command.verb == "serve":
        raise UsageError("serve is the first word: nbdmap serve [OPTION...] [CONFIG.yaml]")
    if verb is None:
        raise UsageError(f"Unknown command: {command.verb}" if command.verb else "No command is given.")
    if len(command.words) < verb.least or (verb.most is not None and len(command.words) > verb.most):
        raise UsageError(f"Incorrect number of arguments: nbdmap {command.verb} {verb.arguments}".rstrip())
    return verb
