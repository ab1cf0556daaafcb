"""The table line of multipath, read and written.

    <#words> [<feature>...] <#words> [<hardware handler> <argument>...] <#groups> <initial group>
    (<selector> <#words> [<word>...] <#paths> <#words of each> (<device> [<word>...])...)...

Features: queue_if_no_path, retain_attached_hw_handler, pg_init_retries <1..50>, pg_init_delay_msecs <0..60000>,
queue_mode <bio|rq|mq>. There is no hardware that would need a handler, so handlers and pg_init are kept for the table
line and do nothing. `queue_mode bio` is Linux's as it is today; without it repeat counts, status and table lines are those of the
documents queue-length.txt and service-time.txt.
"""

from dataclasses import dataclass
from typing import Final

from nbdmap.dm.args import Args
from nbdmap.dm.target import Spec
from nbdmap.errors import InvalidArgument
from nbdmap.targets.multipath.paths import Group, Path
from nbdmap.targets.multipath.selectors import SELECTORS

MAX_FEATURE_WORDS: Final = 8
MAX_WORDS: Final = 1024
"""Of a handler, a selector or a path; and the most groups, and paths of a group."""
HANDLERS: Final = ("alua", "emc", "hp_sw", "rdac")
"""Those of Linux."""


@dataclass(slots=True)
class Features:
    """What stands before the groups."""

    queue_if_no_path: bool = False
    pg_init_retries: int = 0
    pg_init_delay_ms: int | None = None
    retain_handler: bool = False
    bio: bool = False
    handler: str = ""

    def words(self, queue_if_no_path: bool) -> str:
        """The beginning of the table line, with a blank behind each word."""
        words: list[str] = []
        if queue_if_no_path:
            words.append("queue_if_no_path")
        if self.pg_init_retries:
            words += ["pg_init_retries", str(self.pg_init_retries)]
        if self.pg_init_delay_ms is not None:
            words += ["pg_init_delay_msecs", str(self.pg_init_delay_ms)]
        if self.retain_handler:
            words.append("retain_attached_hw_handler")
        if self.bio:
            words += ["queue_mode", "bio"]
        handler = f"1 {self.handler}" if self.handler else "0"
        return " ".join([str(len(words)), *words, handler, ""])


def _group_of(args: Args, what: str, most: int = MAX_WORDS) -> Args:
    """A count, which must be there, and that many words."""
    count = args.number(f"number of {what}", 0, most)
    if count > len(args):
        raise InvalidArgument(f"number of {what}: {count} announced, {len(args)} given")
    return Args([args.word(what) for _ in range(count)])


def read_features(args: Args) -> Features:
    """The features and the hardware handler."""
    features = Features()
    words = _group_of(args, "feature words", MAX_FEATURE_WORDS)
    while words:
        word = words.word("feature")
        match word.lower():
            case "queue_if_no_path":
                features.queue_if_no_path = True
            case "retain_attached_hw_handler":
                features.retain_handler = True
            case "pg_init_retries" if words:
                features.pg_init_retries = words.number("pg_init_retries", 1, 50)
            case "pg_init_delay_msecs" if words:
                features.pg_init_delay_ms = words.number("pg_init_delay_msecs", 0, 60000)
            case "queue_mode" if words:
                mode = words.word("queue_mode").lower()
                if mode not in ("bio", "rq", "mq"):
                    raise InvalidArgument(f"queue_mode {mode!r} is not bio, rq or mq")
                features.bio = mode == "bio"
            case _:
                raise InvalidArgument(f"feature {word!r} is not known, or lacks its value")
    handler = _group_of(args, "hardware handler words")
    if features.bio:
        features.retain_handler = True
    elif handler:
        features.handler = handler.word("hardware handler")
        if features.handler not in HANDLERS:
            raise InvalidArgument(f"hardware handler {features.handler!r} is not one of {', '.join(HANDLERS)}")
    return features


async def read_groups(spec: Spec, args: Args, one_each: bool) -> tuple[list[Group], int]:
    """The groups with their paths opened, and the number of the one to begin with (0 without groups)."""
    count = args.number("number of groups", 0, MAX_WORDS)
    initial = args.number("initial group", 0, MAX_WORDS)
    if bool(count) != bool(initial):
        raise InvalidArgument(f"initial group {initial} of {count} groups")
    groups: list[Group] = []
    while args:
        groups.append(await _read_group(spec, args, len(groups) + 1, one_each))
    if len(groups) != count:
        raise InvalidArgument(f"number of groups: {count} announced, {len(groups)} given")
    return groups, initial


async def _read_group(spec: Spec, args: Args, number: int, one_each: bool) -> Group:
    where = f"group {number}"
    name = args.word("path selector")
    kind = SELECTORS.get(name)
    if kind is None:
        raise InvalidArgument(f"{where}: path selector {name!r} is not one of {', '.join(SELECTORS)}")
    words = _group_of(args, f"selector words of {where}")
    selector = kind([words.word("word") for _ in range(len(words))], one_each)
    paths = args.number(f"number of paths of {where}", 1, MAX_WORDS)
    each = args.number(f"number of words of each path of {where}", 0, MAX_WORDS)
    group = Group(number, selector)
    for _ in range(paths):
        if len(args) < 1 + each:
            raise InvalidArgument(f"{where}: {paths} paths of {1 + each} words were announced, there are fewer")
        reference = args.word("path")
        path_words = Args([args.word("path word") for _ in range(each)])
        path = Path(await spec.open(reference, may_be_absent=True), reference, group)
        selector.add(path, path_words)
        group.add(path)
    return group
