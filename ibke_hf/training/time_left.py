"""How long a training will still take, said from its first minutes on."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

FIRST_STEPS, FIRST_SECONDS = 10, 60.0  # whichever comes first; the very first step, which warms up, does not count
PARTS = 10  # of the run, at the end of each of which it is said again


class TimeLeft(TrainerCallback):
    """Prints the seconds a step and the time to the end after the first steps, then at each tenth of the run."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start counting; a resumed run counts its own steps alone."""
        self.first, self.started, self.next = state.global_step + 1, time.monotonic(), 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Print the line where it is due."""
        step, seconds = state.global_step, time.monotonic() - self.started
        if step <= self.first:
            self.started = time.monotonic()
            return
        if not state.is_world_process_zero or step >= state.max_steps or step < self.next:
            return
        steps = step - self.first
        if self.next or steps >= FIRST_STEPS or seconds >= FIRST_SECONDS:
            part = max(state.max_steps // PARTS, 1)
            self.next = (step // part + 1) * part
            left = in_words(seconds / steps * (state.max_steps - step))
            tqdm.write(
                f"step {step:,} of {state.max_steps:,}: {seconds / steps:.2f} s a step, about {left} to go",
                file=sys.stderr,
            )


def in_words(seconds: float) -> str:
    """Return a span of time as people say it: ``"2 h 10 min"``, ``"12 min"`` or ``"less than a minute"``."""
    minutes = round(seconds / 60)
    hours, rest = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {rest} min"
    return f"{minutes} min" if minutes else "less than a minute"
