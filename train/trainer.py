"""One run, from the model folder to the adapter folder: what `jllama train` and notebooks call."""

import contextlib
import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jllama.cli.settings import settings_from_yaml
from jllama.cli.terminal import console
from jllama.config import PRECISIONS, LoraConfig
from jllama.errors import InputError
from jllama.folders.adapter import check_base, load_adapter, save_adapter, write_passport
from jllama.folders.json_files import NEW
from jllama.folders.load import load_model, save_model
from jllama.folders.model import base_of, model_sizes, read_config, transformers_name
from jllama.folders.run import ROWS_OF, RunFolder
from jllama.lora import attach
from jllama.machine import versions
from jllama.model import Llama
from jllama.sharding import make_mesh, mesh_shape
from jllama.text.hf_files import with_template
from jllama.text.style_template import style_template
from jllama.text.tokenizer import Tokenizer, load_tokenizer, tokenizer_files
from train.callbacks import Callback
from train.config import FILES, TrainConfig, resumed_settings
from train.data.batches import sequence_lengths
from train.data.load import load_examples, load_held_out
from train.data.view import show_row
from train.loop import fit
from train.plan.auto import (
    choose,
    cost_of_bf16,
    out_of_memory_explained,
    refuse_what_cannot_fit,
    step_of,
    warning_if_short,
)
from train.prepare import (
    documents_of_single_sequences,
    plan_stream,
    with_adapters_settings,
    with_mesh,
    with_sample,
    with_shape_of,
)
from train.processes.join import Processes, joined
from train.run.folder import check_folder, run_folder
from train.run.given import Given, Rows, is_rows, name_of, write_rows
from train.run.metrics import NOTHING, Result
from train.run.provenance import identity, make_passport
from train.run.show import run_facts, show_end, show_plan, show_settings, without_effect
from train.step import Loss
from train.stream import GivenWindows, Stream, Windows


class Trainer:
    """One run: `train()` fills a run folder as `jllama train` does, to the bit.

        trainer = Trainer("models/llama-2-7b", rows, learning_rate=1e-4, epochs=2)
        result = trainer.train()
        jllama.generate(trainer.model, ...)

    Args:
        model: a model folder's path.
        data: rows, as a list of objects; or one path or several, as `--data` takes them. Rows are
            kept in the run folder, so that anything that reads the run finds them.
        config: settings to begin with: a `TrainConfig`, or the path of a YAML file (a recipe, or
            a run's config.yaml); all that follows takes precedence.
        resume: a run folder to go on with, by its own settings; beside it go what moved, and what
            the run was given: callbacks, loss, windows.
        callbacks: told of every step, evaluation and save; beside those that every run has.
        loss: instead of the cross-entropy of the targets, for training and for held-out rows.
        windows: what the steps take, instead of rows. Batch, accumulation and length are theirs.
        settings: fields of `TrainConfig`; `val_data` may be rows, too.

    Attributes:
        config: the settings; after `train()` with all that was chosen.
        model: after `train()`, the tuned `jllama.Llama`, its adapters attached.
        tokenizer: after `train()`, the model's.
        run: after `train()`, the path of the run folder.

    Raises:
        InputError: for settings that cannot be.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        data: str | Path | Sequence[str | Path] | Rows | None = None,
        *,
        config: TrainConfig | str | Path | None = None,
        resume: str | Path | None = None,
        callbacks: Sequence[Callback] = (),
        loss: Loss | None = None,
        windows: Windows | None = None,
        **settings: Any,
    ):
        if isinstance(model, Llama):
            raise InputError(
                "model: a Llama in memory; expected the path of a model folder, whose certificate "
                "says what the result belongs to"
            )
        given = settings | {
            name: value for name, value in (("model", model), ("data", data)) if value is not None
        }
        self._rows = {name: given.pop(name) for name in ROWS_OF if is_rows(given.get(name, ""))}
        given = {name: _plain(value) for name, value in given.items()}
        if windows is not None and ("data" in {*given, *self._rows} or given.get("val_size")):
            raise InputError(
                "windows: what is learned; drop data and val_size (val_data has rows to hold out)"
            )
        self._callbacks, self._loss, self._windows = callbacks, loss, windows
        self.config = _settings(config, resume, given)
        self.model: Llama | None = None
        self.tokenizer: Tokenizer | None = None
        self.run: Path | None = None

    def train(self) -> Result:
        """Loads, trains and writes; with `dry_run` only counts.

        Of several processes that an environment names (`jllama launch`, SLURM) all train one run.

        Raises:
            InputError: with what is wrong and what to do.
            KeyboardInterrupt: on Ctrl-C, when the step is done and its state saved; a second Ctrl-C
                ends the process. So does what a callback raises: `resume` goes on from there.
        """
        with contextlib.ExitStack() as stack:
            processes = stack.enter_context(joined())
            rows = {}
            if self._rows:
                place = stack.enter_context(tempfile.TemporaryDirectory(prefix="jllama-"))
                for name, some in self._rows.items():
                    rows[name] = write_rows(some, Path(place) / ROWS_OF[name])
            files: dict[str, Any] = {name: str(file) for name, file in rows.items()}
            config = dataclasses.replace(self.config, **files)
            custom = {"loss": self._loss, "windows": self._windows}
            code = {name: name_of(x) for name, x in custom.items() if x is not None}
            return self._train(config, Given(rows, code), processes)

    def _train(self, config: TrainConfig, given: Given, processes: Processes) -> Result:
        settings = dataclasses.asdict(config).items()
        processes.agree(lambda: {name: x for name, x in settings if name not in FILES} | versions())
        config = with_adapters_settings(config)
        lora = config.lora if config.tune == "lora" else None
        if config.dry_run:
            show_settings(self._shown(config), model_sizes(config.model), lora)
            console.print("dry run: nothing was loaded, allocated or written")
            return NOTHING
        if self._windows is None:
            config = processes.first_then_others(lambda: with_sample(config))
        llama, base = read_config(config.model), base_of(config.model, config.asked_base)
        stream = None
        if self._windows is not None:
            stream = GivenWindows(self._windows, config.epochs, llama.vocab_size)
            given = given._replace(windows_sha256=stream.sha256)
        check_folder(config, given)
        processes.agree(functools.partial(identity, config, given))
        config = with_mesh(config, llama, lora, processes)
        if stream:
            config = with_shape_of(stream, config)
        mesh = make_mesh(jax.devices(), mesh_shape(config.mesh))
        if base and config.tune == "full":
            raise InputError(f"{config.model} is stored as {base.words}, which cannot learn")
        refuse_what_cannot_fit(step_of(config, llama, lora, config.max_seq_len))
        self.tokenizer = tokenizer = load_tokenizer(config.model, config.prompt_template)
        show_settings(self._shown(config), llama, lora)
        load = load_held_out if stream else load_examples
        training, held_out = load(config, tokenizer)
        longest = config.max_seq_len
        if not stream:
            (longest,) = sequence_lengths(training, config.max_seq_len, config.packing)
        config, reason = choose(
            config, llama, lora, longest, documents_of_single_sequences(config, training)
        )
        if reason:
            console.print(reason)
        batches, evaluation = plan_stream(config, training, held_out, stream)
        steps = min(config.max_steps or len(batches), len(batches))
        show_plan(config, batches, training, held_out, steps)
        for note in without_effect(config, llama, len(held_out), len(batches)):
            console.print(f"note: {note}")
        if len(training):
            show_row(training[0], tokenizer)

        step = step_of(config, llama, lora, longest, batches.documents)
        for words in filter(None, (cost_of_bf16(step), warning_if_short(step))):
            console.print(words)
        with out_of_memory_explained(step):
            warmup = round(config.warmup_ratio * steps)
            facts = run_facts(step, batches, (training, held_out), steps, warmup)
            self.model = load_learner(config, lora, mesh)
            in_memory: dict[str, Any] = {name: getattr(self.config, name) for name in given.rows}
            self.config = dataclasses.replace(config, **in_memory)
            with run_folder(config, facts, processes, given) as run:
                self.run = run.path
                return self._fit(config, lora, batches, evaluation, steps, run, mesh, processes)

    def _shown(self, config: TrainConfig) -> TrainConfig:
        """With words for rows in memory, which lie in files only for a while."""
        words: dict[str, Any] = {
            name: f"{len(rows):,} rows in memory" for name, rows in self._rows.items()
        }
        return dataclasses.replace(config, **words)

    def _fit(
        self,
        config: TrainConfig,
        lora: LoraConfig | None,
        batches: Stream,
        evaluation: Stream | None,
        steps: int,
        run: RunFolder,
        mesh: Mesh,
        processes: Processes,
    ) -> Result:
        """Trains the model, and fills the run folder."""
        assert self.model is not None
        assert self.tokenizer is not None
        record = run.read_record()
        template = style_template(config.prompt_style, self.tokenizer)
        save = functools.partial(
            save_result, config, lora, self.model, self.tokenizer, template,
            make_passport(config, record), processes.number,
        )  # fmt: skip
        result = fit(
            config,
            self.model,
            batches,
            evaluation,
            steps,
            record["warmup_steps"],  # of a run that got more epochs, as it was
            run,
            lambda: save(run.best),
            mesh,
            processes,
            self._callbacks,
            self._loss,
        )
        processes.mark("the save of the result")
        save(run.result(config.tune))
        show_end(run, result)
        return result


def load_learner(config: TrainConfig, lora: LoraConfig | None, mesh: Mesh) -> Llama:
    """The model with what learns: new adapters, those of another run, or every weight."""
    assert config.remat != "auto"  # `choose` was asked before
    model = load_model(
        config.model, config.precision, remat=config.remat, ffn_bias=config.ffn_bias,
        base=config.asked_base, mesh=mesh,
    )  # fmt: skip
    if config.init_adapter:
        check_base(config.init_adapter, config.model, force=config.force)
        load_adapter(model, config.init_adapter)
    elif lora:
        attach(model, lora, jax.random.key(config.seed))
    return model


def save_result(
    config: TrainConfig,
    lora: LoraConfig | None,
    model: Llama,
    tokenizer: Tokenizer,
    template: str | None,
    passport: Mapping[str, Any],
    process: int,
    folder: Path,
) -> None:
    """Writes the adapter, or with full tuning the model, in place of one that is there."""
    new = folder.with_name(folder.name + NEW)
    if process == 0:
        shutil.rmtree(new, ignore_errors=True)
    if lora:
        save_adapter(new, model, lora, transformers_name(config.model), passport, template)
    else:
        dtype = PRECISIONS[config.precision]
        place = Path(config.model)
        words = tokenizer_files(place)
        if template is not None:
            words = with_template(words, template, tokenizer.stop_ids, place)
        save_model(new, model, dtype, words, source=f"full tuning of {config.model}")
    if process:
        return
    if not lora:
        write_passport(new, passport)
    shutil.rmtree(folder, ignore_errors=True)
    new.replace(folder)


def _settings(
    config: TrainConfig | str | Path | None,
    resume: str | Path | None,
    given: Mapping[str, Any],
) -> TrainConfig:
    """The settings of a run, from where they begin and what takes precedence."""
    if resume is not None:
        if config is not None:
            raise InputError("resume goes on with the settings of its run; drop config")
        return resumed_settings(Path(resume), given)
    if config is None:
        return TrainConfig(**given)
    if not isinstance(config, TrainConfig):
        config = settings_from_yaml(TrainConfig, config)
    return dataclasses.replace(config, **given)


def _plain(value: Any) -> Any:
    """A setting as a declaration takes it: paths are text."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return str(value) if isinstance(value, Path) else value
