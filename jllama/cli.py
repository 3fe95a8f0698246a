"""The shell that every command shares: flags, errors, progress, and the `jllama` script.

A command is a frozen dataclass (one field a flag) and a function; `run_command` does the rest.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from jllama.errors import InputError

# Subcommand of the `jllama` script -> module with a `main(argv)`, imported when asked for.
COMMANDS = {
    "from-meta": "convert.from_meta",
    "from-hf": "convert.from_hf",
    "to-meta": "convert.to_meta",
    "to-hf": "convert.to_hf",
    "verify": "convert.verify",
    "plan": "train.plan",
    "train": "train.lora",
    "sample": "train.sample",
    "lint": "train.lint",
    "prompts": "eval.prompts",
    "chat": "eval.chat",
    "score": "eval.score",
    "ablate": "eval.ablate",
    "report": "eval.report",
    "speed": "eval.speed",
}

Settings = TypeVar("Settings")  # a dataclass


def run_command(
    function: Callable[[Settings], None],
    settings: type[Settings],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    gpu: bool = True,
    default: Callable[[Sequence[str]], tuple[Settings | None, list[str]]] | None = None,
) -> None:
    """Parses `argv` into `settings` and calls `function`.

    Args:
        gpu: False for a command that reads and writes only, and takes no GPU from others.
        default: reads a settings file named among the arguments; returns it and the rest.

    A wrong input ends in one message and exit code 2, Ctrl-C in exit code 130.
    """
    import tyro

    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        loaded, arguments = default(arguments) if default else (None, arguments)
        defaults: dict[str, Any] = {} if loaded is None else {"default": loaded}
        parsed = tyro.cli(settings, prog=prog, args=arguments, **defaults)
        if gpu:
            pass_over_absent_gpu()
        else:
            _use_cpu()
        use_private_compilation_cache()
        function(parsed)
    except (InputError, OSError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        sys.exit(130)


def settings_from_yaml(settings: type[Settings], path: str | Path) -> Settings:
    """A dataclass from a YAML file of `field: value` lines; unknown fields are refused."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; --config wants a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML ({error})") from error
    fields = {field.name for field in dataclasses.fields(settings)}  # type: ignore[arg-type]
    if not isinstance(content, dict) or not set(content) <= fields:
        found = sorted(set(content) - fields) if isinstance(content, dict) else content
        raise InputError(f"{path}: unknown fields {found}; known are {', '.join(sorted(fields))}")
    return settings(**_typed(settings, content, path))


def _typed(settings: type, content: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Values in the types of the defaults; YAML reads 5e-5 as text and 1 as a whole number."""
    typed, wrong = {}, []
    hints = get_type_hints(settings)
    for name, value in content.items():
        if value == "auto" and "'auto'" in str(hints[name]):
            typed[name] = value
            continue
        kind = type(getattr(settings, name))
        try:
            typed[name] = float(value) if kind is float and not isinstance(value, bool) else value
            good = type(typed[name]) is kind
        except (TypeError, ValueError):
            good = False
        if not good:
            wrong.append(f"{name} {value!r}, expected {kind.__name__}")
    if wrong:
        raise InputError(f"{path}: {'; '.join(wrong)}")
    return typed


def settings_from_run(run: str | Path) -> dict[str, Any]:
    """The resolved settings of a run folder, as `train.lora` wrote them."""
    import yaml

    path = Path(run) / "config.yaml"
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a run of train.lora") from error


def user_cache(name: str) -> Path:
    """A folder in the user's cache that only the user may enter (mode 0700).

    Raises:
        OSError: if it cannot be made, or belongs to somebody else.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = home / "jllama" / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    folder.chmod(0o700)
    return folder


def pass_over_absent_gpu() -> None:
    """Keeps JAX's CUDA plugin, which the `plan` extra brings, quiet where there is no driver."""
    drivers = ("/dev/nvidiactl", "/dev/dxg")  # Linux, and Windows' subsystem for it
    plugin = importlib.util.find_spec("jax_cuda13_plugin") is not None
    if plugin and "JAX_PLATFORMS" not in os.environ and not any(map(os.path.exists, drivers)):
        _use_cpu()


def _use_cpu() -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")


def use_private_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache; private, for they are executable code."""
    import jax

    with contextlib.suppress(OSError):  # a read-only home costs a compilation, not the run
        jax.config.update("jax_compilation_cache_dir", str(user_cache("xla")))


class Progress:
    """A bar with rate and remaining time on a terminal, a plain line now and then elsewhere."""

    def __init__(self, title: str, total: int, unit: str, done: int = 0):
        self._title, self._total, self._unit = title, total, unit
        self._every = max(1, total // 10)
        self._done = done
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(bar_width=None),
                progress.MofNCompleteColumn(),
                progress.TextColumn(self._unit),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self._title, total=self._total, completed=self._done, note=""
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, note: str = "") -> None:
        """One unit done; `note` stands at the end of the line."""
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._task, advance=1, note=note)
        elif self._done % self._every == 0 or self._done == self._total:
            print(f"{self._title} {self._done}/{self._total} {self._unit}  {note}".rstrip())


def main(argv: Sequence[str] | None = None) -> None:
    """`jllama COMMAND ...`: the same commands under one name."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: jllama COMMAND [--help] ...\n")
        for name, module in COMMANDS.items():
            print(f"  {name:{width}}  python -m {module}")
        return
    if arguments[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"jllama: no command {arguments[0]!r}; choose from {known}", file=sys.stderr)
        sys.exit(2)
    importlib.import_module(COMMANDS[arguments[0]]).main(arguments[1:])
