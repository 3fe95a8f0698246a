"""In which sizes the suite measures: those of a card, and tiny ones to try it out."""

from dataclasses import dataclass
from typing import NamedTuple

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


@dataclass(frozen=True)
class Setting:
    """A training step: a preset with random bf16 weights, LoRA r 16, one micro-batch."""

    model: str
    micro_batch_size: int
    max_seq_len: int
    remat: str
    packing: bool = False
    targets: str = "wq,wv"
    profile: bool = False  # whether the time of each class of kernels is taken, too

    @property
    def shape(self) -> str:
        """4x4096, and the model's size where it is not the usual one."""
        size = {"llama-3-8b": "8b-"}.get(self.model, "")
        return f"{size}{self.micro_batch_size}x{self.max_seq_len}"

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.remat}{'-packed' if self.packing else ''}"

    @property
    def flags(self) -> list[object]:
        """Those that `train.speed` and `train.plan` have in common."""
        return [
            "--model", self.model, "--precision", "bf16", "--remat", self.remat,
            "--micro-batch-size", self.micro_batch_size, "--max-seq-len", self.max_seq_len,
            "--gradient-accumulation-steps", 1, "--lora-targets", self.targets,
            *(["--packing"] if self.packing else []),
        ]  # fmt: skip


class Sizes(NamedTuple):
    """How much a suite measures."""

    training: tuple[Setting, ...]
    generation: str  # preset
    batches: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    steps: int
    repeated: Setting  # 20 steps of it in two processes,
    repeated_with: tuple[str, ...]  # with each of these flags of XLA
    copied: int  # fp32 numbers
    matmul: int  # rows and columns


_7B, _8B, _TINY = "llama-2-7b", "llama-3-8b", "sample"
# 8B is the setting of NeMo AutoModel's published 12,473 tokens/s on an H100. A base that is stored
# in another way is a further field of `Setting`, and a row of it for each.
CARD = Sizes(
    training=(
        Setting(_7B, 4, 4096, "none", profile=True),
        Setting(_7B, 4, 4096, "block", profile=True),
        Setting(_7B, 4, 4096, "none", packing=True),
        Setting(_8B, 2, 4096, "none", targets="all"),
        Setting(_7B, 8, 1024, "none"),
        Setting(_7B, 8, 1024, "block", profile=True),
        Setting(_7B, 1, 512, "none"),
        Setting(_7B, 1, 512, "block"),
        Setting(_7B, 4, 4096, "dots"),
        Setting(_7B, 8, 1024, "dots"),
        Setting(_7B, 1, 512, "dots"),
    ),
    generation=_7B,
    batches=(1, 32),
    prompt_tokens=128,
    new_tokens=129,
    steps=8,
    repeated=Setting(_7B, 1, 512, "block"),
    repeated_with=("", DETERMINISTIC),
    copied=2**30,
    matmul=8192,
)
TINY = Sizes(
    training=(
        Setting(_TINY, 2, 64, "block", profile=True),
        Setting(_TINY, 1, 320, "dots", packing=True),
    ),
    generation=_TINY,
    batches=(2,),
    prompt_tokens=8,
    new_tokens=9,
    steps=2,
    repeated=Setting(_TINY, 1, 32, "none"),
    repeated_with=("",),
    copied=2**22,
    matmul=256,
)
