"""Reads models and runs, never trains.

prompts.py    `python -m eval.prompts`: base and tuned answers, side by side
chat.py       `python -m eval.chat`: a conversation with the tuned model and its base
speed.py      `python -m eval.speed`: how fast, as ratios from one call
speed_generate.py  its generation part, with a process of speed_side.py for each side
"""
