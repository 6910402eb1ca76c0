"""The commands of `ibke`, one module for each group; only :mod:`ibke_hf.cli` imports them.

Modules import nothing heavy until a command runs, so that `ibke --help` is quick.
"""
