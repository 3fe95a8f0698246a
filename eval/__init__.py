"""Reads models and runs, never trains.

subject.py     the models a command compares: a base, and what was tuned of it
prompts.py     `python -m eval.prompts`: base and tuned answers, side by side
chat.py        `python -m eval.chat`: a conversation with the tuned model and its base
score.py       `python -m eval.score`: likelihood of a data file's answers, and what was forgotten
likelihood.py  its arithmetic: NLL and KL of base and tuned    exact.py  its short answers
ablate/        what each memory technique saves and costs
harness/       the tasks of lm-evaluation-harness
report/        the report of a run
speed/         how fast, as ratios from one call
"""
