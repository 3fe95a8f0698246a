"""jllama as a model of lm-evaluation-harness: its three kinds of requests, asked of one model.

    loglikelihood          "The capital of France is", " Paris."  ->  (-3.2, True)
    loglikelihood_rolling  "A whole text."                        ->  -41.7
    generate_until         "Q: 2 + 3?\\nA:", {"until": ["\\n"]}     ->  " 5"

A text becomes the ids, and is cut where the context ends, as by lm_eval's own `hf` model with an
export of the same folder.
"""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lm_eval.models  # noqa: F401  # registers theirs, which they do only if none is there yet
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import (
    get_rolling_token_windows,
    make_disjoint_window,
    simple_parse_args_string,
)

import jllama
from eval.harness.answers import Wanted, answer, wanted
from eval.harness.continuations import Continued, find
from eval.likelihood import batches
from eval.subject import Subject, load_voices, resolve
from jllama.cli.settings import checked_settings
from jllama.cli.terminal import Progress, console
from jllama.errors import InputError
from jllama.machine import pass_over_absent_gpu, use_private_compilation_cache
from jllama.text.hf_files import TEMPLATE
from jllama.text.json_tokenizer import adds_bos
from jllama.text.messages import Message
from jllama.text.tokenizer import Tokenizer, tokenizer_files

BATCH = 8  # requests at a time


class Texts(NamedTuple):
    """How texts become ids: a tokenizer, and whether it puts BOS first."""

    tokenizer: Tokenizer
    adds_bos: bool


def texts_of(config: Subject, who: str) -> Texts:
    """Of one of the models that `resolve` gave; a chat is written as the training wrote it."""
    folder = config.tuned if who == "tuned" and config.tuned else config.model
    result = config.adapter or config.tuned
    own = Path(result) / TEMPLATE if result else Path()
    template = config.prompt_template or (own if own.is_file() else "")
    files = tokenizer_files(Path(folder))
    return Texts(jllama.load_tokenizer(folder, template), adds_bos(files, Path(folder)))


@register_model("jllama")
class JllamaLM(TemplateLM):
    """One of the models that a command compares.

    Args:
        name: for the progress bar.
        voice: the model, and its adapter's scale.
        batch_size: requests at a time.
    """

    def __init__(
        self, name: str, voice: tuple[jllama.Llama, float], texts: Texts, batch_size: int = BATCH
    ):
        super().__init__()
        self.name, self.voice, self.batch_size = name, voice, batch_size
        self.tokenizer, self._adds_bos = texts
        self._bos = self.tokenizer.piece(self.tokenizer.bos_id)
        self.max_length = voice[0].config.max_seq_len
        self.max_gen_toks = 256  # of a task that does not say, as of `hf`

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict | None = None
    ) -> "JllamaLM":
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> "JllamaLM":
        """The model that `--model_args` name: flags of `jllama harness`, and `voice=base`.

        lm_eval's own `--device` says nothing here: it is cuda:0 wherever it is not given.

        Raises:
            InputError: if they name none.
        """
        pass_over_absent_gpu()
        use_private_compilation_cache()
        given: dict[str, Any] = {
            name: value if isinstance(value, bool) else str(value)
            for name, value in arg_dict.items()
        }
        size = str(given.pop("batch_size", (additional_config or {}).get("batch_size") or BATCH))
        if not size.isdecimal() or not int(size):
            raise InputError(f"batch_size {size}, expected a whole number, at least 1")
        voice = given.pop("voice", "")
        config, _ = resolve(checked_settings(Subject, given, "--model_args"))
        voice = voice or ("tuned" if config.adapter or config.tuned else "base")
        texts = texts_of(config, voice)
        if voice == "base":
            config = dataclasses.replace(config, adapter="", tuned="")
        elif voice == "tuned" and config.tuned:  # alone: two models may not fit
            config = dataclasses.replace(
                config, model=config.tuned, tuned="", base=None, base_skip="none"
            )
        elif voice != "tuned" or not config.adapter:
            raise InputError(f"voice={voice}, expected base, or tuned where something was tuned")
        return cls(voice, list(load_voices(config).values())[-1], texts, int(size))

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.tokenizer.bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: object
    ) -> list[int]:
        """With one BOS, if Hugging Face's tokenizer adds one; special tokens are read."""
        begins = self._adds_bos if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(self._bos):
            begins = False
        return [self.tokenizer.bos_id] * begins + self.tokenizer.marked(string)

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)  # `find` shows progress

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        **kwargs: object,
    ) -> list[tuple[float, bool]]:
        """Of (their key in the cache, context, continuation); contexts are cut on the left."""
        todo: list[Continued] = []
        cut = 0
        for key, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                words = "a window of a text" if key is None else repr(key[1][:80])
                raise InputError(
                    f"{words} has {len(continuation)} tokens; a continuation must have some, and "
                    f"no more than the context, {self.max_length}"
                )
            ids = context + continuation
            cut += len(ids) > self.max_length + 1
            todo.append((ids[-(self.max_length + 1) :], len(continuation)))
        self._tell_cut(cut, len(todo))
        found = find(self.voice, todo, self.batch_size, f"{self.name}: likelihood")
        for (key, _, _), (logprob, greedy) in zip(requests, found, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, (logprob, greedy))
        return [(logprob, greedy) for logprob, greedy in found]

    def _tell_cut(self, cut: int, requests: int) -> None:
        if cut:
            console.print(
                f"{self.name}: {cut} of {requests} requests lost their beginning: the context is "
                f"{self.max_length} tokens"
            )

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Of whole texts, each cut into windows as long as the context."""
        windows: list[tuple[None, list[int], list[int]]] = []
        borders = [0]
        for request in requests:
            ids = self.tok_encode(request.args[0])
            pairs = get_rolling_token_windows(
                token_list=ids,
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            borders.append(len(windows))
        logprobs = [logprob for logprob, _ in self._loglikelihood_tokens(windows)]
        sums = [math.fsum(logprobs[first:last]) for first, last in itertools.pairwise(borders)]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[str]:
        """Answers without their stop string; a sample depends on its request's place alone."""
        alike: dict[Wanted, list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(wanted(request.args[1], self.max_gen_toks), []).append(index)
        prompts: dict[int, list[int]] = {}
        todo: list[tuple[Wanted, int, list[int]]] = []
        cut = 0
        for asked, indices in alike.items():
            room = self.max_length - asked.max_new_tokens
            if room <= 0:
                raise InputError(
                    f"max_gen_toks {asked.max_new_tokens} leaves a prompt no room in a context of "
                    f"{self.max_length} tokens; lower it in the task's generation_kwargs"
                )
            for index in indices:
                ids = self.tok_encode(requests[index].args[0])
                cut += len(ids) > room
                prompts[index] = ids[-room:]
            lengths = [len(prompts[index]) for index in indices]
            for width, chosen in batches(lengths, self.batch_size):
                todo.append((asked, width, [indices[place] for place in chosen]))
        self._tell_cut(cut, len(requests))
        answers: dict[int, str] = {}
        with Progress(f"{self.name}: answers", len(todo), "batches") as progress:
            for asked, width, chosen in todo:
                # Another number of rows is another compilation.
                rows = [*chosen, *chosen[-1:] * (self.batch_size - len(chosen))]
                given = [prompts[index] for index in rows]
                texts = answer(self.voice, self.tokenizer, given, asked, rows, width)
                for index, text in zip(chosen, texts, strict=False):
                    answers[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
                progress.advance()
        return [answers[index] for index in range(len(requests))]

    @property
    def tokenizer_name(self) -> str:
        """What the text of a prompt depends on: lm_eval keeps prompts under this name."""
        template = self.tokenizer.template
        return hashlib.sha256((template.source if template else "").encode()).hexdigest()[:16]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        template = self.tokenizer.template
        return template.source if chat_template and template else None

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text after which the model answers.

        Raises:
            InputError: if there is no template, it refuses the messages, or the task begins the
                answer itself.
        """
        template = self.tokenizer.template
        if template is None:
            raise InputError("this model has no chat template; name one with --prompt-template")
        if not add_generation_prompt:
            raise InputError(
                "this task begins the answer itself (gen_prefix), which a chat template here does "
                "not; leave --apply-chat-template out"
            )
        return template.prompt([Message(turn["role"], turn["content"]) for turn in chat_history])
