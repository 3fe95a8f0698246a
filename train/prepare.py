"""What a run begins with: its settings made definite, and the windows of its examples."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from jllama import bundled
from jllama.cli.terminal import console
from jllama.config import LlamaConfig, LoraConfig
from jllama.errors import InputError
from jllama.folders.adapter import read_lora_config
from jllama.sharding import mesh_shape
from jllama.text.rows import Examples
from train.config import TrainConfig
from train.data.batches import Batches
from train.data.documents import Shapes
from train.plan.auto import step_of, this_device
from train.plan.ladder import choose_mesh
from train.processes.join import Processes
from train.stream import GivenWindows


def plan_batches(
    config: TrainConfig, training: Examples, held_out: Examples
) -> tuple[Batches, Batches | None]:
    """The windows of the whole run, and those of one evaluation."""
    return training_batches(config, training), held_out_batches(config, held_out)


def training_batches(config: TrainConfig, training: Examples) -> Batches:
    """The windows of the whole run."""
    return Batches(
        training,
        accumulation=config.gradient_accumulation_steps,
        length_buckets=config.length_buckets,
        shuffle=config.shuffle,
        epochs=config.epochs,
        **_shape(config),
    )


def held_out_batches(config: TrainConfig, held_out: Examples) -> Batches | None:
    """The windows of one evaluation; None without rows for it."""
    if not len(held_out):
        return None
    return Batches(held_out, accumulation=1, shuffle=False, epochs=1, **_shape(config))


def _shape(config: TrainConfig) -> dict[str, Any]:
    devices = mesh_shape(config.mesh).rows
    return {
        "batch": config.micro_batch_size * devices,
        "devices": devices,
        "max_seq_len": config.max_seq_len,
        "packing": config.packing,
        "seed": config.seed,
    }


def plan_stream(
    config: TrainConfig, training: Examples, held_out: Examples, given: GivenWindows | None
) -> tuple[Batches | GivenWindows, Batches | None]:
    """The windows of the whole run, given or of the rows, and those of an evaluation."""
    if given is None:
        return plan_batches(config, training, held_out)
    return given, held_out_batches(config, held_out)


def with_shape_of(given: GivenWindows, config: TrainConfig) -> TrainConfig:
    """With the batch, accumulation and length of given windows.

    Raises:
        InputError: if their sequences cannot be dealt to the devices.
    """
    devices = mesh_shape(config.mesh).rows
    k, B, T = given.shape
    if B % devices:
        raise InputError(f"windows: {B} sequences, which cannot be dealt to {devices} devices")
    return dataclasses.replace(
        config, gradient_accumulation_steps=k, micro_batch_size=B // devices, max_seq_len=T,
        packing=False, length_buckets=1,
    )  # fmt: skip


def documents_of_single_sequences(config: TrainConfig, training: Examples) -> Shapes:
    """The rows of packed documents where micro-batches are of one sequence: never fewer."""
    if not config.packing or "auto" not in (config.remat, config.micro_batch_size):
        return ()
    single = dataclasses.replace(config, micro_batch_size=1)
    return training_batches(single, training).documents


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
        if not config.data and not config.resume:
            raise InputError("--data FILE is missing: the rows to train on")
        return config
    if bundled.is_missing(config.model):
        console.print(f"{config.model} is not there yet: converting the bundled sample")
        bundled.convert_sample(Path(config.model))
    return dataclasses.replace(config, data=config.data or (str(bundled.ROWS),))
