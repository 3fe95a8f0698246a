"""One command: its flags become settings, wrong input a message and an exit code.

A command is settings (a `jllama.errors.checked` class, one field a flag) and a function of them.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from jllama.cli.terminal import silent_if_nobody_reads
from jllama.errors import InputError
from jllama.machine import pass_over_absent_gpu, use_cpu, use_private_compilation_cache

Settings = TypeVar("Settings")


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

    A wrong input ends in one message and exit code 2, Ctrl-C in exit code 130.
    """
    import tyro

    prog = f"jllama {name}"
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with silent_if_nobody_reads():
            loaded, arguments = default(arguments) if default else (None, arguments)
            defaults: dict[str, Any] = {} if loaded is None else {"default": loaded}
            parsed = tyro.cli(settings, prog=prog, args=arguments, **defaults)
            if gpu:
                pass_over_absent_gpu()
            else:
                use_cpu()
            use_private_compilation_cache()
            function(parsed)
    except (InputError, OSError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        sys.exit(130)
