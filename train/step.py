"""One compiled call per optimizer step."""

import functools
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from jllama.attention import Documents
from jllama.cli.compiler import CODES, READING, TRAINING
from jllama.loss import cross_entropy
from jllama.quantize.weights import in_codes
from jllama.sharding import (
    deal_rows,
    make_mesh,
    of_the_base,
    over_dealt_rows,
    path_name,
    put,
    whole,
)
from train.optimizer import take_norms, tree_norm


class Window(NamedTuple):
    """The rows of one optimizer step: k micro-batches of B rows of T positions."""

    tokens: Int[Array | np.ndarray, "k B T"]
    targets: Int[Array | np.ndarray, "k B T"]
    mask: Bool[Array | np.ndarray, "k B T"]  # True where the target is learned
    # Of packed rows: the position of each token in its document, and where each document lies.
    positions: Int[Array | np.ndarray, "k B T"] | None = None
    documents: tuple[Documents, ...] | None = None  # their arrays `[k, ...]`


@runtime_checkable
class AnyWindow(Protocol):
    """A `Window`, or another named tuple with its fields and more, which a given loss reads."""

    @property
    def tokens(self) -> Any: ...
    @property
    def targets(self) -> Any: ...
    @property
    def mask(self) -> Any: ...
    @property
    def positions(self) -> Any: ...
    @property
    def documents(self) -> Any: ...


_W = TypeVar("_W", bound=AnyWindow)


class TrainState(NamedTuple):
    """Everything that changes; what a resume needs."""

    step: Int[Array, ""]
    learned: nnx.State  # the adapters, or with full tuning every weight; fp32
    optimizer: optax.OptState


class StepMetrics(NamedTuple):
    """Of one window: summed cross-entropy (nats), supervised tokens, norm of the gradient.

    `skipped` is True where the gradient was not finite and the step changed nothing.
    """

    loss_sum: Float[Array, ""]
    tokens: Int[Array, ""]
    grad_norm: Float[Array, ""]
    update_ratio: Float[Array, ""]  # norm of the update over norm of what learns
    skipped: Bool[Array, ""]


# Of the last hidden states `[B, T, D]`, the head `[V, D]` and the rows of a micro-batch (arrays
# `[B, T]`): the loss in nats, summed over the supervised tokens. The step divides by their number
# in the whole window. Of several devices each calls it with its own rows.
Loss = Callable[[Array, Array, Any], Array]


def next_token_loss(
    x: Float[Array, "B T D"], head: Float[Array, "V D"], rows: AnyWindow, head_learns: bool
) -> Float[Array, ""]:
    """Cross-entropy of the targets, where no other loss is given."""
    return cross_entropy(x, head, rows.targets, rows.mask, head_learns)


def summed_loss(
    learned: nnx.State,
    frozen: nnx.State,
    rows: AnyWindow,
    key: Key[Array, ""] | None,
    graphdef: nnx.GraphDef,
    loss: Loss | None = None,
) -> Float[Array, ""]:
    """Loss of one micro-batch (arrays `[B, T]`), summed over its supervised tokens."""
    model = nnx.merge(graphdef, learned, frozen, copy=True)
    x = model.hidden(rows.tokens, rows.positions, rows.documents, key)
    head_learns = not jax.tree.leaves(frozen)
    head = model.head_weight.matrix(model.head_weight.dtype)  # as stored: its gradient is, too
    of_rows = loss or functools.partial(next_token_loss, head_learns=head_learns)
    return over_dealt_rows(lambda x, rows, head: of_rows(x, head, rows))(x, rows, head)


def start_state(
    learned: nnx.State, frozen: nnx.State, optimizer: optax.GradientTransformation
) -> TrainState:
    """Step 0, with zero moments and an empty accumulator."""
    # bf16 weights would lose small updates: what learns is an fp32 master of them.
    learned = jax.tree.map(lambda x: x.astype(jnp.float32), learned)
    moments = optimizer.init({"learned": learned, "frozen": frozen})
    return TrainState(jnp.zeros((), jnp.int32), learned, moments)


def initial_state(
    learned: nnx.State,
    frozen: nnx.State,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
) -> TrainState:
    """`start_state` where the step leaves it: placed elsewhere, step 2 would compile again.

    Args:
        mesh: by default the first device alone.
    """
    state = start_state(learned, frozen, optimizer)
    mesh = mesh or make_mesh(jax.local_devices()[:1])
    return put(state, places_of(state, frozen, mesh))


def places_of(state: TrainState, frozen: nnx.State, mesh: Mesh) -> TrainState:
    """Where each array of a state lies.

    Adapters and their moments are whole on every device. Without a base beside them all weights
    learn, and they and their moments lie as a base would.
    """
    cut = of_the_base(mesh)
    adapters = bool(jax.tree.leaves(frozen))

    def place(path, leaf):
        return whole(mesh) if adapters else cut(path_name(path), leaf.shape)

    return jax.tree_util.tree_map_with_path(place, state)


@functools.partial(
    jax.jit,
    static_argnames=("graphdef", "optimizer", "mesh", "loss"),
    donate_argnames=("state",),
    compiler_options=dict(TRAINING),
)
def train_step(
    state: TrainState,
    frozen: nnx.State,
    window: AnyWindow,
    key: Key[Array, ""],
    *,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
    loss: Loss | None = None,
) -> tuple[TrainState, StepMetrics]:
    """Learns from one window.

    The loss of a micro-batch is its summed loss over the number of supervised tokens of the whole
    window, so the sum of k gradients is the gradient of the big batch, whatever the rows hold.

    Args:
        frozen: weights that do not learn; an argument, never differentiated, donated or copied.
        key: the run's key; the step's number is folded in here, so a resume needs no generator.
        mesh: where there are several devices: the state stays where `initial_state` puts it.
        loss: by default the cross-entropy of the targets.
    """
    supervised = jnp.sum(window.mask)
    step_key = jax.random.fold_in(key, state.step)

    def share(learned, rows, micro_key):
        total = summed_loss(learned, frozen, rows, micro_key, graphdef, loss)
        return total / jnp.maximum(supervised, 1).astype(total.dtype), total

    def micro_step(carry, rows):
        learned, moments, index = carry
        micro_key = jax.random.fold_in(step_key, index)
        grads, total = jax.grad(share, has_aux=True)(learned, rows, micro_key)
        with jax.named_scope("optimizer"):
            # multi_transform takes a whole model; the frozen part is dead in the compiled step.
            nothing = jax.tree.map(jnp.zeros_like, frozen)
            updates, moments = optimizer.update(
                {"learned": grads, "frozen": nothing},
                moments,
                {"learned": learned, "frozen": frozen},
            )
            learned = optax.apply_updates(learned, updates["learned"])
        return (learned, moments, index + 1), total

    with jax.named_scope("optimizer"):
        size = tree_norm(state.learned)
    carry = (state.learned, state.optimizer, jnp.zeros((), jnp.int32))
    (learned, moments, _), losses = jax.lax.scan(micro_step, carry, window)
    norm, moved, moments = take_norms(moments)
    metrics = StepMetrics(jnp.sum(losses), supervised, norm, moved / size, ~jnp.isfinite(norm))
    state = TrainState(state.step + 1, learned, moments)
    if mesh is not None and mesh.size > 1:  # else XLA would choose places of its own
        state = jax.lax.with_sharding_constraint(state, places_of(state, frozen, mesh))
    return state, metrics


@functools.partial(jax.jit, static_argnames=("graphdef", "loss"), compiler_options=dict(READING))
def eval_step(
    learned: nnx.State,
    frozen: nnx.State,
    window: AnyWindow,
    *,
    graphdef: nnx.GraphDef,
    loss: Loss | None = None,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Summed loss and supervised tokens of a window, without dropout."""

    def micro_step(total, rows):
        return total + summed_loss(learned, frozen, rows, None, graphdef, loss), None

    total, _ = jax.lax.scan(micro_step, jnp.zeros(()), window)
    return total, jnp.sum(window.mask)


def deal(window: _W, mesh: Mesh) -> _W:
    """A window on the devices, its rows dealt to them."""
    return put(window, jax.tree.map(lambda _: deal_rows(mesh, 1), window))


def evaluate(
    learned: nnx.State,
    frozen: nnx.State,
    windows: Iterable[AnyWindow],
    graphdef: nnx.GraphDef,
    loss: Loss | None = None,
) -> tuple[float, int]:
    """Loss per supervised token (nats) over all windows, and how many tokens they have."""
    total, tokens = 0.0, 0
    for window in windows:
        more = eval_step(learned, frozen, window, graphdef=graphdef, loss=loss)
        total, tokens = total + float(more[0]), tokens + int(more[1])
    return total / max(1, tokens), tokens


class Programs:
    """`train_step`, compiled once for each shape of window: another placement is an error.

    `planned_bytes` is what XLA's buffer assignment of the largest takes on one device,
    `compile_seconds` how long all of them took to compile.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        optimizer: optax.GradientTransformation,
        mesh: Mesh | None = None,
        loss: Loss | None = None,
    ):
        self._static: dict[str, Any] = {
            "graphdef": graphdef, "optimizer": optimizer, "mesh": mesh, "loss": loss,
        }  # fmt: skip
        self._compiled: dict[tuple[int, ...], Any] = {}
        self.planned_bytes = 0
        self.compile_seconds = 0.0

    def __call__(
        self, state: TrainState, frozen: nnx.State, window: AnyWindow, key: Key[Array, ""]
    ) -> tuple[TrainState, StepMetrics]:
        shape = window.tokens.shape
        if shape not in self._compiled:
            started = time.perf_counter()
            lowered = train_step.lower(state, frozen, window, key, **self._static)
            program = lowered.compile(compiler_options=options_for(frozen))
            self.compile_seconds += time.perf_counter() - started
            self._compiled[shape] = program
            size = planned_bytes(program.memory_analysis())
            self.planned_bytes = max(self.planned_bytes, size)
        return self._compiled[shape](state, frozen, window, key)

    def has(self, window: AnyWindow) -> bool:
        """Whether the step of such a window is compiled."""
        return window.tokens.shape in self._compiled

    def text(self, window: AnyWindow) -> str:
        """The compiled step of such a window, as XLA prints it."""
        return self._compiled[window.tokens.shape].as_text()

    @property
    def compilations(self) -> int:
        """Of steps by these programs, and of `eval_step` in this process; a run needs one of it."""
        return len(self._compiled) + eval_step._cache_size()  # type: ignore[attr-defined]


def options_for(frozen: nnx.State) -> dict[str, Any]:
    """What XLA is asked for beside `TRAINING`."""
    return dict(CODES) if in_codes(frozen) else {}


def planned_bytes(memory: Any) -> int:
    """Arguments, temporaries and what is put out beside donated arguments, on one device."""
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + fresh
