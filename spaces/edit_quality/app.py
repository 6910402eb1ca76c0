"""The page of the metric `edit_quality`; `ibke spaces build` and `push` put the other modules beside it."""

from functools import partial
from pathlib import Path

import evaluate
from metric_page import launch

if __name__ == "__main__":
    launch(partial(evaluate.load, str(Path(__file__).with_name("edit_quality.py")), keep_in_memory=True))
