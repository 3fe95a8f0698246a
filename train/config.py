"""Every setting of a training run: one class, one declaration a field."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import tyro
import yaml

from jllama import bundled
from jllama.cli.settings import checked_settings, settings_from_yaml, take_flag, take_words
from jllama.config import (
    MESH_AXES,
    Base,
    BaseChoice,
    BaseSkip,
    LoraConfig,
    MeshChoice,
    Precision,
    Remat,
    asked_base,
)
from jllama.errors import (
    AtLeast0,
    AtLeast1,
    InputError,
    NotEmpty,
    NotNegative,
    Positive,
    Seed,
    Share,
    SomeOf,
    checked,
)
from jllama.folders.json_files import write_whole
from jllama.folders.run import LATEST, RunFolder
from jllama.names import LINEAR_CHOICES
from jllama.text.messages import Learn
from jllama.text.prompt import PromptStyle, chat_style
from jllama.text.row_formats import Sources
from jllama.text.rows import LongRows
from train.recipes import recipe_file, settings_file

# What may lie elsewhere for each process, and at a resume: hashes tell whether it is the same.
FILES = ("model", "data", "val_data", "init_adapter", "prompt_template")
CHANGEABLE = (*FILES, "epochs", "mesh")  # what a resume may give anew

Scheduler = Literal["constant", "linear", "cosine"]
OptimizerName = Literal["adamw", "adafactor", "lion"]
Tune = Literal["lora", "full"]


@checked
class TrainConfig:
    """Fine-tune a LLaMA with LoRA; without --model, the bundled sample by recipes/sample.yaml.

    --config FILE reads defaults from a YAML file (a run's config.yaml), or from a recipe by its
    name (jllama recipes lists them); flags override it. --resume RUN (or --resume latest) continues
    a run with its own settings; --model, --data, --val-data, --init-adapter and --prompt-template
    beside it say where moved files are now, --epochs adds epochs, --mesh goes on with other
    devices.
    """

    model: Annotated[NotEmpty, tyro.conf.arg(metavar="DIR")] = bundled.MODEL
    """Model folder; with --dry-run also a preset such as llama-2-7b."""
    data: Sources = ()
    """Rows with instruction/input/output, prompt/completion, messages, conversations or text: files
    of JSON, JSONL, CSV or Parquet, packed by gzip or not, or folders of them. A weight says how
    often an epoch has each row: a.json b.json:0.5 has half of b's."""
    output_dir: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""
    """Run folder to make; by default runs/MODEL-TIME, with a link runs/latest."""
    precision: Precision = "bf16"
    """Dtype of frozen weights and activations; what learns, its moments and the loss are fp32."""
    base: BaseChoice = "stored"
    """Holds the frozen linears of the blocks in 8 or 4 bits, made while the model is loaded: int8,
    int4 (the small card's), or nf4 (bitsandbytes' format)."""
    base_skip: BaseSkip = "none"
    """With --base: linears that stay as they are."""

    columns: Annotated[str, tyro.conf.arg(metavar="NAME=COLUMN,...")] = ""
    """What the columns are called: prompt=question,completion=answer."""
    max_rows: AtLeast0 = 0
    """Only the first rows of each file; 0 takes all."""
    prompt_style: PromptStyle = "plain"
    """How a row becomes text; saved with the adapter."""
    prompt_template: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """A chat template in Jinja, instead of the model's own; saved with the adapter."""
    max_seq_len: AtLeast1 = 512
    """Tokens a row may have, and with --packing the length of a sequence."""
    long_rows: LongRows = "cut"
    """Rows that are longer lose their end (cut), are left out (drop), or go on as further rows
    (split)."""
    learn: Learn = "all"
    """Which answers of a conversation: each one that no mark excepts, the last one, or those that
    are marked (weight 1, train true)."""
    train_on_prompt: bool = False
    """Learn the prompt as well as the answer."""
    packing: bool = False
    """Put several rows into one sequence; they do not see each other."""
    length_buckets: AtLeast1 = 1
    """Without --packing: lengths to which rows are padded, each compiled once; a step's rows are
    of one of them."""
    shuffle: bool = True
    """A new order every epoch, a function of seed and epoch."""
    skip_bad_rows: AtLeast0 = 0
    """Rows without anything to learn that may be left out; one more is an error."""
    val_size: NotNegative = 0.0
    """Rows held out for evaluation: a share below 1, or a number."""
    val_data: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Rows for evaluation from a file of their own, instead of --val-size."""

    tune: Tune = "lora"
    """What learns: adapters, or every weight (full); the result is then a model folder."""
    lora_rank: AtLeast1 = 16
    """Rank R of the adapters."""
    lora_alpha: Positive = 32.0
    """The adapter's output is multiplied by alpha / rank."""
    lora_dropout: Share = 0.05
    """Dropout of the adapter's input while training."""
    lora_targets: Annotated[str, SomeOf(LINEAR_CHOICES)] = "wq,wv"
    """Linears that get an adapter: wq,wk,wv,wo,w1,w2,w3 (or q_proj, ...), or all."""
    init_adapter: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""
    """A PEFT adapter to start from; it brings its own rank, alpha and targets."""
    force: bool = False
    """Start from an adapter that was trained on a different base model."""
    ffn_bias: bool = False
    """Feed-forward linears with zero biases, as the original report counted them."""

    rslora: bool = False
    """rsLoRA: scale by alpha / sqrt(rank)."""
    dora: bool = False
    """DoRA: learn the length of every row of the weights apart from its direction."""

    optimizer: OptimizerName = "adamw"
    """Optimizer; optax has the rule."""
    learning_rate: Positive = 2e-4
    """Peak learning rate."""
    lora_plus_ratio: Positive = 1.0
    """LoRA+: how many times faster B learns than A."""
    lr_scheduler: Scheduler = "cosine"
    """Decay after the warm-up."""
    warmup_ratio: Share = 0.03
    """Share of the optimizer steps in which the rate rises."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay."""
    max_grad_norm: NotNegative = 1.0
    """Global norm to which the gradient of a step is clipped; 0 does not clip."""

    epochs: AtLeast1 = 3
    """Passes over the data."""
    max_steps: AtLeast0 = 0
    """Optimizer steps to stop after; 0 runs all epochs."""
    micro_batch_size: AtLeast1 | Literal["auto"] = 4
    """Sequences in one forward pass; auto: the fastest that is planned to fit the device, with
    --gradient-accumulation-steps as the number of sequences of a step."""
    gradient_accumulation_steps: AtLeast1 = 4
    """Micro-batches in one optimizer step."""
    mesh: MeshChoice | Literal["auto"] = ""
    """Several devices, as data=2,fsdp=4 (or tensor=2): data and fsdp deal rows, each device with
    --micro-batch-size of its own; fsdp and tensor cut the weights. auto: over all devices, the
    fastest that is planned to fit. By default one device, or fsdp over those of all processes."""
    remat: Remat | Literal["auto"] = "block"
    """What the backward pass recomputes: nothing; all but matmuls (dots), which may wait in the
    host's memory (offload); ffn_norm + feed_forward (ffn); or whole blocks. auto: the least that
    is planned to fit."""

    eval_steps: AtLeast0 = 0
    """Optimizer steps between evaluations; 0 evaluates before the first and after each epoch."""
    patience: AtLeast0 = 0
    """Evaluations without a lower held-out loss after which a run ends; 0 never ends it."""
    save_steps: AtLeast0 = 0
    """Optimizer steps between saves of the state; 0 saves after each epoch."""
    save_total_limit: AtLeast1 = 2
    """Newest states that are kept."""
    wandb_project: str = ""
    """Also log to this Weights & Biases project, if wandb is installed."""
    seed: Seed = 0
    """Seed of the adapters, the order, the dropout and the held-out rows."""
    resume: Annotated[str, tyro.conf.arg(metavar="RUN")] = ""
    """Run folder (or latest) to continue, with its own settings."""
    dry_run: bool = False
    """Print settings and counts, allocate nothing."""

    def __post_init__(self):
        wrong = []
        if self.prompt_template:
            object.__setattr__(self, "prompt_style", chat_style(self.prompt_style))
        asked_base(self.base, self.base_skip)
        if self.packing and self.length_buckets > 1:
            wrong.append("packing and length_buckets, expected one of them")
        if self.val_data and self.val_size:
            wrong.append("val_data and val_size, expected one of them")
        if self.tune == "full":
            only_lora = (
                {"lora_plus_ratio": 1.0}
                | dict.fromkeys(("init_adapter", "ffn_bias", "rslora", "dora"))
                | {"base": "stored"}
            )
            wrong += [
                f"tune full and {name}, which is for adapters"
                for name, unused in only_lora.items()
                if (getattr(self, name) or unused) != unused
            ]
        if wrong:
            raise InputError("; ".join(wrong))

    @property
    def asked_base(self) -> Base | None:
        """The format that the flags ask for; a model folder may bring its own."""
        return asked_base(self.base, self.base_skip)

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


def write_config(config: TrainConfig, path: Path) -> None:
    """The resolved settings as YAML; `--config` reads them back."""
    write_whole(path, yaml.safe_dump(plain(config), sort_keys=False))


def plain(config: TrainConfig) -> dict[str, Any]:
    """The settings as YAML has them: one file of rows is its name."""
    data = list(config.data)
    return dataclasses.asdict(config) | {"data": data if len(data) > 1 else "".join(data)}


def read_defaults(argv: Sequence[str]) -> tuple[TrainConfig | None, list[str]]:
    """Takes `--config FILE` or `--resume RUN` out of the arguments and reads what it names.

    For the bundled sample the defaults are its own recipe.

    Raises:
        InputError: if the file is missing or a field is wrong, or a flag beside --resume is none
            of `CHANGEABLE`.
    """
    rest, resumed = take_flag("--resume", argv)
    if resumed is not None and not {"-h", "--help"} & set(rest):
        return _resumed(LATEST if resumed == "latest" else Path(resumed), rest), []
    rest, named = take_flag("--config", argv)
    file = settings_file(named) if named else None
    given = {word.partition("=")[0] for word in rest}
    model = take_flag("--model", rest)[1] or bundled.MODEL
    if file is None and model == bundled.MODEL and not {"--data", "-h", "--help"} & given:
        file = recipe_file("sample")
    return (None if file is None else settings_from_yaml(TrainConfig, file)), rest


def _resumed(path: Path, argv: Sequence[str]) -> TrainConfig:
    """A run's own settings, but for those that the arguments may give anew."""
    anew: dict[str, Any] = {}
    argv, data = take_words("--data", argv)
    anew |= {"data": data} if data else {}
    for name in CHANGEABLE:
        argv, value = take_flag(f"--{name.replace('_', '-')}", argv)
        anew |= {} if value is None else {name: value}
    if argv:
        _refuse_beside_resume(" ".join(argv))
    return resumed_settings(path, anew)


def resumed_settings(path: Path, anew: Mapping[str, Any]) -> TrainConfig:
    """A run's own settings, but for those of `CHANGEABLE` that are given anew.

    Raises:
        InputError: if it is no run folder, or others are given.
    """
    if others := [name for name in anew if name not in CHANGEABLE]:
        _refuse_beside_resume(", ".join(others))
    run = RunFolder(path)
    before = checked_settings(TrainConfig, run.read_settings(), run.config)
    return _as_many_rows(dataclasses.replace(before, resume=str(path), **anew), before)


def _refuse_beside_resume(words: str) -> NoReturn:
    allowed = ", ".join(f"--{name.replace('_', '-')}" for name in CHANGEABLE)
    raise InputError(
        f"--resume takes its settings from the run; drop {words}. Beside it go only {allowed}"
    )


def _as_many_rows(config: TrainConfig, before: TrainConfig) -> TrainConfig:
    """With the micro-batch of a device that keeps a run's steps as they were on another mesh."""
    if config.mesh == before.mesh:
        return config
    if config.mesh == "auto":
        raise InputError("--mesh auto is for a new run; beside --resume give the sizes")
    rows, had = (
        math.prod(size for axis, size in MESH_AXES.read(mesh).items() if axis != "tensor")
        for mesh in (config.mesh, before.mesh)
    )
    batch = before.micro_batch_size
    if batch != "auto" and batch * had % rows:
        raise InputError(
            f"--mesh {config.mesh} deals rows to {rows} devices, and a micro-batch of this run "
            f"has {batch * had}"
        )
    return dataclasses.replace(
        config, micro_batch_size=batch if batch == "auto" else batch * had // rows
    )
