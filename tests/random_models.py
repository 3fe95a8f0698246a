"""Tiny random models, without torch: their tensors under Meta's names, as folders, with adapters.

`meta_files.py` has the same models in other programs' formats.
"""

import base64
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from convert.meta.params import config_from_meta
from jllama.config import Base, LoraConfig, tensor_shapes
from jllama.folders.adapter import save_adapter
from jllama.folders.codes import coded_arrays
from jllama.folders.files import whole_folder
from jllama.folders.load import load_model
from jllama.folders.model import ModelWriter, read_block, read_config
from jllama.lora import adapted_linears, attach
from jllama.model import Llama
from jllama.names import HF_LINEARS
from jllama.text.tokenizer import tokenizer_files

BASE = {"dim": 32, "n_layers": 2, "n_heads": 4, "multiple_of": 8, "norm_eps": 1e-5}
GROUPED = BASE | {"n_kv_heads": 2}
VOCABULARY = 512  # 256 bytes and 256 special tokens: the smallest tiktoken file
BASE_OF_ALL: Base | None = None  # the format of every model folder, by `pytest --base`
LORA = LoraConfig(rank=4, alpha=8, dropout=0.0, targets=tuple(HF_LINEARS))
TOKENIZER = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))


def random_arrays(params: dict, *, seed: int = 0, tied: bool = False) -> dict[str, np.ndarray]:
    """A whole model in fp32 under Meta's names, scaled so that logits are of order one."""
    draw = np.random.default_rng(seed)
    dim, heads = params["dim"], params["n_heads"]
    kv_dim = dim // heads * params.get("n_kv_heads", heads)
    multiple = params["multiple_of"]
    hidden = -(-int(8 * dim / 3) // multiple) * multiple

    def matrix(rows, columns):
        return draw.standard_normal((rows, columns), np.float32) / np.float32(columns**0.5)

    def norm():
        return 1 + np.float32(0.1) * draw.standard_normal(dim, np.float32)

    arrays = {"tok_embeddings.weight": matrix(VOCABULARY, dim), "norm.weight": norm()}
    if not tied:
        arrays["output.weight"] = matrix(VOCABULARY, dim)
    for layer in range(params["n_layers"]):
        arrays |= {
            f"layers.{layer}.attention.wq.weight": matrix(dim, dim),
            f"layers.{layer}.attention.wk.weight": matrix(kv_dim, dim),
            f"layers.{layer}.attention.wv.weight": matrix(kv_dim, dim),
            f"layers.{layer}.attention.wo.weight": matrix(dim, dim),
            f"layers.{layer}.feed_forward.w1.weight": matrix(hidden, dim),
            f"layers.{layer}.feed_forward.w2.weight": matrix(dim, hidden),
            f"layers.{layer}.feed_forward.w3.weight": matrix(hidden, dim),
            f"layers.{layer}.attention_norm.weight": norm(),
            f"layers.{layer}.ffn_norm.weight": norm(),
        }
    return arrays


def model_folder(
    root: Path,
    params: dict,
    *,
    name: str = "model",
    seed: int = 0,
    transformers_name: str | None = None,
) -> Path:
    """The model folder `root / name` of `random_arrays`; test_convert.py has the converter's."""
    arrays = random_arrays(params, seed=seed)
    config, base = config_from_meta(params, VOCABULARY, tied=False), BASE_OF_ALL
    with whole_folder(root / name) as partial:
        writer = ModelWriter(partial, config, f"random, seed {seed}", transformers_name, base)
        for block, shapes in tensor_shapes(config).items():
            tensors = {tensor: arrays[tensor] for tensor in shapes}
            for tensor in filter(base.holds if base else (lambda _: False), shapes):
                tensors |= coded_arrays(tensor, tensors.pop(tensor), base)
            writer.write_block(block, tensors)
        writer.finish({"tokenizer.model": TOKENIZER})
    return root / name


def adapted(base: Path, folder: Path, lora: LoraConfig = LORA, size: float = 0.3) -> Llama:
    """A model with a random adapter, and the adapter's folder."""
    model = load_model(base, "fp32")
    attach(model, lora, jax.random.key(0))
    for index, linear in enumerate(adapted_linears(model).values()):
        draw = jax.random.normal(jax.random.key(100 + index), linear.lora.b.shape)
        linear.lora.b[...] = size * draw
    save_adapter(folder, model, lora, str(base), {})
    return model


def with_a_nan(model: Path, folder: Path) -> Path:
    """A copy of a model folder in which the embedding of `~` is NaN: byte b is token b."""
    config = read_config(model)
    with (
        mock.patch("jllama.folders.tensors.is_finite", return_value=True),  # or it is refused
        whole_folder(folder) as partial,
    ):
        writer = ModelWriter(partial, config, "a test")
        for block in tensor_shapes(config):
            tensors = {name: np.array(stored) for name, stored in read_block(model, block).items()}
            if block == "embeddings":
                tensors["tok_embeddings.weight"][ord("~")] = np.nan
            writer.write_block(block, tensors)
        writer.finish(tokenizer_files(model))
    return folder
