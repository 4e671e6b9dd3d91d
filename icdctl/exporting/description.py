"""What an exported graph says of itself, in the metadata of the .onnx file.

The key `names` is the one that other tools read; the rest starts with `icdctl.`. No time, path or user is among them,
so that equal weights give equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from icdctl.data import Preprocessing

InputKind = Literal["uint8", "float"]
SCHEMA = "1"
INPUT_NAME = "image"
OUTPUT_NAME = "logits"
BATCH_NAME = "batch"


@dataclass(frozen=True)
class ModelDescription:
    """Everything that is needed to feed the graph and to name what comes out."""

    model: str
    """A name in `MODELS`."""
    dataset: str
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    input_kind: InputKind
    """"uint8": [batch, H, W, 3] RGB, normalised in the graph. "float": [batch, 3, H, W], normalised already."""
    weights_sha256: str
    """Of the file that the weights came from."""
    precision: str = "fp32"
    variant: Any = None
    """What distinguishes the run from its recipe, where the caller said so."""

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[str | int, ...]:
        """The declared shape of the one input."""
        height, width = self.preprocessing.size
        return (BATCH_NAME, height, width, 3) if self.input_kind == "uint8" else (BATCH_NAME, 3, height, width)

    def metadata(self) -> dict[str, str]:
        """The entries of `metadata_props`."""
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
        return values

    @staticmethod
    def from_metadata(values: Mapping[str, str]) -> ModelDescription:
        """The inverse of `metadata`.

        Raises:
            KeyError, TypeError, ValueError: an entry is missing or malformed, or two of them contradict each other.
        """
        if values["icdctl.schema"] != SCHEMA:
            raise ValueError(f"schema {values['icdctl.schema']}, this version of icdctl reads {SCHEMA}")
        names = json.loads(values["names"])
        if not isinstance(names, dict):
            raise TypeError("`names` is not a JSON object")
        class_names = tuple(str(names[str(number)]) for number in range(len(names)))
        if int(values["icdctl.num_classes"]) != len(class_names):
            raise ValueError(f"{len(class_names)} names for {values['icdctl.num_classes']} classes")
        preprocess = json.loads(values["icdctl.preprocess"])
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
            variant=json.loads(values.get("icdctl.variant", "null")),
        )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
