"""How a command line is read: dmsetup's getopt_long, and the tables behind it."""

import pytest

from nbdmap.cli.errors import UsageError
from nbdmap.cli.grammar import OPTIONS, VERBS, check_words, parse
from nbdmap.cli.main import EACH, NAMED, WHOLE


def test_options_stand_anywhere() -> None:
    for line in ("--noheadings info -c -o name lin", "info lin -c --noheadings -oname", "-co name info --nohead lin"):
        command = parse(line.split())
        assert (command.verb, command.words) == ("info", ["lin"])
        assert dict(command.options) == {"noheadings": None, "columns": None, "options": "name"}


def test_two_dashes_end_the_options() -> None:
    command = parse(["message", "d", "0", "--", "-1", "--force"])
    assert command.words == ["d", "0", "-1", "--force"]


def test_verbosity_is_counted_and_the_last_value_counts() -> None:
    command = parse(["-vv", "info", "--verbose", "-o", "name", "-o", "uuid"])
    assert command.options.verbosity == 3
    assert command.options["options"] == "uuid"
    assert parse(["-j", "254", "-m3", "info"]).options.number("minor") == 3


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("info -q", "option -q not recognized"), ("--quiet ls", "option --quiet not recognized"),
        ("create --table", "option --table requires argument"), ("ls --no", "not a unique prefix"),
        ("info -j 254", "both major number and minor number"), ("create x -m 3", "both major number and minor number"),
        ("create x --table t -n", "--table and --notable are incompatible"),
        ("create x --addnodeonresume --addnodeoncreate", "--addnodeonresume and --addnodeoncreate are incompatible"),
        ("ls --manglename bad", "Unknown name mangling mode"),
    ],
)  # fmt: skip
def test_what_cannot_be_read(line: str, complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(line.split())
    assert complaint in caught.value.line


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("", "No command is given"), ("--json serve", "serve is the first word"), ("frob", "Unknown command: frob"),
        ("ls x", "Incorrect number of arguments: nbdmap ls"), ("rename", "nbdmap rename DEVICE NEW_NAME"),
        ("load a b c", "nbdmap load DEVICE [TABLE_FILE]"),
    ],
)  # fmt: skip
def test_wrong_verbs_and_words(line: str, complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_words(parse(line.split()))
    assert complaint in caught.value.line


def test_a_number_is_a_number() -> None:
    for word in ("x", "", "1" * 11, "\u0663"):
        with pytest.raises(UsageError, match="is not a number"):
            parse(["export", "d", "--max-connections", word]).options.number("max-connections")


def test_every_verb_is_done_somewhere_and_names_options_that_there_are() -> None:
    assert set(VERBS) == set(WHOLE) | set(EACH) | set(NAMED)
    assert not set(WHOLE) & set(EACH) | set(WHOLE) & set(NAMED) | set(EACH) & set(NAMED)
    names = {option.long for option in OPTIONS}
    for verb in VERBS.values():
        assert set(verb.options) <= names
    letters = [letter for option in OPTIONS for letter in option.short]
    assert len(letters) == len(set(letters))


def test_dmsetups_options_are_all_taken() -> None:
    dmsetups = (
        "readonly checks columns concise count deferred select exec force gid help inactive interval manglename major minor "
        "mode nameprefixes noflush noheadings nolockfs notable udevcookie noudevrules noudevsync options readahead retry rows "
        "separator setuuid showkeys sort table target tree uid units uuid unbuffered unquoted verbose verifyudev version yes "
        "addnodeonresume addnodeoncreate"
    )
    assert set(dmsetups.split()) <= {option.long for option in OPTIONS}
