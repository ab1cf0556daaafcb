"""The targets, by the name that tables call them, newest last as the kernel registers them."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from nbdmap.dm.target import Target
from nbdmap.targets.crypt.target import Crypt
from nbdmap.targets.error import Error
from nbdmap.targets.linear import Linear
from nbdmap.targets.striped import Striped
from nbdmap.targets.zero import Zero

TARGETS: Final[Mapping[str, type[Target]]] = MappingProxyType(
    {target.type_name: target for target in (Error, Zero, Linear, Striped, Crypt)}
)
