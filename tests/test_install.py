"""What a fresh process imports, and what it prints."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.integration


def said(script: str) -> str:
    """What a fresh Python prints, on a machine whose devices nobody chose for it."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout + done.stderr


HELP = "import train.lora\ntry: train.lora.main(['--help'])\nexcept SystemExit: pass"


@pytest.mark.parametrize(
    ("script", "absent"),
    [
        ("from jllama.cli.script import overview; overview()", {"jax", "numpy", "pydantic"}),
        (HELP, {"jax", "torch"}),
        ("import train.trainer, eval.prompts, eval.chat, eval.score", {"torch", "transformers"}),
    ],
    ids=["jllama --help", "jllama train --help", "training and answering"],
)
def test_a_command_imports_only_what_it_needs(script, absent):
    listed = said(f"{script}\nimport json, sys; print(json.dumps(list(sys.modules)))")
    assert not absent & set(json.loads(listed.splitlines()[-1]))


def test_taking_things_from_jllama_prints_nothing_where_no_driver_is():
    script = "import jllama; jllama.Llama, jllama.generate; import jax; jax.devices()"
    assert said(script) == ""
