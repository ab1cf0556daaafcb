"""What is printed where the transcripts have nothing: keys, events, JSON, YAML, measures."""

import json
from typing import Any

import pytest
import yaml

from nbdmap.cli.render import event_text, json_line, lines_text, measure_text, without_keys, yaml_text


def data(*lines: tuple[str, str]) -> dict[str, Any]:
    return {"name": "d", "lines": [{"start": 0, "length": 8, "target": target, "params": params} for target, params in lines]}


@pytest.mark.parametrize(
    ("target", "params", "shown"),
    [
        ("crypt", "aes-xts-plain64 0123456789abcdef 0 7:0 0", "aes-xts-plain64 0000000000000000 0 7:0 0"),
        ("crypt", "aes-xts-plain64 :32:logon:key 0 7:0 0", "aes-xts-plain64 :32:logon:key 0 7:0 0"),
        ("crypt", "aes - 0 7:0 0", "aes 0 0 7:0 0"),
        ("integrity", "7:0 0 4 J 2 internal_hash:hmac(sha256):0a0b journal_mac:x", "7:0 0 4 J 2 internal_hash:hmac(sha256):0000 "
         "journal_mac:x"),
        ("linear", "7:0 0", "7:0 0"),
    ],
)  # fmt: skip
def test_keys_are_not_shown(target: str, params: str, shown: str) -> None:
    assert without_keys(data((target, params)))["lines"][0]["params"] == shown


def test_lines_of_one_target_only() -> None:
    both = data(("zero", ""), ("linear", "7:0 0"))
    assert lines_text(both, multiple=True, target="linear") == "d: 0 8 linear 7:0 0\n"
    assert lines_text(both, multiple=False, target="crypt") == ""
    assert lines_text(data(), multiple=True) == "d: \n"
    assert lines_text(data(), multiple=True, target="zero") == ""


def test_an_event_looks_like_udevmonitors() -> None:
    event = {
        "TIMESTAMP": "1192521009.711215", "ACTION": "change", "DEVPATH": "/block/dm-3", "SUBSYSTEM": "block",
        "DM_TARGET": "multipath", "DM_ACTION": "PATH_FAILED", "DM_SEQNUM": "1", "DM_PATH": "8:32", "DM_NR_VALID_PATHS": "0",
        "DM_NAME": "mpath2", "DM_UUID": "mpath-35333333000002328", "MINOR": "3", "MAJOR": "253", "SEQNUM": "1130",
    }  # fmt: skip
    assert event_text(event) == (
        "UEVENT[1192521009.711215] change@/block/dm-3\nACTION=change\nDEVPATH=/block/dm-3\nSUBSYSTEM=block\n"
        "DM_TARGET=multipath\nDM_ACTION=PATH_FAILED\nDM_SEQNUM=1\nDM_PATH=8:32\nDM_NR_VALID_PATHS=0\nDM_NAME=mpath2\n"
        "DM_UUID=mpath-35333333000002328\nMINOR=3\nMAJOR=253\nSEQNUM=1130\n\n"
    )
    assert json.loads(json_line(event)) == event
    assert json_line(event).count("\n") == 1


@pytest.mark.parametrize(
    "found",
    [
        {"disks": {"ram 0": {"source": "x: y", "number": "8:0"}, "no": {}}, "devices": {}},
        {"devices": {"a": {"uuid": "", "table": "0 8 zero \n8 8 linear 7:0 0\n", "export": True, "n": [1, "x"], "none": None}}},
        {"t": {"odd": " leading\n", "tab": "a\tb\n", "umläut": "ü\n", "nothing": "", "end": "\n", "#": "a # b", "on": "off"}},
    ],
)  # fmt: skip
def test_yaml_is_read_again(found: dict[str, Any]) -> None:
    assert yaml.safe_load(yaml_text(found)) == found


def test_tables_are_blocks_in_yaml() -> None:
    assert yaml_text({"a": {"table": "0 8 zero\n8 8 error\n"}}) == "a:\n  table: |\n    0 8 zero\n    8 8 error\n"


def test_what_has_no_measure_is_printed_without() -> None:
    assert measure_text(data(("crypt", "x y")), {"crypt": "1.2.3"}, multiple=False) == "0 8 crypt \n"
