"""Reads models and runs, never trains.

prompts.py    `python -m eval.prompts`: base and tuned answers, side by side
speed.py      `python -m eval.speed`: how fast, as ratios from one call
"""
