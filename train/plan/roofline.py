"""How long a compiled program takes, predicted from its text: a roofline of every kernel.

A kernel takes the longest of its matmuls, its other operations and its bytes, each at its rate, and
a fixed time to be launched; nothing overlaps. Bytes are those that must move: every operand read
once and every result written once, of what is sliced, gathered or updated in place only the part.
Caches are not counted on, and no kernel is slower than its roofline: that is what a measurement
would add.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache

from train.plan.exchange import Exchange, Links, exchange_of
from train.plan.hlo import Computation, Instruction, Program, Shape

# What is reached of a data sheet: 790 of 989 TFLOP/s and 4.3 of 4.8 TB/s were measured on an H200,
# and flash attention at 0.65 of its matmuls.
MATMUL_SHARE, BANDWIDTH_SHARE, ATTENTION_SHARE = 0.8, 0.896, 0.65
LAUNCH = 1e-6  # seconds between two kernels of a command buffer

CLASSES = (
    "matmuls", "attention", "adapters", "norms", "swiglu", "rotary", "dropout", "packing", "loss",
    "sampling", "optimizer", "copies", "exchange", "other", "launches",
)  # fmt: skip
# The scopes that `jax.named_scope` writes into the model and the step are such classes, too.
_SCOPE = re.compile(r"\b(adapters|norms|swiglu|rotary|dropout|packing|loss|sampling|optimizer)\b")

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "domain",
}  # fmt: skip
_MOVES = _FREE | {
    "broadcast", "reshape", "transpose", "slice", "dynamic-slice", "dynamic-update-slice",
    "concatenate", "copy", "iota", "pad", "gather", "reverse", "fusion", "call", "bitcast-convert",
}  # fmt: skip
_COSTLY = {"exponential", "log", "sine", "cosine", "power", "sqrt", "rsqrt", "tanh", "logistic",
           "divide", "remainder", "exponential-minus-one", "log-plus-one", "erf"}  # fmt: skip
_COST = 8  # of one of these, in operations: a special function unit for eight lanes
_PARTS = {"slice", "dynamic-slice", "gather"}
_THROUGH = {"bitcast", "reshape", "get-tuple-element", "opt-barrier"}
_ASYNC = ("-start", "-done", "-update")


@dataclass(frozen=True)
class Rates:
    """What a device sustains, per second: operations of matmuls and of vectors, and bytes."""

    matmul: float
    vector: float
    bandwidth: float
    attention: float
    launch: float = LAUNCH
    links: Links = Links()  # noqa: RUF009


@dataclass(frozen=True)
class Kernel:
    """One launch: operations of matmuls, other operations, and bytes; `times` in the program."""

    name: str
    kind: str  # of CLASSES
    matmul: float
    vector: float
    bytes: float
    times: int
    exchange: Exchange | None = None  # with other devices

    def seconds(self, rates: Rates) -> float:
        """Of one launch, without launching."""
        if self.exchange:
            return self.exchange.seconds(rates.links)
        rate = rates.attention if self.kind == "attention" else rates.matmul
        return max(
            self.matmul / rate if self.matmul else 0.0,
            self.vector / rates.vector,
            self.bytes / rates.bandwidth,
        )


@dataclass
class Prediction:
    """Seconds of a program by class, and how many kernels it launches."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CLASSES, 0.0))
    kernels: int = 0
    # By kind: how many exchanges, and the bytes that each device sends in them.
    exchanges: dict[str, float] = field(default_factory=dict)
    exchanged: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def predict(program: Program, rates: Rates, trips: int = 1) -> Prediction:
    """The roofline of a whole program; `trips` as for `kernels`."""
    found = Prediction()
    for kernel in Roofline(program, trips).kernels():
        found.seconds[kernel.kind] += kernel.times * kernel.seconds(rates)
        found.kernels += kernel.times
        if (one := kernel.exchange) is not None:
            found.exchanges[one.kind] = found.exchanges.get(one.kind, 0) + kernel.times
            sent = found.exchanged.get(one.kind, 0) + kernel.times * one.bytes
            found.exchanged[one.kind] = sent
    found.seconds["launches"] = found.kernels * rates.launch
    return found


class Roofline:
    """The kernels of one program, with what each computes and moves.

    Args:
        trips: how often a loop runs whose number of turns depends on data.
    """

    def __init__(self, program: Program, trips: int = 1):
        self.program, self.trips = program, trips
        self._work = cache(self._uncached_work)

    def kernels(self) -> Iterator[Kernel]:
        """Every launch, in order; a kernel in a loop once, with its `times`."""
        yield from self._walk(self.program.entry, 1, 1)

    def _walk(self, computation: Computation, times: int, loops: int) -> Iterator[Kernel]:
        """Of a computation that runs `times`, in a loop that is begun so many times."""
        for instruction in computation.instructions.values():
            opcode = instruction.opcode
            if opcode in _FREE or opcode.endswith(("-done", "-update")):
                continue
            if opcode == "while":
                turns = times * instruction.trips(self.trips)
                for part in ("condition", "body"):
                    yield from self._walk(self._called(instruction, part), turns, times)
            elif opcode in ("call", "async-start") and instruction.calls("to_apply"):
                yield from self._walk(self._called(instruction, "to_apply"), times, loops)
            elif opcode == "async-start":
                yield from self._walk(self._called(instruction, "calls"), times, loops)
            elif opcode == "conditional":
                # Its dearest branch once in a loop: MultiSteps's, when it has all gradients.
                branches = [list(self._walk(x, loops, loops)) for x in self._branches(instruction)]
                yield from max(branches, key=lambda some: sum(x.bytes * x.times for x in some))
            else:
                yield self._kernel(computation, instruction, times)

    def _called(self, instruction: Instruction, attribute: str) -> Computation:
        return self.program.computations[instruction.calls(attribute)]

    def _branches(self, instruction: Instruction) -> list[Computation]:
        listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        names = (
            re.findall(r"%?([\w.\-]+)", listed[1])
            if listed
            else [instruction.calls("true_computation"), instruction.calls("false_computation")]
        )
        return [self.program.computations[name] for name in names]

    def _kernel(self, where: Computation, instruction: Instruction, times: int) -> Kernel:
        given = sum(self._operand_bytes(where, [name]) for name in instruction.operands)
        if exchange := exchange_of(instruction, given):
            return Kernel(instruction.name, "exchange", 0.0, 0.0, 0.0, times, exchange)
        if instruction.opcode == "fusion":
            inside = self._called(instruction, "calls")
            matmul, vector = self._work(inside.name)
            moved = self._read(inside, where, instruction) + self._written(inside)
        elif instruction.opcode == "custom-call":
            matmul, vector = self._custom(where, instruction), 0.0
            moved = self._operand_bytes(where, instruction.operands) + _bytes(instruction.shapes)
        else:
            matmul, vector = self._operations(where, instruction)
            moved = self._plain_bytes(where, instruction)
        kind = self._kind(where, instruction, matmul)
        return Kernel(instruction.name, kind, matmul, vector, moved, times)

    # What a kernel computes.

    def _uncached_work(self, name: str) -> tuple[float, float]:
        """Operations of matmuls and others in a fused computation."""
        matmul = vector = 0.0
        inside = self.program.computations[name]
        for instruction in inside.instructions.values():
            if instruction.opcode in ("fusion", "call"):
                called = instruction.calls() or instruction.calls("to_apply")
                some, more = self._work(called)
            elif instruction.opcode == "custom-call":
                some, more = self._custom(inside, instruction), 0.0
            else:
                some, more = self._operations(inside, instruction)
            matmul, vector = matmul + some, vector + more
        return matmul, vector

    def _operations(self, where: Computation, instruction: Instruction) -> tuple[float, float]:
        opcode = instruction.opcode
        size = sum(shape.elements for shape in instruction.shapes)
        if opcode == "dot":
            left = where.instructions[instruction.operands[0]].shapes[0].dims
            depth = 1
            for dimension in instruction.numbers("lhs_contracting_dims"):
                depth *= left[dimension]
            return 2.0 * size * depth, 0.0
        if opcode in ("reduce", "reduce-window", "sort", "scatter"):
            return 0.0, float(self._elements(where, instruction.operands[0]))
        if opcode in _MOVES:
            return 0.0, 0.0
        return 0.0, float(size * (_COST if opcode in _COSTLY else 1))

    def _elements(self, where: Computation, name: str) -> int:
        return sum(shape.elements for shape in where.instructions[name].shapes)

    def _custom(self, where: Computation, instruction: Instruction) -> float:
        """Operations of a call of cuBLAS or cuDNN, by the shapes of its operands."""
        first = where.instructions[instruction.operands[0]].shapes if instruction.operands else ()
        if "fmha" in instruction.target:
            B, T, N, H = first[0].dims
            S = where.instructions[instruction.operands[1]].shapes[0].dims[1]
            products = 5 if "Backward" in instruction.target else 2
            seen = 0.5 if "CAUSAL" in instruction.attributes.split('"mask_type":')[-1][:30] else 1.0
            return products * 2.0 * B * N * T * S * H * seen
        if "cublas" in instruction.target or "matmul" in instruction.target:
            listed = re.search(r'"lhs_contracting_dimensions":(\[[^]]*])', instruction.attributes)
            depth = 1
            for digit in json.loads(listed[1]) if listed else ():
                depth *= first[0].dims[int(digit)]
            return 2.0 * instruction.shapes[0].elements * depth
        return 0.0

    # What a kernel moves.

    def _read(self, inside: Computation, where: Computation, instruction: Instruction) -> float:
        seen = dict(zip(inside.parameters, instruction.operands, strict=True))
        once = {operand: parameter for parameter, operand in seen.items()}  # read twice, moved once
        return sum(self._read_of(inside, parameter) for parameter in once.values())

    def _read_of(self, inside: Computation, name: str) -> float:
        """Bytes of a value that its users in a fusion read: the parts, where all want parts."""
        whole = _bytes(inside.instructions[name].shapes)
        parts = 0.0
        for user, place in inside.users(name):
            if user.opcode in _PARTS and place == 0:
                parts += _bytes(user.shapes)
            elif user.opcode in ("dynamic-update-slice", "scatter") and place == 0:
                pass  # updated in place
            elif user.opcode in _THROUGH:
                parts += self._read_of(inside, user.name)
            elif user.opcode in ("fusion", "call"):
                called = self.program.computations[user.calls() or user.calls("to_apply")]
                parts += self._read_of(called, called.parameters[place])
            else:
                return whole
        return min(whole, parts)

    def _written(self, inside: Computation) -> float:
        root = inside.instructions[inside.root]
        results = root.operands if root.opcode == "tuple" else (root.name,)
        return sum(self._written_of(inside, name) for name in results)

    def _written_of(self, inside: Computation, name: str) -> float:
        instruction = inside.instructions[name]
        if instruction.opcode in ("dynamic-update-slice", "scatter"):
            update = instruction.operands[1 if instruction.opcode[0] == "d" else -1]
            return _bytes(inside.instructions[update].shapes)
        if instruction.opcode in _THROUGH:
            return self._written_of(inside, instruction.operands[0])
        if instruction.opcode == "fusion":
            return self._written(self._called(instruction, "calls"))
        return _bytes(instruction.shapes)

    def _plain_bytes(self, where: Computation, instruction: Instruction) -> float:
        result = _bytes(instruction.shapes)
        if instruction.opcode in _PARTS:
            return 2 * result
        if instruction.opcode in ("dynamic-update-slice", "scatter"):
            update = instruction.operands[1 if instruction.opcode[0] == "d" else -1]
            return 2 * _bytes(where.instructions[update].shapes)
        return self._operand_bytes(where, instruction.operands) + result

    def _operand_bytes(self, where: Computation, names: Iterable[str]) -> float:
        return sum(_bytes(where.instructions[name].shapes) for name in set(names))

    # What a kernel is for.

    def _kind(self, where: Computation, instruction: Instruction, matmul: float) -> str:
        if "fmha" in instruction.target:
            return "attention"
        lines = [instruction]
        if instruction.opcode == "fusion":
            lines += self._inside(self._called(instruction, "calls"))
        scopes = Counter(found[-1] for line in lines if (found := _SCOPE.findall(line.op_name)))
        if matmul:
            dots = {s[-1] for x in lines if x.opcode == "dot" and (s := _SCOPE.findall(x.op_name))}
            return next((kind for kind in ("loss", "adapters") if kind in dots), "matmuls")
        if instruction.opcode in ("copy", "copy-start", "transpose") or {
            line.opcode for line in lines
        } <= _FREE | {"fusion", "copy", "transpose", "reshape"}:
            return "copies"
        for kind in ("dropout", "optimizer"):
            if scopes[kind]:
                return kind
        return scopes.most_common(1)[0][0] if scopes else "other"

    def _inside(self, computation: Computation) -> Iterator[Instruction]:
        for instruction in computation.instructions.values():
            yield instruction
            if instruction.opcode == "fusion":
                yield from self._inside(self._called(instruction, "calls"))


def _bytes(shapes: tuple[Shape, ...]) -> float:
    return float(sum(shape.bytes for shape in shapes))
