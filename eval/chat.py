"""`python -m eval.chat`: talk with the tuned model and its base; the answer comes word by word.

    tuned> What is the capital of Canada?
    The capital of Canada is Ottawa.
    tuned> /both And of Germany?
    base: What is
    tuned: The capital of Germany is Berlin.

Turn n of a conversation is sampled with --seed plus n, so that a conversation can be repeated.
"""

import contextlib
import difflib
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace

import jllama
from eval.subject import Subject, Voices, is_of_sample, load_voices, resolve
from jllama.cli.command import run_command
from jllama.cli.terminal import console
from jllama.decode.sampling import Likeliest, Likelihood
from jllama.errors import AtLeast0, AtLeast1, InputError, NotNegative, Positive, checked
from jllama.folders.adapter import read_passport
from jllama.text.prompt import Message, PromptStyle, conversation
from jllama.text.tokenizer import Tokenizer

WITH_TURNS = ("llama2-chat", "llama3-chat")  # made for conversations, however they were trained
COMMANDS = {
    "/base": "the base model answers; /base TEXT asks it once",
    "/tuned": "the tuned model answers; /tuned TEXT asks it once",
    "/both": "both answer, the base first, and the tuned answer is kept; /both TEXT asks once",
    "/system TEXT": "a system prompt before the conversation; /system alone removes it",
    "/set NAME VALUE": "changes how answers are sampled; /set alone shows it",
    "/clear": "forgets the history, and counts turns from the start; keeps the system prompt",
    "/help": "shows this",
    "/quit": "ends, as Ctrl-D does; Ctrl-C stops an answer",
}


@checked
class ChatConfig(Subject):
    """Talk with a run's tuned model, and with its base.

    Without --run and --model, of the newest run. /help lists what can be typed besides questions.
    """

    temperature: NotNegative | None = None
    """0 takes the likeliest token; by default 0 for a run on the bundled sample, else 0.6."""
    top_p: Likeliest = 0.9
    """Only the likeliest tokens that together have this probability."""
    top_k: AtLeast0 = 0
    """Only the k likeliest tokens; 0 takes all."""
    min_p: Likelihood = 0.0
    """Only tokens at least this likely, relative to the likeliest."""
    repetition_penalty: Positive = 1.0
    """Makes tokens that the conversation holds less likely; 1 does nothing."""
    max_new_tokens: AtLeast1 = 256
    """Tokens of an answer."""
    seed: AtLeast0 = 0
    """Seed of the first turn; each further turn adds 1."""
    system: str = ""
    """A system prompt before the conversation."""

    def sampling(self) -> jllama.Sampling:
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        chosen = {name: getattr(self, name) for name in names}
        return jllama.Sampling(**{k: v for k, v in chosen.items() if v is not None})


# What /set changes: the fields that do not say who answers, or what was said before.
SETTABLE = [field.name for field in fields(ChatConfig)[len(fields(Subject)) : -1]]


class Chat:
    """One conversation: who answers, how, and what was said.

    Args:
        voices: who can answer: "base" and, if something was tuned, "tuned"; a model each, and its
            adapter's scale.
        turns: whether a question is asked with what was said before.
    """

    def __init__(
        self,
        config: ChatConfig,
        style: PromptStyle,
        tokenizer: Tokenizer,
        voices: Voices,
        turns: bool,
    ):
        self.turns = turns
        self.config, self.style, self.tokenizer, self.voices = config, style, tokenizer, voices
        self.who = "tuned" if "tuned" in voices else "base"
        self.context = min(model.config.max_seq_len for model, _ in voices.values())
        self.clear()

    def clear(self) -> None:
        self.history: list[Message] = []
        self.turn = 0

    def read(self, line: str) -> None:
        """Obeys or answers one line; what is wrong with it is printed."""
        try:
            if line.startswith("/"):
                name, *text = line.split(maxsplit=1)
                self.obey(name, "".join(text).strip())
            elif line.strip():
                self.ask(line.strip())
        except InputError as error:
            console.print(str(error))
        except KeyboardInterrupt:  # between two answers
            console.print("[stopped]")

    def obey(self, name: str, text: str) -> None:
        """A command, and what follows it on the line."""
        if name == "/set":
            self.set(text.split())
        elif name == "/system":
            self.config = replace(self.config, system=text)
            console.print("[the system prompt is kept]" if text else "[no system prompt]")
        elif name in ("/base", "/tuned", "/both"):
            if "tuned" not in self.voices:
                raise InputError("nothing tuned is loaded, so the base answers; start with --run, "
                                 "--adapter or --tuned")  # fmt: skip
            before, self.who = self.who, name[1:]
            if text:
                try:
                    self.ask(text)
                finally:
                    self.who = before
        elif name == "/clear":
            self.clear()
        elif name == "/help":
            for usage, meaning in COMMANDS.items():
                console.print(f"{usage:17}{meaning}")
        else:
            known = ", ".join(usage.split()[0] for usage in COMMANDS)
            raise InputError(f"no command {name}; there are {known} (a question that begins with "
                             "a slash wants a space before it)")  # fmt: skip

    def set(self, words: Sequence[str]) -> None:
        """`/set NAME VALUE`; a wrong value changes nothing."""
        now = ", ".join(f"{name} {getattr(self.config, name)}" for name in SETTABLE)
        if not words:
            console.print(now)
            return
        if words[0] not in SETTABLE:
            near = difflib.get_close_matches(words[0], SETTABLE, 1)
            known = f"did you mean {near[0]}?" if near else f"there are {', '.join(SETTABLE)}"
            raise InputError(f"no setting {words[0]}; {known}")
        if len(words) != 2:
            raise InputError(f"/set {' '.join(words)}: expected a name and a value; now {now}")
        name, text = words
        try:
            self.config = replace(self.config, **{name: text})  # type: ignore[arg-type]
        except InputError as error:
            raise InputError(f"{error}; it stays {getattr(self.config, name)}") from None
        console.print(f"{name} {getattr(self.config, name)}")

    def ask(self, question: str) -> None:
        """Prints the answer of whose turn it is, and keeps it."""
        prompt = self.prompt(question)
        answer = ""
        for name in self.voices if self.who == "both" else [self.who]:
            answer = self.answer(name, prompt)
        self.turn += 1
        if answer and self.turns:
            self.history += [Message("user", question), Message("assistant", answer)]

    def prompt(self, question: str) -> list[int]:
        """The ids of history and question; forgets the oldest turns that leave an answer no room.

        Raises:
            InputError: if the question does not fit alone; nothing is forgotten then.
        """
        room = min(self.config.max_new_tokens, self.context // 4)
        ids: list[int] = []
        system = [Message("system", self.config.system)] if self.config.system else []
        for first in range(0, len(self.history) + 1, 2):
            messages = [*system, *self.history[first:], Message("user", question)]
            ids = conversation(self.style, messages, self.tokenizer)[0]
            if len(ids) + room <= self.context:
                break
        if len(ids) >= self.context:
            what = "the question and the system prompt have" if system else "the question has"
            raise InputError(f"{what} {len(ids)} tokens, the context of the model is "
                             f"{self.context}; ask a shorter one")  # fmt: skip
        if first:
            console.print(
                f"[oldest turns forgotten: {first // 2}; the context is {self.context} tokens]"
            )
            del self.history[:first]
        return ids

    def answer(self, name: str, prompt: Sequence[int]) -> str:
        """Streams one answer; says where it was cut. Ctrl-C ends it where it is."""
        model, adapter_scale = self.voices[name]
        if self.who == "both":
            console.print(f"{name}: ", end="")
        said, cut = "", False

        def pieces() -> Iterator[str]:
            nonlocal cut
            cut = yield from jllama.stream(
                model,
                self.tokenizer,
                prompt,
                self.config.max_new_tokens,
                self.config.sampling(),
                seed=self.config.seed + self.turn,
                adapter_scale=adapter_scale,
            )

        try:
            for piece in pieces():
                said += piece
                console.print(piece, end="")
            console.print("" if said else "[an empty answer]")
        except KeyboardInterrupt:
            console.print(" [stopped]")
        room = model.config.max_seq_len - len(prompt)
        if cut and room < self.config.max_new_tokens:
            console.print(f"[cut at {room} tokens: the context is full; /clear makes room]")
        elif cut:
            console.print(
                f"[cut at {self.config.max_new_tokens} tokens; /set max_new_tokens changes that]"
            )
        return said


def chat(config: ChatConfig) -> None:
    """Loads the models, and reads lines until /quit or the end of the input."""
    config, settings = resolve(config)
    style = config.prompt_style
    assert style
    tokenizer = jllama.load_tokenizer(config.model, config.prompt_template)
    conversation(style, [Message("user", "?")], tokenizer)  # fails now if the two do not fit
    if config.temperature is None:
        default = 0.0 if is_of_sample(settings) else jllama.Sampling.temperature
        config = replace(config, temperature=default)
    turns = style in WITH_TURNS or trained_on_turns(config)
    system = config.system.encode("utf-8", "replace").decode()  # a flag may hold any bytes
    config = replace(config, system=system)
    talk = Chat(config, style, tokenizer, load_voices(config), turns)
    console.print(
        f"{config.adapter or config.tuned or config.model}, prompt style {style}; /help lists "
        "commands"
    )
    if not turns:
        console.print(
            "[trained on rows of one question: each question is sent alone, without what was said "
            "before]"
        )

    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # input() edits lines with it
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a wrong byte is no reason to end
    while True:
        try:
            line = input(f"{talk.who}> " if terminal else "")
        except EOFError:
            break
        except KeyboardInterrupt:
            if not terminal:
                raise
            console.print()  # the line is cleared
            continue
        if line.split() == ["/quit"]:
            return
        talk.read(line)
    if terminal:
        console.print()


def trained_on_turns(config: ChatConfig) -> bool:
    """Whether the tuned model, asked in its own style, has seen rows of several questions."""
    result = config.adapter or config.tuned
    passport = read_passport(result) if result else {}
    own = passport.get("prompt_style") == config.prompt_style
    return own and passport.get("turns", 1) > 1


def main(argv: Sequence[str] | None = None) -> None:
    run_command(chat, ChatConfig, argv, name="chat")


if __name__ == "__main__":
    main()
