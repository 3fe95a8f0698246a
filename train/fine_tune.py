"""One run, from the model folder to the adapter folder."""

import dataclasses
import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jllama import bundled
from jllama.cli.terminal import console
from jllama.config import PRECISIONS, LlamaConfig, LoraConfig
from jllama.errors import InputError
from jllama.folders.adapter import (
    check_base,
    load_adapter,
    read_lora_config,
    save_adapter,
    write_passport,
)
from jllama.folders.json_files import NEW
from jllama.folders.load import load_model, save_model
from jllama.folders.model import base_of, model_sizes, read_config, transformers_name
from jllama.lora import attach
from jllama.machine import versions
from jllama.sharding import make_mesh, mesh_shape
from jllama.text.hf_files import with_template
from jllama.text.rows import Examples
from jllama.text.style_template import style_template
from jllama.text.tokenizer import Tokenizer, load_tokenizer, tokenizer_files
from train.config import FILES, TrainConfig
from train.data.batches import Batches, sequence_lengths
from train.data.documents import Shapes
from train.data.load import load_examples
from train.data.view import show_row
from train.loop import fit
from train.plan.auto import (
    choose,
    cost_of_bf16,
    out_of_memory_explained,
    refuse_what_cannot_fit,
    step_of,
    this_device,
    warning_if_short,
)
from train.plan.ladder import choose_mesh
from train.processes.join import Processes
from train.run.folder import check_folder, run_folder
from train.run.provenance import identity, make_passport
from train.run.show import run_facts, show_end, show_plan, show_settings, without_effect


def fine_tune(config: TrainConfig, processes: Processes | None = None) -> None:
    """Loads, trains and writes; with --dry-run only counts.

    Args:
        processes: that do it together; by default this one alone.
    """
    processes = processes or Processes()
    settings = dataclasses.asdict(config).items()
    processes.agree(lambda: {name: x for name, x in settings if name not in FILES} | versions())
    config = with_adapters_settings(config)
    lora = config.lora if config.tune == "lora" else None
    if config.dry_run:
        show_settings(config, model_sizes(config.model), lora)
        console.print("dry run: nothing was loaded, allocated or written")
        return
    config = processes.first_then_others(lambda: with_sample(config))
    check_folder(config)
    llama, base = read_config(config.model), base_of(config.model, config.asked_base)
    processes.agree(functools.partial(identity, config))
    config = with_mesh(config, llama, lora, processes)
    mesh = make_mesh(jax.devices(), mesh_shape(config.mesh))
    if base and config.tune == "full":
        raise InputError(f"{config.model} is stored as {base.words}, which cannot learn")
    refuse_what_cannot_fit(step_of(config, llama, lora, config.max_seq_len))
    tokenizer = load_tokenizer(config.model, config.prompt_template)
    show_settings(config, llama, lora)
    training, held_out = load_examples(config, tokenizer)
    (longest,) = sequence_lengths(training, config.max_seq_len, config.packing)
    config, reason = choose(
        config, llama, lora, longest, documents_of_single_sequences(config, training)
    )
    if reason:
        console.print(reason)
    batches, evaluation = plan_batches(config, training, held_out)
    steps = min(config.max_steps or len(batches), len(batches))
    show_plan(config, batches, training, held_out, steps)
    for note in without_effect(config, llama, len(held_out), len(batches)):
        console.print(f"note: {note}")
    show_row(training[0], tokenizer)

    step = step_of(config, llama, lora, longest, batches.documents)
    for words in filter(None, (cost_of_bf16(step), warning_if_short(step))):
        console.print(words)
    with out_of_memory_explained(step):
        warmup = round(config.warmup_ratio * steps)
        facts = run_facts(step, batches, (training, held_out), steps, warmup)
        run_steps(config, lora, tokenizer, batches, evaluation, steps, facts, mesh, processes)


def run_steps(
    config: TrainConfig,
    lora: LoraConfig | None,
    tokenizer: Tokenizer,
    batches: Batches,
    evaluation: Batches | None,
    steps: int,
    facts: Mapping[str, Any],
    mesh: Mesh,
    processes: Processes,
) -> None:
    """Loads the model, trains it, and fills the run folder."""
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
    template = style_template(config.prompt_style, tokenizer)
    with run_folder(config, facts, processes) as run:
        record = run.read_record()
        passport = make_passport(config, record)
        warmup = record["warmup_steps"]  # of a run that got more epochs, as it was

        def save(folder: Path) -> None:
            new = folder.with_name(folder.name + NEW)
            if processes.number == 0:
                shutil.rmtree(new, ignore_errors=True)
            if lora:
                base_name = transformers_name(config.model)
                save_adapter(new, model, lora, base_name, passport, template)
            else:
                dtype = PRECISIONS[config.precision]
                place = Path(config.model)
                words = tokenizer_files(place)
                if template is not None:
                    words = with_template(words, template, tokenizer.stop_ids, place)
                save_model(new, model, dtype, words, source=f"full tuning of {config.model}")
            if processes.number:
                return
            if not lora:
                write_passport(new, passport)
            shutil.rmtree(folder, ignore_errors=True)
            new.replace(folder)

        metrics = fit(
            config,
            model,
            batches,
            evaluation,
            steps,
            warmup,
            run,
            lambda: save(run.best),
            mesh,
            processes,
        )
        processes.mark("the save of the result")
        save(run.result(config.tune))
        of = "on the device" if jax.default_backend() == "gpu" else "for the whole Python process"
        show_end(
            run,
            metrics.epoch_losses,
            metrics.eval_losses,
            f"{metrics.seconds:,.0f} s; peak memory {processes.peak_memory_mib():,.0f} MiB {of} "
            f"(training step alone: {metrics.planned_mib:,.0f} MiB planned)",
        )


def plan_batches(
    config: TrainConfig, training: Examples, held_out: Examples
) -> tuple[Batches, Batches | None]:
    """The windows of the whole run, and those of one evaluation."""
    devices = mesh_shape(config.mesh).rows
    shape: dict[str, Any] = {
        "batch": config.micro_batch_size * devices,
        "devices": devices,
        "max_seq_len": config.max_seq_len,
        "packing": config.packing,
        "length_buckets": config.length_buckets,
        "seed": config.seed,
    }
    batches = Batches(
        training,
        accumulation=config.gradient_accumulation_steps,
        shuffle=config.shuffle,
        epochs=config.epochs,
        **shape,
    )
    if not len(held_out):
        return batches, None
    shape["length_buckets"] = 1
    return batches, Batches(held_out, accumulation=1, shuffle=False, epochs=1, **shape)


def documents_of_single_sequences(config: TrainConfig, training: Examples) -> Shapes:
    """The rows of packed documents where micro-batches are of one sequence: never fewer."""
    if not config.packing or "auto" not in (config.remat, config.micro_batch_size):
        return ()
    single = dataclasses.replace(config, micro_batch_size=1)
    return plan_batches(single, training, training.take(slice(0)))[0].documents


def with_adapters_settings(config: TrainConfig) -> TrainConfig:
    """Where there is an initial adapter: with its rank, alpha, targets and kind."""
    if not config.init_adapter:
        return config
    lora = read_lora_config(config.init_adapter)
    used: dict[str, Any] = {
        "lora_rank": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_targets": ",".join(lora.targets),
        "rslora": lora.rslora,
        "dora": lora.dora,
    }
    for field in dataclasses.fields(config):
        asked = getattr(config, field.name)
        if field.name in used and asked not in (field.default, used[field.name]):
            flag = "--" + field.name.replace("_", "-")
            console.print(
                f"note: {flag} {asked} does nothing; {config.init_adapter} brings "
                f"{used[field.name]}"
            )
    return dataclasses.replace(config, **used)


def with_mesh(
    config: TrainConfig, llama: LlamaConfig, lora: LoraConfig | None, processes: Processes
) -> TrainConfig:
    """With the sizes of an automatic mesh; or of one over the devices of several processes."""
    count = jax.device_count()
    if config.mesh == "auto":
        chosen = reason = ""
        if processes.number == 0:
            step = step_of(dataclasses.replace(config, mesh=""), llama, lora, config.max_seq_len)
            shape, reason = choose_mesh(step, this_device(), count)
            chosen = shape.words or "data=1"
            console.print(reason)
        config = dataclasses.replace(config, mesh=processes.tell(chosen)[0])
        if config.micro_batch_size != "auto":
            rows = config.micro_batch_size * mesh_shape(config.mesh).tensor
            config = dataclasses.replace(config, micro_batch_size=rows)
        return config
    if config.mesh or count == 1:
        return config
    if processes.count == 1:
        console.print(f"note: there are {count} devices; --mesh fsdp={count} uses all of them")
        return config
    console.print(
        f"{processes.count} processes with {count} devices: --mesh fsdp={count}, which cuts the "
        f"weights and deals the rows; data={count} deals rows only"
    )
    return dataclasses.replace(config, mesh=f"fsdp={count}")


def with_sample(config: TrainConfig) -> TrainConfig:
    """Fills in the bundled sample's model and rows where the default asks for them."""
    if config.model != bundled.MODEL:
        if not config.data:
            raise InputError("--data FILE is missing: the rows to train on")
        return config
    if bundled.is_missing(config.model):
        console.print(f"{config.model} is not there yet: converting the bundled sample")
        bundled.convert_sample(Path(config.model))
    return dataclasses.replace(config, data=config.data or (str(bundled.ROWS),))
