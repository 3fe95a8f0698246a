"""From examples to windows: batches.py; lint/ and view.py (`python -m train.data`) show them."""
