"""Help, completion, and how quickly a control command starts."""

import argparse
import shlex
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest

import nbdmap
from nbdmap.cli.grammar import VERBS, check_words, parse
from nbdmap.cli.main import main, run
from nbdmap.cli.rpc_client import Connection
from nbdmap.cli.session import Surroundings
from nbdmap.cli.usage import bash_completion, build_parser, help_text

COMPLETION = Path(nbdmap.__file__).parent / "completions" / "nbdmap.bash"
SLOW = ("asyncio", "argparse", "cryptography", "dataclasses", "numpy", "pydantic", "rich", "subprocess", "uvloop", "yaml")


@pytest.mark.parametrize("verb", VERBS)
def test_every_help_ends_with_an_example_that_can_be_read(verb: str) -> None:
    text = help_text(verb)
    example = text.rpartition("example:\n  ")[2].strip()
    assert example == VERBS[verb].example
    words = shlex.split(example.partition(" >")[0].removeprefix("source <(").rstrip(")"))
    if "$(" in example:
        words = ["nbdmap", "wait", "lin", "0"]
    assert words[0] == "nbdmap"
    assert check_words(parse(words[1:])) is VERBS[verb]


def test_the_helps_of_nbdmap_and_of_serve() -> None:
    assert help_text().endswith("example:\n  nbdmap serve & nbdmap ls --tree\n")
    assert "example:\n  nbdmap serve" in help_text("serve")
    assert "    thin  " in help_text()
    assert "restore" in help_text("thin")
    assert help_text("nosuch") == help_text()
    assert isinstance(build_parser(), argparse.ArgumentParser)


def test_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["remove", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: nbdmap remove [OPTION...] DEVICE...")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"nbdmap {nbdmap.__version__}\n"
    assert main(["serve", "--nosuch"]) == 2


def test_the_completion_is_current() -> None:
    """To make it so: python -c 'from nbdmap.cli.usage import *; print(bash_completion(), end="")' >THE FILE."""
    assert COMPLETION.read_text() == bash_completion()


def test_the_completion_is_printed() -> None:
    stdout = StringIO()
    around = Surroundings(StringIO(), stdout, StringIO(), {}, "/")
    assert run(["completion", "bash"], Connection, around) == 0
    assert stdout.getvalue() == COMPLETION.read_text()
    assert run(["completion", "zsh"], Connection, around) == 2


def test_the_completion_knows_devices() -> None:
    script = f"""
        source {shlex.quote(str(COMPLETION))}
        nbdmap() {{ if [ "$1" = info ]; then printf 'alpha\\nbeta\\n'; else printf 'linear  v1.4.0\\nzero  v1.2.0\\n'; fi; }}
        complete_it() {{ COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _shtab_nbdmap; echo "${{COMPREPLY[@]}}"; }}
        complete_it nbdmap remove a
        complete_it nbdmap suspend alpha b
        complete_it nbdmap target-version l
        complete_it nbdmap res
        complete_it nbdmap th
        complete_it nbdmap thin de
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True, text=True)
    assert done.stdout.splitlines() == ["alpha", "beta", "linear", "resume", "thin", "delta"]


def test_control_commands_import_nothing_slow(tmp_path: Path) -> None:
    script = (
        "import sys; from nbdmap.cli.main import main; status = main(sys.argv[1:]);"
        f"print(*sorted(set(sys.modules) & set({SLOW!r})), file=sys.stderr); sys.exit(status)"
    )
    for line in (["splitname", "a-b"], ["ls", "--socket", str(tmp_path / "none")]):
        done = subprocess.run([sys.executable, "-c", script, *line], capture_output=True, check=False, text=True)
        assert done.stderr.splitlines()[-1] == ""


def test_the_module_can_be_run() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nbdmap", "splitname", "--noheadings", "vg-lv"], capture_output=True, check=False, text=True
    )
    assert (done.stdout, done.stderr, done.returncode) == ("vg:lv:\n", "", 0)


def test_a_reader_that_goes_away_is_no_failure_to_talk_of() -> None:
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{sys.executable} -m nbdmap completion bash | head -n 1"],
        capture_output=True, check=False, text=True,
    )  # fmt: skip
    assert done.stdout.startswith("#")
    assert "Traceback" not in done.stderr
