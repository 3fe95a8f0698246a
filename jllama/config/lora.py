"""An adapter's settings, and the arrays that it has on a model."""

import math

from jllama.config.llama import LlamaConfig, tensor_shapes
from jllama.errors import AtLeast1, Positive, Share, checked
from jllama.names import linear_names


@checked
class LoraConfig:
    """Rank, scale, input dropout and the linears that get an adapter.

    The scale is alpha / rank, with rsLoRA alpha / sqrt(rank) (Kalajdzievski, 2023). DoRA (Liu et
    al., 2024) adds a learned magnitude for every output.
    """

    rank: AtLeast1 = 16
    alpha: Positive = 32.0
    dropout: Share = 0.05
    targets: tuple[str, ...] = ("wq", "wv")
    rslora: bool = False
    dora: bool = False

    def __post_init__(self):
        object.__setattr__(self, "targets", linear_names(",".join(self.targets)))

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def shapes(self, config: LlamaConfig) -> dict[str, tuple[int, ...]]:
        """The adapter's arrays by name: `layers.0.attention.wq.lora.a` `[R, in]`, `.b` `[out, R]`.

        DoRA adds `.magnitude` `[out]`.
        """
        found: dict[str, tuple[int, ...]] = {}
        for block in tensor_shapes(config).values():
            for tensor, shape in block.items():
                linear = tensor.removesuffix(".weight")
                if linear.rpartition(".")[2] in self.targets:
                    outs, ins = shape
                    found |= {f"{linear}.lora.a": (self.rank, ins)}
                    found |= {f"{linear}.lora.b": (outs, self.rank)}
                    found |= {f"{linear}.lora.magnitude": (outs,)} if self.dora else {}
        return found

    def parameter_count(self, config: LlamaConfig) -> int:
        """rank * (in + out) for every adapted linear, with DoRA + out."""
        return sum(math.prod(shape) for shape in self.shapes(config).values())
