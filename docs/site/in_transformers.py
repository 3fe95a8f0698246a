"""Whether transformers gives the answers of a run: with the base, the adapter and the merged model.

    python docs/site/in_transformers.py runs/smollm2 models/smollm2-hf models/smollm2-tuned-hf

The run's answers must be greedy ones of a model in its own chat format. Nothing of jllama is used:
prompts are written by `apply_chat_template`, the adapter is loaded by peft. Greedy decoding would
give the same answer if each of its tokens is the likeliest after those before it, which one pass
tells.
"""

import json
import logging
import sys
import warnings
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def is_greedy(model, tokenizer, prompt: str, ids: list[int]) -> bool:
    """Whether every token of an answer is the likeliest one after those before it."""
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
    )
    with torch.no_grad():
        logits = model(torch.tensor([[*asked, *ids]])).logits[0]
    return logits[len(asked) - 1 : -1].argmax(-1).tolist() == ids


def main(run: Path, base: Path, merged: Path) -> None:
    from peft import AutoPeftModelForCausalLM  # here, where its imports' warnings are silent

    lines = (run / "generations.jsonl").read_text().splitlines()
    generations = [json.loads(line) for line in lines]
    equal = True
    for what, folder, kind, name in (
        ("base", base, AutoModelForCausalLM, "base"),
        ("adapter, by peft", run / "adapter", AutoPeftModelForCausalLM, "tuned"),
        ("merged", merged, AutoModelForCausalLM, "tuned"),
    ):
        model = kind.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(merged if name == "tuned" else base)
        same = [
            is_greedy(model, tokenizer, row["prompt"], row[f"{name}_ids"]) for row in generations
        ]
        equal &= all(same)
        print(f"transformers, {what} ({folder}): {sum(same)} of {len(same)} answers equal {run}'s")
    if not equal:
        raise SystemExit("transformers gives other answers")


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    main(*map(Path, sys.argv[1:]))
