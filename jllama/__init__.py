"""LoRA fine-tuning of LLaMA in JAX: convert, train, compare, hand the adapter on.

model = jllama.load_model("models/llama-2-7b", precision="bf16")
tokenizer = jllama.load_tokenizer("models/llama-2-7b")
jllama.load_adapter(model, "runs/latest/adapter")
prompt = [tokenizer.bos_id, *tokenizer.encode("Hello")]
answers = jllama.generate(model, [prompt], max_new_tokens=64, stop_ids=tokenizer.stop_ids)
"""

from pathlib import Path

from jllama.adapter import load_adapter, save_adapter
from jllama.checkpoint import load_model
from jllama.config import PRESETS, LlamaConfig, LoraConfig, RopeScaling
from jllama.errors import InputError
from jllama.generate import generate, generate_with_logprobs
from jllama.model import Llama
from jllama.sampling import Sampling
from jllama.stream import stream
from jllama.tokenizer import Tokenizer, load_tokenizer

SAMPLE = Path(__file__).parent / "sample"  # a small LLaMA in Meta's files, with instructions

__all__ = [
    "PRESETS",
    "SAMPLE",
    "InputError",
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
    "save_adapter",
    "stream",
]
