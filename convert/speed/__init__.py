"""How fast conversions are, beside `cp` of the same bytes (`python -m convert.speed`).

command.py   the command
side.py      one conversion in a process of its own
"""
