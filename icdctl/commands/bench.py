"""`icdctl bench`: the speed of training, alone or beside the reference code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from icdctl.commands import console, options
from icdctl.commands.setting_flags import parse_settings
from icdctl.errors import IcdctlError, UsageError
from icdctl.files import JsonObject

_WHAT, _TRAINING, _WHERE, _COMPARED = "What", "Training", "Where and how long", "Comparison with reference code"
_GATES = ("float32_loss", "float32_gradient", "float64_loss", "float64_gradient")
_TEACHER, _STUDENT = "res32x4", "mv2"


def bench(
    teacher: Annotated[
        str | None,
        typer.Option(help="Model of the teacher, e.g. `res32x4`.", show_default=_TEACHER, rich_help_panel=_WHAT),
    ] = None,
    student: Annotated[
        str | None, typer.Option(help="Model of the student, e.g. `mv2`.", show_default=_STUDENT, rich_help_panel=_WHAT)
    ] = None,
    pairs: Annotated[
        str | None,
        typer.Option(
            metavar="T:S,...",
            help="Pairs of teacher and student to time in turn, instead of one: `res32x4:mv2,wrn40_2:res8x4`.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Distillation method; `icdctl list methods` shows all.",
            show_default="cd_sdd_dkd; with --against the first of cd_sdd_dkd, sdd_dkd, dkd that DIR has",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    scales: str | None = None,
    settings: list[str] | None = None,
    recipe: str | None = None,
    batch_size: int | None = None,
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=2**31 - 2, help="Seed of the random weights, images and labels.", rich_help_panel=_TRAINING
        ),
    ] = 0,
    device: str | None = None,
    precision: str | None = None,
    teacher_mode: str | None = None,
    teacher_precision: str | None = None,
    compile: bool | None = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads to use.", rich_help_panel=_WHERE)] = 1,
    seconds: Annotated[
        float, typer.Option(min=0.01, help="Seconds of timed steps for each pair.", rich_help_panel=_WHERE)
    ] = 20.0,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of a checkout of iCD, SDD-CVPR2024 or mdistiller: time its training step too and print the "
            "ratio.",
            rich_help_panel=_COMPARED,
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="Timed blocks of each side, for each pair.", rich_help_panel=_COMPARED)
    ] = 5,
    budget: Annotated[
        float,
        typer.Option(
            min=1.0,
            help="Seconds for the whole comparison; when they run out, fewer rounds are timed.",
            rich_help_panel=_COMPARED,
        ),
    ] = 540.0,
    reference_variants: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Ways to run the reference: as `published`, with more loader `workers`, under `autocast`.",
            show_default="published",
            rich_help_panel=_COMPARED,
        ),
    ] = None,
    require: Annotated[
        float | None,
        typer.Option(
            metavar="RATIO",
            help="Exit with 1 if the lowest ratio of a pair or variant is below RATIO.",
            rich_help_panel=_COMPARED,
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Measure the speed of training steps on random images; write nothing.

    Example: icdctl bench --teacher res32x4 --student mv2 --method cd_sdd_dkd
    """
    if pairs is not None and (teacher is not None or student is not None):
        raise UsageError("`--pairs` and `--teacher` or `--student` are given", hint="name all models in `--pairs`")
    for flag, given in (("--require", require), ("--reference-variants", reference_variants)):
        if given is not None and against is None:
            raise UsageError(
                f"`{flag}` needs `--against`", hint="name a checkout of the reference with `--against DIR`"
            )
    from icdctl.benchmark.workload import Plan, parse_pairs

    wanted = parse_pairs(pairs if pairs is not None else f"{teacher or _TEACHER}:{student or _STUDENT}")
    plan = Plan(
        method=method,
        batch_size=batch_size,
        device="auto" if device is None else device,
        precision=precision,
        teacher_mode=teacher_mode,
        teacher_precision=teacher_precision,
        scales=scales,
        settings=parse_settings(settings),
        recipe=recipe,
        seed=seed,
        threads=threads,
        compile=bool(compile),
    )
    if against is None:
        from icdctl.benchmark import speed

        result = speed.measure_pairs(plan, wanted, seconds=seconds, tell=console.talk)
        console.show_json(result) if as_json else _show_speed(result)
        return
    from icdctl.benchmark.against import VARIANTS, Pace, compare, parse_variants

    variants = parse_variants(reference_variants or VARIANTS[0])
    result = compare(plan, wanted, against, Pace(rounds, budget), variants=variants, tell=console.talk)
    _report(result, require, as_json)


def _report(result: JsonObject, require: float | None, as_json: bool) -> None:
    """Print the comparison; exit 1 where it is below what is required, with the numbers and the reason."""
    ratios = {
        label if len(row["variants"]) == 1 else f"{label} ({name})": variant["ratio_min"]
        for label, row in result["pairs"].items()
        for name, variant in row["variants"].items()
    }
    slow = {name: ratio for name, ratio in ratios.items() if require is not None and ratio < require}
    error = None
    if slow:
        listed = ", ".join(f"{name} {ratio:.2f}" for name, ratio in slow.items())
        error = IcdctlError(
            f"the lowest ratio is below {require:g}: {listed}",
            hint="repeat on an idle machine with more `--rounds`; `icdctl bench` shows the parts of a step",
        )
    if as_json:
        failure = {"code": error.exit_code, "message": error.message, "hint": error.hint} if error else None
        console.show_json(result | ({"error": failure} if failure else {}))
    else:
        _show_comparison(result)
    if error is not None:
        console.show_error(error.messages, error.hints)
        raise typer.Exit(error.exit_code)


def _show_speed(result: JsonObject) -> None:
    _show_machine(result)
    rates = result["ceilings"]
    console.show_line(f"ceilings    {', '.join(f'{key} {value:.3g}' for key, value in rates.items())}")
    for label, row in result["pairs"].items():
        console.show_line("")
        for name, value in _speed_lines(label, row):
            console.show_line(f"{name:<11} {value}")


def _speed_lines(label: str, row: JsonObject) -> list[tuple[str, str]]:
    step, wall, extra, work = row["step_ms"], row["wall_step_ms"], row["extrapolated"], row["work"]
    tail = f"p90 {step['p90']:.2f}, p99 {step['p99']:.2f} over {row['num_steps']} steps"
    split = " | ".join(f"{name} {spent:.2f}" for name, spent in row["split_ms"].items())
    hours = extra["run_seconds"] / 3600
    shares = {name: f"{100 * work[f'share_of_{name}_ceiling']:.0f} %" for name in ("matmul", "conv3x3", "copy")}
    memory = ", ".join(f"{key.replace('_bytes', '')} {size / 1e9:.2f} GB" for key, size in row["memory"].items())
    teacher = f"teacher {row['teacher_mode']} in {row['teacher_precision']}"
    how = "medians of a separate run"
    if row["cuda_graph"]:
        how = f"graphs that end before and after each{', teacher hidden' if row['teacher_mode'] == 'ahead' else ''}"
    if row["compiled"]:
        how += ", not compiled"
    lines = [
        ("pair", f"{label}, {row['method']}, batch {row['batch_size']}, {teacher}{', compiled' * row['compiled']}"),
        ("step", f"p50 {step['p50']:.2f} ms, {tail}; wall p50 {wall['p50']:.2f}"),
        ("rate", f"{row['images_per_second']:,.1f} images/s; wall {row['wall_images_per_second']:,.1f} images/s"),
        ("split", f"{split} (ms, {how})"),
        ("evaluation", f"{row['evaluation']['seconds']:.2f} s for {row['evaluation']['images']:,} images"),
        (
            "epoch",
            f"{extra['epoch_seconds']:,.1f} s with evaluation and checkpoint; {extra['epochs']} epochs: {hours:,.2f} h "
            "(both extrapolated from the median step and one of each)",
        ),
        ("work", f"teacher {work['teacher_gflop']:,.1f} GFLOP, student {work['student_gflop']:,.1f} GFLOP per step"),
        (
            "shares",
            f"{shares['matmul']} of the matmul ceiling, {shares['conv3x3']} of the convolution ceiling; at least "
            f"{work['least_gb']:.2f} GB per step, {shares['copy']} of the copy ceiling",
        ),
        ("memory", memory),
    ]
    if row["host_syncs_per_step"] is not None:
        kernels = row["kernels_per_step"]
        number = (
            "not counted: torch's profiler sees nothing of the device" if kernels is None else f"{kernels:g} per step"
        )
        form = "one CUDA graph per step" if row["cuda_graph"] else "launched one by one"
        lines += [
            ("kernels", f"{number}; {form}, after {row['first_step_seconds']:.1f} s for the first step"),
            ("host syncs", f"{row['host_syncs_per_step']:g} per step"),
        ]
    return lines


def _show_comparison(result: JsonObject) -> None:
    _show_machine(result)
    state = result["reference"]["git"]
    commit = "no git" if state is None else f"{state['commit'][:12]}{' with changes' if state['dirty'] else ''}"
    stand_ins = ", ".join(result["reference"]["stand_ins"]) or "none"
    console.show_line(f"reference   {commit}; stand-ins for packages that are missing: {stand_ins}")
    console.show_line("")
    columns = ["pair", "method", "reference ms", "ms of icdctl", "reference img/s", "icdctl img/s", "ratio", "min..max"]
    first = next(iter(result["pairs"].values()))["variants"]
    others = list(first)[1:]
    columns += [f"{what}, {name}" for name in others for what in ("ms", "ratio")]
    rows = [
        [
            label,
            row["method"],
            round(row["reference_ms"], 2),
            round(row["icdctl_ms"], 2),
            round(row["reference_images_per_second"], 1),
            round(row["icdctl_images_per_second"], 1),
            round(row["ratio"], 2),
            f"{row['ratio_min']:.2f}..{row['ratio_max']:.2f} ({row['rounds']} rounds)",
            *(cell for name in others for cell in _variant_columns(row["variants"][name])),
        ]
        for label, row in result["pairs"].items()
    ]
    console.show_table(columns, rows)
    by_wall = [name for name in others if first[name]["clock"] != result["device"]["clock"]]
    if by_wall:
        console.show_line(
            f"{', '.join(by_wall)}: by the wall clock, since the CPU time of workers is not counted otherwise"
        )
    worst = {key: max(row["gate_differences"][key] for row in result["pairs"].values()) for key in _GATES}
    gaps = ", ".join(f"{key.replace('_', ' ')} {gap:.1e}" for key, gap in worst.items())
    console.show_line(f"largest relative differences of the same steps: {gaps}")


def _variant_columns(variant: JsonObject) -> tuple[float, str]:
    low, high = variant["ratio_min"], variant["ratio_max"]
    return round(variant["reference_ms"], 2), f"{variant['ratio']:.2f} ({low:.2f}..{high:.2f})"


def _show_machine(result: JsonObject) -> None:
    device, versions = result["device"], result["versions"]
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    size = f"{device['threads']} of {device['cores']} cores" if device["type"] == "cpu" else "CUDA"
    load = f"load {device['load_before']} to {device['load_after']}"
    console.show_line(f"device      {device['name']}, {size}, {device['precision']}, {load}")
    console.show_line(f"clock       {device['clock']}")
    console.show_line(f"versions    {named}")
