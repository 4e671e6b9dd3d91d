"""The description that an exported graph carries in the metadata of its .onnx file.

Other tools read the key `names`; all other keys start with `icdctl.`. They hold no time, path or user, so that equal
weights give equal bytes.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from icdctl.data import Preprocessing, SplitRecord
from icdctl.files import parse_json

InputKind = Literal["uint8", "float"]
SCHEMA = "1"
INPUT_NAME = "image"
OUTPUT_NAME = "logits"
BATCH_NAME = "batch"


@dataclass(frozen=True)
class ModelDescription:
    """Everything that a program needs to feed the graph and to name its answers."""

    model: str
    """Name of the architecture in `MODELS`."""
    dataset: str
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    input_kind: InputKind
    """"uint8": [batch, H, W, 3] RGB, normalised by the graph. "float": [batch, 3, H, W], normalised by the caller."""
    weights_sha256: str
    """Hash of the file that the weights came from."""
    precision: str = "fp32"
    variant: object = None
    """How the run differs from its recipe, a JSON value; None if the caller did not say."""
    split: SplitRecord | None = None
    """How its data set was divided, and the hashes of its images; None where the weights do not say it."""

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[str | int, ...]:
        """The declared shape of the only input."""
        height, width = self.preprocessing.size
        return (BATCH_NAME, height, width, 3) if self.input_kind == "uint8" else (BATCH_NAME, 3, height, width)

    def metadata(self) -> dict[str, str]:
        """The entries of `metadata_props` in the .onnx file."""
        layout = "NHWC" if self.input_kind == "uint8" else "NCHW"
        values = {
            "names": _json({str(number): name for number, name in enumerate(self.class_names)}),
            "icdctl.schema": SCHEMA,
            "icdctl.model": self.model,
            "icdctl.dataset": self.dataset,
            "icdctl.num_classes": str(self.num_classes),
            "icdctl.input": self.input_kind,
            "icdctl.preprocess": _json({**self.preprocessing.as_json(), "layout": layout}),
            "icdctl.weights_sha256": self.weights_sha256,
            "icdctl.precision": self.precision,
        }
        if self.variant is not None:
            values["icdctl.variant"] = _json(self.variant)
        if self.split is not None:
            values["icdctl.split"] = _json(self.split.as_json())
        return values

    @staticmethod
    def from_metadata(values: Mapping[str, str]) -> ModelDescription:
        """The inverse of `metadata`.

        Raises:
            KeyError, TypeError, ValueError: an entry is missing or malformed, or two entries contradict each other.
        """
        if values["icdctl.schema"] != SCHEMA:
            raise ValueError(f"schema {values['icdctl.schema']}, this version of icdctl reads {SCHEMA}")
        names = parse_json(values["names"])
        if not isinstance(names, dict):
            raise TypeError("`names` is not a JSON object")
        class_names = tuple(unicodedata.normalize("NFC", str(names[str(number)])) for number in range(len(names)))
        if int(values["icdctl.num_classes"]) != len(class_names):
            raise ValueError(f"{len(class_names)} names for {values['icdctl.num_classes']} classes")
        preprocess = parse_json(values["icdctl.preprocess"])
        if preprocess["colour"] != "RGB":
            raise ValueError(f"colour {preprocess['colour']}, expected RGB")
        input_kind = values["icdctl.input"]
        if input_kind not in ("uint8", "float"):
            raise ValueError(f"input {input_kind}, expected uint8 or float")
        return ModelDescription(
            model=values["icdctl.model"],
            dataset=values["icdctl.dataset"],
            class_names=class_names,
            preprocessing=Preprocessing.from_json(preprocess),
            input_kind="uint8" if input_kind == "uint8" else "float",
            weights_sha256=values["icdctl.weights_sha256"],
            precision=values["icdctl.precision"],
            variant=parse_json(values.get("icdctl.variant", "null")),
            split=SplitRecord.from_json(parse_json(values["icdctl.split"])) if "icdctl.split" in values else None,
        )


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
