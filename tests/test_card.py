"""What JAX takes of a card, and the plugin that it wants, by a driver that is not there."""

import os

import pytest

from jllama.cli import card
from jllama.errors import InputError

VARIABLES = (card.FRACTION, card.OLD_FRACTION, *card.ALLOCATION)


@pytest.fixture
def hundred(tmp_path, monkeypatch):
    """A driver that tells of 100,000 MiB, and no variable set; what JAX is told is taken back."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '100000 MiB'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_jax_takes_what_a_plan_assumes_of_a_card(hundred):
    card.prepare_gpu()
    assert float(os.environ[card.FRACTION]) == pytest.approx((100_000 - 700 - 3_000) / 100_000)
    assert card.usable_bytes(100_000) == 96_300 * 2**20


@pytest.mark.parametrize(
    ("name", "value", "fraction"),
    [
        (card.FRACTION, "0.5", 0.5),
        (card.OLD_FRACTION, "0.6", 0.6),
        (card.ALLOCATION[0], "false", 0.75),
    ],
)
def test_what_the_user_says_of_memory_stays(hundred, monkeypatch, name, value, fraction):
    monkeypatch.setenv(name, value)
    card.prepare_gpu()
    assert {each: os.environ[each] for each in VARIABLES if each in os.environ} == {name: value}
    assert card.memory_fraction() == fraction


def test_without_a_gpu_nothing_is_said_of_memory(hundred, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    card.prepare_gpu()
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("PATH", "/nowhere")
    card.prepare_gpu()
    assert card.FRACTION not in os.environ


@pytest.mark.parametrize("value", ["most", "0", "-1", "nan"])
def test_a_share_that_is_none_is_one_message(monkeypatch, value):
    monkeypatch.setenv(card.FRACTION, value)
    with pytest.raises(InputError, match=f"{card.FRACTION}={value}, expected a number above 0"):
        card.memory_fraction()


def test_a_plugin_of_another_version_is_refused_where_there_is_a_card(hundred, monkeypatch):
    versions = {"jaxlib": "0.11.2", "jax-cuda13-plugin": "0.11.2.post1", "jax-cuda13-pjrt": ""}
    monkeypatch.setattr(card, "installed_version", lambda name: versions.get(name, ""))
    card.prepare_gpu()
    versions["jax-cuda13-pjrt"] = "0.10.2"
    words = (
        r"^jax-cuda13-pjrt 0\.10\.2 does not fit jaxlib 0\.11\.2: .*'jax-cuda13-pjrt==0\.11\.2'$"
    )
    with pytest.raises(InputError, match=words):
        card.prepare_gpu()
    monkeypatch.setenv("PATH", "/nowhere")
    card.prepare_gpu()
