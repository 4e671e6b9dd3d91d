"""Choose the figures of a report, and collect the numbers for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from icdctl import evaluation, methods, models
from icdctl.data import Dataset
from icdctl.engine.environment import cpu_name
from icdctl.registry.trained import TrainedModel
from icdctl.reporting import drawing, figures, measure, model_maps
from icdctl.reporting.drawing import Picture
from icdctl.reporting.figures import Curve, Point
from icdctl.reporting.group_measurements import GroupMeasurements
from icdctl.reporting.measure import ChosenImages, FigureInputs, ModelMeasurer
from icdctl.reporting.run_groups import ReportCell, RunGroup

_NUM_SHOWN = 4
_BYTES = 4e-6
"""Megabytes that a parameter takes in float32."""


def curves(group: RunGroup) -> list[Picture]:
    """Learning curves of the drawn cells: one figure for runs that watched the test images, one for the others."""
    pictures = []
    for column, kind, name in (("test_top1", "test", "curves"), ("val_top1", "held-out", "curves-held-out")):
        watching = [cell for cell in group.drawn if all(column in run.history[0] for run in cell.runs)]
        if watching:
            rows = [Curve(cell.label, [[row[column] for row in run.history] for run in cell.runs]) for cell in watching]
            title = "Learning curves" if kind == "test" else "Learning curves on held-out images"
            pictures.append(figures.learning_curves(f"{group.name}-{name}", rows, title=title, watched=kind))
    return pictures


def in_detail(found: GroupMeasurements, measurer: ModelMeasurer, *, shown: Sequence[int] | None) -> list[Picture]:
    """The figures of a group that need its models.

    Args:
        found: the measurements of the group.
        measurer: the measurer of the group's data set.
        shown: numbers of the test images whose Gram matrices are drawn; None for four that a fixed seed chooses.

    Raises:
        UsageError: `shown` has a number that no image has.
    """
    group, name, dataset = found.group, found.group.name, measurer.dataset
    cells = [cell for cell in group.drawn if found.measurements_of(cell)]
    pictures = []
    gains = {}
    for first, second in group.comparisons:
        values = _class_gains(found, first, second, dataset)
        if values is not None:
            gains[first.label, second.label] = values
    if gains:
        pictures.append(figures.per_class_gains(f"{name}-classes", gains))
    bins = {cell.label: _together([each.numbers for each in found.measurements_of(cell)]) for cell in cells}
    ece = {cell.label: [each.numbers.ece for each in found.measurements_of(cell)] for cell in cells}
    if found.teacher_numbers is not None:
        label = f"{group.teacher_label} {drawing.TEACHER}"
        bins = {label: found.teacher_numbers.numbers.reliability, **bins}
        ece = {label: [found.teacher_numbers.numbers.ece], **ece}
    if bins:
        pictures.append(figures.reliability(f"{name}-reliability", bins, ece))
    if not cells:
        return pictures
    chosen = measure.choose_images(dataset.test_labels, num_shown=_NUM_SHOWN, shown=shown)
    views = {cell.label: measurer.figure_inputs(found.trained_models[cell.label], chosen) for cell in cells}
    placed = {label: view.features for label, view in views.items()}
    if found.teacher is not None and group.teacher is not None:
        theirs = measurer.figure_inputs(found.teacher, chosen, is_teacher=True)
        pictures.append(_agreement(found, cells, group.teacher))
        differences = {
            label: measure.correlation(view.logits) - measure.correlation(theirs.logits)
            for label, view in views.items()
        }
        pictures.append(model_maps.correlation_differences(f"{name}-correlation", differences, teacher=group.teacher))
        placed = {f"{group.teacher_label} {drawing.TEACHER}": theirs.features, **placed}
        pictures += [
            _gram_picture(found, cell, views[cell.label], theirs, dataset, chosen) for cell in _clustered(cells)
        ]
    if len(chosen.mapped) >= measure.FEWEST_MAPPED:
        maps = {label: measure.feature_map(features) for label, features in placed.items()}
        names = {number: dataset.class_names[number] for number in chosen.classes}
        labels = dataset.test_labels[chosen.mapped].numpy()
        used = measure.perplexity(len(labels))
        pictures.append(model_maps.feature_maps(f"{name}-features", maps, labels, names, perplexity=used))
    return pictures


def _clustered(cells: Sequence[ReportCell]) -> list[ReportCell]:
    """The cells whose Gram matrices are drawn: those with the cluster term and their counterparts without it; if there
    are none, the last cell."""
    clustered = [cell for cell in cells if methods.get(cell.config.method).cluster]
    families = {methods.get(cell.config.method).family for cell in clustered}
    beside = [
        cell
        for cell in cells
        if cell not in clustered
        and methods.get(cell.config.method).patches
        and methods.get(cell.config.method).family in families
    ]
    return [*beside, *clustered] or list(cells[-1:])


def _gram_picture(
    found: GroupMeasurements,
    cell: ReportCell,
    view: FigureInputs,
    theirs: FigureInputs,
    dataset: Dataset,
    chosen: ChosenImages,
) -> Picture:
    # Only these can be drawn from the regions that are kept of each image.
    scales = [scale for scale in cell.config.scales if scale > 1 and scale in methods.SCALES] or [
        scale for scale in methods.SCALES if scale > 1
    ]
    images = dataset.test_images[chosen.shown].numpy()
    names = [
        f"{drawing.brief(dataset.class_names[int(dataset.test_labels[number])], 12)} (no. {number})"
        for number in chosen.shown.tolist()
    ]
    grams = [
        {
            scale: (measure.gram_of(theirs.regions[place], scale), measure.gram_of(view.regions[place], scale))
            for scale in scales
        }
        for place in range(len(names))
    ]
    name = f"{found.group.name}-patches-{cell.config.method}"
    return model_maps.gram_maps(name, images, names, grams, student=cell.label, teacher=str(found.group.teacher))


def _agreement(found: GroupMeasurements, cells: Sequence[ReportCell], teacher: str) -> Picture:
    shares, divergences = {}, {}
    for cell in cells:
        held = found.measurements_of(cell)
        shares[cell.label] = [each.agreement for each in held if each.agreement is not None]
        divergences[cell.label] = [each.fidelity for each in held if each.fidelity is not None]
    return figures.agreements(f"{found.group.name}-agreement", shares, divergences, teacher=teacher)


def _class_gains(
    found: GroupMeasurements, first: ReportCell, second: ReportCell, dataset: Dataset
) -> list[float] | None:
    """Mean gain in points for each class with test images, over the seeds that both have; None if there are none."""
    sides = [
        {run.config.seed: found.measured[run.folder] for run in cell.runs if run.folder in found.measured}
        for cell in (first, second)
    ]
    seeds = sorted(sides[0].keys() & sides[1].keys())
    if not seeds:
        return None
    tested = sorted(set(dataset.test_labels.tolist()))
    shares = [[np.array(side[seed].numbers.per_class, dtype=float)[tested] for seed in seeds] for side in sides]
    gains = np.array(shares[0]) - np.array(shares[1])
    return [float(value) for value in gains.mean(axis=0)]


def _together(several: Sequence[evaluation.Evaluation]) -> tuple[evaluation.Bin, ...]:
    """The bins of several models as one."""
    found = []
    for same in zip(*(each.reliability for each in several), strict=True):
        images = sum(each.images for each in same)
        means = [_mean([(each.images, each[place]) for each in same]) for place in (1, 2)]
        found.append(evaluation.Bin(images, *means))
    return tuple(found)


def _mean(weighted: Sequence[tuple[int, float | None]]) -> float | None:
    """The mean of values, each weighted by a number of images; None without images."""
    images = sum(weight for weight, _ in weighted)
    return sum(weight * (value or 0.0) for weight, value in weighted) / images if images else None


def pareto(groups: Sequence[GroupMeasurements]) -> list[Picture]:
    """A figure of accuracy and cost for each set of test images, with its teachers and the cells of its students."""
    pictures = []
    for images in dict.fromkeys(each.group.images for each in groups):
        points: dict[str, Point] = {}  # by weights, because the same plain students are in several groups
        here = [each for each in groups if each.group.images == images]
        has_several_teachers = len({each.group.teacher_label for each in here if each.group.teacher}) > 1
        for each in here:
            if each.teacher is not None and each.teacher_numbers is not None:
                label = f"{each.group.teacher_label} {drawing.TEACHER}"
                latency = each.latencies.get(each.teacher.model)
                size = _BYTES * num_parameters(each.teacher)
                points[each.teacher.sha256] = Point(label, [each.teacher_numbers.numbers.top1], size, latency)
            for cell in each.group.drawn:
                params = cell.runs[0].metrics.params
                if params is not None:
                    label = f"{each.group.student}, {cell.label}"
                    if has_several_teachers and cell.config.teacher is not None:
                        label += f", from {each.group.teacher_label}"
                    latency = each.latencies.get(each.group.student)
                    points[cell.runs[0].sha256] = Point(label, list(cell.top1.values()), _BYTES * params, latency)
        if len(points) > 1:
            slug = "".join(char if char.isalnum() and char.isascii() else "-" for char in images)
            hardware = cpu_name() if any(point.latency_ms for point in points.values()) else ""
            pictures.append(figures.pareto(f"pareto-{slug}", list(points.values()), hardware=hardware))
    return pictures


def num_parameters(trained_model: TrainedModel) -> int:
    """The number of a model's parameters, without the statistics of its batch norms."""
    if models.is_backbone(trained_model.model):  # which must run once, so it needs weights
        made = trained_model.load()
    else:
        with torch.device("meta"):
            size = trained_model.preprocessing.size
            made = models.create(trained_model.model, trained_model.num_classes, image_size=size)
    return sum(parameter.numel() for parameter in made.parameters())
