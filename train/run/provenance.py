"""Where a run comes from: what a second person needs to repeat it."""

import dataclasses
import hashlib
import sys
from typing import Any

import jax

from jllama.folders.adapter import weights_file
from jllama.folders.json_files import read_bytes
from jllama.folders.manifest import file_sha256, manifest_sha256
from jllama.folders.run import Record
from jllama.machine import versions
from jllama.text.row_formats import rows_sha256
from jllama.text.tokenizer import tokenizer_sha256
from train.config import TrainConfig
from train.run.given import Given

OF_PASSPORT = ("base_manifest_sha256", "data_sha256", "tokenizer_sha256", "versions")


def provenance(config: TrainConfig, given: Given) -> dict[str, Any]:
    """The part of run.json that says what the run is made of."""
    return {
        "command": [sys.executable, *sys.argv],
        "chosen": [
            field.name
            for field in dataclasses.fields(config)
            if getattr(config, field.name) != field.default
        ],
        "versions": versions(),
        "device": jax.devices()[0].device_kind,
        "tokenizer_sha256": tokenizer_sha256(config.model),
        **identity(config, given),
        **({"given": dict(given.code)} if given.code else {}),
    }


def identity(config: TrainConfig, given: Given) -> dict[str, str]:
    """The files that a resume must find unchanged, wherever they are: their hashes."""
    found = {
        "base_manifest_sha256": manifest_sha256(config.model),
        "data_sha256": given.windows_sha256 or rows_sha256(config.data),
    }
    if config.val_data:
        found["val_data_sha256"] = rows_sha256([config.val_data])
    if config.prompt_template:
        template = read_bytes(config.prompt_template, "a chat template")
        found["prompt_template_sha256"] = hashlib.sha256(template).hexdigest()
    if config.init_adapter:
        found["init_adapter_sha256"] = file_sha256(weights_file(config.init_adapter))
    return found


def make_passport(config: TrainConfig, record: Record) -> dict[str, Any]:
    """What an adapter carries about its origin: whoever loads it can tell where it belongs."""
    return {
        "prompt_style": config.prompt_style,
        "seed": config.seed,
        "epochs": config.epochs,
        "turns": record["data"]["turns"],
        **{name: record[name] for name in OF_PASSPORT},  # type: ignore[literal-required]
        **({"base": config.asked_base.entry} if config.asked_base else {}),
    }
