"""Evaluation of edits: formulas in `scores`, the procedure in `protocol`."""
