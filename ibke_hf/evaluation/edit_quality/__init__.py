"""The `evaluate` module ``edit_quality``; folder and file share their name, as ``evaluate.load`` of a folder wants."""
