"""LoRA fine-tuning of LLaMA in JAX: convert, train, compare, hand the adapter on.

model = jllama.load_model("models/llama-2-7b", precision="bf16")
tokenizer = jllama.load_tokenizer("models/llama-2-7b")
jllama.load_adapter(model, "runs/latest/adapter")
prompt = jllama.prompt_ids("plain", {"prompt": "Hello"}, tokenizer)
answers = jllama.generate(model, [prompt], max_new_tokens=64, stop_ids=tokenizer.stop_ids)

To train one, see `train`, a package of its own:

trainer = train.Trainer("models/llama-2-7b", rows, learning_rate=1e-4, epochs=2)

config/        sizes, shapes, settings of an adapter    names.py     Meta's names, and others'
model.py       the network; layers.py, attention.py     lora.py      adapters: attach, scale, merge
loss.py        cross-entropy without [B, T, V]          sharding.py  several GPUs
quantize/      weights in 8 and 4 bits
text/          from text to ids and what is learned     decode/      from ids to ids
folders/       what lies on disk: model, adapter, run   cli/         what every command shares
bundled.py     the sample (sample/)                     machine.py   devices, memory, versions
errors.py      wrong input, and settings that refuse it
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jllama.bundled import SAMPLE
    from jllama.config import PRESETS, LinearScaling, LlamaConfig, LoraConfig, RopeScaling
    from jllama.decode.generate import generate, generate_with_logprobs
    from jllama.decode.sampling import Sampling
    from jllama.decode.stream import stream
    from jllama.errors import InputError
    from jllama.folders.adapter import load_adapter, save_adapter
    from jllama.folders.load import load_model
    from jllama.model import Llama
    from jllama.text.prompt import prompt_ids
    from jllama.text.tokenizer import Tokenizer, load_tokenizer

# Imported when they are asked for: `jllama --help` needs no JAX.
_HOMES = {
    "SAMPLE": "bundled",
    "PRESETS": "config",
    "LinearScaling": "config",
    "LlamaConfig": "config",
    "LoraConfig": "config",
    "RopeScaling": "config",
    "generate": "decode.generate",
    "generate_with_logprobs": "decode.generate",
    "Sampling": "decode.sampling",
    "stream": "decode.stream",
    "InputError": "errors",
    "load_adapter": "folders.adapter",
    "save_adapter": "folders.adapter",
    "load_model": "folders.load",
    "Llama": "model",
    "prompt_ids": "text.prompt",
    "Tokenizer": "text.tokenizer",
    "load_tokenizer": "text.tokenizer",
}

__all__ = [
    "PRESETS",
    "SAMPLE",
    "InputError",
    "LinearScaling",
    "Llama",
    "LlamaConfig",
    "LoraConfig",
    "RopeScaling",
    "Sampling",
    "Tokenizer",
    "generate",
    "generate_with_logprobs",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "prompt_ids",
    "save_adapter",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jllama' has no attribute {name!r}")
    from jllama.machine import pass_over_absent_gpu  # here: `jllama --help` asks for nothing

    pass_over_absent_gpu()
    return getattr(importlib.import_module(f"jllama.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
