"""The fault campaign: `python -m tests.faults` injects faults into every command and counts.

campaign.py  the command: what is injected, in how many processes, and the counted figures
table.py     the figures as the tables of docs/reliability.md
place.py     the tiny models, adapters and runs that faults are injected into
call.py      a command called in a process of its own, watched: its end, its words, its orphans
verdict.py   what counts as survived
moments.py   faults at a chosen moment of a command that writes: kills, signals, full disks
kills.py     the commands that write, and how each goes on after a fault
flips.py     the commands that read, each with one byte of one file flipped
texts.py     hostile texts, from nothing but a seed and a good file
readers.py   every reader of foreign text, given hostile ones
"""
