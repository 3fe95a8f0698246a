"""LLaMAs of `transformers`, on this machine's device: what the peer's sides share.

torch is imported by name, here alone: it is imported nowhere outside convert/
(tests/test_layout.py).
"""

import importlib
from collections.abc import Callable
from typing import Any, Literal

from jllama.config import PRESETS, LlamaConfig
from jllama.errors import InputError
from jllama.machine import installed_version, process_memory_mib

Device = Literal["cpu", "gpu"]


def open_torch(device: Device, threads: int) -> tuple[Any, Any]:
    """The modules `torch` and `transformers`, ready for this device.

    Raises:
        InputError: if torch does not see the card.
    """
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
    if device == "gpu" and not torch.cuda.is_available():
        raise InputError(
            f"JAX sees a GPU, and torch {torch.__version__} none; set JAX_PLATFORMS=cpu to compare "
            "the two"
        )
    return torch, transformers


def place(device: Device) -> str:
    """The device as torch names it."""
    return "cuda" if device == "gpu" else "cpu"


def load(model: str, precision: str, device: Device) -> Any:
    """A `LlamaForCausalLM` with SDPA attention.

    Args:
        model: folder in Hugging Face's format, or a preset, whose weights are then random and
            made on the device.
    """
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    if model not in PRESETS:
        loaded = transformers.LlamaForCausalLM.from_pretrained(
            model, dtype=dtype, attn_implementation="sdpa"
        )
        return loaded.to(place(device))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(place(device)):
            return transformers.LlamaForCausalLM._from_config(
                hf_config(transformers, PRESETS[model]), dtype=dtype, attn_implementation="sdpa"
            )
    finally:
        torch.set_default_dtype(before)


def hf_config(transformers: Any, config: LlamaConfig) -> Any:
    """The same sizes; rotary scaling is left out, for it costs nothing."""
    return transformers.LlamaConfig(
        hidden_size=config.dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.hidden_dim,
        vocab_size=config.vocab_size,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        max_position_embeddings=config.max_seq_len,
        tie_word_embeddings=config.tied,
        bos_token_id=None,
        eos_token_id=None,
    )


def peak_memory_mib(device: Device) -> float:
    """Peak of what torch has allocated on the card; on a CPU, of the process."""
    if device == "cpu":
        return process_memory_mib()
    return importlib.import_module("torch").cuda.max_memory_allocated() / 2**20


def streamer(device: Device, numbers: int, passes: int) -> Callable[[], Any]:
    """A call that reads and writes so many fp32 numbers on the device, `passes` times."""
    torch = importlib.import_module("torch")
    held = torch.ones(numbers, device=place(device))

    def stream() -> None:
        for _ in range(passes):
            held.neg_()
        if device == "gpu":
            torch.cuda.synchronize()

    return stream


def versions(*packages: str) -> dict[str, str]:
    """Of these, torch and `transformers`."""
    return {name: installed_version(name) for name in ("torch", "transformers", *packages)}
