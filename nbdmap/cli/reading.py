"""The verbs that only read."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import nbdmap
from nbdmap.cli import names, render
from nbdmap.cli.errors import CommandFailed, UsageError
from nbdmap.cli.fields import (
    INFO_DEFAULT,
    INFO_FIELDS,
    SPLIT_DEFAULT,
    SPLIT_FIELDS,
    STATS_DEFAULT,
    STATS_FIELDS,
    InfoRow,
    SplitRow,
    list_fields,
)
from nbdmap.cli.grammar import VERBS
from nbdmap.cli.report import Field, Report, report_for
from nbdmap.cli.rpc_client import Refused
from nbdmap.cli.session import Session
from nbdmap.cli.tree import Forest, draw, tree_style

LIBRARY_VERSION: Final = "1.02.185 (2022-05-18)"
"""Of the dmsetup whose grammar and output are followed."""
_NAMINGS: Final = ("devno", "blkdevname", "devname")
Data = dict[str, Any]


def _devices(session: Session, words: Sequence[str], find: Callable[[Mapping[str, str]], list[Data]]) -> list[Data]:
    """What `find` finds for each device that is named; all of them when none is."""
    return [data for device in session.devices(words) for data in find(device)]


def is_multiple(session: Session, words: Sequence[str]) -> bool:
    """Whether dmsetup would put names in front of lines."""
    return len(words) != 1 and bool(words or not session.options.names_device)


# --- columns ---------------------------------------------------------------------------------------------------------------


def _report(session: Session, fields: Sequence[Field], default: str) -> Report | None:
    """The report that the options ask for; None when they ask for help, which is printed."""
    selection = session.options.get("select")
    if (session.options.get("options") or "").lower() in ("help", "?"):
        session.around.stderr.write(list_fields(fields))
        return None
    if selection and selection.lower() in ("help", "?"):
        session.around.stderr.write(list_fields(fields, types=True) + SELECTION_HELP)
        return None
    return report_for(fields, default, session.options, selection)


SELECTION_HELP: Final = """\
Selection operators
-------------------
  =   !=            - the whole text, or the number, is equal or is not
  >   >=   <   <=   - numbers
  =~  !~            - a regular expression is found in the text or is not
  &&  ,             - both must match
  ||  #             - at least one must match
  !(  )             - negation, grouping
"""


def _info_report(session: Session) -> Report | None:
    return _report(session, INFO_FIELDS, INFO_DEFAULT)


def _rows(session: Session, infos: Sequence[Data], every: bool) -> list[InfoRow]:
    """Rows for the report; the tree of all devices is asked for when a column needs it."""
    known: list[Forest] = []

    def forest() -> Forest:
        if not known:
            known.append(Forest(infos if every else [session.shown(one) for one in session.call("info")]))
        return known[0]

    return [InfoRow(info, forest) for info in infos]


def info(session: Session, words: Sequence[str]) -> None:
    """info."""
    every = not words and not session.options.names_device
    if "json" in session.options:
        session.write(render.json_text(_devices(session, words, session.infos)))
    elif "columns" not in session.options:
        _check_naming(session)
        found = False
        for device in session.devices(words):
            for one in session.infos(device):
                session.write(render.info_long(one))
                found = True
        session.write("" if found else render.NO_DEVICES)
    elif report := _info_report(session):
        try:
            for device in session.devices(words):
                infos = session.infos(device)
                for row in _rows(session, infos, every and "inactive" not in session.options):
                    report.add(row)
                session.write("" if infos else render.NO_DEVICES)
        finally:
            session.write(report.text())


def select(session: Session, words: Sequence[str]) -> list[str]:
    """The names of the devices that -S chooses, of those that are named or of all."""
    report = _info_report(session)
    if report is None:
        return []
    infos = _devices(session, words, session.infos)
    every = not words and not session.options.names_device
    if not infos:
        session.write(render.NO_DEVICES)
    return [row.info["name"] for row in _rows(session, infos, every) if report.add(row)]


def splitname(session: Session, words: Sequence[str]) -> None:
    """splitname NAME [SUBSYSTEM]."""
    if report := _report(session, SPLIT_FIELDS, SPLIT_DEFAULT):
        report.add(SplitRow(names.split_lvm(words[0], words[1] if len(words) > 1 else "LVM")))
        session.write(report.text())


def stats(session: Session, words: Sequence[str]) -> None:
    """stats [DEVICE...]."""
    found = _devices(session, words, lambda device: session.call("stats", **device))
    if "json" in session.options:
        session.write(render.json_text(found))
    elif report := _report(session, STATS_FIELDS, STATS_DEFAULT):
        for one in found:
            report.add(one)
        session.write(report.text() if found else render.NO_DEVICES)


# --- tables ----------------------------------------------------------------------------------------------------------------


def _lines(session: Session, verb: str, device: Mapping[str, str]) -> list[Data]:
    """`table` or `status` of one device or all, without keys unless --showkeys."""
    noflush = {"noflush": True} if verb == "status" and "noflush" in session.options else {}
    try:
        found = session.server.call(verb, {**device, **session.inactive(), **noflush})
    except Refused as error:
        if verb == "status" and error.errno:
            raise CommandFailed("Device does not exist.") from error
        raise session.failed(verb, device, error) from error
    shown = [session.shown(data) for data in found]
    return shown if verb == "status" or "showkeys" in session.options else [render.without_keys(data) for data in shown]


def _each_lines(session: Session, verb: str, words: Sequence[str], multiple: bool, show: Callable[[Data], str]) -> None:
    """Prints, or runs --exec for, one device after another, so that those before one that fails are printed."""
    target = session.options.get("target")
    found = False
    for device in session.devices(words):
        for data in _lines(session, verb, device):
            found = True
            matched = target is None or target in [line["target"] for line in data["lines"]]
            if "exec" not in session.options:
                verbose = session.options.verbosity and matched
                session.verbose(data) if verbose else None
                session.write(show(data) + "\n" * bool(verbose and multiple))
            elif matched:
                run(session, data["name"])
    session.write("" if found or words else render.NO_DEVICES)


def table(session: Session, words: Sequence[str], multiple: bool = False) -> None:
    """table."""
    multiple = multiple or is_multiple(session, words)
    target = session.options.get("target")
    if "json" in session.options:
        session.write(render.json_text(_devices(session, words, lambda device: _lines(session, "table", device))))
    elif "concise" in session.options:
        found: list[Data] = []
        try:
            for device in session.devices(words):
                found += _lines(session, "table", device)
        finally:
            session.write(render.concise(found, target))
        session.write("" if found else render.NO_DEVICES)
    else:
        names_shown = multiple and not session.options.verbosity
        _each_lines(session, "table", words, multiple, lambda data: render.lines_text(data, multiple=names_shown, target=target))


def status(session: Session, words: Sequence[str], multiple: bool = False) -> None:
    """status."""
    multiple = multiple or is_multiple(session, words)
    target = session.options.get("target")
    if "json" in session.options:
        session.write(render.json_text(_devices(session, words, lambda device: _lines(session, "status", device))))
    else:
        names_shown = multiple and not session.options.verbosity
        _each_lines(session, "status", words, multiple, lambda data: render.lines_text(data, multiple=names_shown, target=target))


def measure(session: Session, words: Sequence[str], multiple: bool = False) -> None:
    """measure."""
    multiple = multiple or is_multiple(session, words)
    versions = {kind["name"]: kind["version"] for kind in session.call("targets")}
    for word in words:
        session.infos(session.device(word))  # "Device does not exist."
    _each_lines(session, "table", words, multiple, lambda data: render.measure_text(data, versions, multiple=multiple))


# --- who stands on whom ----------------------------------------------------------------------------------------------------


def _check_naming(session: Session) -> str:
    """How -o says that devices are named: the last of devno, blkdevname and devname, each of which may be abbreviated."""
    naming = "devno"
    for word in (session.options.get("options") or "").split(","):
        found = next((one for one in _NAMINGS if one.startswith(word)), None)
        if found is None:
            raise UsageError(f"Option not recognised: {word}.")
        naming = found
    return naming


def deps(session: Session, words: Sequence[str], multiple: bool = False) -> None:
    """deps."""
    multiple = multiple or is_multiple(session, words)
    naming = _check_naming(session)

    def find(device: Mapping[str, str]) -> list[Data]:
        return [session.shown(one) for one in session.ioctl("deps", "deps", device, **session.inactive())]

    if "json" in session.options:
        session.write(render.json_text(_devices(session, words, find)))
        return
    forest = None
    found = False
    for device in session.devices(words):
        for one in find(device):
            found = True
            if forest is None and naming != "devno":
                forest = Forest([session.shown(each) for each in session.call("info", **session.inactive())])
            session.verbose(one)
            prefixed = multiple and not session.options.verbosity
            session.write(render.deps_text(one, multiple=prefixed, naming=naming, forest=forest))
            session.write("\n" if multiple and session.options.verbosity else "")
    session.write("" if found else render.NO_DEVICES)


def ls(session: Session, _: Sequence[str]) -> None:
    """ls."""
    options = session.options
    tree = tree_style(options.get("options"), utf=session.around.utf, width=session.around.width) if "tree" in options else None
    naming = "devno" if tree else _check_naming(session)
    infos = session.infos()
    target = options.get("target")
    if "json" in options:
        session.write(render.json_text([one for one in infos if target is None or target in one["target_types"]]))
    elif not infos:
        session.write(render.NO_DEVICES)
    elif target is not None or "exec" in options:
        for one in infos:
            if target is None or target in one["target_types"]:
                if "exec" not in options or options.verbosity:
                    session.write(render.ls_target_text(one))
                if "exec" in options:
                    run(session, one["name"])
    elif tree:
        session.write(draw(infos, tree))
    else:
        session.write(render.ls_text(infos, naming))


def run(session: Session, name: str) -> None:
    """--exec: runs the command with the path of a device behind it; its exit status does not count."""
    command = (session.options.get("exec") or "").split()
    if not command:
        raise CommandFailed("--exec names no command.")
    session.around.stdout.flush()
    session.around.execute([*command, f"/dev/mapper/{names.mangle(name)}"])


# --- the rest --------------------------------------------------------------------------------------------------------------


def targets(session: Session, _: Sequence[str]) -> None:
    """targets."""
    kinds = session.call("targets")
    session.write(render.json_text(kinds) if "json" in session.options else "".join(map(render.target_text, kinds)))


def target_version(session: Session, words: Sequence[str]) -> None:
    """target-version TYPE..."""
    kinds = {kind["name"]: kind for kind in session.call("targets")}
    for word in words:
        if word not in kinds:
            raise session.failed("target-version", {"name": word}, Refused(f"unknown target type {word!r}", 22))
        session.write(render.json_text(kinds[word]) if "json" in session.options else render.target_text(kinds[word]))


def version(session: Session, _: Sequence[str]) -> None:
    """version: that of the dmsetup and of the driver that are followed; nbdmap's own is what --version prints."""
    found = session.call("version")
    if "json" in session.options:
        session.write(render.json_text({**found, "library": LIBRARY_VERSION}))
    else:
        session.write(f"Library version:   {LIBRARY_VERSION}\nDriver version:    {found['driver']}\n")


def mangle(session: Session, words: Sequence[str]) -> None:
    """mangle."""
    infos = _devices(session, words, session.infos)
    for one in infos:
        session.write(render.mangle_text(names.mangle(one["name"]), names.mangle(one["uuid"])))
    session.write("" if infos else render.NO_DEVICES)


def events(session: Session, _: Sequence[str]) -> None:
    """events: until it is interrupted."""
    for event in session.server.events():
        session.write(render.json_line(event) if "json" in session.options else render.event_text(event))
        session.around.stdout.flush()


def dump_config(session: Session, _: Sequence[str]) -> None:
    """dump-config."""
    found = session.call("dump_config")
    session.write(render.json_text(found) if "json" in session.options else render.yaml_text(found))


def udevcookies(session: Session, _: Sequence[str]) -> None:
    """udevcookies: the heading and no cookie."""
    session.write("Cookie       Semid      Value      Last semop time           Last change time\n")


def completion(session: Session, words: Sequence[str]) -> None:
    """completion bash."""
    if words != ["bash"]:
        raise UsageError(f"There is no completion for {words[0]}, only for bash.")
    with open(os.path.join(os.path.dirname(nbdmap.__file__), "completions", "nbdmap.bash"), encoding="utf-8") as script:
        session.write(script.read())


def help_verbs(session: Session, _: Sequence[str]) -> None:
    """help: on standard error, as dmsetup prints it."""
    width = max(map(len, VERBS))
    lines = [f"  {name:{width}}  {verb.arguments}".rstrip() for name, verb in VERBS.items()]
    session.around.stderr.write("\n".join(["Usage: nbdmap [OPTION...] COMMAND [ARGUMENT...]", "", *lines, ""]))
    session.around.stderr.write("  serve" + " " * (width - 3) + "[CONFIG.yaml]\n\nnbdmap COMMAND --help tells more of one.\n")
    if "columns" in session.options:
        session.around.stderr.write("\n" + list_fields(INFO_FIELDS))
