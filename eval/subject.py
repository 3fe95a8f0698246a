"""The models that a command compares: a base model, and what was tuned of it."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, TypeVar

import jax
import tyro

import jllama
from jllama import bundled
from jllama.config import Base, BaseChoice, BaseSkip, MeshChoice, Precision, asked_base
from jllama.errors import InputError, checked
from jllama.folders.adapter import check_base, read_passport, template_of
from jllama.folders.run import LATEST, RunFolder
from jllama.sharding import make_mesh, mesh_shape
from jllama.text.prompt import PromptStyle, chat_style

Voices = dict[str, tuple[jllama.Llama, float]]  # "base", "tuned": a model, its adapter's scale


@checked
class Subject:
    """The flags that name them."""

    run: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""
    """Run folder of train.lora; names the model, what was tuned, the data and the prompt style."""
    model: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""
    """Model folder, instead of a run."""
    adapter: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""
    """PEFT adapter folder for --model."""
    tuned: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""
    """Model folder to compare with --model, instead of an adapter; without either there is only
    the base."""
    force: bool = False
    """Load an adapter that was trained on a different base model."""
    precision: Precision | None = None
    """Dtype of weights and activations; by default that of the run, else bf16."""
    base: BaseChoice | None = None
    """Format of the base's linears; by default the one that was trained on, else as stored."""
    base_skip: BaseSkip = "none"
    """With --base: linears that stay as they are."""
    mesh: MeshChoice = ""
    """Several devices that the weights are cut over, as fsdp=4 or tensor=4."""
    prompt_style: PromptStyle | None = None
    """How a prompt becomes text; by default as it was in training, else plain."""
    prompt_template: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """A chat template in Jinja, instead of the model's own."""

    def __post_init__(self):
        if self.prompt_template:
            chosen = chat_style(self.prompt_style or "chat")
            object.__setattr__(self, "prompt_style", chosen)
        if self.adapter and self.tuned:
            raise InputError("--adapter and --tuned; expected one of them")
        asked_base(self.base or "stored", self.base_skip)

    @property
    def asked_base(self) -> Base | None:
        """The format that `resolve` found or was given."""
        return asked_base(self.base or "stored", self.base_skip)


Named = TypeVar("Named", bound=Subject)


def resolve(config: Named) -> tuple[Named, dict[str, Any]]:
    """The flags with what the run and the passport say, and the run's settings, if there is one.

    Raises:
        InputError: if there is no such run, or the adapter was trained on another base.
    """
    settings: dict[str, Any] = {}
    if not config.model:
        config, settings = _from_run(config)
    elif config.run:
        raise InputError("--run names the model itself; drop --model or --run")
    if config.adapter:
        check_base(config.adapter, config.model, force=config.force)
    result = config.adapter or config.tuned
    passport = read_passport(result) if result else {}
    style: PromptStyle = config.prompt_style or passport.get("prompt_style", "plain")
    own = template_of(result) if result and style == "chat" else None
    if config.base is None and (base := Base.of(passport.get("base"))):
        skip = ",".join(base.skip) or "none"
        config = dataclasses.replace(config, base=base.format, base_skip=skip)
    return dataclasses.replace(
        config,
        precision=config.precision or "bf16",
        prompt_style=style,
        prompt_template=config.prompt_template or str(own or ""),
    ), settings


def _from_run(config: Named) -> tuple[Named, dict[str, Any]]:
    run = RunFolder(Path(config.run) if config.run else LATEST)
    settings = run.read_settings()
    result = run.result(settings["tune"])
    if not result.is_dir():
        raise InputError(f"{run.path}: no {result.name}/ yet; the run has not finished")
    found: dict[str, Any] = {
        "run": str(run.path),
        "model": settings["model"],
        "precision": config.precision or settings["precision"],
    }
    if not (config.adapter or config.tuned):
        found["adapter" if settings["tune"] == "lora" else "tuned"] = str(result)
    return dataclasses.replace(config, **found), settings


def is_of_sample(settings: dict[str, Any]) -> bool:
    """Whether a run's settings are of one on the bundled sample."""
    data = settings.get("data")
    return isinstance(data, str) and Path(data) == bundled.ROWS


def load_on_mesh(config: Subject, folder: str, base: Base | None = None) -> jllama.Llama:
    """One of a subject's models, cut over the devices that it asks for."""
    assert config.precision  # by `resolve`
    mesh = make_mesh(jax.devices(), mesh_shape(config.mesh))
    return jllama.load_model(folder, config.precision, base=base, mesh=mesh)


def load_voices(config: Subject) -> Voices:
    """The base and, if something was tuned, the tuned model; with an adapter they are one model.

    Args:
        config: what `resolve` gave.
    """
    model = load_on_mesh(config, config.model, config.asked_base)
    voices = {"base": (model, 0.0)}
    if config.adapter:
        voices["tuned"] = (jllama.load_adapter(model, config.adapter), 1.0)
    if config.tuned:
        voices["tuned"] = (load_on_mesh(config, config.tuned), 1.0)
    return voices
