"""Records tests/golden/dmsetup: runs the commands of every transcript in a kernel and writes down what it answered.

    .venv/bin/python -m tests.vm.transcripts [FILE...]      # all of them without an argument

A transcript is its own script: its commands are kept, its answers replaced. They are those of Debian 12's stock kernel, 6.1.
What its backport, 6.12, answers otherwise is kept as linux-6.12.diff: where they differ, nbdmap follows 6.12.
The format is described in tests/golden/dmsetup/README.md; `parse` reads it for the tests that replay transcripts, too.
"""

import difflib
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from tests.vm.harness import Kernel, prepare

GOLDEN: Final = Path(__file__).resolve().parents[1] / "golden" / "dmsetup"
# Long texts that the first of the two commands shows in full, and every other one by a name.
ABRIDGED: Final = (
    ("dmsetup help", "@USAGE@", re.compile(r"Usage:\n\ndmsetup\n.* rw and uuid\.\n\n", re.DOTALL)),
    ("dmsetup help -c", "@FIELDS@", re.compile(r"Mapped Device Name Fields\n-+\n.*  \?  +- Show help\..*?\n \n", re.DOTALL)),
)
LINE_KINDS: Final = frozenset("#$+<=&%>!~?")
DIFFERENCES: Final = "linux-6.12.diff"

PRELUDE: Final = """
modprobe loop max_loop=8; modprobe dm-zero
disks() {
  for n in 0 1 2 3; do disk loop$n 67108864; done
  disk loop4 1048576; disk loop5 67108864 --read-only; disk loop6 67108864 --sector-size 4096; disk loop7 1049088
  for file in /sys/block/loop*/queue/read_ahead_kb; do echo 128 >$file; done
}
hold() { _file=/dev/mapper/$1; sleep 1000 <$_file & echo $! >/run/holder-$1; usleep 200000; }
release() { kill "$(cat /run/holder-$1)"; rm /run/holder-$1; usleep 200000; }
log() { dmesg -c | sed -n 's/^\\[[^]]*\\] \\(device-mapper: \\|dm-\\)/\\1/p'; }
record() {
  sh -c '. /job.sh; . /run/command' </run/input >/run/out 2>/run/err; _status=$?
  printf '\\n@@@step\\n'; cat /run/out; printf '\\n@@@err\\n'; cat /run/err; printf '\\n@@@log\\n'; log
  printf '\\n@@@end %s\\n' $_status
  [ -z "$_meanwhile" ] || wait $_meanwhile; _meanwhile=
}
clean() {
  for file in /run/holder-*; do [ -e $file ] && kill "$(cat $file)" && rm $file; done
  wait; dmsetup remove_all --force >/dev/null 2>&1; dmsetup remove_all --force >/dev/null 2>&1
  printf '\\n@@@left %s\\n' "$(dmsetup info)"; losetup -D; rm /tmp/loop*.img; log >/dev/null
}
_meanwhile=; dmsetup version >/dev/null; log >/dev/null
"""


@dataclass(slots=True)
class Step:
    """One thing that a transcript does, what is given to it, and what it answered."""

    kind: Literal["$", "=", "&", "%"]
    text: str
    comments: list[str] = field(default_factory=list)    # the lines before it, as written
    given: list[str] = field(default_factory=list)    # "<": standard input of "$", or the lines of the file "="
    stdout: str = ""
    stderr: str = ""
    kernel_log: list[str] = field(default_factory=list)
    status: int = 0

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)


def parse(text: str) -> tuple[list[Step], list[str]]:
    """The steps, and the comment lines behind the last one."""
    steps: list[Step] = []
    comments: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        kind, rest = line[:1], line[2:]
        if kind in {"", "#"}:
            comments.append(line)
        elif kind in {"$", "=", "&", "%"}:
            steps.append(Step(kind, rest, comments))    # type: ignore[arg-type]
            comments = []
        elif not steps or kind not in LINE_KINDS:
            raise ValueError(f"line {number}: not a line of a transcript: {line}")
        else:
            _add(steps[-1], kind, rest, "" if line[1:2] == "-" else "\n")
    return steps, comments


def _add(step: Step, kind: str, rest: str, end: str) -> None:
    if kind == "+":
        step.text += f"\n{rest}"
    elif kind == "<":
        step.given.append(rest)
    elif kind == ">":
        step.stdout += rest + end
    elif kind == "!":
        step.stderr += rest + end
    elif kind == "~":
        step.kernel_log.append(rest)
    else:
        step.status = int(rest)


def render(steps: Sequence[Step], comments: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in [*(line for step in steps for line in _lines(step)), *comments])


def _lines(step: Step) -> Iterator[str]:
    yield from step.comments
    yield from f"{step.kind} {step.text}".replace("\n", "\n+ ").split("\n")
    yield from (f"< {line}" if line else "<" for line in step.given)
    if step.kind == "$":
        for mark, text in ((">", step.stdout), ("!", step.stderr)):
            for line in text.splitlines(keepends=True):
                yield f"{mark} {line[:-1]}" if line.endswith("\n") else f"{mark}-{line}"
        yield from (f"~ {line}" for line in step.kernel_log)
        yield f"? {step.status}"


def _script(step: Step) -> str:
    """The shell lines that do the step in the guest."""
    given = "".join(f"{line}\n" for line in step.given)
    if step.kind == "=":
        return f"printf %s {shlex.quote(given)} >{shlex.quote(step.text)}\n"
    if step.kind == "&":
        return f"(sleep 1; {step.text}) >/dev/null 2>&1 & _meanwhile=$!\n"
    if step.kind == "%":
        return f"{step.text}\n"
    return f"printf '%s\\n' {shlex.quote(step.text)} >/run/command; printf %s {shlex.quote(given)} >/run/input; record\n"


def record(kernel: Kernel, files: Sequence[str]) -> list[str]:
    """The same transcripts with what the kernel answered."""
    parsed = [parse(text) for text in files]
    job = PRELUDE
    for number, (steps, _) in enumerate(parsed):
        job += f"section {number}\ndisks; log >/dev/null\n{''.join(map(_script, steps))}clean\n"
    sections = kernel.run(job, seconds=900).sections()
    recorded: list[str] = []
    for number, (steps, comments) in enumerate(parsed):
        section = sections[str(number)].rstrip("\n")
        if not section.endswith("\n@@@left No devices found"):
            raise RuntimeError(f"devices are left behind: {section[-500:]}")
        recorded.append(render(_answered(steps, section), comments))
    return recorded


def _answered(steps: Sequence[Step], section: str) -> list[Step]:
    pattern = r"\n@@@step\n(.*?)\n@@@err\n(.*?)\n@@@log\n(.*?)\n@@@end (\d+)\n"
    answers = iter(re.findall(pattern, section, re.DOTALL))
    done: list[Step] = []
    for step in steps:
        if step.kind == "$":
            out, err, log, status = next(answers)
            for command, name, pattern_of_text in ABRIDGED:
                err = err if step.text == command else pattern_of_text.sub(f"{name}\n", err)
            if int(status) > 127:
                raise RuntimeError(f"{step.text}: ended by signal {int(status) - 128}; record again")
            step = replace(step, stdout=out, stderr=err, kernel_log=log.splitlines(), status=int(status))
        done.append(step)
    return done


def differences(recorded: dict[str, str], otherwise: dict[str, str]) -> str:
    """What the other kernel answers differently, as `diff -u` would print it."""
    lines: list[str] = []
    for name, text in recorded.items():
        before, after = text.splitlines(keepends=True), otherwise[name].splitlines(keepends=True)
        lines += difflib.unified_diff(before, after, f"6.1/{name}", f"6.12/{name}", n=2)
    return "".join(lines)


def as_on_6_12(name: str) -> str:
    """The transcript `name` with what linux-6.12.diff says of it."""
    lines = (GOLDEN / name).read_text().splitlines(keepends=True)
    section = rf"^--- 6\.1/{re.escape(name)}\n.*\n((?:[@ +-].*\n)*?)(?=--- |\Z)"
    found = re.search(section, (GOLDEN / DIFFERENCES).read_text(), re.MULTILINE)
    done: list[str] = []
    at = 0
    for line in found[1].splitlines(keepends=True) if found else []:
        if hunk := re.match(r"@@ -(\d+)", line):
            done += lines[at : int(hunk[1]) - 1]
            at = int(hunk[1]) - 1
            continue
        if line[0] != "+":
            if lines[at] != line[1:]:
                raise ValueError(f"{DIFFERENCES} does not fit line {at + 1} of {name}")
            at += 1
        if line[0] != "-":
            done.append(line[1:])
    return "".join(done + lines[at:])


def read_all() -> dict[str, str]:
    """Every transcript by its path below GOLDEN."""
    return {str(path.relative_to(GOLDEN)): path.read_text() for path in sorted(GOLDEN.rglob("*.txt"))}


def record_all(kernel: Kernel, files: dict[str, str]) -> dict[str, str]:
    return dict(zip(files, record(kernel, list(files.values())), strict=True))


def main(arguments: Sequence[str]) -> None:
    named = {str(Path(word).resolve().relative_to(GOLDEN)) for word in arguments}
    stock, backport = prepare(), prepare(backports=True)
    chosen = {name: text for name, text in read_all().items() if not named or name in named}
    for name, text in record_all(stock, chosen).items():
        (GOLDEN / name).write_text(text)
    files = read_all()
    (GOLDEN / DIFFERENCES).write_text(differences(files, record_all(backport, files)))


if __name__ == "__main__":
    main(sys.argv[1:])
