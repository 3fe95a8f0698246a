"""The tiny models, adapters and runs that faults are injected into, made once for each process.

    ROOT/good/   model/ meta/ hf/ adapter/ run/ begun/ full/ begun-full/ ablation/ rows.json ...
    ROOT/case/   what one case needs of it, copied; commands see only this folder

Runs name their model by its whole path. So all of it is made in `case`, and moved.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from random_models import BASE, model_folder

import train.trainer  # imported once, not in every process
from convert.to_hf import main as to_hf
from convert.to_meta import main as to_meta
from eval.prompts import main as prompts
from eval.score import main as score
from faults.call import in_fork
from jllama.bundled import SAMPLE
from train.lora import main as train

PARAMS = BASE | {"n_kv_heads": 2, "n_layers": 1}
ABLATION = Path(__file__).parents[2] / "docs/results/ablation-llama-2-7b-a100-40gb"
ROWS = [{"prompt": f"Say {i}.", "completion": f"{i} " * (1 + i % 4)} for i in range(14)]


def train_flags(case: Path, **more: object) -> list[str]:
    """Of a run of 6 steps, each evaluated and saved; None takes a flag away."""
    settings = {
        "model": case / "model", "data": case / "rows.json", "output-dir": case / "run",
        "precision": "fp32", "max-seq-len": 48, "micro-batch-size": 4,
        "gradient-accumulation-steps": 1, "epochs": 2, "val-size": 2, "save-steps": 1,
        "eval-steps": 2, "lora-rank": 4, "learning-rate": 1e-2, "remat": "none",
    } | {name.replace("_", "-"): value for name, value in more.items()}  # fmt: skip
    kept = {name: value for name, value in settings.items() if value is not None}
    return [str(word) for name, value in kept.items() for word in (f"--{name}", value)]


class Place:
    """A process's own folder of good inputs.

    Args:
        root: a folder to make.
        wanted: the inputs that will be needed.
    """

    def __init__(self, root: Path, wanted: Iterable[str]):
        self.good, self.case = root / "good", root / "case"
        self.case.mkdir(parents=True)
        done = in_fork(lambda: _make(self.case, set(wanted)), self.case, limit=600)
        if done.code:
            raise RuntimeError(f"the good inputs could not be made:\n{done.words[-3000:]}")
        self.case.rename(self.good)

    @contextlib.contextmanager
    def fresh(self, names: Sequence[str]) -> Iterator[Path]:
        """The folder `case` with copies of these good inputs; it is the working directory."""
        before = Path.cwd()
        shutil.rmtree(self.case, ignore_errors=True)  # of a case whose process was killed
        self.case.mkdir()
        try:
            for name in names:
                copy = shutil.copytree if (self.good / name).is_dir() else shutil.copy2
                copy(self.good / name, self.case / name)
            os.chdir(self.case)
            yield self.case
        finally:
            os.chdir(before)
            shutil.rmtree(self.case)


def full_flags(case: Path, **more: object) -> list[str]:
    """The same run, with every weight learning."""
    return [*train_flags(case, lora_rank=None, learning_rate=1e-3, **more), "--tune", "full"]


def prompts_flags(case: Path, *subject: object) -> list[str]:
    return [
        *map(str, subject), "--prompts", str(case / "prompts.json"), "--max-new-tokens", "3",
        "--temperature", "0", "--precision", "fp32",
    ]  # fmt: skip


def score_flags(case: Path, *subject: object) -> list[str]:
    return [
        *map(str, subject), "--data", str(case / "rows.json"), "--limit", "3", "--exact-tokens",
        "3", "--precision", "fp32",
    ]  # fmt: skip


def _make(case: Path, wanted: set[str]) -> None:
    model_folder(case, PARAMS)
    (case / "rows.json").write_text(json.dumps(ROWS))
    (case / "prompts.json").write_text(json.dumps(ROWS[:2]))
    (case / "talk.txt").write_text("Say 3.\n/set\n/set top_p 0.5\n/both\nSay 4.\n/clear\n/help\n")
    recorded = [{"prompt": row["prompt"], "old_answer": "so"} for row in ROWS]
    (case / "reference.json").write_text(json.dumps(recorded))
    shutil.copytree(SAMPLE, case / "sample")
    shutil.copytree(ABLATION, case / "ablation")
    to_hf([str(case / "model"), str(case / "hf")])
    to_meta([str(case / "model"), str(case / "meta")])
    if wanted & {"run", "begun", "adapter"}:
        train(train_flags(case))
        _begun(case / "run", case / "begun", "adapter")
        shutil.copytree(case / "run" / "adapter", case / "adapter")
        (case / "adapter" / "jllama.json").unlink()  # as other tools write it
    if "run" in wanted:
        prompts(prompts_flags(case, "--run", case / "run"))
        score(score_flags(case, "--run", case / "run"))
    if wanted & {"full", "begun-full"}:
        train(full_flags(case, output_dir=case / "full"))
        _begun(case / "full", case / "begun-full", "model")


def _begun(run: Path, begun: Path, result: str) -> None:
    """A copy of a run to which a step, an evaluation and the result are still to come."""
    shutil.copytree(run, begun)
    shutil.rmtree(begun / result)
    shutil.rmtree(max((begun / "state").iterdir(), key=lambda path: int(path.name)))
