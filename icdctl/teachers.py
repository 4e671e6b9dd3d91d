"""Where a distillation finds its teacher, and where a person gets one."""

from __future__ import annotations

from icdctl import data, files, models, registry, targets
from icdctl.errors import ArtifactError
from icdctl.targets import Target

_CRD_TEACHERS = ("res32x4", "wrn40_2", "res56", "res110", "vgg13", "res50")
"""The CIFAR-100 teachers that CRD published, and the literature since has used."""
_CRD_ARCHIVE = "https://github.com/megvii-research/mdistiller/releases/download/checkpoints/cifar_teachers.tar"


def find(teacher: str, *, dataset: str) -> Target:
    """What `--teacher` names: a path, `registry:NAME`, or a model whose registered teacher for the data set is taken.

    Raises:
        UsageError: no path and no model.
        ArtifactError: the model has no registered teacher, or it is another data set's; the hint says how to get one.
    """
    is_path = bool(teacher) and (files.user_path(teacher).exists() or "/" in teacher or "." in teacher)
    if not (is_path or teacher.startswith("registry:")):
        return _registered(models.resolve(teacher), data.resolve(dataset))
    name = data.resolve(dataset)
    target = targets.resolve(teacher, dataset=name)
    if target.dataset != name:
        raise ArtifactError(
            f"teacher `{teacher}` was trained on `{target.dataset}`, the run is on `{name}`",
            hint=f"train one with `icdctl train --model {target.model} --dataset {name}`, or change `--dataset`",
        )
    num_classes = len(data.DATASETS[name].class_names)
    if target.num_classes != num_classes:
        raise ArtifactError(
            f"teacher `{teacher}` tells {target.num_classes} classes apart, `{name}` has {num_classes}",
            hint=f"train one with `icdctl train --model {target.model} --dataset {name}`",
        )
    return target


def _registered(model: str, name: str) -> Target:
    """The newest registered teacher of a model on a data set."""
    artifact = registry.find_teacher(registry.default_folder(), model=model, dataset=name)
    if artifact is not None:
        return targets.resolve(f"registry:{artifact.reference}")
    published = _published_teacher(model, name)
    raise ArtifactError(
        f"teacher `{model}` for `{name}` is not there: no such artifact in `{registry.default_folder()}`",
        hint=f"{published}train one with `icdctl train --model {model} --dataset {name} --out runs/teacher`, then pass "
        "`--teacher runs/teacher`, or register it with `icdctl registry add runs/teacher`",
    )


def _published_teacher(model: str, dataset: str) -> str:
    """Where the literature's own teacher can be had, as the start of a hint."""
    if dataset != "cifar100" or model not in _CRD_TEACHERS:
        return ""
    member = f"cifar_teachers/{models.MODELS[model].aliases[0]}_vanilla/ckpt_epoch_240.pth"
    return f"download {_CRD_ARCHIVE}, unpack it and pass `--teacher {member}`; or "
