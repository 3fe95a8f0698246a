"""Every setting of a training run: one dataclass, one field a flag."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
import yaml

import jllama
from jllama.checkpoint import read_config
from jllama.cli import settings_from_yaml
from jllama.config import PRESETS, LlamaConfig, LoraConfig, PrecisionName, config_from_meta
from jllama.errors import InputError
from jllama.files import read_json
from jllama.model import Remat
from jllama.prompt import PromptStyle
from jllama.tokenizer import load_tokenizer
from train.optimizer import OptimizerName, Scheduler, Tune

RECIPES = Path(__file__).parent / "recipes"
LATEST = Path("runs/latest")


@dataclass(frozen=True)
class TrainConfig:
    """Fine-tune a LLaMA with LoRA; without --model, the bundled sample by recipes/sample.yaml.

    --config FILE reads defaults from a YAML file (a recipe, or a run's config.yaml); flags
    override it. --resume RUN (or --resume latest) continues a run with its own settings.
    """

    model: Annotated[str, tyro.conf.arg(metavar="DIR")] = "models/sample"
    """Model folder; with --dry-run also a preset such as llama-2-7b."""
    data: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Rows: JSON or JSONL with instruction/input/output, prompt/completion or messages."""
    output_dir: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""
    """Run folder to make; by default runs/MODEL-TIME, with a link runs/latest."""
    precision: PrecisionName = "bf16"
    """Of frozen weights and activations; what learns, its moments and the loss are fp32."""

    prompt_style: PromptStyle = "plain"
    """How a row becomes text; saved with the adapter."""
    max_seq_len: int = 512
    """Tokens a row may have, and with --packing the length of a sequence."""
    train_on_prompt: bool = False
    """Learn the prompt as well as the answer."""
    packing: bool = False
    """Put several rows into one sequence; they do not see each other."""
    length_buckets: int = 1
    """Without --packing: lengths to which rows are padded, each compiled once; a step's rows are
    of one of them."""
    shuffle: bool = True
    """A new order every epoch, a function of seed and epoch."""
    skip_bad_rows: int = 0
    """Rows without anything to learn that may be left out; one more is an error."""
    val_size: float = 0.0
    """Rows held out for evaluation: a share below 1, or a number."""

    tune: Tune = "lora"
    """What learns: adapters, or every weight (full); the result is then a model folder."""
    lora_rank: int = 16
    """Rank R of the adapters."""
    lora_alpha: float = 32.0
    """The adapter's output is multiplied by alpha / rank."""
    lora_dropout: float = 0.05
    """Dropout of the adapter's input while training."""
    lora_targets: str = "wq,wv"
    """Linears that get an adapter: wq,wk,wv,wo,w1,w2,w3 (or q_proj, ...), or all."""
    init_adapter: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""
    """A PEFT adapter to start from; it brings its own rank, alpha and targets."""
    force: bool = False
    """Start from an adapter whose passport names another base model."""
    ffn_bias: bool = False
    """Feed-forward linears with zero biases, as the original report counted them."""

    rslora: bool = False
    """rsLoRA: scale by alpha / sqrt(rank)."""
    dora: bool = False
    """DoRA: learn the length of every row of the weights apart from its direction."""

    optimizer: OptimizerName = "adamw"
    """Rule of optax."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    lora_plus_ratio: float = 1.0
    """LoRA+: how many times faster B learns than A."""
    lr_scheduler: Scheduler = "cosine"
    """Decay after the warm-up."""
    warmup_ratio: float = 0.03
    """Share of the optimizer steps in which the rate rises."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Global norm to which the gradient of a step is clipped; 0 does not clip."""

    epochs: int = 3
    """Passes over the data."""
    max_steps: int = 0
    """Optimizer steps to stop after; 0 runs all epochs."""
    micro_batch_size: int | Literal["auto"] = 4
    """Sequences in one forward pass; auto: the fastest that is planned to fit the device, with
    --gradient-accumulation-steps as the number of sequences of a step."""
    gradient_accumulation_steps: int = 4
    """Micro-batches in one optimizer step."""
    remat: Remat | Literal["auto"] = "block"
    """What the backward pass recomputes: nothing; all but matmuls (dots), which may wait in the
    host's memory (offload); ffn_norm + feed_forward (ffn); or whole blocks. auto: the least that
    is planned to fit."""

    eval_steps: int = 0
    """Optimizer steps between evaluations; 0 evaluates before the first and after each epoch."""
    patience: int = 0
    """Evaluations without a lower held-out loss after which a run ends; 0 never ends it."""
    save_steps: int = 0
    """Optimizer steps between saves of the state; 0 saves after each epoch."""
    save_total_limit: int = 2
    """Newest states that are kept."""
    wandb_project: str = ""
    """Also log to this Weights & Biases project, if wandb is installed."""
    seed: int = 0
    """Of the adapters, the order, the dropout and the held-out rows."""
    resume: Annotated[str, tyro.conf.arg(metavar="RUN")] = ""
    """Run folder (or latest) to continue, with its own settings."""
    dry_run: bool = False
    """Print settings and counts, allocate nothing."""

    def __post_init__(self):
        positive = (
            "max_seq_len", "length_buckets", "epochs", "micro_batch_size",
            "gradient_accumulation_steps", "learning_rate", "lora_plus_ratio", "save_total_limit",
        )  # fmt: skip
        not_negative = (
            "skip_bad_rows", "val_size", "warmup_ratio", "weight_decay", "max_grad_norm",
            "max_steps", "eval_steps", "save_steps", "patience", "seed",
        )  # fmt: skip
        wrong = [f"{name} {getattr(self, name)}, expected above 0" for name in positive
                 if getattr(self, name) != "auto" and getattr(self, name) <= 0]  # fmt: skip
        wrong += [f"{name} {getattr(self, name)}, expected 0 or more"
                  for name in not_negative if getattr(self, name) < 0]  # fmt: skip
        if self.warmup_ratio >= 1:
            wrong.append(f"warmup_ratio {self.warmup_ratio}, expected below 1")
        if self.packing and self.length_buckets > 1:
            wrong.append("packing and length_buckets, expected one of them")
        if self.tune == "full":
            only_lora = ("init_adapter", "ffn_bias", "rslora", "dora")
            wrong += [f"tune full and {name}, which is for adapters"
                      for name in only_lora if getattr(self, name)]  # fmt: skip
            if self.lora_plus_ratio != 1:
                wrong.append("tune full and lora_plus_ratio, which is for adapters")
        if wrong:
            raise InputError("; ".join(wrong))

    @property
    def lora(self) -> LoraConfig:
        """The flags' adapter; an initial adapter brings its own."""
        return LoraConfig(
            rank=self.lora_rank,
            alpha=self.lora_alpha,
            dropout=self.lora_dropout,
            targets=tuple(self.lora_targets.split(",")),
            rslora=self.rslora,
            dora=self.dora,
        )


def model_sizes(model: str) -> LlamaConfig:
    """Of a preset, the bundled sample (converted or not) or a model folder.

    Raises:
        InputError: if it is none of them.
    """
    if model in PRESETS:
        return PRESETS[model]
    if not Path(model).exists() and "/" not in model:
        raise InputError(
            f"{model!r} is neither a model folder nor a preset; presets: {', '.join(PRESETS)}"
        )
    if model == TrainConfig.model and not Path(model).exists():
        params = read_json(jllama.SAMPLE / "params.json")
        return config_from_meta(params, load_tokenizer(jllama.SAMPLE).vocab_size, tied=False)
    return read_config(model)


def write_config(config: TrainConfig, path: Path) -> None:
    """The resolved settings as YAML; `--config` reads them back."""
    path.write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False), encoding="utf-8")


def read_defaults(argv: Sequence[str]) -> tuple[TrainConfig | None, list[str]]:
    """Takes `--config FILE` or `--resume RUN` out of the arguments and reads what it names.

    For the bundled sample the defaults are its own recipe.

    Raises:
        InputError: if the file is missing or has unknown fields, or --resume is not alone.
    """
    rest, resumed = _take("--resume", argv)
    if resumed is not None:
        if rest:
            raise InputError(f"--resume takes its settings from the run; drop {' '.join(rest)}")
        run = LATEST if resumed == "latest" else Path(resumed)
        if not (run / "config.yaml").is_file():
            raise InputError(f"{run}: no config.yaml; --resume wants a run folder of train.lora")
        config = settings_from_yaml(TrainConfig, run / "config.yaml")
        return dataclasses.replace(config, resume=str(run)), []
    rest, named = _take("--config", argv)
    file = Path(named) if named else None
    given = [word.partition("=")[0] for word in rest]
    model = _take("--model", rest)[1] or TrainConfig.model
    if file is None and model == TrainConfig.model and not {"--data", "-h", "--help"} & set(given):
        file = RECIPES / "sample.yaml"
    return (None if file is None else settings_from_yaml(TrainConfig, file)), rest


def _take(flag: str, argv: Sequence[str]) -> tuple[list[str], str | None]:
    """The arguments without a flag, and the flag's value."""
    rest = list(argv)
    for index, word in enumerate(rest):
        name, equals, value = word.partition("=")
        if name == flag:
            end = index + 1 if equals else index + 2
            value = value if equals else "".join(rest[index + 1 : end])
            if not value or value.startswith("--"):
                raise InputError(f"{flag} wants a value")
            return rest[:index] + rest[end:], value
    return rest, None
