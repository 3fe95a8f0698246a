"""What every test shares: CPU by default, strict shapes, and the folder of real weights."""

import os
import shutil
from pathlib import Path
from typing import get_args

import jax
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # for the commands that tests start, too
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Programs this small are sooner run as they are than optimized; what XLA itself does stays.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
os.environ["OMP_NUM_THREADS"] = "1"  # torch's: models this small only wait for a second one
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_numpy_rank_promotion", "raise")

import random_models  # noqa: E402
from random_models import GROUPED, TOKENIZER  # noqa: E402

from jllama.config import Base, Format  # noqa: E402
from jllama.errors import InputError  # noqa: E402

ASSETS = Path(os.environ.get("JLLAMA_ASSETS", Path(__file__).parents[2] / "shared" / "assets"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--base", choices=get_args(Format), default=None,
        help="the tests' models have their linears in this format; `as_stored` tests are left out",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Commands share compiled programs in a cache of the tests' own, kept between runs."""
    os.environ["XDG_CACHE_HOME"] = str(config.cache.mkdir("home"))
    base = config.getoption("--base")
    random_models.BASE_OF_ALL = Base(base) if base else None


@pytest.fixture(autouse=True)
def dtype_promotion(request):
    """Strict, but where others' code that promotes is in the program."""
    allowed = any(map(request.node.get_closest_marker, ("integration", "promotes")))
    with jax.numpy_dtype_promotion("standard" if allowed else "strict"):
        yield


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    """One good checkpoint of two shards; tests damage copies of it."""
    from meta_files import random_tensors, write_meta

    return write_meta(
        tmp_path_factory.mktemp("meta") / "a", random_tensors(GROUPED), GROUPED, shards=2
    )


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """Of bytes: byte b is token b."""
    from jllama.text.tokenizer import load_tokenizer

    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    file.write_bytes(TOKENIZER)
    return load_tokenizer(file)


@pytest.fixture
def meta(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "meta"))


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real weights and their expected outputs."""
    return ASSETS


@pytest.fixture
def refusal(tmp_path):
    """Calls a conversion that must be refused; gives its message. Nothing new may be left."""

    def call(convert, settings) -> str:
        before = sorted(os.listdir(tmp_path))
        with pytest.raises(InputError) as refused:
            convert(settings)
        assert sorted(os.listdir(tmp_path)) == before  # no model, no *.partial, nothing executed
        return str(refused.value)

    return call


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if base := config.getoption("--base"):
        for item in items:
            if item.get_closest_marker("as_stored"):
                item.add_marker(pytest.mark.skip(reason=f"needs weights as stored, not {base}"))
    if not ASSETS.is_dir():
        skip = pytest.mark.skip(reason=f"no real weights in {ASSETS}; set JLLAMA_ASSETS")
        for item in items:
            if item.get_closest_marker("real"):
                item.add_marker(skip)
