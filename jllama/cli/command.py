"""One command: its flags become settings, wrong input a message and an exit code.

A command is settings (a `jllama.errors.checked` class, one field a flag) and a function of them.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import tyro

from jllama.cli.card import prepare_gpu
from jllama.cli.terminal import complain, to_any_reader
from jllama.errors import InputError, WrongFields
from jllama.machine import (
    pass_over_absent_gpu,
    refuse_small_address_space,
    use_cpu,
    use_private_compilation_cache,
)

Settings = TypeVar("Settings")

_AS_TYPED = tyro.constructors.ConstructorRegistry()


@_AS_TYPED.primitive_rule
def _as_typed(
    kind: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Numbers and choices reach the settings as text, which check them by their declarations."""
    choices = get_args(kind.type) if kind.type_origin is Literal else ()
    if not choices and kind.type not in (int, float):
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(filter(None, choices))}}}" if choices else kind.type.__name__.upper(),
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    )


def run_command(
    function: Callable[[Settings], None],
    settings: type[Settings],
    argv: Sequence[str] | None,
    *,
    name: str,
    gpu: bool = True,
    default: Callable[[Sequence[str]], tuple[Settings | None, list[str]]] | None = None,
) -> None:
    """Parses `argv` into `settings` and calls `function`.

    Args:
        argv: None takes the process's own.
        name: of the command, as the `jllama` script knows it.
        gpu: False for a command that reads and writes only, and takes no GPU from others.
        default: reads a settings file named among the arguments; returns it and the rest.

    A wrong input, a disk or a memory that is full end in one message and exit code 2, Ctrl-C in
    exit code 130, SIGTERM in 143 and SIGHUP in 129, without children or temporary files left.
    """
    prog = f"jllama {name}"
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with to_any_reader(), _ended_in_order():
            _refuse_repeated(arguments)
            loaded, arguments = default(arguments) if default else (None, arguments)
            defaults: dict[str, Any] = {} if loaded is None else {"default": loaded}
            parsed = _parse(settings, prog=prog, args=arguments, registry=_AS_TYPED, **defaults)
            refuse_small_address_space()
            if gpu:
                pass_over_absent_gpu()
                prepare_gpu()
            else:
                use_cpu()
            use_private_compilation_cache()
            function(parsed)
    except (Exception, KeyboardInterrupt) as error:
        known = ending(error)
        if known is None:
            raise
        code, words = known
        complain(f"{prog}: {words}")
        sys.exit(code)


def ending(error: BaseException) -> tuple[int, str] | None:
    """The exit code and the message of an error that is no fault of the program."""
    if isinstance(error, InputError | OSError):
        return 2, str(error)
    if isinstance(error, UnicodeEncodeError):  # a library that takes only Unicode
        name = error.object[:200].encode("utf-8", "backslashreplace").decode()
        return 2, (
            f"{name}: a name that is no text in this locale ({error.encoding}); rename it, or set "
            "LC_ALL=C.UTF-8"
        )
    full = isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    if full or isinstance(error, MemoryError):
        words = str(error).partition("\n")[0][:200] or "this process may take no more"
        return 2, (
            f"out of memory: {words}; use a smaller model, shorter or fewer sequences, or "
            "--precision bf16"
        )
    return (130, "interrupted") if isinstance(error, KeyboardInterrupt) else None


def _refuse_repeated(arguments: Sequence[str]) -> None:
    """A flag that is given twice would lose its first value without a word."""
    flags = [word.partition("=")[0].replace("_", "-") for word in arguments if word[:2] == "--"]
    repeated = sorted({flag for flag in flags if flags.count(flag) > 1})
    if repeated:
        raise InputError(f"{', '.join(repeated)} given more than once; expected one value")


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM and SIGHUP end the body as an exception does; a second one ends it at once.

    A signal that is ignored (nohup) stays ignored.
    """
    numbers = (signal.SIGTERM, signal.SIGHUP)
    here = threading.current_thread() is threading.main_thread()
    ours = [n for n in numbers if here and signal.getsignal(n) == signal.SIG_DFL]

    def end(number: int, _: FrameType | None) -> None:
        for each in ours:
            signal.signal(each, signal.SIG_DFL)
        sys.exit(128 + number)

    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _parse(settings: type[Settings], **how: Any) -> Settings:
    """`tyro.cli`, whose words for a wrong value are the declaration's."""
    try:
        return tyro.cli(settings, **how)
    except WrongFields as wrong:
        problems = [(_flag(wrong.settings, name), what) for name, what in wrong.problems]
        raise InputError(str(WrongFields(wrong.settings, problems))) from None


def _flag(settings: type, field: str) -> str:
    """A field as it is typed: `--micro-batch-size`."""
    marks = getattr(get_type_hints(settings, include_extras=True)[field], "__metadata__", ())
    named = next((mark.name for mark in marks if getattr(mark, "name", None)), field)
    return "--" + named.replace("_", "-")
