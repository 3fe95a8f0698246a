"""Reads models and runs, never trains.

subject.py    whom a command is about: a base model, and what was tuned of it
prompts.py    `python -m eval.prompts`: base and tuned answers, side by side
chat.py       `python -m eval.chat`: a conversation with the tuned model and its base
score.py      `python -m eval.score`: likelihood of a data file's answers, and what was forgotten
likelihood.py its arithmetic: NLL and KL of base and tuned    exact.py  its short answers
speed.py      `python -m eval.speed`: how fast, as ratios from one call
speed_generate.py  its generation part, with a process of speed_side.py for each side
"""
