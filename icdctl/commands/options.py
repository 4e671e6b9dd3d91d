"""Options that several commands share, each defined once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from icdctl.errors import UsageError

_TRAINING = "Training"
_WHERE = "Where and how long"

Dataset = Annotated[
    str | None,
    typer.Option(
        help="What to train on: a name of `icdctl list datasets`, or `imagefolder:DIR`.",
        show_default="cifar100",
        rich_help_panel=_TRAINING,
    ),
]
DataDir = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="Folder that holds the data sets' folders.",
        show_default="$ICDCTL_DATA or .icdctl/data",
        rich_help_panel=_WHERE,
    ),
]
Scales = Annotated[
    str | None, typer.Option(help="Patch grids: some of 1, 2, 4.", show_default="1,2,4", rich_help_panel=_TRAINING)
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A setting of the method (`gamma=8`, or several: `gamma=1,2,4`; `icdctl list methods`) or of the recipe "
        "(`weight_decay=1e-4`, `label_smoothing=0.1`, ...; `--dry-run` shows them); may be repeated.",
        rich_help_panel=_TRAINING,
    ),
]
Epochs = Annotated[int | None, typer.Option(show_default="of the recipe", rich_help_panel=_TRAINING)]
BatchSize = Annotated[int | None, typer.Option(show_default="of the recipe", rich_help_panel=_TRAINING)]
LearningRate = Annotated[float | None, typer.Option("--lr", show_default="of the recipe", rich_help_panel=_TRAINING)]
Seed = Annotated[
    int | None,
    typer.Option(
        help="Of initial weights, order, crops and flips.",
        show_default="0",
        rich_help_panel=_TRAINING,
    ),
]
Seeds = Annotated[
    str | None,
    typer.Option(
        metavar="0-4",
        help="Several seeds: a run folder each, trained together, on one teacher.",
        show_default=False,
        rich_help_panel=_TRAINING,
    ),
]
InitWeights = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Weights to start from.",
        show_default="drawn from the seed",
        rich_help_panel=_TRAINING,
    ),
]
TeacherPrecision = Annotated[
    str | None,
    typer.Option(
        help="Of the teacher: `fp32`, `bf16` or `fp16`.",
        show_default="auto: half where it saves seconds and its logits agree",
        rich_help_panel=_WHERE,
    ),
]
Optimizer = Annotated[
    str | None, typer.Option(help="`sgd` or `adamw`.", show_default="of the recipe", rich_help_panel=_TRAINING)
]
Recipe = Annotated[
    str | None,
    typer.Option(
        help="Named set of training numbers; `icdctl list recipes`.",
        show_default="the data set's",
        rich_help_panel=_TRAINING,
    ),
]
TrainImages = Annotated[
    int | None,
    typer.Option(help="How many images digits100 makes.", show_default="4000", rich_help_panel=_TRAINING),
]
TestImages = Annotated[
    int | None,
    typer.Option(help="How many test images digits100 makes.", show_default="2000", rich_help_panel=_TRAINING),
]
ImageSize = Annotated[
    int | None,
    typer.Option(
        metavar="SIDE",
        help="What images of an `imagefolder` are resized to.",
        show_default="32; 224 for a model of your own",
        rich_help_panel=_TRAINING,
    ),
]
ValSplit = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Hold out this share of the training images, and watch them; the test images are then looked at once, at "
        "the end.",
        show_default="0: the test images are watched",
        rich_help_panel=_TRAINING,
    ),
]
TestSplit = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Share of each class for testing, where an `imagefolder` has no `val/` or `test/`.",
        show_default="0.2",
        rich_help_panel=_TRAINING,
    ),
]
SplitSeed = Annotated[
    int | None,
    typer.Option(help="Which images are held out, whatever `--seed` is.", show_default="0", rich_help_panel=_TRAINING),
]
SkipBroken = Annotated[
    bool,
    typer.Option(
        "--skip-broken",
        help="Leave out images of an `imagefolder` that can't be decoded, and count them.",
        rich_help_panel=_TRAINING,
    ),
]
Device = Annotated[
    str | None, typer.Option(help="`auto`, `cpu`, `cuda` or `cuda:N`.", show_default="auto", rich_help_panel=_WHERE)
]
Precision = Annotated[
    str | None,
    typer.Option(
        help="`fp32`, `tf32` (CUDA) or `bf16` (student in autocast).",
        show_default="auto: tf32 on CUDA, else fp32",
        rich_help_panel=_WHERE,
    ),
]
TeacherMode = Annotated[
    str | None,
    typer.Option(
        help="`inline`: the teacher runs on each batch; `ahead`: on the batches of several steps at once; "
        "`cache`: once on every crop and flip of every image.",
        show_default="auto: cache where it is less work and fits, else ahead on CUDA, else inline",
        rich_help_panel=_WHERE,
    ),
]
Out = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="Run folder to make.",
        show_default="runs/<dataset>/<what differs>",
        rich_help_panel=_WHERE,
    ),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Start, go on, or finish at once, whatever is there.", rich_help_panel=_WHERE),
]
MaxSteps = Annotated[int | None, typer.Option(help="Stop after this many steps in all.", rich_help_panel=_WHERE)]
TimeLimit = Annotated[
    str | None,
    typer.Option(
        metavar="90m",
        help="Stop in time, save, and leave with 0; `--resume` goes on.",
        rich_help_panel=_WHERE,
    ),
]
Deterministic = Annotated[
    bool,
    typer.Option("--deterministic", help="Only algorithms that repeat bit for bit.", rich_help_panel=_WHERE),
]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="Have torch.compile fuse the student's kernels: minutes at first, other rounding; never tried on a GPU.",
        show_default="no",
        rich_help_panel=_WHERE,
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="A run's config.json, to repeat it.", rich_help_panel=_WHERE),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved configuration; train nothing.", rich_help_panel=_WHERE)
]
FromFile = Annotated[
    Path | None,
    typer.Option("--from", metavar="FILE", help="Take this copy, through the same checks.", show_default=False),
]
Mirror = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="Ask here first: http, https or file, a folder of files.", show_default="$ICDCTL_MIRROR"
    ),
]
Offline = Annotated[bool, typer.Option("--offline", help="Download nothing; say what is missing.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else, on stdout.")]


def check_wanted(wanted: Sequence[str], from_file: Path | None, *, example: str) -> None:
    """Of a command that fetches: something is named, and one thing alone where a file is.

    Raises:
        UsageError: it is not so.
    """
    if not wanted:
        raise UsageError("nothing is named", hint=f"e.g. `{example}`; `--list` shows what there is")
    if from_file is not None and len(set(wanted)) != 1:
        raise UsageError(f"`--from` is one file, {len(set(wanted))} are wanted", hint="name the one that it is")


def parse_settings(given: Sequence[str] | None) -> dict[str, Any]:
    """`["gamma=8", "flip=false"]` as options of a run: fields of the recipe each by its name, the rest as `settings`.

    Raises:
        UsageError: one is not KEY=VALUE, or a key is given twice.
    """
    from icdctl.config.sources import WITHOUT_FLAG

    settings: dict[str, str] = {}
    for item in given or []:
        key, equals, value = item.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise UsageError(f"setting `{item}` is not KEY=VALUE", hint="e.g. `--set gamma=8`")
        if key.strip() in settings:
            raise UsageError(f"setting `{key.strip()}` is given twice", hint="give it once")
        settings[key.strip()] = value.strip()
    of_recipe = {key: settings.pop(key) for key in list(settings) if key in WITHOUT_FLAG}
    return {**of_recipe, **({"settings": settings} if settings else {})}


def given_options(**options: Any) -> dict[str, Any]:
    """The options of a run, those that were given alone; a flag that was not set counts as not given."""
    return {key: value for key, value in options.items() if value is not None and value is not False}
