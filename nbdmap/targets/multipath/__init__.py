"""multipath: several ways to the same storage, in groups of decreasing priority.

    0 2097152 multipath 1 queue_if_no_path 0 1 1 service-time 0 2 2 nbd://a/disk 1 1 nbd://b/disk 1 4

`grammar` reads the table line, `selectors` choose a path for each request, `paths` hold what is known of them, `target`
fails and reinstates them and tries again on another.
"""

from nbdmap.targets.multipath.target import Multipath

__all__ = ["Multipath"]
