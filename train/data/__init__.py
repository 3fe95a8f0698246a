"""From examples to windows: batches.py; lint.py and view.py (`python -m train.data`) show them."""
