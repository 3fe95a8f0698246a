"""Four techniques in every combination, measured or planned (`python -m eval.ablate`).

command.py   the command                         cells.py    its processes and their figures
store.py     the folder that they fill           table.py    a table
analysis.py  what follows from them, in words    figures.py  their names
"""
