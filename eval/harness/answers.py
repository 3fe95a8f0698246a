"""Answers as a task's `generation_kwargs` ask for them.

{"until": ["\\n"], "max_gen_toks": 64}                   greedy
{"until": [], "do_sample": true, "temperature": 0.8}     sampled, up to 256 tokens
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lm_eval.models.utils import normalize_gen_kwargs

import jllama
from jllama.errors import InputError
from jllama.text.tokenizer import Tokenizer

_CUTS = ("top_k", "top_p", "min_p")  # which greedy decoding passes over


class Wanted(NamedTuple):
    """How to answer, and where an answer ends."""

    sampling: jllama.Sampling
    until: tuple[str, ...]
    max_new_tokens: int


def wanted(given: Mapping[str, Any], max_new_tokens: int) -> Wanted:
    """What a request's `generation_kwargs` mean.

    Args:
        max_new_tokens: where they do not say.

    Raises:
        InputError: if they ask for what jllama has not.
    """
    settings: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), max_new_tokens))
    until = tuple(filter(None, settings.pop("until")))
    budget = settings.pop("max_gen_toks")
    temperature = settings.pop("temperature", 0.0)
    cuts = {name: settings.pop(name) for name in _CUTS if name in settings}
    if not settings.pop("do_sample"):
        temperature, cuts = 0.0, {}
    penalty = settings.pop("repetition_penalty", 1.0)
    if settings.get("num_beams") == 1:
        del settings["num_beams"]
    if settings:
        raise InputError(
            f"generation_kwargs {', '.join(settings)}: expected until, max_gen_toks, do_sample, "
            f"temperature, {', '.join(_CUTS)}, repetition_penalty or num_beams 1"
        )
    cuts = {"top_p": 1.0} | cuts
    sampling = jllama.Sampling(temperature=temperature, repetition_penalty=penalty, **cuts)
    return Wanted(sampling, until, budget)


def answer(
    voice: tuple[jllama.Llama, float],
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    asked: Wanted,
    seeds: Sequence[int],
    width: int,
) -> list[str]:
    """The text of each answer, up to the first of its stop strings.

    Args:
        width: to which the prompts are padded.
    """
    model, adapter_scale = voice
    stops = tokenizer.stop_ids
    answers = jllama.generate(
        model, prompts, asked.max_new_tokens, asked.sampling, seed=seeds, stop_ids=stops,
        stop_strings=asked.until, tokenizer=tokenizer, adapter_scale=adapter_scale, width=width,
    )  # fmt: skip
    texts = []
    for ids in answers:
        text = tokenizer.decode([token for token in ids if token not in stops])
        for stop in asked.until:
            text = text.partition(stop)[0]
        texts.append(text)
    return texts
