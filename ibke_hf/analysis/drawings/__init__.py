"""Data of figures -> figures of matplotlib, each with a title that says what its data show."""
