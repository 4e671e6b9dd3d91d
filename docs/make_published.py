"""Makes icdctl/science/published.json from the survey's transcript of published and recorded results.

    python docs/make_published.py published_results.json

The transcript is a list of rows as they stand in papers, READMEs and comments of scripts, in their spelling. Here each
gets our names, what kind of number it is, and where it is suspect, why. No row is left out. Run it again when the
transcript or a judgement below changes; its sha256 is in the result.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from icdctl import models
from icdctl.errors import UsageError

OUT = Path(__file__).parents[1] / "icdctl" / "science" / "published.json"

KINDS = {
    "student": "student",
    "student_vanilla": "plain",
    "teacher": "teacher",
    "training_time": "time",
    "independent_reproduction": "reproduction",
    "claim": "claim",
    "not_found": "not found",
}
CRD_PAIRS = {
    ("75.61", "73.26"): ("wrn40_2", "wrn16_2"),
    ("75.61", "71.98"): ("wrn40_2", "wrn40_1"),
    ("72.34", "69.06"): ("res56", "res20"),
    ("74.31", "69.06"): ("res110", "res20"),
    ("74.31", "71.14"): ("res110", "res32"),
    ("79.42", "72.50"): ("res32x4", "res8x4"),
    ("74.64", "70.36"): ("vgg13", "vgg8"),
    ("74.64", "64.60"): ("vgg13", "mv2"),
    ("79.34", "64.60"): ("res50", "mv2"),
    ("79.34", "70.36"): ("res50", "vgg8"),
    ("79.42", "70.50"): ("res32x4", "shuv1"),
    ("79.42", "71.82"): ("res32x4", "shuv2"),
    ("75.61", "70.50"): ("wrn40_2", "shuv1"),
}
"""CRD's README heads its columns with names and accuracies; the transcript kept the accuracies. They are unique."""
CRD_MODELS = {
    **{teacher: float(accuracy) for (accuracy, _), (teacher, _) in CRD_PAIRS.items()},
    **{student: float(accuracy) for (_, accuracy), (_, student) in CRD_PAIRS.items()},
}
CRD_HEADS = "RepDistiller:README.md, heads of the columns"
IMAGENET = {
    "ResNet18": "torchvision:resnet18",
    "ResNet34": "torchvision:resnet34",
    "ResNet50": "torchvision:resnet50",
    "MobileNetV1": "mobilenetv1",
    "MobileNetV1 (called mv2 in the code)": "mobilenetv1",
}
"""ImageNet's ResNets are not the CIFAR models of these names; MobileNetV1 is no model of icdctl or torchvision."""
METHODS = {
    "vanilla": ("ce", ""),
    "teacher": ("ce", ""),
    "CRD (tau 0.07)": ("crd", "tau 0.07"),
    "CRD+KD (tau 0.07)": ("crd+kd", "tau 0.07"),
    "CRD (tau 0.1)": ("crd", "tau 0.1"),
    "CRD+KD (tau 0.1)": ("crd+kd", "tau 0.1"),
    "KR": ("reviewkd", ""),
    "KD w/ LS": ("kd", "with label smoothing"),
    "Tf-KD (self)": ("tf-kd", "self"),
    "CSE+L2": ("cse+l2", ""),
}
PARTS = {
    "none": "",
    "fusion": "",
    "consistent only": "agreeing patches alone",
    "complementary only": "disagreeing patches alone",
    "beta=1": "disagreeing patches weigh 1",
    "beta=2": "",
    "beta=4": "disagreeing patches weigh 4",
    "beta=6": "disagreeing patches weigh 6",
    "beta=8": "disagreeing patches weigh 8",
}
"""Rows of SDD's Tables 6 and 8; the empty ones are the method as it is."""
SDD_COPIES = "the column repeats the ResNet50 -> MobileNetV2 column; CRD's README has another value"

SUSPECT: tuple[tuple[Callable[[dict[str, Any]], bool], str], ...] = (
    (
        lambda row: row["source"] in ("iCD:eval_cub.sh:76", "iCD:eval_cub.sh:80", "iCD:eval_cub.sh:122"),
        "lines 76, 80 and 122 have one and the same result for three methods, to three decimals: probably pasted",
    ),
    (
        lambda row: row["source"] in ("iCD:eval_cub.sh:84", "iCD:eval_cub.sh:88", "iCD:eval_cub.sh:92"),
        "under the heading of cd_sdd_kd, with a checkpoint folder of cd_sdd_dkd: which of them it is can't be told",
    ),
    (
        lambda row: row["source"] == "iCD:eval_cub.sh:228",
        "recorded without top-5, and equal to eval_cub.sh:88, whose folder is one of cd_sdd_dkd",
    ),
    (
        lambda row: row["source"] == "iCD:eval.sh:291",
        "under the heading of gamma 2, with a checkpoint folder of gamma 8",
    ),
    (
        lambda row: row["source"] in ("iCD:eval.sh:200", "iCD:eval.sh:312"),
        "collapsed: 8 points below sdd_kd; its config has lr 0.05 where every other mv2 student has 0.01",
    ),
    (
        lambda row: row["source"] == "iCD:eval.sh:192",
        "collapsed: 5.6 points below sdd_kd and below the same cell at gamma 2",
    ),
    (
        lambda row: row["source"] == "SDD-CVPR2024:train_cub_1.sh:14",
        "5.4 points below SDD's Table 5 for this cell, and near that of the pair above it",
    ),
    (
        lambda row: (
            "SDD (CVPR 2024) Table 2" in row["paper"]
            and (row["teacher"], row["student"]) == ("vgg13", "mv2")
            and row["method"] in ("fitnet", "rkd", "sp", "pkt", "crd")
        ),
        SDD_COPIES,
    ),
    (
        lambda row: (
            "SDD (CVPR 2024) Table 2" in row["paper"]
            and (row["teacher"], row["student"], row["method"]) == ("wrn40_2", "shuv1", "pkt")
        ),
        "equal to the RKD value above it; CRD's README has 73.89",
    ),
    (
        lambda row: (
            "SDD (CVPR 2024) Table 2" in row["paper"]
            and (row["teacher"], row["student"], row["method"]) == ("res32x4", "shuv1", "fitnet")
        ),
        "equal to the value of shuv2; CRD's README has 73.59",
    ),
    (
        lambda row: (
            row["dataset"] == "cub200" and (row["teacher"], row["student"], row["method"]) == ("vgg13", "mv2", "semckd")
        ),
        "10 points above every other method without SDD in its column: probably a misprint",
    ),
    (
        lambda row: "appendix SDD-KD" in row["paper"] and row["method"] == "sdd_kd",
        "Tables 6 and 7 of the same paper have 76.63; the repository's log has 75.59 and 75.31",
    ),
    (
        lambda row: (
            row["method"] == "sdd_kd"
            and row["top1"] == 76.63
            and ("Table 6" in row["paper"] or "Table 7" in row["paper"])
        ),
        "the appendix of the same paper has 75.63; the repository's log has 75.59 and 75.31",
    ),
    (
        lambda row: "appendix SDD-SP" in row["paper"] and row["student"] == "shuv2",
        "the SP value it is compared with is the KD value of this pair",
    ),
)
EPOCHS: tuple[tuple[str, str, int | None], ...] = (
    ("iCD arXiv", "unknown", None),
    ("iCD", "best", 1),
    ("CRD checkpoint", "final", 1),
    ("SDD-CVPR2024 repository", "best", 1),
    ("SDD (CVPR 2024)", "best", None),
    ("CRD (ICLR 2020)", "final", None),
    ("DKD (CVPR 2022)", "best", None),
    ("DOT (ICCV 2023)", "best", None),
    ("Logit Standardization", "best", None),
)
"""Start of `paper`, which epoch its code reports, and how many runs; None where that is not said. CRD's code prints the
best accuracy and says that the tables have the last epoch; mdistiller, SDD and iCD report the best epoch on the test
set."""
PEOPLE: tuple[tuple[str, str, int | None], ...] = (
    ("ChenBill900703/CRD-Reproduction README", "final", 5),
    ("ChenBill900703/CRD-Reproduction STAGE", "final", 1),
    ("https://github.com/megvii-research/mdistiller/issues/7", "unknown", 1),
    ("https://github.com/megvii-research/mdistiller/issues/8 (user, mean of 4", "unknown", 4),
    ("https://github.com/megvii-research/mdistiller/issues/8 (first", "best", 1),
    ("", "unknown", 1),
)
"""The same for what others found, by the start of `source`."""
COPIED_FROM = (("SDD (", "DOT (", "DKD (", "Logit "), ("CRD (ICLR 2020)", "DKD (CVPR 2022)"))
"""Tables that repeat values of earlier ones, and those that they repeat."""


def main() -> None:
    """Read the transcript that is named on the command line, write the package data."""
    transcript = Path(sys.argv[1])
    OUT.write_text(make(transcript.read_bytes(), transcript.name), encoding="utf-8")


def make(content: bytes, name: str) -> str:
    """The package data from the bytes of a transcript."""
    rows = [convert(index, row) for index, row in enumerate(json.loads(content))]
    mark_copies(rows)
    for row in rows:
        row["suspect"] = next((reason for holds, reason in SUSPECT if holds(row)), None)
        if re.match(r"SDD .* Table [25]", row["paper"]):
            row["notes"] = []  # they are about one value of a row of the table; `suspect` now says which
    made_from = {"file": name, "sha256": hashlib.sha256(content).hexdigest(), "rows": len(rows)}
    lines = ",\n".join("    " + json.dumps(compact(row), ensure_ascii=False) for row in rows)
    return (
        f'{{\n  "made_by": "docs/make_published.py",\n  "made_from": {json.dumps(made_from)},\n'
        f'  "rows": [\n{lines}\n  ]\n}}\n'
    )


def convert(index: int, given: dict[str, Any]) -> dict[str, Any]:
    """A row of the transcript under our names."""
    kind = KINDS[given["kind"]]
    method, detail = METHODS.get(str(given.get("method")), (str(given.get("method") or "").lower(), ""))
    paper = given.get("paper") or ""
    source, notes = tidy(given["source"]), [tidy(note) for note in given.get("notes") or []]
    teacher, student = given.get("teacher"), given.get("student") or given.get("model")
    corrected = given.get("student_corrected")
    if paper.startswith("CRD (ICLR"):
        teacher, student = CRD_PAIRS[str(teacher), str(student)]
    if corrected:
        notes.insert(0, f"its column is headed {teacher} -> {student}")
        student = corrected
    if "Table 6" in paper or "Table 8" in paper:
        detail = PARTS[re.sub(r".*Table \d ", "", paper)]
    epoch, runs = next(
        (epoch, runs)
        for start, epoch, runs in (EPOCHS if paper else PEOPLE)
        if (paper if paper else source).startswith(start)
    )
    if given.get("of_trials"):
        notes.insert(0, f"value {given['trial']} of {given['of_trials']} on one line")
    label = given.get("gamma_label")
    dataset = given.get("dataset")
    scales = given.get("M")
    if "Table 5" in paper and kind == "teacher":
        epoch, runs = "best", 1
    if kind == "time":
        epoch, runs = "unknown", 1
    return {
        "id": index,
        "kind": kind,
        "dataset": dataset,
        "teacher": name_model(teacher, dataset),
        "student": name_model(student, dataset),
        "method": method or None,
        "detail": detail,
        "scales": scales,
        "gamma": given.get("gamma"),
        "family": f"gamma{label:g}" if label else None,
        "top1": given.get("top1"),
        "top5": given.get("top5"),
        "sd": given.get("std"),
        "best_top1": given.get("best_epoch_top1_mean"),
        "seconds_per_step": seconds(given),
        "epoch": epoch if kind not in ("claim", "not found") else None,
        "runs": given.get("seeds", runs) if kind not in ("claim", "not found") else None,
        "paper": tidy(paper),
        "source": source,
        "config": given.get("config"),
        "heading": f"{given['section']}" if given.get("section") else None,
        "notes": notes,
        "text": tidy(given.get("claim") or given.get("what") or ""),
        "repeats": None,
    }


def name_model(name: str | None, dataset: str | None) -> str | None:
    """Our name of a model; ImageNet's are others than CIFAR's."""
    if name is None:
        return None
    return IMAGENET[name] if dataset == "imagenet" else models.resolve(name)


def seconds(given: dict[str, Any]) -> list[float] | None:
    """Least and greatest seconds a training step, as read from a progress bar or a table."""
    if "milliseconds_per_batch" in given:
        return [given["milliseconds_per_batch"] / 1000] * 2
    read = given.get("seconds_per_iteration_read")
    return [min(read), max(read)] if read else None


def mark_copies(rows: list[dict[str, Any]]) -> None:
    """`repeats`: the source of the row that has the same number first. A copied number is of the kind it was there."""
    for row in rows:
        if row["top1"] is None or row["kind"] not in ("student", "plain"):
            continue
        first = next((other for other in rows if other is not row and is_copy(row, other)), None)
        if first is not None:
            row["repeats"] = first["source"]
            row["epoch"], row["runs"] = first["epoch"], first["runs"]
    for row in rows:
        if row["kind"] in ("plain", "teacher") and row["dataset"] == "cifar100" and row["paper"].startswith("SDD ("):
            if row["top1"] != CRD_MODELS[row["student"]]:
                raise SystemExit(f"error: row {row['id']} is not CRD's {row['student']}")
            row["repeats"], row["epoch"], row["runs"] = CRD_HEADS, "final", None
    # The comments of iCD's train_cd_sdd_dkd.sh are those of SDD's teacher_wrn.sh, line by line.
    theirs = [row for row in rows if row["source"].startswith("SDD-CVPR2024:teacher_wrn.sh")]
    for row in rows:
        if row["source"].startswith("iCD:train_cd_sdd_dkd.sh"):
            same = next(
                (other for other in theirs if (other["config"], other["top1"]) == (row["config"], row["top1"])), None
            )
            if same is not None:
                theirs.remove(same)
                row["repeats"] = same["source"]


def is_copy(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether a row repeats another one's number: a table an earlier paper's, eval_cub.sh what eval.sh has."""
    cell = ("dataset", "teacher", "student", "method", "detail", "top1", "top5")
    if any(row[key] != other[key] for key in cell):
        return False
    tables, originals = COPIED_FROM
    if row["paper"].startswith(tables) and other["paper"].startswith(originals):
        return bool(row["paper"] != other["paper"])
    same_run = bool(row["family"] == other["family"] and row["gamma"] == other["gamma"])
    return same_run and row["source"].startswith("iCD:eval_cub.sh") and bool(other["source"].startswith("iCD:eval.sh"))


def tidy(text: str) -> str:
    """Without the marks of the tool that the survey was made with."""
    text = re.sub(r" \(stored public copy, find_string id \d+\)", "", text)
    text = re.sub(r" \(stored id \d+\)", "", text)
    text = re.sub(r" \(stored pages?(, machine-written)?\)", r"\1", text)
    text = re.sub(r"searched: .* on ", "searched for in public copies on ", text)
    return text.replace("not in any stored corpus", "not reachable").replace("computed by us", "computed")


def compact(row: dict[str, Any]) -> dict[str, Any]:
    """Without what is empty."""
    return {key: value for key, value in row.items() if value not in (None, "", [])}


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        sys.exit(f"error: {error.message}")
