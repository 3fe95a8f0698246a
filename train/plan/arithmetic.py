"""Closed formulas: what a step holds and computes, from sizes alone.

The terms of a token's operations, with N the parameters in matmuls, T the length, q = heads * head
size, and one multiply-add as two operations:

    forward 2N + 2TqL    gradients of activations 2N + 5TqL (scores are computed again)
    adapters 6 per parameter    full tuning: 2N more
    remat: what is recomputed, once more, but w2, whose product no gradient wants

Causal attention is counted once: half of T x T.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from jllama.config import (
    Base,
    LlamaConfig,
    LoraConfig,
    Precision,
    Remat,
    linear_shapes,
    weight_bytes,
)
from jllama.sharding import ONE_DEVICE, MeshShape
from train.config import OptimizerName

BYTES = {"bf16": 2, "fp32": 4}
ADAPTER_BYTES = 4  # what learns is fp32
# Arrays of the learned parameters' size that an optimizer keeps as moments.
MOMENTS = {"adamw": 2, "lion": 1}


@dataclass(frozen=True)
class Step:
    """What a plan is made for: one optimizer step of one model."""

    model: LlamaConfig
    lora: LoraConfig | None  # None: every weight learns
    precision: Precision
    remat: Remat
    micro_batch_size: int
    max_seq_len: int
    accumulation: int = 8
    optimizer: OptimizerName = "adamw"
    documents: tuple[tuple[int, int], ...] = ()  # packing: rows for each sequence, their length
    mesh: MeshShape = ONE_DEVICE
    base: Base | None = None  # the format of the frozen linears, if they are in codes

    def of_length(self, tokens: int) -> "Step":
        """The same with sequences of another length, as densely packed."""
        share = tokens / self.max_seq_len
        rows = ((max(1, round(n * share)), min(length, tokens)) for n, length in self.documents)
        return replace(self, max_seq_len=tokens, documents=tuple(rows))

    @property
    def attended(self) -> float:
        """Positions that attention computes for a token, causal or not."""
        pairs = sum(rows * length**2 for rows, length in self.documents)
        return pairs / self.max_seq_len if self.documents else self.max_seq_len

    @property
    def learned(self) -> int:
        """Parameters that learn."""
        model = self.model
        return self.lora.parameter_count(model) if self.lora else model.parameter_count


def matmul_parameters(model: LlamaConfig) -> tuple[int, int, int]:
    """(all, of the head, of the feed-forward layers) parameters that a token is multiplied with."""
    sizes = {name: outs * ins for name, (outs, ins) in linear_shapes(model).items()}
    head = model.vocab_size * model.dim
    feed = model.n_layers * (sizes["w1"] + sizes["w2"] + sizes["w3"])
    return head + model.n_layers * sum(sizes.values()), head, feed


def flops_per_token(step: Step) -> float:
    """Floating-point operations of training on one token."""
    weights, head, feed = matmul_parameters(step.model)
    attended = step.attended * step.model.query_dim * step.model.n_layers  # T q L
    forward = 2 * weights + 2 * attended
    backward = 2 * weights + 5 * attended
    down = step.model.n_layers * step.model.hidden_dim * step.model.dim  # w2
    again = {
        "none": 0.0,
        "dots": 0.0,
        "offload": 2 * attended,
        "ffn": 2.0 * (feed - down),
        "block": 2 * (weights - head - down) + 2 * attended,
    }[step.remat]
    learning = 6 * step.learned if step.lora else 2 * weights
    return forward + backward + again + learning


def memory_classes(step: Step) -> dict[str, int]:
    """Bytes on one GPU of what stays between steps; weights lie cut over the GPUs."""
    weights = weight_bytes(step.model, step.precision, step.base)
    frozen = weights // step.mesh.parts if step.lora else 0
    learned = step.learned * ADAPTER_BYTES // (1 if step.lora else step.mesh.parts)
    return {
        "base_weights": frozen,
        "adapters" if step.lora else "learned_weights": learned,
        "optimizer_state": MOMENTS.get(step.optimizer, 0) * learned,
        "accumulator": learned,
    }


def saved_activations(step: Step) -> int:
    """Bytes that wait for the backward pass, by what `remat` keeps of every block.

    In units of one token's stream (D), of its queries (N * H), which are as large as what its heads
    have seen, of its keys or values (K * H) and of its hidden layer (F).
    """
    model = step.model
    stream, queries, keys, hidden = model.dim, model.query_dim, model.kv_dim, model.hidden_dim
    kept = {
        "none": 2 * stream + 2 * queries + 2 * keys + 2 * hidden,
        "dots": 2 * stream + 2 * queries + 2 * keys + 2 * hidden,
        "offload": stream,
        "ffn": 2 * stream + 2 * queries + 2 * keys,
        "block": stream,
    }[step.remat]
    # What attention reads and gives lies in the rows of the documents, and waits there.
    rows = sum(n * length for n, length in step.documents) / step.max_seq_len
    if rows and step.remat not in ("block", "offload"):
        kept += round((rows - 1) * (2 * queries + 2 * keys))
    tokens = step.micro_batch_size * step.max_seq_len
    kept += _read_by_adapters(step)
    return tokens * model.n_layers * kept * BYTES[step.precision]


def _read_by_adapters(step: Step) -> int:
    """Numbers of a token and block that wait for the gradients of A, in a frozen block for nothing.

    Adapters that read the same have one copy, dropped out; beside w2's waits what it is made of.
    """
    if step.lora is None or step.remat in ("block", "offload"):
        return 0
    model, targets = step.model, set(step.lora.targets)
    kept = model.dim if targets & {"wq", "wk", "wv"} else 0
    kept += model.query_dim if "wo" in targets else 0
    if step.remat == "ffn":
        return kept
    kept += model.dim if targets & {"w1", "w3"} else 0
    return kept + (2 * model.hidden_dim if "w2" in targets else 0)


def working_memory(step: Step) -> int:
    """Bytes of one block's forward and backward pass, and of the loss's chunk of logits."""
    tokens = step.micro_batch_size * step.max_seq_len
    model, size = step.model, BYTES[step.precision]
    block = tokens * (4 * model.hidden_dim + 4 * model.dim + 2 * model.query_dim) * size
    # nf4 is made into matrices before it is multiplied with, a few at a time.
    unfused = step.base is not None and step.base.format == "nf4"
    copies = 3 * model.hidden_dim * model.dim * size if unfused else 0
    return block + copies + 128 * 2**20


def widened_weights(step: Step) -> int:
    """Bytes of the fp32 copies of frozen weights where XLA has no product of bf16 on a CPU.

    XLA keeps one of each for the forward pass of all micro-batches, one for the backward pass, and
    one of the head.
    """
    if step.precision == "fp32" or step.lora is None or step.base:
        return 0
    weights, head, _ = matmul_parameters(step.model)
    return BYTES["fp32"] * (2 * (weights - head) + head)


def bound_tokens_per_second(step: Step, flops: float, bandwidth: float) -> float:
    """Tokens a second that no step can pass on a card with these rates.

    A micro-batch takes at least the time of its operations, and of reading the weights of its
    blocks once forward, once backward, and once more where a remat runs the block again. Left out
    is what some steps are spared: the head, where few tokens are supervised, and behind frozen
    embeddings the first block's backward pass.
    """
    if not flops or not bandwidth:
        return 0.0  # a card whose rates are not known
    model = step.model
    weights, head, _ = matmul_parameters(model)
    block = (weights - head) / model.n_layers
    spared: float = 4 * head
    if step.lora:
        spared += 2 * block + 5 * step.attended * model.query_dim
    tokens = step.micro_batch_size * step.max_seq_len
    computing = tokens * (flops_per_token(step) - spared) / flops
    again = {"block": block - model.hidden_dim * model.dim}.get(step.remat, 0.0)
    read = model.n_layers * (2 * block + again) - (block if step.lora else 0)
    others = (model.parameter_count - (weights - head)) * BYTES[step.precision]
    held = weight_bytes(model, step.precision, step.base) - others  # bytes of all linears
    reading = read * held / (weights - head) / step.mesh.parts / bandwidth
    computing /= step.mesh.tensor
    return tokens * step.mesh.rows / max(computing, reading)


def between(few: Mapping[str, float], many: Mapping[str, float], share: float) -> dict[str, float]:
    """On the line through two points, entry by entry; never below 0."""
    return {
        name: max(0.0, few.get(name, 0) + share * (many.get(name, 0) - few.get(name, 0)))
        for name in {**few, **many}
    }
