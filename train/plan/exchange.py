"""What the devices of a compiled program send to each other, and how long that takes.

By rings: of n devices that gather a whole of b bytes each sends (n - 1) / n of b, and of n that add
up b bytes each sends 2 (n - 1) / n of b.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from train.plan.hlo import Instruction

# Of links nothing was measured: both are assumed.
LINK_SHARE = 0.8  # of a link's rate that is reached
BEGIN = 1e-5  # seconds until an exchange moves anything
# How many bytes each of n devices sends for a byte that it gives.
_SENT: Mapping[str, Callable[[int], float]] = {
    "all-gather": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}


class Links(NamedTuple):
    """Bytes a second that a device sends: within its machine, and to other machines."""

    link: float = 0.0
    network: float = 0.0
    machine: int = 8  # devices


class Exchange(NamedTuple):
    """One exchange: its kind in XLA's words, the bytes that each device sends, and which devices.

    `groups` has the first and the last of those that exchange with each other, by their numbers.
    """

    kind: str
    bytes: float
    groups: frozenset[tuple[int, int]]

    def seconds(self, links: Links) -> float:
        far = any(first // links.machine != last // links.machine for first, last in self.groups)
        rate = links.network if far else links.link
        return BEGIN + (self.bytes / rate if rate else 0.0)


def exchange_of(instruction: Instruction, given: float) -> Exchange | None:
    """What an instruction has devices exchange, if it does.

    Args:
        given: bytes of its operands on one device.
    """
    kind = instruction.opcode.removesuffix("-start")
    if kind not in _SENT:
        return None
    groups = [group for group in instruction.groups if len(group) > 1]
    sent = _SENT[kind](max(map(len, groups), default=1)) * given if groups else 0.0
    return Exchange(kind, sent, frozenset((min(group), max(group)) for group in groups))
