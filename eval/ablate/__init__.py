"""Four techniques in every combination, measured or planned (`python -m eval.ablate`).

command.py    the command                          cells.py       processes, and their figures
store.py      the folder that they fill            accuracy.py    how well each method learns
analysis.py   what each technique changes          staircase.py   one technique after another
table.py      tables                               figures.py     names and units
"""
