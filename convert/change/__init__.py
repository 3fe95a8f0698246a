"""Weights that change on their way, and what that does to the model.

merge.py  an adapter folded into the blocks that pass, and what rounding took
probe.py  prompts through the blocks that pass, before and after a change
"""
