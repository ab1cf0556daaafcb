"""The targets, by the name that tables call them, newest last as the kernel registers them."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from nbdmap.dm.target import Target
from nbdmap.targets.crypt.target import Crypt
from nbdmap.targets.delay import Delay
from nbdmap.targets.dust import Dust
from nbdmap.targets.ebs import Ebs
from nbdmap.targets.error import Error
from nbdmap.targets.flakey import Flakey
from nbdmap.targets.linear import Linear
from nbdmap.targets.log_writes import LogWrites
from nbdmap.targets.multipath import Multipath
from nbdmap.targets.striped import Striped
from nbdmap.targets.switch import Switch
from nbdmap.targets.thin.thin import Thin
from nbdmap.targets.thin.thin_pool import ThinPool
from nbdmap.targets.unstriped import Unstriped
from nbdmap.targets.zero import Zero

_ALL: Final[tuple[type[Target], ...]] = (
    Error,
    Zero,
    Linear,
    Striped,
    Crypt,
    Delay,
    Flakey,
    Dust,
    LogWrites,
    Unstriped,
    Switch,
    Ebs,
    ThinPool,
    Thin,
    Multipath,
)

TARGETS: Final[Mapping[str, type[Target]]] = MappingProxyType({target.type_name: target for target in _ALL})
