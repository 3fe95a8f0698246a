"""One answer as a stream of text, for somebody who is reading along."""

from collections.abc import Generator, Sequence

import numpy as np

from jllama.decode.generate import answer_end, check_prompts, decode_chunks, power_of_two
from jllama.decode.sampling import Sampling, make_choice
from jllama.model import Llama
from jllama.text.tokenizer import Tokenizer

LEAST_WIDTH = 64


def stream(
    model: Llama,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    seed: int = 0,
    stop_strings: Sequence[str] = (),
    adapter_scale: float = 1.0,
    chunk: int = 8,
) -> Generator[str, None, bool]:
    """The answer to one prompt as pieces of text, which end at whole characters.

    A stop string and what follows it are not yielded. The generator's return value says whether
    the answer was cut, by `max_new_tokens` or the context, before it ended by itself. Errors as for
    `generate_with_logprobs`.
    """
    check_prompts(model, [prompt], np.array([max_new_tokens]))
    budget = min(max_new_tokens, model.config.max_seq_len - len(prompt))
    choice = make_choice(sampling or Sampling(), [seed], [0])
    ids: list[int] = []
    sent, cut = "", True
    width = power_of_two(len(prompt), LEAST_WIDTH)  # a conversation compiles a few times
    steps = (
        decode_chunks(model, [prompt], budget, choice, adapter_scale, width, chunk)
        if budget
        else ()
    )
    for tokens, _ in steps:
        ids += tokens[0].tolist()
        end = answer_end(ids, budget, tokenizer.stop_ids, (), None)
        text = tokenizer.decode([i for i in ids[:end] if i not in tokenizer.stop_ids])
        stops = [at for stop in stop_strings if (at := text.find(stop)) >= 0]
        if stops:
            text, end = text[: min(stops)], len(ids)
        whole = text if end is not None else _whole(text, stop_strings)
        if len(whole) > len(sent):
            yield whole[len(sent) :]
            sent = whole
        if end is not None:
            cut = not stops and ids[end - 1] not in tokenizer.stop_ids
            break
    return cut


def _whole(text: str, stop_strings: Sequence[str]) -> str:
    """Text without an unfinished character, and without what may be the start of a stop string."""
    text = text.rstrip("\ufffd")
    longest = max(
        (n for stop in stop_strings for n in range(1, len(stop)) if text.endswith(stop[:n])),
        default=0,
    )
    return text[: len(text) - longest]
