"""How the teacher of some runs answers: in which precision, and on each batch, some steps ahead or from a cache."""

from __future__ import annotations

from collections.abc import Sequence

from icdctl import methods, models
from icdctl.config.run_config import RunConfig
from icdctl.engine.observer import Observer
from icdctl.engine.precision import choose_teacher_precision
from icdctl.engine.shared_data import SharedData
from icdctl.engine.teacher import InlineTeacher, Teacher, TeacherPrecision
from icdctl.engine.teacher_cache import Demand, cache_pays, choose_mode, make_teacher, plan_cache
from icdctl.errors import UsageError
from icdctl.methods import ModelProbe
from icdctl.models import Classifier


def teacher_reads(config: RunConfig) -> frozenset[str]:
    """Names of the tensors that a run's method reads of its teacher."""
    method = methods.get(config.method)
    return method.teacher_reads(config.settings) | method.reads_of_scales(config.scales)


def choose_teacher(
    model: Classifier,
    configs: Sequence[RunConfig],
    shared: SharedData,
    *,
    num_images: int,
    wanted_mode: str,
    wanted_precision: str,
    observer: Observer,
) -> tuple[Teacher, dict[str, str]]:
    """The teacher of runs that share one, its cache filled.

    Args:
        model: the trained teacher; it is copied, not changed.
        configs: the configurations of the runs, whose methods read it.
        shared: the images.
        num_images: most that any of the runs will still see.
        wanted_mode: `auto`, `inline`, `ahead` or `cache`.
        wanted_precision: `auto`, `fp32`, `bf16` or `fp16`.
        observer: receives progress and messages.

    Returns:
        The teacher, and what was decided: `teacher_mode` and `teacher_precision`.

    Raises:
        UsageError: the mode can't be used for these methods or images, or on this machine.
        ArtifactError: the cache can't be written.
    """
    config = configs[0]
    reads = frozenset().union(*map(teacher_reads, configs))
    if not methods.get(config.method).has_eval_mode_teacher(config.settings):
        return _in_training_mode(model, config, reads, shared, wanted_mode, wanted_precision)
    demand = _demand(model, configs, reads, shared, num_images)
    num_forwards = demand.num_images
    if shared.store.num_views is not None and wanted_mode in ("auto", "cache"):
        num_forwards = min(num_forwards, shared.num_images * shared.store.num_views)
    precision = choose_teacher_precision(
        wanted_precision, model, shared.store, num_images=num_forwards, deterministic=config.deterministic
    )
    is_foreign = models.is_backbone(config.teacher or "")
    plan = plan_cache(
        shared.store,
        demand,
        shared.dataset,
        # The weights of a custom module, or of another library's model, are known, but not its code: no cache is kept.
        teacher_sha256="" if is_foreign or not config.teacher_weights else config.teacher_sha256 or "",
        precision=precision,
        teacher=config.teacher or "",
    )
    mode = choose_mode(wanted_mode, plan, demand, shared.device)
    # What depends on the machine's state is said, because the same command may decide otherwise another time.
    if wanted_mode == "auto" and mode != "cache" and plan is not None and cache_pays(plan, demand, shared.device):
        why = plan.left_out or f"its cache needs {plan.num_bytes / 1e9:.1f} GB, and there is not so much room"
        observer.message(f"the teacher runs in every epoch: {why}")
    if wanted_precision == "auto" and precision != "fp32":
        observer.message(
            f"the teacher runs in {precision}, which was faster in a measurement; `--teacher-precision` fixes it"
        )
    inline = InlineTeacher(model, reads=reads, device=shared.device, precision=precision)
    teacher = make_teacher(
        mode,
        inline,
        shared.store,
        plan,
        begin=observer.begin,
        advance=observer.advance,
        message=observer.message,
    )
    return teacher, {"teacher_mode": mode, "teacher_precision": precision}


def _demand(
    model: Classifier, configs: Sequence[RunConfig], reads: frozenset[str], shared: SharedData, num_images: int
) -> Demand:
    """How often, and for which tensors, the runs call their teacher; arguments as for `choose_teacher`."""
    probe = ModelProbe(model, shared.dataset.preprocessing.size)
    num_streams = len({(each.seed, methods.get(each.method).num_views) for each in configs})
    num_views = max(methods.get(each.method).num_views for each in configs)
    return Demand(
        num_streams=num_streams,
        num_images=num_streams * num_images * num_views,
        shapes={name: probe.shape(name) for name in sorted(probe.names(reads))},
        deterministic=configs[0].deterministic,
    )


def _in_training_mode(
    model: Classifier,
    config: RunConfig,
    reads: frozenset[str],
    shared: SharedData,
    wanted_mode: str,
    wanted_precision: str,
) -> tuple[Teacher, dict[str, str]]:
    """A teacher that normalises with the statistics of the batch, so that its answers belong to that batch alone."""
    if wanted_mode not in ("auto", "inline"):
        raise UsageError(
            f"`--teacher-mode {wanted_mode}` can't be used with `{config.method}`, whose teacher normalises with the "
            "statistics of the student's batch",
            hint="leave `--teacher-mode` out: the teacher then runs on each batch",
        )
    precision: TeacherPrecision = choose_teacher_precision(
        wanted_precision, model, shared.store, num_images=0, deterministic=True
    )
    teacher = InlineTeacher(model, reads=reads, device=shared.device, precision=precision, in_eval_mode=False)
    return teacher, {"teacher_mode": "inline", "teacher_precision": precision}
