"""What a compiled step needs, from shapes alone: the child process of `train.plan.planner`.

JAX compiles for CUDA on a machine without a GPU or a driver, given a card's description, and the
buffer assignment is then the one that a run would get. The platform must be chosen before JAX is
imported, hence the process: pickled `Request`s on standard input, the answer to each as a line of
JSON on standard output when it is there.
"""

import json
import pickle
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jllama.attention import Documents
from jllama.cli.compiler import CODES
from jllama.decode.generate import decoder, prefill
from jllama.decode.sampling import Sampling, make_choice
from jllama.folders.load import abstract_model
from jllama.lora import split
from jllama.loss import chunk_size
from jllama.sharding import (
    deal_rows,
    local_bytes,
    make_mesh,
    of_the_base,
    placed,
    platform_of,
    whole,
)
from train.optimizer import make_optimizer, split_learned
from train.plan.arithmetic import Step, between
from train.plan.cards import Gpu, devices_of
from train.plan.hlo import read_program
from train.plan.roofline import Prediction, Rates, predict
from train.step import Window, places_of, planned_bytes, start_state, train_step

Program = Literal["train", "prefill", "decode"]
GREEDY = Sampling(temperature=0)
# Layers of the models whose difference is what each further layer adds. Of layers that are cut the
# first few differ: 405B over `data=8,fsdp=8` takes 730 MiB for the fourth and fifth each, then 67.
SMALL, SMALL_CUT = (2, 3), (5, 7)
# Who may compute a matmul on a GPU, which the card's autotuner decides by time; and what to compile
# with so that one of them computes all.
MATMULS: dict[str, dict[str, bool]] = {
    "triton": {}, "cublaslt": {"xla_gpu_enable_triton_gemm": False},
}  # fmt: skip
# Of the room on a card: a sum this much below or above it is the plan.
BELOW, ABOVE = 0.9, 1.25


@dataclass(frozen=True)
class Request:
    """A program to compile. `gpu` None means the devices of this machine.

    Of a train step two small versions are compiled, and what each further layer adds is added on:
    layers are alike, and for 7B the sum was that of the whole to the MiB in four remats, as it was
    for ten layers of 70B over eight cards (tests/test_plan.py holds it for small ones). `whole`
    compiles the model as it is: None where the sum cannot stand for it (`needs_whole`), True in any
    case, False in none.
    """

    step: Step
    gpu: Gpu | None = None
    program: Program = "train"
    whole: bool | None = None
    room: int = 0  # bytes that a step may take on the card; 0 where they are not known
    text: str = ""  # file for the compiled program's HLO; a train step's other one is beside it
    rates: Rates | None = None  # what the time is predicted by; without them it is not
    sampling: Sampling = GREEDY  # of prefill and decode


class Weight(NamedTuple):
    """Bytes of a compiled program beside its arguments, by XLA's buffer assignment; its time."""

    own: int  # on the device
    host: int
    prediction: Prediction


def answer(request: Request) -> dict[str, Any]:
    """Bytes on one device by class, and microseconds by class."""
    mesh = make_mesh(devices_of(request.gpu, request.step.mesh.size), request.step.mesh)
    started = time.monotonic()
    weigh = weigh_training if request.program == "train" else weigh_generation
    return weigh(request, mesh) | {"compile_seconds": time.monotonic() - started}


def weigh_generation(request: Request, mesh: Mesh) -> dict[str, Any]:
    """Of the prefill or decode, whole, as it is compiled without autotuning."""
    lowered, classes = lower_generation(request.step, mesh, request.program, request.sampling)
    weight = compile_and_weigh(lowered, request)
    held = classes["cache"] if request.program == "prefill" else 0  # it makes the cache
    return as_answer(weight, classes | {"temporaries": weight.own - held})


def weigh_training(request: Request, mesh: Mesh) -> dict[str, Any]:
    """Of the train step: the memory of whoever computes the matmuls with more, Triton's time."""
    step, small = request.step, replace(request, text="")
    _, _, classes = training_arguments(step, mesh)
    held = sum(classes.values())
    sizes = SMALL if mesh.size == 1 else SMALL_CUT
    few, more = (
        compile_each(lower_training(with_layers(step, n), mesh), small, mesh) for n in sizes
    )
    far = (step.model.n_layers - sizes[0]) / (sizes[1] - sizes[0])
    weights = {who: extended(few[who], more[who], far) for who in few}
    summed = not needs_whole(request, held + max(weight.own for weight in weights.values()))
    if not summed:
        weights = compile_each(lower_training(step, mesh), request, mesh)
    most = max(weights, key=lambda who: weights[who].own)
    own, first = weights[most].own, next(iter(weights))
    layer = max(0, more[most].own - few[most].own) / (sizes[1] - sizes[0])
    saved = min(own, round(layer * step.model.n_layers))
    launched = more[first].prediction.kernels - few[first].prediction.kernels
    found = as_answer(
        weights[first], classes | {"saved_activations": saved, "temporaries": own - saved}
    )
    return found | {
        "host": weights[most].host,
        "layer_kernels": launched / (sizes[1] - sizes[0]) / step.accumulation,
        "peaks": {who: held + weight.own for who, weight in weights.items()},
        "summed": summed,
    }


def needs_whole(request: Request, peak: int) -> bool:
    """Whether a model is compiled whole, given the sum's peak.

    XLA computes again by itself what a card has no room for, so the sum stands only for a step that
    leaves some; nor does it for weights that learn (it was off by 10 %), or on a CPU.
    """
    step = request.step
    if request.whole is not None:
        return request.whole
    small = SMALL if step.mesh.size == 1 else SMALL_CUT
    alike = step.lora is not None and step.model.n_layers > small[1]
    return (
        bool(request.text)
        or not alike
        or BELOW * request.room <= peak <= ABOVE * request.room
        or not request.room
    )


def as_answer(timed: Weight, classes: dict[str, int]) -> dict[str, Any]:
    """What the planner is told of a program; of a train step there is more."""
    return {
        "classes": classes,
        "host": timed.host,
        "time_us": {kind: 1e6 * some for kind, some in timed.prediction.seconds.items()},
        "kernels": timed.prediction.kernels,
        "layer_kernels": 0.0,
        "exchanges": timed.prediction.exchanges,
        "exchanged": timed.prediction.exchanged,
        "peaks": {},
        "summed": False,
    }


def extended(few: Weight, more: Weight, times: float) -> Weight:
    """What a larger model would weigh, `times` as far from `few` as `more` is."""
    one, other = few.prediction, more.prediction
    kernels = one.kernels + times * (other.kernels - one.kernels)
    own = round(few.own + times * max(0, more.own - few.own))
    prediction = Prediction(
        between(one.seconds, other.seconds, times),
        round(kernels),
        between(one.exchanges, other.exchanges, times),
        between(one.exchanged, other.exchanged, times),
    )
    return Weight(own, few.host, prediction)


def compile_each(lowered: Any, request: Request, mesh: Mesh) -> dict[str, Weight]:
    """By who computes the matmuls; time is of the first, which is all on a CPU."""
    ways: dict[str, dict[str, Any]] = MATMULS if platform_of(mesh) == "gpu" else {"": {}}
    if request.step.base is not None and platform_of(mesh) == "gpu":
        ways = {"triton": dict(CODES)}  # it alone multiplies with codes
    found: dict[str, Weight] = {}
    for who, options in ways.items():
        beside = replace(request, rates=None, text=file_beside(request.text, who))
        found[who] = compile_and_weigh(lowered, beside if found else request, options)
    return found


def file_beside(file: str, part: str) -> str:
    """step.txt -> step.prefill.txt."""
    return str(Path(file).with_suffix(f".{part}{Path(file).suffix}")) if file else ""


def compile_and_weigh(
    lowered: Any, request: Request, options: Mapping[str, bool] = MappingProxyType({})
) -> Weight:
    """Compiles a program, predicts its time, and writes its HLO if the request names a file.

    Args:
        options: for XLA, beside the program's own.
    """
    compiled = lowered.compile(compiler_options=dict(options))
    prediction = Prediction()
    if request.rates or request.text:
        text = compiled.as_text()
        if request.text:
            Path(request.text).write_text(text, encoding="utf-8")
        if request.rates:
            prediction = predict(read_program(text), request.rates, loss_chunks(request.step))
    memory = compiled.memory_analysis()
    own = planned_bytes(memory) - memory.argument_size_in_bytes
    return Weight(own, memory.host_temp_size_in_bytes, prediction)


def loss_chunks(step: Step) -> int:
    """How often the loop of the loss runs, whose turns depend on the rows: all tokens learned."""
    positions = step.micro_batch_size * step.max_seq_len
    return -(-positions // chunk_size(positions, step.model.vocab_size))


def with_layers(step: Step, layers: int) -> Step:
    return replace(step, model=replace(step.model, n_layers=layers))


def lower_training(step: Step, mesh: Mesh) -> Any:
    """The train step, ready to compile."""
    arguments, static, _ = training_arguments(step, mesh)
    with jax.set_mesh(mesh):
        return train_step.lower(*arguments, **static)


def training_arguments(step: Step, mesh: Mesh) -> tuple[tuple, dict[str, Any], dict[str, int]]:
    """The shapes of the train step's arguments, its static ones, and bytes by class."""
    model = abstract_model(
        step.model, step.precision, remat=step.remat, platform=platform_of(mesh), lora=step.lora,
        base=step.base,
    )  # fmt: skip
    graphdef, learned, frozen = split_learned(model, "lora" if step.lora else "full")
    optimizer = make_optimizer(
        {"learned": learned, "frozen": frozen}, optax.constant_schedule(1e-4),
        name=step.optimizer, weight_decay=0.01, max_grad_norm=1.0, accumulation=step.accumulation,
    )  # fmt: skip
    state = jax.eval_shape(lambda a, b: start_state(a, b, optimizer), learned, frozen)
    key = jax.eval_shape(lambda: jax.random.key(0))
    shape = (step.accumulation, step.micro_batch_size * step.mesh.rows, step.max_seq_len)
    ids: Any = jax.ShapeDtypeStruct(shape, jnp.int32)
    mask: Any = jax.ShapeDtypeStruct(shape, jnp.bool_)
    window = Window(ids, ids, mask, *((ids, rows_of(step, shape)) if step.documents else ()))

    state = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        state, places_of(state, frozen, mesh),
    )  # fmt: skip
    arguments = (
        state,
        placed(frozen, of_the_base(mesh)),
        placed(window, lambda *_: deal_rows(mesh, 1)),
        placed(key, lambda *_: whole(mesh)),
    )
    accumulator = local_bytes(optax.tree.get(state.optimizer, "acc_grads"))
    classes = {
        "base_weights": local_bytes(arguments[1]),
        "adapters" if step.lora else "learned_weights": local_bytes(state.learned),
        "optimizer_state": local_bytes(state.optimizer) - accumulator,
        "accumulator": accumulator,
        "batch": local_bytes((*arguments[2:], state.step)),
    }
    static = {"graphdef": graphdef, "optimizer": optimizer, "mesh": mesh}
    return arguments, static, classes


def rows_of(step: Step, shape: tuple[int, int, int]) -> tuple[Documents, ...]:
    """The shapes of packed documents' rows in a window `[k, B, T]`."""
    k, B, _ = shape
    places: Any = jax.ShapeDtypeStruct(shape, jnp.int32)
    rows: list[Any] = [jax.ShapeDtypeStruct((k, n * B, L), jnp.int32) for n, L in step.documents]
    return tuple(Documents(some, places) for some in rows)


def lower_generation(
    step: Step, mesh: Mesh, program: Program, sampling: Sampling
) -> tuple[Any, dict[str, int]]:
    """The lowered prefill or decode for `micro_batch_size` prompts and `max_seq_len` slots."""
    model = abstract_model(
        step.model, step.precision, platform=platform_of(mesh), lora=step.lora, base=step.base
    )
    graphdef, adapters, base = split(model)
    B, slots = step.micro_batch_size, step.max_seq_len
    weights = placed(
        (adapters, base, jax.ShapeDtypeStruct((), jnp.float32)),
        of_the_base(mesh),
    )
    choice = jax.eval_shape(lambda: make_choice(sampling, [0] * B, [0] * B))
    prompts = (
        jax.ShapeDtypeStruct((B, slots // 2), jnp.int32),
        jax.ShapeDtypeStruct((B,), jnp.int32),
    )
    prompts, choice = placed((prompts, choice), lambda *_: whole(mesh))
    state, _ = prefill.eval_shape(weights, *prompts, choice, graphdef=graphdef, slots=slots)
    state = placed(state, lambda *_: whole(mesh))
    classes = {
        "base_weights": local_bytes(weights[1]),
        "adapters": local_bytes(weights[0]),
        "cache": local_bytes(state.cache),
    }
    if program == "prefill":
        return prefill.lower(weights, *prompts, choice, graphdef=graphdef, slots=slots), classes
    return decoder(base).lower(weights, state, choice, graphdef=graphdef), classes


if __name__ == "__main__":
    for request in pickle.load(sys.stdin.buffer):
        print(json.dumps(answer(request)), flush=True)
