"""Makes icdctl/science/paper.json from a transcript of the reference's training configurations.

    python docs/make_paper.py paper_configs.json

The transcript has every configuration file of the iCD reference (commit 6dbf193), merged with its defaults, and what is
wrong with it. Here each becomes a row in our names, with the settings of both families of results; and every fault
becomes a correction: the file, what it says, what is used and why. A fault that no rule below knows stops the script,
so none is passed over in silence.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from icdctl import methods, models
from icdctl.methods import METHODS

OUT = Path(__file__).parents[1] / "icdctl" / "science" / "paper.json"
FAMILIES: dict[str, dict[str, Any]] = {
    "gamma2": {
        "beta": 2.0,
        "gamma": 2.0,
        "about": "the defaults of the iCD reference as published, DKD.BETA 2 and CD.GAMMA 2",
    },
    "gamma8": {
        "beta": 8.0,
        "gamma": 8.0,
        "about": "its defaults before (its own comments say 8), which DKD's and SDD's code still has; most likely what "
        "its results in folders named gamma8 were made with, which is an inference",
    },
}
SLOW = 0.01
"""Learning rate of every mv2, shuv1 and shuv2 student but two."""

Rule = tuple[str, str, str, str, str]
RULES: tuple[Rule, ...] = (
    (
        r"LR 0\.05 while every other MobileNetV2_sdd student uses 0\.01",
        "lr",
        "0.05",
        "0.01",
        "every other config of an mv2 student has 0.01; the accuracies recorded with 0.05 are 8 points below sdd_kd",
    ),
    (
        r"project name says gamma(\d) but effective CD\.GAMMA is ([\d.]+)(?: \(default.*\)| \(explicit.*\))",
        "gamma",
        r"project named gamma\1, CD.GAMMA \2",
        "",
        "a folder's name changes no number. Where the config sets no gamma itself, gamma2 takes the default of the "
        "published code and gamma8 the earlier one; both are named families here",
    ),
    (
        r"project name carries gamma(\d) though the method has no CD term",
        "gamma",
        r"project named gamma\1",
        "none",
        "the method has no cluster term",
    ),
    (
        r"DKD\.BETA=([\d.]+) is set but (\w+) never reads DKD",
        "beta",
        r"DKD.BETA \1",
        "none",
        r"\2 has no beta: the key is dead",
    ),
    (
        r"file lives under cub200/ but DATASET\.TYPE is missing.*",
        "dataset",
        "none, so cifar100 by default",
        "cub200",
        "the file lies under cub200/; run as it is, it trains on CIFAR-100",
    ),
    (
        r"cub200 config writes to project 'cifar100_baselines'.*",
        "output folder",
        "project cifar100_baselines",
        "a folder of its own data set",
        "runs of both data sets would overwrite each other",
    ),
    (
        r"SDD method with plain \(non-_sdd\) teacher/student: (.*); those models.*",
        "models",
        r"\1, plain",
        "the same models",
        "the reference needs twins of its models for patch logits and has none of these; here every model has them",
    ),
    (
        r"DISTILLER\.TYPE 'GL_DKD' is not in distiller_dict: KeyError",
        "method",
        "GL_DKD",
        "none",
        "no such method; res32x4_mv2.yaml beside it is the same pair and is used",
    ),
    (
        r"tag '(.*)' names another method than TYPE (\w+)",
        "output folder",
        r"tag \1",
        r"named after \2",
        "four configs would write to one folder",
    ),
    (
        r"tag '(.*)' does not match student (\w+): .*",
        "output folder",
        r"tag \1",
        r"named after \2",
        "two configs would write to one folder",
    ),
    (
        r"tag says (.*) but teacher/student are (.*)",
        "output folder",
        r"tag \1",
        r"named after \2",
        "the tag is another config's",
    ),
    (
        r"scripts call it with --M (\S+) which SPP\.forward .* rejects.*",
        "scales",
        r"\1, which the published code refuses",
        r"\1",
        "numbers are recorded for it; any subset of 1, 2 and 4 works here",
    ),
    (
        r"TEACHER '(\w+)' not in the model dict",
        "models",
        r"teacher \1, unknown to the code for CUB-200",
        "the same model",
        "only the twins with patch logits are in its table",
    ),
    (
        r"no CUB-200 teacher checkpoint for '(\w+)'.*",
        "models",
        r"teacher \1, no checkpoint in its table",
        "a teacher of our own",
        "the published CUB-200 teachers can't be downloaded by a program",
    ),
    (
        r"student '(\w+)' has no stem patch for CUB-200.*",
        "models",
        r"student \1, no stem for 224 x 224",
        "the same model",
        "every model has such a variant here",
    ),
)
"""Pattern of a fault, key, what the file says, what is used ("" for what the row has), why."""


def main() -> None:
    """Read the transcript that is named on the command line, write the package data."""
    transcript = Path(sys.argv[1])
    OUT.write_text(make(transcript.read_bytes(), transcript.name), encoding="utf-8")


def make(content: bytes, name: str) -> str:
    """The package data from the bytes of a transcript."""
    given = json.loads(content)
    rows = [convert(config) for config in given["configs"]]
    corrections = [
        correction(config["config"], issue, row)
        for config, row in zip(given["configs"], rows, strict=True)
        for issue in config["issues"]
    ]
    corrections += kept_as_they_are(given, rows)
    head = {
        "made_by": "docs/make_paper.py",
        "made_from": {
            "file": name,
            "sha256": hashlib.sha256(content).hexdigest(),
            "configs": len(rows),
        },
        "source": "iCD reference, commit 6dbf193, configs/",
        "families": FAMILIES,
    }
    lines = json.dumps(head, indent=2)[:-2]
    for key, values in (("configs", rows), ("corrections", corrections)):
        lines += f',\n  "{key}": [\n' + ",\n".join("    " + json.dumps(value) for value in values) + "\n  ]"
    return lines + "\n}\n"


def convert(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration under our names; `settings` is None for a method that icdctl did not have when this was made."""
    name = config["config"].removeprefix("configs/")
    method = "ce" if config["method"] == "NONE" else config["method"].lower()
    student = models.resolve(config["student"])
    usual = SLOW if student in ("mv2", "shuv1", "shuv2") else 0.05
    if config["lr"] != usual and not any(issue.startswith("LR ") for issue in config["issues"]):
        raise SystemExit(f"error: {name} has lr {config['lr']}, its siblings {usual}")
    for key, expected in (("epochs", 240), ("batch_size", 64), ("weight_decay", 5e-4), ("momentum", 0.9)):
        if config[key] != expected:
            raise SystemExit(f"error: {name} has {key} {config[key]}, the recipe {expected}")
    called_with = {tuple(call["M"]) for call in config["M_from_scripts"]}
    return {
        "config": name,
        "group": config["group"],
        "dataset": name.partition("/")[0],
        "teacher": models.resolve(config["teacher"]),
        "student": student,
        "method": method,
        "scales": [list(scales) for scales in sorted(called_with)],
        "lr": usual,
        "lr_said": config["lr"],
        "settings": {family: settings_of(method, config, family) for family in FAMILIES} if method in METHODS else None,
        "runs": config["runs_with_published_code"],
        "why_not": config["why_not"][0] if config["why_not"] else None,
    }


def settings_of(method: str, config: dict[str, Any], family: str) -> dict[str, float]:
    """What differs between configs, spelled out: beta and gamma. What is explicit in the file is the same in both."""
    explicit = config["explicit_in_yaml"]
    settings = {}
    if "beta" in METHODS[method].defaults:
        plain_nkd = method == "nkd"  # its constants stand in the code, not in the configuration
        settings["beta"] = 1.5 if plain_nkd else explicit.get("DKD", {}).get("BETA", FAMILIES[family]["beta"])
    if "gamma" in METHODS[method].defaults:
        settings["gamma"] = explicit.get("CD", {}).get("GAMMA", FAMILIES[family]["gamma"])
    check_rest(method, config)
    methods.check_settings(method, settings)
    return settings


def check_rest(method: str, config: dict[str, Any]) -> None:
    """All other numbers of a configuration are the defaults of our method; one that is not stops the script."""
    names = {"T": "temperature", "ce_weight": "ce_weight", "kd_weight": "kd_weight", "alpha": "alpha"}
    names["warmup_epochs"] = "warmup_epochs"
    for theirs, ours in names.items():
        if theirs in config["hyper"] and config["hyper"][theirs] != METHODS[method].defaults[ours]:
            raise SystemExit(f"error: {config['config']} has {theirs} {config['hyper'][theirs]}, the method another")


def correction(config: str, issue: str, row: dict[str, Any]) -> dict[str, str]:
    """What is done about a fault.

    Raises:
        SystemExit: no rule knows it.
    """
    text = re.sub(r" \[intended: .*\]$", "", issue)
    for pattern, key, said, used, why in RULES:
        match = re.fullmatch(pattern, text)
        if match:
            if key == "gamma" and not used:
                gammas = {family: f"{values['gamma']:g}" for family, values in row["settings"].items()}
                same = len(set(gammas.values())) == 1
                used = gammas["gamma2"] if same else ", ".join(f"{gamma} in {name}" for name, gamma in gammas.items())
            return {
                "config": config.removeprefix("configs/"),
                "key": key,
                "said": match.expand(said),
                "used": match.expand(used),
                "why": match.expand(why),
            }
    raise SystemExit(f"error: no rule for `{issue}` of {config}")


def kept_as_they_are(given: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """What looks odd between configs and is nevertheless used, because the numbers were made with it."""
    found = []
    for item in given["cross_config_inconsistencies"]:
        if item["kind"].startswith("DKD.BETA"):
            for path in item["values"]["6.0"]:
                found.append(
                    {
                        "config": path.removeprefix("configs/"),
                        "key": "beta",
                        "said": "DKD.BETA 6 for dkd",
                        "used": "6",
                        "why": "kept: the other methods of this pair have 2, but the file is explicit",
                    }
                )
    for row in rows:
        if "patch/res32x4_shuv1" in row["config"]:
            found.append(
                {
                    "config": row["config"],
                    "key": "gamma",
                    "said": "CD.GAMMA 1",
                    "used": "1",
                    "why": "kept: the other half of this ablation, vgg13 to vgg8, has 2; the file is explicit",
                }
            )
        if row["config"].endswith("kd_res32x4_shuv1.yaml"):
            found.append(
                {
                    "config": row["config"],
                    "key": "method",
                    "said": "KD, in the folder of cd_sdd_kd",
                    "used": "kd",
                    "why": "kept: it is the baseline, at scale 1",
                }
            )
    return found


if __name__ == "__main__":
    main()
