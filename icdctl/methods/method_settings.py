"""The settings that methods have, each declared once: meaning, bounds, kind of value.

A method states which of them it has and their defaults; `icdctl list methods`, `--set`, docs/settings.md and the checks
of a configuration follow from both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from icdctl.errors import UsageError, unknown_name

Settings = Mapping[str, float | str]
"""The values of a method's settings, `variant` among them."""

VARIANT = "variant"
VARIANTS = ("published", "corrected")
"""`published` has the reference code's numbers, quirks included; docs/methods.md says what `corrected` changes."""


def is_corrected(settings: Settings) -> bool:
    """Whether the variant is the one without the reference code's quirks."""
    return settings[VARIANT] == "corrected"


_LARGEST_WEIGHT = 1e6


@dataclass(frozen=True)
class MethodSetting:
    """The values that a setting accepts, and what it does."""

    help: str
    least: float = 0.0
    most: float = _LARGEST_WEIGHT
    """Largest value; with it, neither the value's square nor its product with a loss leaves float32."""
    is_whole: bool = False
    """Fractions are refused."""

    @property
    def bounds(self) -> str:
        """The values that are accepted, in words."""
        return f"{'whole number' if self.is_whole else 'number'} from {self.least:g} to {self.most:,.0f}"

    def accepts(self, number: float) -> bool:
        """Whether a number is within the bounds; NaN is not."""
        return self.least <= number <= self.most and (not self.is_whole or number.is_integer())


DECLARED: dict[str, MethodSetting] = {
    "temperature": MethodSetting("Temperature of both softmaxes.", least=0.001, most=10_000.0),
    "alpha": MethodSetting("Weight of the target part (DKD), the confidence (RLD) or the local part (LDRLD)."),
    "beta": MethodSetting("Weight of the part among the other classes (DKD, NKD, RLD, LDRLD)."),
    "gamma": MethodSetting("Weight of the cluster term."),
    "confidence_temperature": MethodSetting("Temperature of RLD's confidence part.", least=0.001, most=10_000.0),
    "top_classes": MethodSetting("Classes in GDKD's first group, the teacher's likeliest.", least=1.0, is_whole=True),
    "split_weight": MethodSetting("Weight of GDKD's split between the first group and the rest."),
    "top_weight": MethodSetting("Weight of GDKD's part within the first group."),
    "rest_weight": MethodSetting("Weight of GDKD's part within the rest."),
    "ranked_classes": MethodSetting(
        "Classes that LDRLD compares in pairs, the student's likeliest.", least=2.0, most=1000.0, is_whole=True
    ),
    "teacher_power": MethodSetting("Power of the teacher's probabilities in TTM and WTTM.", least=0.001, most=100.0),
    "ab_alpha": MethodSetting("Exponent of the teacher's probabilities in ABKD.", least=-3.0, most=3.0),
    "ab_beta": MethodSetting("Exponent of the student's probabilities in ABKD.", least=-3.0, most=3.0),
    "inter_weight": MethodSetting("Weight of DIST's relations between the classes of an image."),
    "intra_weight": MethodSetting("Weight of DIST's relations between the images of a class."),
    "regularisation": MethodSetting("What SKD adds to the diagonal of the covariance.", least=0.001),
    "map_resolution": MethodSetting("Rows and columns of CAT's maps: 1, 2 or 4.", least=1.0, most=4.0, is_whole=True),
    "map_normalised": MethodSetting("1 to scale each of CAT's maps to unit length, 0 not to.", most=1.0, is_whole=True),
    "ea_temperature": MethodSetting("Temperature of the entropies in EA's weights.", least=0.001, most=10_000.0),
    "weight": MethodSetting("Factor of all terms of this part of a sum of methods."),
    "ce_weight": MethodSetting("Weight of the cross-entropy with the labels."),
    "kd_weight": MethodSetting("Weight of the divergence from the teacher."),
    "feature_weight": MethodSetting("Weight of the distance between feature maps or between their relations."),
    "hint_stage": MethodSetting("Stage whose output is imitated; 0 is the stem.", most=100.0, is_whole=True),
    "attention_power": MethodSetting("Power of the activations in AT's maps.", least=1.0, most=100.0),
    "feat_dim": MethodSetting("Width of the embeddings of both models.", least=1.0, most=65_536.0, is_whole=True),
    "distance_weight": MethodSetting("Weight of RKD's distances of two images."),
    "angle_weight": MethodSetting("Weight of RKD's angles among three images."),
    "num_vectors": MethodSetting("Singular vectors of a map.", least=1.0, most=1000.0, is_whole=True),
    "margin": MethodSetting("How far beyond 0 AB wants pre-activations."),
    "kernel_size": MethodSetting("Side of the connectors' kernel, odd.", least=1.0, most=15.0, is_whole=True),
    "initial_variance": MethodSetting("Variance of VID's distributions at first.", least=0.001, most=10_000.0),
    "factor_ratio": MethodSetting("FT's factors per channel of the teacher.", least=0.001, most=10.0),
    "factor_power": MethodSetting("Power of the activations in FT's maps.", least=1.0, most=100.0, is_whole=True),
    "distance_power": MethodSetting("Power of FT's distances.", least=1.0, most=100.0, is_whole=True),
    "student_preactivations": MethodSetting(
        "1 to read the student's stages before their last ReLU, 0 after it.", most=1.0, is_whole=True
    ),
    "max_mid_channels": MethodSetting(
        "Most channels inside ReviewKD's fusions.", least=1.0, most=65_536.0, is_whole=True
    ),
    "nce_k": MethodSetting("CRD's negatives of each image.", least=1.0, is_whole=True),
    "nce_t": MethodSetting("Temperature of CRD's similarities.", least=0.001, most=10_000.0),
    "nce_m": MethodSetting("Share of its old embedding that an image keeps in CRD's banks.", most=1.0),
    "warmup_epochs": MethodSetting(
        "Epochs in which the weight of the distillation term rises from 0; 0 for none.", most=100_000.0
    ),
}


def check_values(method: str, defaults: Mapping[str, float], given: Mapping[str, object]) -> dict[str, float | str]:
    """A method's settings with the given ones in place of the defaults, and `variant` among them.

    Args:
        method: its name, for messages.
        defaults: its settings and their defaults.
        given: some of them.

    Raises:
        UsageError: a key that the method does not have, a value that is not a number or out of range.
    """
    settings: dict[str, float | str] = {**defaults, VARIANT: VARIANTS[0]}
    for key, value in given.items():
        if key not in settings:
            raise unknown_name(f"setting of `{method}`", key, settings, listing="icdctl list methods")
        settings[key] = _check_variant(value) if key == VARIANT else _check_number(key, value)
    return settings


def _check_variant(value: object) -> str:
    if value not in VARIANTS:
        raise UsageError(f"variant is `{value}`", hint=f"choose {' or '.join(f'`{variant}`' for variant in VARIANTS)}")
    return str(value)


def _check_number(key: str, value: object) -> float:
    try:
        number = float(str(value))
    except ValueError as error:
        raise UsageError(f"setting `{key}` is `{value}`, expected a number", hint=f"e.g. `--set {key}=2`") from error
    declared = DECLARED[key.rpartition(".")[2]]  # `kd.temperature` in a sum of methods
    if not declared.accepts(number):
        expected = declared.bounds
        raise UsageError(f"setting `{key}` is {value}, expected a {expected}", hint=f"e.g. `--set {key}=2`")
    return number
