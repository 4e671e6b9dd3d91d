"""What a student run writes: its run folder, its checkpoint, and a batch that was not finite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save

from icdctl import files, models, run_files
from icdctl.config.run_config import RunConfig
from icdctl.data import UNLABELED, Views
from icdctl.engine.checkpoint import PREVIOUS_FILE, REPLAY_FILE, STATE_FILE, CheckpointWriter, Progress
from icdctl.engine.run_folder import write_history
from icdctl.engine.run_state import ENVIRONMENT_FILE, RunState
from icdctl.engine.shared_data import SharedData
from icdctl.engine.step import TrainingStep
from icdctl.engine.teacher import Answer
from icdctl.errors import ArtifactError
from icdctl.models import Classifier
from icdctl.models.external import without_adapter
from icdctl.run_files import HASH_KEY, WEIGHTS_FILE


@dataclass(frozen=True)
class RunResult:
    """The result of a run."""

    out: Path
    """The run folder."""
    config: RunConfig
    metrics: dict[str, Any]
    """The content of metrics.json; empty where the run stopped before its end."""
    finished: bool
    """False after a time limit; `--resume` continues the run."""
    model: Classifier = field(repr=False)
    """The trained student, in eval mode."""

    @property
    def top1(self) -> float:
        """Top-1 accuracy of the final epoch on the test set, in percent."""
        return float(self.metrics["final_top1"])

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        summary = {"out": str(self.out), "finished": self.finished, "method": self.config.method}
        return {**summary, "student": self.config.student, "teacher": self.config.teacher, **self.metrics}


class RunOutput:
    """The files of one student run."""

    def __init__(self, config: RunConfig, shared: SharedData, state: RunState) -> None:
        self.out = Path(config.out)
        """The run folder."""
        self.state = state
        """Where the checkpoint is."""
        self._shared = shared
        self.writer = CheckpointWriter(shared.device, in_background=shared.device_driven)

    @property
    def replay_path(self) -> Path:
        """The file for a batch that was not finite."""
        return self.state.folder / REPLAY_FILE

    def write_start(self, config: RunConfig, progress: Progress) -> None:
        """Write what is known before the first step: config.json, environment.json, and where the checkpoint is."""
        files.write_json(self.out / "config.json", config.model_dump(mode="json"))
        *earlier, last = progress.attempts
        environment = {**last, **({"earlier": earlier} if earlier else {}), **self.state.pointer(self.out)}
        files.write_json(self.out / ENVIRONMENT_FILE, environment)

    def write_state(self, step: TrainingStep, progress: Progress, config: RunConfig) -> None:
        """Write the checkpoint, then history.csv.

        Raises:
            ArtifactError: a file can't be written, or the run folder was removed.
        """
        self.writer.save(self.state.folder / STATE_FILE, step, progress, config)
        self._check_folder(progress, config)
        if progress.history:
            write_history(self.out / "history.csv", progress.history)

    def write_result(self, config: RunConfig, progress: Progress, model: Classifier, metrics: dict[str, Any]) -> None:
        """Write history, weights and metrics of a run whose last epoch is done; all hashes join `metrics`.

        Args:
            config: the configuration of the run.
            progress: the progress at its end.
            model: the model to keep.
            metrics: without the hashes.
        """
        self._check_folder(progress, config)
        write_history(self.out / "history.csv", progress.history)
        metadata = self._shared.dataset.weights_metadata(config.student)
        if models.is_backbone(config.student):
            metadata["library"] = models.library_of(config.student)
        # These describe an earlier training in this folder, whose weights are replaced now.
        (self.out / "metrics.json").unlink(missing_ok=True)
        metrics[HASH_KEY] = models.save_weights(self.out / WEIGHTS_FILE, without_adapter(model), metadata)
        metrics |= run_files.hashes(self.out, metrics)
        files.write_json(self.out / "metrics.json", metrics)
        (self.state.folder / PREVIOUS_FILE).unlink(missing_ok=True)

    def keep_replay(self, config: RunConfig, *, epoch: int, index: int, views: Views, answer: Answer | None) -> None:
        """Keep what a step that was not finite saw: pixels, labels and the teacher's answer.

        The weights of an earlier step are the checkpoint beside it, or those that the seed gives.

        Args:
            config: the configuration of the run.
            epoch: counted from 1.
            index: number of the step in its epoch, from 0.
            views: the views of its images.
            answer: the teacher's answer.
        """
        shared = self._shared
        held = {
            "pixels": shared.store.pixels(views),
            "labels": shared.labels[views.index],
            "image_numbers": views.index,
            **{f"teacher_{name}": tensor for name, tensor in (answer or {}).items()},
        }
        metadata = {"epoch": str(epoch), "step": str(index + 1), "config": config.model_dump_json()}
        tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in held.items()}
        files.write_bytes(self.replay_path, save(tensors, metadata=metadata))

    def _check_folder(self, progress: Progress, config: RunConfig) -> None:
        """Stop if the run folder was removed: another run may be about to be trained there.

        A pipeline that is started again deletes the outputs of a stage, and its first trainer may have outlived it.
        """
        if not (self.out / "config.json").is_file():
            raise ArtifactError(
                f"run folder `{self.out}` was removed during the run; the state after {progress.shown(config)} is "
                "saved",
                hint="continue from there with the same command and `--resume`",
            )


def run_metrics(
    shared: SharedData,
    config: RunConfig,
    progress: Progress,
    *,
    accuracy: Mapping[str, Any],
    num_parameters: int,
    num_students: int,
    compiled: bool,
    teacher_origin: Mapping[str, str | None],
    head_is_new: bool,
) -> dict[str, Any]:
    """The content of metrics.json, the hashes aside.

    Args:
        shared: the images.
        config: the configuration of the run.
        progress: the progress at its end.
        accuracy: accuracy on the test images, final and best.
        num_parameters: number of parameters of the student.
        num_students: number of students that were trained at once.
        compiled: whether torch.compile made the kernels.
        teacher_origin: source and licence of the teacher's weights.
        head_is_new: whether the first weights were of another number of classes, so that their head was not taken.
    """
    return {
        **accuracy,
        "epochs": progress.epoch,
        "steps": progress.steps,
        "seconds": progress.seconds,
        "images_per_second": shared.images_of(progress.steps) / progress.seconds,
        "students_at_once": num_students,
        **({"compiled": compiled} if config.compile else {}),
        **({"head_is_new": True} if head_is_new else {}),
        "nonfinite_steps": progress.nonfinite_steps,
        "params": num_parameters,
        "variant": config.settings["variant"],
        "dataset_sha256": shared.dataset.sha256,
        "train_images": shared.num_images,
        "unlabeled_images": int((shared.dataset.train_labels == UNLABELED).sum()),
        "skipped_images": shared.dataset.skipped_images,
        **teacher_origin,
    }
