"""Every measurement of docs/performance.md, unattended (`python -m eval.speed suite`).

run.py       the command        parts.py   what is measured        settings.py  in which sizes
bench.py     where a part runs its child processes                 tables.py    figures to tables
wheels/      what a machine without a network lacks, and a script that fetches it
"""
