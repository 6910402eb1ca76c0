"""`ibke plan`."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from .options import add_command, count, place, positive, shown

if TYPE_CHECKING:
    from ..training.needs import Speed, TrainingNeeds

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SIZE = re.compile(r"\s*(?P<number>\d{1,15}(\.\d+)?)\s*(?P<unit>[A-Za-z]*)\s*")
PRECISIONS = ("float32", "bfloat16", "float16")


def memory(text: str) -> int:
    """Read an amount of memory such as 24GB, 512MB or 80GiB."""
    match = SIZE.fullmatch(text)
    if match is None or match["unit"].upper() not in UNITS or float(match["number"]) == 0:
        raise argparse.ArgumentTypeError(f"an amount of memory such as 24GB is wanted, found {shown(text)}")
    return int(float(match["number"]) * UNITS[match["unit"].upper()])


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(
        commands, "plan", "say what editing, training and serving take, from a backbone's config alone", _run
    )
    command.add_argument(
        "--backbone", required=True, metavar="PATH|ID", help="folder or Hub id of the backbone, or smollm2"
    )
    command.add_argument("--memory", type=memory, metavar="SIZE", help="what the device holds, such as 24GB")
    command.add_argument("--dtype", choices=PRECISIONS, help="precision of the backbone (default: as saved)")
    command.add_argument(
        "--layers", type=count, nargs="+", help="edited layers (default: the preset's, else by depth)"
    )
    command.add_argument("--latent-dim", type=positive, metavar="N", help="d_m of the editor (default: by size)")
    _amounts(command.add_argument_group("how much at once"))
    command.add_argument(
        "--device", help="device whose speed is measured, such as cuda (default: cpu)", default="cpu", metavar="DEVICE"
    )
    command.add_argument("--no-speed", action="store_true", help="measure nothing: leave out steps a second and days")
    command.add_argument("--json", type=place, metavar="FILE", help="write the numbers")


def _amounts(group: Any) -> None:
    group.add_argument("--records", type=positive, default=8, metavar="N", help="records of a step (default: 8)")
    group.add_argument("--tokens", type=positive, default=64, metavar="N", help="tokens of a text (default: 64)")
    group.add_argument(
        "--targets", type=positive, default=8, metavar="N", help="tokens of a text that are judged (default: 8)"
    )
    group.add_argument("--rows", type=positive, default=1, metavar="N", help="texts served at once (default: 1)")
    group.add_argument(
        "--context", type=positive, default=2048, metavar="N", help="tokens of each of them (default: 2048)"
    )
    group.add_argument(
        "--steps", type=positive, default=1_000_000, metavar="N", help="steps of training (default: the paper's)"
    )


def _run(options: argparse.Namespace) -> None:
    from ..io import require_writable, write_json
    from ..loading import require_device
    from ..training.needs import measured_speed, plan_needs
    from ..training.passes import Work

    if options.json is not None:
        require_writable(options.json)
    if options.targets >= options.tokens:
        raise ValueError(
            f"--targets {options.targets}: a text of {options.tokens} tokens (--tokens) has fewer to judge"
        )
    if not options.no_speed:
        require_device(options.device)
    fields = {} if options.latent_dim is None else {"latent_dim": options.latent_dim}
    work = Work(options.records, options.tokens, options.targets, options.rows, options.context)
    needs = plan_needs(options.backbone, dtype=options.dtype, layers=options.layers, fields=fields, work=work)
    speed = None if options.no_speed else measured_speed(needs, options.device)
    plan = planned(options.backbone, needs, speed, steps=options.steps, memory=options.memory)
    print(as_text(plan, needs))
    if options.json is not None:
        write_json(options.json, plan)
        print(f"written: {options.json}")


def planned(name: str, needs: TrainingNeeds, speed: Speed | None, *, steps: int, memory: int | None) -> dict[str, Any]:
    """Return a plan as JSON values; memory in bytes, times in seconds and days."""
    from ..training.needs import DTYPES, days, largest_batch

    plan: dict[str, Any] = {
        "backbone": name,
        "layers": list(needs.config.edited_layers or []),
        "latent_dim": needs.config.latent_dim,
        "dtype": needs.dtype,
        "backbone_parameters": needs.backbone_parameters,
        "editor_parameters": needs.editor_parameters,
        "edit_bytes": needs.edit_bytes(),
        "memory": {"edit": needs.edit_total, "training": needs.total, "serving": needs.serving_total},
        "records_of_a_step": needs.work.records,
        "flops_of_a_step": needs.step_passes.flops,
    }
    if speed is not None:
        seconds = speed.step_seconds(needs)
        plan |= {"seconds_of_a_step": seconds, "steps_per_second": 1 / seconds, "steps": steps}
        plan |= {"seconds_of_an_edit": speed.edit_seconds(needs), "days": days(needs, speed, steps)}
    if memory is not None:
        from dataclasses import replace

        plan["memory_of_the_device"] = memory
        fits = {dtype: replace(needs, dtype=dtype) for dtype in DTYPES[:2]}
        plan["largest_batch"] = {dtype: largest_batch(part, memory) for dtype, part in fits.items()}
    return plan


def as_text(plan: dict[str, Any], needs: TrainingNeeds) -> str:
    """Return a plan as text, its memory with how it is reckoned."""
    from ..training.needs import needs_table

    gigabytes = {name: f"{size / 1e9:.2f} GB" for name, size in plan["memory"].items()}
    subject = (
        f"{plan['backbone']}: {plan['backbone_parameters']:,} parameters in {plan['dtype']}; an editor of layers "
        f"{', '.join(map(str, plan['layers']))} with d_m {plan['latent_dim']}: {plan['editor_parameters']:,}"
    )
    takes = (
        f"memory: {gigabytes['edit']} to make an edit, {gigabytes['training']} for training, "
        f"{gigabytes['serving']} to serve {needs.work.rows} × {needs.work.context:,} tokens"
    )
    lines = [subject, takes]
    if "days" in plan:
        lines.append(
            f"time at the speed measured here: {plan['steps_per_second']:.3g} steps/s, {plan['days']:.3g} days for "
            f"{plan['steps']:,} steps; {plan['seconds_of_an_edit']:.3g} s an edit"
        )
    if "largest_batch" in plan:
        lines += _fitting(plan)
    return "\n".join((*lines, "", needs_table(needs)))


def _fitting(plan: dict[str, Any]) -> list[str]:
    """Say which batch and precision fit, the plan's own precision first."""
    size, batches = f"{plan['memory_of_the_device'] / 1e9:.3g} GB", plan["largest_batch"]
    fits = [f"{number:,} records a step in {dtype}" for dtype, number in batches.items() if number]
    if not fits:
        return [f"{size} hold no training of it, in no precision: spread it over devices, or load it in 8 or 4 bits"]
    return [f"{size} hold " + ", or ".join(fits)]
