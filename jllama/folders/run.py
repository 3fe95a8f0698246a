"""The run folder: what training writes and evaluation reads. Every name in it stands here, once.

config.yaml        the resolved settings; `--config` reads them back
run.json           command, versions, hashes of base and data, what was known before step 1
rows.jsonl         rows that were given in memory; held-out-rows.jsonl likewise
metrics.jsonl      a line for every optimizer step, epoch and evaluation
state/             adapters, moments, accumulator and step (Orbax)
adapter/           the result: a PEFT adapter; with full tuning model/, a model folder
best/              the same, of the lowest held-out loss
tensorboard/       the figures of metrics.jsonl
generations.jsonl  answers of base and tuned (jllama prompts)
score.json         how likely they find a data file's answers (jllama score)
harness.json       what lm-evaluation-harness says of both (jllama harness)
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, final

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from jllama.cli.settings import read_yaml
from jllama.cli.terminal import command_line
from jllama.errors import InputError
from jllama.folders.json_files import JsonLines, read_json_lines
from jllama.folders.manifest import check_fields, file_sha256, read_sealed

CONFIG, RECORD, METRICS = "config.yaml", "run.json", "metrics.jsonl"
GENERATIONS, SCORES, HARNESS = "generations.jsonl", "score.json", "harness.json"
ROWS_OF = {"data": "rows.jsonl", "val_data": "held-out-rows.jsonl"}  # by their setting
LATEST = Path("runs/latest")  # a link to the newest run


class StepLine(TypedDict):
    """metrics.jsonl, after every optimizer step. Losses in nats; null for what is not finite."""

    step: int
    loss: float | None  # per supervised token
    loss_sum: float | None
    tokens: int  # supervised ones
    grad_norm: float | None
    update_ratio: float | None  # norm of the update over norm of what learns
    skipped: bool  # the gradient was not finite, and nothing changed
    step_seconds: float
    tokens_per_second: float
    peak_memory_mib: float
    planned_memory_mib: float
    learning_rate: float
    padding_share: float
    rows: list[int]  # in the data file
    compilations: int


@final
class EpochLine(TypedDict):
    """metrics.jsonl, after an epoch: its token-weighted mean."""

    step: int
    epoch: int
    epoch_loss: float | None
    tokens: int


@final
class EvaluationLine(TypedDict):
    """metrics.jsonl, after an evaluation."""

    step: int
    eval_loss: float | None
    eval_tokens: int


class DataFacts(TypedDict):
    """Of the rows of a run. Tokens are of the rows that are trained on."""

    rows: int
    held_out_rows: int
    held_out: NotRequired[list[int]]  # their numbers in the file
    tokens: int
    learned_tokens: int
    longest: int
    cut_rows: int
    padding_share: float
    turns: int  # questions in the longest conversation
    windows: NotRequired[int]  # of an epoch, where they were given instead of rows


class Record(TypedDict):
    """run.json."""

    command: list[str]
    versions: dict[str, str]
    device: str
    device_memory_mib: int
    base_manifest_sha256: str
    tokenizer_sha256: str
    data_sha256: str
    config_sha256: str
    init_adapter_sha256: NotRequired[str]  # of its weights
    prompt_template_sha256: NotRequired[str]
    val_data_sha256: NotRequired[str]
    given: NotRequired[dict[str, str]]  # names of a loss and of windows: {"loss": "smoothed"}
    chosen: NotRequired[list[str]]  # settings of config.yaml that are not the defaults
    changed: NotRequired[dict[str, Any]]  # settings that a resume gave anew, over config.yaml's
    parameters: dict[str, int]  # {"trainable": 8388608, "total": 6746804224}
    model: dict[str, Any]  # LlamaConfig
    memory_bytes: dict[str, int]  # by class: {"base_weights": 13476831232, "adapters": ...}
    data: DataFacts
    steps: int
    warmup_steps: int


class Generation(TypedDict):
    """generations.jsonl: a prompt and its answers; those of a reference end in `_answer`."""

    prompt: str
    base: NotRequired[str]
    tuned: NotRequired[str]
    expected: NotRequired[str]
    base_ids: NotRequired[list[int]]
    tuned_ids: NotRequired[list[int]]
    base_stopped: NotRequired[bool]  # by itself, not at its budget
    tuned_stopped: NotRequired[bool]
    base_score: NotRequired[dict[str, Any]]
    tuned_score: NotRequired[dict[str, Any]]


_RECORD: TypeAdapter[Any] = TypeAdapter(Record)
_GENERATIONS: TypeAdapter[Any] = TypeAdapter(list[Generation])
_LINES: TypeAdapter[Any] = TypeAdapter(list[StepLine | EpochLine | EvaluationLine])
_ADVICE = "restore it, or start a new run"


def read_generations(file: Path) -> JsonLines:
    """The lines of a generations.jsonl.

    Raises:
        InputError: if one of them is no Generation, or not as it was written.
    """
    lines = read_json_lines(file)
    check_fields(lines.values, _GENERATIONS, file, "make it again with: jllama prompts")
    return lines


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run folder, and its readers."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / CONFIG

    @property
    def record(self) -> Path:
        return self.path / RECORD

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    @property
    def generations(self) -> Path:
        return self.path / GENERATIONS

    @property
    def scores(self) -> Path:
        return self.path / SCORES

    @property
    def state(self) -> Path:
        return self.path / "state"

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def result(self, tune: str) -> Path:
        """What the run makes; it is there when the run has finished."""
        return self.path / {"lora": "adapter", "full": "model"}[tune]

    def read_settings(self) -> dict[str, Any]:
        """config.yaml, with what a resume has changed.

        Raises:
            InputError: if there is none, or it is not what the run began with.
        """
        if not self.config.is_file():
            make = command_line("train")
            raise InputError(f"{self.path}: no {CONFIG}; expected a run folder, made by: {make}")
        changed = self.read_record().get("changed", {})
        return read_yaml(self.config) | changed

    def read_record(self) -> Record:
        """run.json, which vouches for config.yaml.

        Raises:
            InputError: if either is missing or was changed since the run began.
        """
        if not self.record.is_file():
            raise InputError(
                f"{self.path}: no {RECORD}; the run ended before its first step, start it anew"
            )
        record: Any = read_sealed(self.record, _ADVICE)
        check_fields(record, _RECORD, self.record, _ADVICE)
        if record.get("config_sha256") != file_sha256(self.config):
            others = command_line("train", "--config", self.config)
            raise InputError(
                f"{self.config} was changed after the run began, which goes on with its own "
                f"settings only; restore it, or train anew with these: {others}"
            )
        return record

    def read_metrics(self) -> JsonLines:
        """metrics.jsonl: each line is a StepLine, an EpochLine or an EvaluationLine.

        Raises:
            InputError: if a line is none of them, or not as it was written.
        """
        lines = read_json_lines(self.metrics)
        check_fields(lines.values, _LINES, self.metrics, _ADVICE)
        return lines
