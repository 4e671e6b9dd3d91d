"""Known differences between a method's published code and its paper, and what each variant of icdctl does.

`icdctl list methods --audit` shows them. Each names a test that shows what the two variants give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from icdctl.methods.algebra import parts_of

Side = Literal["code", "paper"]


@dataclass(frozen=True)
class Difference:
    """One place where published code and paper differ."""

    of: str
    """The method, modifier or addition (`sdd`, `cd`) that has it."""
    where: str
    """File and lines of the code, with the commit where it was read."""
    code: str
    paper: str
    """The paper's form; what mathematics says where the paper is silent."""
    published: Side
    """What `variant=published` follows."""
    corrected: Side
    """What `variant=corrected` follows."""
    test: str
    """`FILE::TEST` under `tests/`."""


_ICD = "iCD, mdistiller/distillers/"
_GOLDEN = "test_golden_newer.py::test_a_newer_loss_reaches_the_float64_value_of_the_reference"
_BIT = "test_newer_logit.py::test_float32_reaches_the_float64_value_however_confident_the_logits"

DIFFERENCES = (
    Difference(
        "dkd",
        f"{_ICD}DKD.py:16",
        "takes the logarithm of summed probabilities: infinite or NaN in float32 for confident logits",
        "computed from log probabilities",
        "paper",
        "paper",
        "test_logit.py::test_float32_reaches_the_float64_value_however_confident_the_logits",
    ),
    Difference(
        "nkd",
        f"{_ICD}nkd.py:23",
        "the mask of the target removes no class: the second term sums over all classes",
        "the classes other than the target, renormalised",
        "code",
        "paper",
        "test_logit.py::test_nkd_loss_matches_three_classes_worked_by_hand",
    ),
    Difference(
        "sdd",
        f"{_ICD}SDD_DKD.py:73",
        "patch 0 is the whole image's prediction, even where scale 1 is not asked for",
        "the prediction from the logits",
        "paper",
        "paper",
        "test_methods.py::test_without_scale_one_the_whole_images_prediction_comes_from_the_logits",
    ),
    Difference(
        "cd",
        f"{_ICD}CD_SDD_DKD.py:31-42",
        "the 1 x 1 scale keeps its share of the weights, though its part is always 0",
        "the weights are shared among scales that have a part",
        "code",
        "paper",
        "test_methods.py::test_scales_weigh_as_published_or_as_corrected",
    ),
    Difference(
        "cd",
        f"{_ICD}CD_SDD_DKD.py:59",
        "softened by 2, without a factor T^2",
        "the factor 2^2",
        "code",
        "paper",
        "test_methods.py::test_scales_weigh_as_published_or_as_corrected",
    ),
    Difference(
        "ls",
        "logit-standardization-KD, mdistiller/distillers/KD.py:7-10 @f6e5aa5",
        "standard deviation with 1 / (K - 1), plus 1e-7",
        "1 / K, nothing added",
        "code",
        "paper",
        "test_newer_logit.py::test_a_constant_row_has_a_small_gradient_where_the_published_form_has_a_huge_one",
    ),
    Difference(
        "ls",
        "DSKD, mdistiller/distillers/SDD_DKD.py:200-205 @d60df7d",
        "with `sdd_dkd`, every patch has the mean complementary weight",
        "each patch has its own weight",
        "code",
        "paper",
        "test_algebra.py::test_published_dskd_gives_every_patch_the_mean_weight",
    ),
    Difference(
        "ea",
        "EA-KD, mdistiller/distillers/KD.py:44, DKD.py:93 @6fb4c06",
        "the largest entropy is 100 with KD and DKD on CIFAR-100",
        "ln K",
        "code",
        "paper",
        "test_newer_logit.py::test_entropy_weights_of_the_unsure_and_the_certain",
    ),
    Difference(
        "ea",
        "EA-KD, mdistiller/distillers/DKD.py:22-23,46 @6fb4c06",
        "with standardised logits, the entropies are those of the standardised logits",
        "entropies of the raw logits, as in the repository's KD_ours.py:35",
        "code",
        "paper",
        _GOLDEN,
    ),
    Difference(
        "ea",
        "EA-KD, mdistiller/distillers/KD.py:10 @6fb4c06",
        "adds 1e-10 inside of the logarithm with KD",
        "nothing added",
        "code",
        "paper",
        _GOLDEN,
    ),
    Difference(
        "dist",
        "image_classification_sota, lib/models/losses/dist_kd.py:4-5 @6f7a70a",
        "adds 1e-8 to the product of the norms, which removes rare classes from the relations between images",
        "Pearson's correlation",
        "code",
        "paper",
        "test_newer_logit.py::test_dist_is_zero_for_shifted_rows_but_for_the_published_eps",
    ),
    Difference(
        "rld",
        "RLD, mdistiller/distillers/RLD.py:25-28 @d54578f",
        "takes the logarithm of summed probabilities: infinite or NaN in float32",
        "computed from log-odds",
        "paper",
        "paper",
        _BIT,
    ),
    Difference(
        "rld",
        "RLD, mdistiller/engine/cfg.py:180-184 @d54578f",
        "beta 8, and the confidence part at a temperature of its own, 1",
        "beta 4, one temperature",
        "code",
        "code",
        _GOLDEN,
    ),
    Difference(
        "gdkd",
        "GDKD, mdistiller/distillers/GDKD.py:52-84 @dc5201d",
        "k = K: the split is NaN, and the rest is all classes",
        "the rest is empty, its terms are 0",
        "paper",
        "paper",
        "test_newer_logit.py::test_gdkd_with_one_class_is_dkd_and_its_parts_add_up_to_kd",
    ),
    Difference(
        "gdkd",
        "GDKD, mdistiller/distillers/GDKD.py:52 @dc5201d",
        "takes the logarithm of summed probabilities: infinite or NaN in float32",
        "computed from log-odds",
        "paper",
        "paper",
        _BIT,
    ),
    *(
        Difference(
            name,
            f"TTM, distiller_zoo/{name}.py:15 @fe457b3",
            "takes the power of probabilities: float32 loses classes below e^-103",
            "the softmax of the scaled logits",
            "paper",
            "paper",
            _BIT,
        )
        for name in ("ttm", "wttm")
    ),
    Difference(
        "abkd",
        "abkd, standard_classification/distiller_zoo/abkl.py:37,47,58 @df81318",
        "the limits have the factor 1 / beta, or 1 / alpha",
        "1 / beta^2, or 1 / alpha^2",
        "code",
        "paper",
        "test_newer_logit.py::test_limits_of_abkd_are_those_of_the_general_form_but_for_the_published_factor",
    ),
    Difference(
        "abkd",
        "abkd, standard_classification/distiller_zoo/abkl.py:14-81 @df81318",
        "computed from probabilities: NaN in float32 for confident logits",
        "computed from log probabilities",
        "paper",
        "paper",
        _BIT,
    ),
    Difference(
        "ldrld",
        "LDRLD, distiller_zoo/LDRLD.py:57 @b4dcfc9",
        "the mean of the pairs' terms and of the one of all k",
        "their sum: 22 times as much at k = 7",
        "code",
        "paper",
        "test_newer_logit.py::test_ldrld_pair_by_pair",
    ),
    Difference(
        "ldrld",
        "LDRLD, distiller_zoo/LDRLD.py:24-27 @b4dcfc9",
        "k = 2: the term of all k has the weight of a pair",
        "weight 1",
        "code",
        "code",
        _GOLDEN,
    ),
    Difference(
        "ldrld",
        "LDRLD, distiller_zoo/LDRLD.py:60-65 @b4dcfc9",
        "k = K: the rest is all classes",
        "the rest is empty, its term is 0",
        "code",
        "paper",
        "test_newer_logit.py::test_the_rest_of_ldrld_is_kd_where_all_classes_are_ranked_and_the_paper_has_none",
    ),
    Difference(
        "normkd",
        "NormKD, mdistiller/distillers/NormKD.py:9-16 @279371b",
        "a constant row is divided by 0: the whole batch is NaN",
        "a uniform distribution",
        "paper",
        "paper",
        "test_newer_logit.py::test_normkd_is_the_standardised_loss_times_the_teachers_variance",
    ),
    Difference(
        "skd",
        "StreamLined, Distiller/SKD.py:27-28 @7458628",
        "the Gram matrices are divided by the number of classes, so the covariance is nothing but its regularisation",
        "cosines",
        "code",
        "paper",
        "test_newer_logit.py::test_skd_is_the_textbooks_mahalanobis_distance",
    ),
    Difference(
        "skd",
        "StreamLined, Distiller/SKD.py:65-90 @7458628",
        "masks meet losses that are already averaged, so they are two factors of about 1 / 2",
        "no masks",
        "code",
        "paper",
        "test_newer_logit.py::test_the_published_masks_of_skd_are_two_numbers",
    ),
    Difference(
        "skd",
        "StreamLined, Distiller/SKD.py:15 @7458628",
        "the divergence has the factor T^2",
        "no factor T^2",
        "code",
        "code",
        _GOLDEN,
    ),
    Difference(
        "skd",
        "StreamLined, Distiller/SKD.py @7458628",
        "one image raises; equal student and teacher have a NaN gradient",
        "0",
        "paper",
        "paper",
        "test_newer_logit.py::test_skd_is_zero_with_a_finite_gradient_where_directions_agree",
    ),
    Difference(
        "cat",
        "CAT-KD, mdistiller/distillers/CAT_KD.py:80 @4467073",
        "the mean over the map's places too",
        "the squared norm of each map",
        "code",
        "code",
        "test_newer_logit.py::test_cat_is_the_error_of_patch_logits_less_the_bias",
    ),
    Difference(
        "fitnet",
        f"{_ICD}FitNet.py, _common.py:33-40",
        "a term of every epoch; a pass in training mode, for the shapes, changes the teacher's statistics",
        "a training stage of its own, before the others",
        "code",
        "code",
        "test_feature.py::test_a_probe_changes_nothing_of_a_model",
    ),
    Difference(
        "ofd",
        f"{_ICD}OFD.py:114-121",
        "the teacher is in training mode: it normalises with the statistics of the batch",
        "a teacher in eval mode",
        "code",
        "paper",
        "test_feature_methods.py::test_margins_have_their_limits",
    ),
    Difference(
        "ofd",
        f"{_ICD}OFD.py:82-109,130-137",
        "margins are not aligned with the stages where the models have different numbers of them",
        "the deepest stages and their margins",
        "paper",
        "paper",
        "test_feature_methods.py::test_stages_are_paired_from_the_deepest_on",
    ),
    Difference(
        "ofd",
        f"{_ICD}OFD.py:96-98",
        "divides by the weight of a batch norm, which may be 0",
        "the limit, min(m, 0)",
        "paper",
        "paper",
        "test_feature_methods.py::test_margins_have_their_limits",
    ),
    Difference(
        "vid",
        f"{_ICD}VID.py:53",
        "the variances are hidden from the optimiser and keep their first value",
        "the variances are learnt",
        "code",
        "paper",
        "test_feature_methods.py::test_vid_trains_its_variances_where_it_is_corrected",
    ),
    Difference(
        "vid",
        f"{_ICD}VID.py:63",
        "log(1 + exp(x)): infinite in float32 above 88",
        "softplus",
        "paper",
        "paper",
        "test_feature_methods.py::test_variational_and_context_losses_by_hand",
    ),
    Difference(
        "vid",
        f"{_ICD}VID.py:86",
        "fails where the models have different numbers of stages",
        "the deepest stages are paired",
        "paper",
        "paper",
        "test_feature_methods.py::test_stages_are_paired_from_the_deepest_on",
    ),
    Difference(
        "kdsvd",
        f"{_ICD}KDSVD.py:43",
        "the value depends on signs of singular vectors, which linear algebra libraries choose freely",
        "the teacher's largest entry is positive",
        "paper",
        "paper",
        "test_feature_methods.py::test_singular_vectors_do_not_depend_on_signs_and_have_a_gradient_where_values_are_equal",
    ),
    Difference(
        "kdsvd",
        f"{_ICD}KDSVD.py:42",
        "decomposes C x H rows of W columns; RepDistiller H x W rows of C columns",
        "H x W rows of C columns",
        "code",
        "code",
        "test_feature_golden.py::test_a_feature_method_computes_what_the_reference_computes",
    ),
    Difference(
        "rkd",
        f"{_ICD}RKD.py:24,32",
        "a batch of one image is NaN",
        "0",
        "paper",
        "paper",
        "test_feature_methods.py::test_batches_of_one_or_two_images_of_two_classes_are_finite",
    ),
    Difference(
        "pkt",
        f"{_ICD}PKT.py:10",
        "the mean over the B x B pairs; a vector of zeros has a NaN gradient",
        "the sum over each row; a finite gradient",
        "code",
        "code",
        "test_feature_golden.py::test_a_feature_method_computes_what_the_reference_computes",
    ),
    Difference(
        "cc",
        "RepDistiller, distiller_zoo/CC.py",
        "products of each image with the next one of the batch",
        "kernel matrices of the whole batch",
        "code",
        "code",
        "test_feature_methods.py::test_flow_boundaries_margins_and_correlations_by_hand",
    ),
    Difference(
        "reviewkd",
        f"{_ICD}ReviewKD.py:43",
        "the configured width of the fusions is read and ignored: 512",
        "the configured width",
        "paper",
        "paper",
        "test_feature_golden.py::test_a_feature_method_computes_what_the_reference_computes",
    ),
    Difference(
        "crd",
        f"{_ICD}CRD.py:152",
        "the normalisers are fixed by the first batch",
        "as the code does; the paper's constant is unknown",
        "code",
        "code",
        "test_feature_golden.py::test_a_feature_method_computes_what_the_reference_computes",
    ),
)
"""All known differences, in the order of the methods."""


def differences_of(name: str) -> list[Difference]:
    """The differences of a method: those of its losses and modifiers, and of SDD and the cluster term if it has them.

    Args:
        name: a name or an expression.
    """
    concerned: set[str] = set()
    for part in parts_of(name):
        loss = part.base.removeprefix("cd_").removeprefix("sdd_")
        concerned.update((loss, *part.modifiers))
        concerned.update(prefix for prefix in ("cd", "sdd") if f"{prefix}_" in part.base.removesuffix(loss))
    return [each for each in DIFFERENCES if each.of in concerned]
