"""Reads models and runs, never trains.

subject.py    whom a command is about: a base model, and what was tuned of it
prompts.py    `python -m eval.prompts`: base and tuned answers, side by side
chat.py       `python -m eval.chat`: a conversation with the tuned model and its base
score.py      `python -m eval.score`: likelihood of a data file's answers, and what was forgotten
likelihood.py its arithmetic: NLL and KL of base and tuned    exact.py  its short answers
speed.py      `python -m eval.speed`: how fast, as ratios from one call
speed_generate.py  its generation part, with a process of speed_side.py for each side
ablate.py     `python -m eval.ablate`: four techniques in every combination, measured or planned
cells.py      its processes and their figures    cell_store.py  the folder that they fill
analysis.py   what follows from them, in words   figures.py  their names    cell_table.py  a table
report.py     `python -m eval.report`: a run's whole report, from files alone
sections.py   its sections    techniques.py  the one about an ablation    pictures.py  its SVGs
evidence.py   numbers that know where they stand      document.py  HTML and Markdown of it all
"""
