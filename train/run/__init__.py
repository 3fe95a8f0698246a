"""The run while it lives.

folder.py      made or resumed, held by one process      provenance.py  where it comes from
state.py       what a resume needs (Orbax)               signals.py     how it is stopped
metrics.py     metrics.jsonl, TensorBoard                reports.py     the figures of each step
show.py        what the terminal shows
"""
