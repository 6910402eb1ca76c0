"""The page of the metric `edit_quality`. The other modules are put beside this file by `ibke spaces build` and `ibke spaces push`."""

from functools import partial
from pathlib import Path

import evaluate
from metric_page import launch

if __name__ == "__main__":
    launch(partial(evaluate.load, str(Path(__file__).with_name("edit_quality.py")), keep_in_memory=True))
