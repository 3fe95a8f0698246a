"""One side of `python -m eval.speed train`: training with `transformers` and `peft`.

    python -m eval.speed.peft_training JOB.json

The same rows as `train.speed`: the same ids, all of them learned, LoRA on the same linears, AdamW,
the gradient's norm clipped. bf16 is autocast's over a bf16 base, as `Trainer(bf16=True)` has it;
adapters and loss are fp32.
"""

import importlib
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.speed import torch_models
from eval.speed.torch_models import Device
from jllama.folders.json_files import read_json, write_json
from jllama.machine import use_cores
from jllama.names import HF_LINEARS


@dataclass(frozen=True)
class Job:
    """What to train; fields as the flags of `train.speed`.

    Attributes:
        model: folder in Hugging Face's format, or a preset for random weights.
        threads: cores to run on; 0 takes all.
        output: JSON file for the figures.
    """

    model: str
    precision: str
    checkpointing: bool
    micro_batch_size: int
    max_seq_len: int
    lora_targets: tuple[str, ...]
    steps: int
    warmup_steps: int
    threads: int
    device: Device
    output: str
    lora_rank: int = 16
    lora_dropout: float = 0.05
    learning_rate: float = 2e-4


def measure(job: Job) -> dict[str, Any]:
    """The figures, named as those of `train.speed`."""
    if job.threads:
        use_cores(job.threads)
    started = time.perf_counter()
    torch, _ = torch_models.open_torch(job.device, job.threads)
    model = adapted(job)
    ids = rows(job, model.config.vocab_size)
    learned = [x for x in model.parameters() if x.requires_grad]
    rule = torch.optim.AdamW(
        learned, lr=job.learning_rate, weight_decay=0.01, fused=job.device == "gpu"
    )
    tokens, targets = (
        torch.from_numpy(x.astype(np.int64)).to(torch_models.place(job.device))
        for x in (ids[:, :-1], ids[:, 1:])
    )
    autocast = torch.autocast(
        torch_models.place(job.device), torch.bfloat16, enabled=job.precision == "bf16"
    )

    def step() -> float:
        with autocast:
            # `labels` asks for a loss; the shifted ones are what it is computed from.
            wanted = {"labels": tokens, "shift_labels": targets}
            found = model(input_ids=tokens, use_cache=False, **wanted)
        found.loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        rule.step()
        rule.zero_grad(set_to_none=True)
        return found.loss.item()  # waits for the step

    loaded = time.perf_counter() - started
    losses = [step() for _ in range(job.warmup_steps)]
    seconds, cpu = [], time.process_time()
    for _ in range(job.steps):
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
    cpu, median = time.process_time() - cpu, statistics.median(seconds)
    return {
        "tokens_per_second": tokens.numel() / median,
        "step_seconds": median,
        "seconds_of_each_step": seconds,
        "cpu_seconds_per_step": cpu / job.steps,
        "seconds_to_load": loaded,
        "peak_memory_mib": torch_models.peak_memory_mib(job.device),
        "peak_memory_of": "process" if job.device == "cpu" else "device",
        "platform": job.device,
        "losses": losses,
        "versions": torch_models.versions("peft"),
    }


def adapted(job: Job) -> Any:
    """The base, frozen, with fresh adapters."""
    peft = importlib.import_module("peft")
    base = torch_models.load(job.model, job.precision, job.device)
    if job.checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = peft.LoraConfig(
        r=job.lora_rank,
        lora_alpha=32,
        lora_dropout=job.lora_dropout,
        target_modules=[HF_LINEARS[name] for name in job.lora_targets],
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(base, lora).train()


def rows(job: Job, vocab_size: int) -> np.ndarray:
    """`[B, T + 1]` ids, those of `train.speed` with one micro-batch."""
    shape = (job.micro_batch_size, job.max_seq_len + 1)
    return np.random.default_rng(0).integers(0, vocab_size, shape, np.int32)


def main(path: str) -> None:
    job = Job(**read_json(Path(path)))
    write_json(Path(job.output), measure(job))


if __name__ == "__main__":
    main(sys.argv[1])
