"""A compiled program as XLA prints it, read into computations and instructions.

    %fusion.1 = bf16[8,4]{1,0} fusion(%p.0, %p.1), kind=kLoop, calls=%fused.1, metadata={...}

Only what a plan asks for is kept: names, shapes, operands and the attributes as text.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,]*)\]")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ?([a-z][a-z0-9\-]*)\(")
_OPERAND = re.compile(r"%([\w.\-]+)")


class Shape(NamedTuple):
    """An array's element type, in XLA's words (`bf16`, `s32`, `pred`), and dimensions."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        bits = _BITS.get(self.dtype) or int((re.findall(r"\d+", self.dtype) or ["0"])[0])
        return -(-self.elements * bits // 8)


@dataclass(frozen=True)
class Instruction:
    """One line; a tuple has several shapes."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    def calls(self, attribute: str = "calls") -> str:
        """The computation that an attribute names; `""` if there is none."""
        return self._first(rf"\b{attribute}=%?([\w.\-]+)")

    def numbers(self, attribute: str) -> tuple[int, ...]:
        """`lhs_contracting_dims={1,2}` as (1, 2); () if it is not there."""
        return tuple(_numbers(self._first(rf"\b{attribute}=\{{([0-9,]*)\}}")))

    @property
    def target(self) -> str:
        """What a custom call calls."""
        return self._first(r'custom_call_target="([^"]*)"')

    @property
    def groups(self) -> list[list[int]]:
        """The devices that exchange something with each other, by their numbers.

        `replica_groups={{0,1},{2,3}}`, `[2,2]<=[4]` (4 in order, as 2 groups of 2),
        `[2,2]<=[2,2]T(1,0)` (turned first), `mesh['a'=2,'b'=2] {'b'}` (along b) or `mesh['a'=2,
        'b'=2], device_ids=([2,2]T(1,0)) {'b'}` (turned first); of a permutation the pairs.

        Raises:
            ValueError: if they are written in another way.
        """
        words = self.attributes
        listed = r"(?:replica_groups|source_target_pairs)=\{((?:\{[0-9,]*\},?)*)\}"
        if found := re.search(listed, words):
            return [_numbers(group) for group in re.findall(r"\{([0-9,]*)\}", found[1])]
        iota = r"replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?"
        if found := re.search(iota, words):
            sizes, of, turned = (_numbers(part or "") for part in found.groups())
            return _in_order(of, turned).reshape(sizes).tolist()
        turn = r"\[([0-9,]+)\](?:T\(([0-9,]+)\))?"
        along = rf"replica_groups=mesh\[([^]]*)\](?:, device_ids=\({turn}\))? \{{([^}}]*)\}}"
        if found := re.search(along, words):
            axes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", found[1])}
            of, turned = (_numbers(part or "") for part in found.group(2, 3))
            ids = _in_order(of or list(axes.values()), turned).reshape(list(axes.values()))
            chosen = [list(axes).index(name) for name in re.findall(r"'(\w+)'", found[4])]
            last = [i for i in range(len(axes)) if i not in chosen] + chosen
            group = math.prod(ids.shape[i] for i in chosen)
            return ids.transpose(last).reshape((-1, group)).tolist()
        if "replica_groups=" in words:
            raise ValueError(f"groups of devices are written in a new way: {words[:200]}")
        return []

    @property
    def op_name(self) -> str:
        """The path of scopes and primitives in JAX that it comes from."""
        return self._first(r'op_name="([^"]*)"')

    def trips(self, default: int) -> int:
        """How often a loop runs: `default` if the compiler does not know."""
        return int(self._first(r'"known_trip_count":\{"n":"(\d+)"') or default)

    def _first(self, pattern: str) -> str:
        match = re.search(pattern, self.attributes)
        return match[1] if match else ""


def _numbers(text: str) -> list[int]:
    return [int(digits) for digits in text.split(",") if digits]


def _in_order(of: Sequence[int], turned: Sequence[int]) -> Any:
    """0, 1, ... in an array, whose axes are turned."""
    ids = np.arange(math.prod(of)).reshape(of)
    return ids.transpose(turned) if turned else ids


@dataclass
class Computation:
    """Its instructions by name, in the order in which they stand, the last of them the result."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    def users(self, name: str) -> Iterator[tuple[Instruction, int]]:
        """The instructions that read a value, and as which operand."""
        for instruction in self.instructions.values():
            for place, operand in enumerate(instruction.operands):
                if operand == name:
                    yield instruction, place

    @property
    def parameters(self) -> list[str]:
        """Their names by number."""
        found = {
            int(i.attributes): i.name for i in self.instructions.values() if i.opcode == "parameter"
        }
        return [found[number] for number in sorted(found)]


class Program(NamedTuple):
    """All computations of a compiled program, and the one that it begins with."""

    computations: Mapping[str, Computation]
    entry: Computation


def read_program(text: str) -> Program:
    """The program that `compiled.as_text()` prints.

    Raises:
        ValueError: if the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    current, entry = Computation(""), None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations[head[2]] = Computation(head[2])
            entry = current if head[1] else entry
        elif begin := _LINE.match(line):
            instruction = _instruction(begin[2], line[begin.end() :])
            current.instructions[begin[2]] = instruction
            if begin[1]:
                current.root = begin[2]
    if entry is None:
        raise ValueError("no entry computation in the text of a compiled program")
    return Program(computations, entry)


def _instruction(name: str, text: str) -> Instruction:
    """`bf16[8,4]{1,0} fusion(%p.0, %p.1), kind=kLoop` and the like."""
    end = _closing(text, 0) + 1 if text[0] == "(" else text.index(" ")
    shapes = tuple(
        Shape(dtype, tuple(int(size) for size in dims.split(",") if size))
        for dtype, dims in _ARRAY.findall(text[:end])
    )
    opcode = _OPCODE.match(text, end)
    if opcode is None:
        raise ValueError(f"no instruction: {text[:80]}")
    closing = _closing(text, opcode.end() - 1)
    inside = text[opcode.end() : closing]
    number = inside if opcode[1] == "parameter" else ""
    operands = tuple(_OPERAND.findall(inside)) if opcode[1] != "constant" else ()
    return Instruction(name, shapes, opcode[1], operands, number or text[closing + 1 :])


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis at `opening` is closed."""
    depth = 0
    for match in re.finditer(r"[()]", text[opening:]):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return opening + match.start()
    raise ValueError(f"a parenthesis is not closed: {text[:80]}")
