"""llama.cpp itself, out of the package `xllamacpp`: the other side of what is exported."""

import json
import urllib.request
from pathlib import Path

import pytest


class LlamaCpp:
    """llama.cpp with everything but the stored weights in fp32."""

    def __init__(self, file: Path):
        peer = pytest.importorskip(
            "xllamacpp", reason="llama.cpp is not here: pip install xllamacpp"
        )
        params = peer.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(file), 512, 1
        params.cpuparams.n_threads, params.verbosity, params.warmup = 1, 0, False
        params.cache_type_k = params.cache_type_v = peer.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = peer.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = peer.Server(params)

    def _ask(self, path: str, **asked) -> dict:
        request = urllib.request.Request(
            f"{self._server.listening_address}/{path}", json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def tokens(self, text: str, *, marked: bool = False) -> list[int]:
        """With BOS where the file wants it; `marked`: special tokens are read out of the text."""
        return self._ask("tokenize", content=text, add_special=True, parse_special=marked)["tokens"]

    def chat(self, *messages: str) -> list[int]:
        """The ids of messages of user and assistant in turns, by the file's template."""
        turns = [
            {"role": ("user", "assistant")[n % 2], "content": m} for n, m in enumerate(messages)
        ]
        return self.tokens(self._ask("apply-template", messages=turns)["prompt"], marked=True)

    def next(self, ids: list[int]) -> int | None:
        """The likeliest id after these; None for one that ends a text."""
        said = self._ask("completion", prompt=ids, n_predict=1, temperature=0, return_tokens=True)
        return said["tokens"][0] if said["tokens"] else None

    def answer(self, prompt: list[int], length: int) -> tuple[list[int], list[float]]:
        """Greedy ids up to one that ends a text; the log-probability of each if all are told.

        It tells none of a token that is only a part of a character.
        """
        said = self._ask(
            "completion", prompt=prompt, n_predict=length, temperature=0, n_probs=1,
            return_tokens=True,
        )  # fmt: skip
        told = said["completion_probabilities"]
        whole = [token["id"] for token in told] == said["tokens"]
        return said["tokens"], [token["logprob"] for token in told] if whole else []
