"""What the reading verbs print: data of the server in, dmsetup's text out, byte for byte."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from nbdmap.cli.fields import read_ahead
from nbdmap.cli.tree import Forest, Info

NO_DEVICES: Final = "No devices found\n"


def info_long(info: Info) -> str:
    """`info NAME`, with the empty line behind it."""
    state = "SUSPENDED" if info["suspended"] else "ACTIVE"
    state += " (READ-ONLY)" * info["read_only"] + " (DEFERRED REMOVE)" * info["deferred_remove"]
    tables = " & ".join(word for word, there in (("LIVE", info["live"]), ("INACTIVE", info["inactive"])) if there)
    lines = [
        f"Name:              {info['name']}",
        f"State:             {state}",
        *([f"Read Ahead:        {read_ahead(info)}"] if info["loaded"] else []),
        f"Tables present:    {tables or 'None'}",
        f"Open count:        {info['open']}",
        f"Event number:      {info['event']}",
        f"Major, minor:      {info['major']}, {info['minor']}",
        f"Number of targets: {info['targets']}",
        *([f"UUID: {info['uuid']}"] if info["uuid"] else []),
        "",
    ]
    return "".join(f"{line}\n" for line in lines)


def without_keys(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data of `table` with every encryption key as zeroes; references to kernel keys (:32:logon:name) stay."""
    return {**data, "lines": [{**line, "params": _hide(line["target"], line["params"])} for line in data["lines"]]}


def _hide(target: str, params: str) -> str:
    if target == "crypt":
        words = params.split(" ")
        if len(words) > 1 and not words[1].startswith(":"):
            words[1] = "0" * len(words[1])
        return " ".join(words)
    if target == "integrity":
        return re.sub(
            r"((?:internal_hash|journal_crypt|journal_mac):[^ :]*:)([^ ]*)", lambda m: m[1] + "0" * len(m[2]), params
        )
    return params


def lines_text(data: Mapping[str, Any], *, multiple: bool, target: str | None = None) -> str:
    """`table` or `status` of one device; each line has the name in front when several are printed."""
    prefix = f"{data['name']}: " if multiple else ""
    if not data["lines"]:
        return f"{prefix}\n" if target is None else ""
    return "".join(
        f"{prefix}{line['start']} {line['length']} {line['target']} {line['params']}\n"
        for line in data["lines"]
        if target in (None, line["target"])
    )


def concise(devices: Iterable[Mapping[str, Any]], target: str | None = None) -> str:
    """`table --concise`: `name,uuid,minor,rw,line[,line...]`, devices separated by semicolons."""
    entries = []
    for data in devices:
        lines = [line for line in data["lines"] if target in (None, line["target"])]
        if target is not None and not lines:
            continue
        flags = "ro" if data["read_only"] else "rw"
        head = f"{_quoted(data['name'])},{_quoted(data['uuid'])},{data['minor']},{flags}"
        table = (f",{line['start']} {line['length']} {line['target']} {_quoted(line['params'])}" for line in lines)
        entries.append(head + "".join(table))
    return ";".join(entries) + "\n" if entries else ""


def _quoted(text: str) -> str:
    return re.sub(r"([,;\\])", r"\\\1", text)


def deps_text(info: Info, *, multiple: bool, naming: str, forest: Forest | None) -> str:
    """`deps` of one device; `naming` is devno, devname or blkdevname (for these `forest` is needed)."""
    prefix = f"{info['name']}: " if multiple else ""
    devices = "".join(f" ({device_name(one, naming, forest) or _comma_number(one)})" for one in info["dependencies"])
    return f"{prefix}{len(info['dependencies'])} dependencies\t:{devices}\n"


def _comma_number(device: Mapping[str, Any]) -> str:
    return f"{device['major']}, {device['minor']}"


def device_name(device: Mapping[str, Any], naming: str, forest: Forest | None) -> str:
    """The name of a device, or "" where its number is to be printed."""
    if naming == "devno" or forest is None:
        return ""
    node = forest.nodes[f"{device['major']}:{device['minor']}"]
    return node.name if naming == "devname" and node.name and node.blkdevname else node.blkdevname


def ls_text(infos: Sequence[Info], naming: str = "devno") -> str:
    """`ls`."""
    forest = Forest(infos) if naming != "devno" else None
    return "".join(
        f"{info['name']}\t({device_name(info, naming, forest) or '%d:%d' % (info['major'], info['minor'])})\n"  # noqa: UP031
        for info in infos
    )


def ls_target_text(info: Info) -> str:
    """A line of `ls --target`."""
    return f"{info['name']}\t({_comma_number(info)})\n"


def target_text(kind: Mapping[str, str]) -> str:
    """A line of `targets`."""
    return f"{kind['name']:16} v{kind['version']}\n"


def measure_text(data: Mapping[str, Any], versions: Mapping[str, str], *, multiple: bool) -> str:
    """`measure` of one device, from its table: what Linux would tell its integrity log of the targets that say something."""
    lines = [
        {**line, "params": _MEASURES[line["target"]](line["params"].split(), versions[line["target"]])}
        if line["target"] in _MEASURES
        else {**line, "params": ""}
        for line in data["lines"]
    ]
    return lines_text({**data, "lines": lines}, multiple=multiple)


def _measure_linear(words: Sequence[str], version: str) -> str:
    return f"target_name=linear,target_version={version},device_name={words[0]},start={words[1]};"


def _measure_striped(words: Sequence[str], version: str) -> str:
    def stripes() -> Iterator[str]:
        for number in range(int(words[0])):
            device, start = words[2 + 2 * number : 4 + 2 * number]
            yield (
                f",stripe_{number}_device_name={device},stripe_{number}_physical_start={start},stripe_{number}_status=A"
            )

    return f"target_name=striped,target_version={version},stripes={words[0]},chunk_size={words[1]}{''.join(stripes())};"


_MEASURES: Final = {"linear": _measure_linear, "striped": _measure_striped}


def mangle_text(name: str, uuid: str) -> str:
    """A line of `mangle`: nbdmap's names are never in an incorrect form."""
    return f"{name}: {uuid or '[no UUID]'}: name {'and UUID ' * bool(uuid)}already in correct form\n"


def event_text(event: Mapping[str, str]) -> str:
    """An event as udevmonitor prints it."""
    keys = "".join(f"{key}={value}\n" for key, value in event.items() if key != "TIMESTAMP")
    return f"UEVENT[{event['TIMESTAMP']}] {event['ACTION']}@{event['DEVPATH']}\n{keys}\n"


def json_text(data: object) -> str:
    """What --json prints."""
    return json.dumps(data, indent=2) + "\n"


def json_line(data: object) -> str:
    """What `events --json` prints: one object a line."""
    return json.dumps(data) + "\n"


def yaml_text(data: Mapping[str, Any], depth: int = 0) -> str:
    """`data` (mappings, lists and plain values) as YAML; text of several lines as a block."""
    out = []
    for key, value in data.items():
        head = f"{'  ' * depth}{_yaml_word(key)}:"
        if isinstance(value, Mapping) and value:
            out.append(f"{head}\n{yaml_text(value, depth + 1)}")
        elif isinstance(value, str) and _BLOCK.fullmatch(value):
            block = "".join(f"{'  ' * (depth + 1)}{line}\n" for line in value.splitlines())
            out.append(f"{head} |\n{block}")
        else:
            out.append(f"{head} {_yaml_word(value) if isinstance(value, str) else json.dumps(value)}\n")
    return "".join(out)


_BLOCK: Final = re.compile(r"(?:[!-~][ -~]*\n)+")
"""Text that a YAML block keeps as it is."""
_WORD: Final = re.compile(r"[A-Za-z/][A-Za-z0-9_./@+-]*")
_TAKEN: Final = frozenset(["true", "false", "null", "yes", "no", "on", "off", "y", "n"])


def _yaml_word(text: str) -> str:
    plain = _WORD.fullmatch(text) and text.lower() not in _TAKEN
    return text if plain else json.dumps(text)
