"""What an export needs beside the weights: test images to be verified on, and facts for the model card."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from icdctl import data, files
from icdctl.api.classifiers import ClassifierInfo
from icdctl.errors import ArtifactError, UsageError
from icdctl.registry.trained import TrainedModel
from icdctl.run_files import HASH_KEY, check_numbers


def test_images_of(
    classifier: ClassifierInfo, dataset: str | None, data_dir: str | None
) -> tuple[Tensor | None, Tensor | None, str | None]:
    """The test images that an export is verified on, and their labels; or the reason why there are none.

    Images without labels are those that the classifier was trained on, or may have been: they verify the graph, but
    give no accuracy. Without images, the verification uses its own probe images.
    """
    try:
        held = data.load(classifier.own_images(dataset, data_dir=data_dir, test_images=None))
    except (ArtifactError, UsageError) as error:
        return None, None, error.message
    seen = classifier.test_images_seen(held)
    return held.test_images, None if seen is not None else held.test_labels, seen


def facts_of(target: TrainedModel) -> dict[str, Any]:
    """How a weights file was made, as far as its run folder says so, for the model card."""
    row = data.row_of(target.dataset)
    facts: dict[str, Any] = {} if row is None else {"data_source": row.source, "data_licence": row.licence}
    if target.licence is not None:
        facts |= {"weights_source": target.source, "weights_licence": target.licence}
    folder = target.path.parent
    hint = "point at the weights file itself"
    if (folder / "config.json").is_file() and (folder / "metrics.json").is_file():
        config = files.read_json(folder / "config.json", what="config", hint=hint)
        metrics = files.read_json(folder / "metrics.json", what="metrics", hint=hint)
        for name, value in (("config.json", config), ("metrics.json", metrics)):
            if not isinstance(value, dict):
                raise ArtifactError(f"`{folder / name}` holds no JSON object", hint=hint)
        facts |= {key: config.get(key) for key in ("method", "teacher", "teacher_sha256", "scales", "settings", "seed")}
        names = ("final_top1", "best_top1", "best_epoch", "variant", "teacher_source", "teacher_licence")
        if metrics.get(HASH_KEY) in (None, target.sha256):  # otherwise they belong to other weights
            check_numbers(folder, metrics)
            facts |= {key: metrics[key] for key in names if metrics.get(key) is not None}
    return facts
