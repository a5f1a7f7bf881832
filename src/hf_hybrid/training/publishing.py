"""What a trainer pushes to the Hub: clean copies, each push one commit."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import Trainer
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress

from ..published import tokenizer_files, write_published
from .checkpoints import PUBLISHING_FOLDER, amend_manifest


class PublishingTrainer(Trainer):
    """`Trainer` whose pushes hold the model and nothing of this machine (`published`).

    The options `push_to_hub` and `hub_...` mean what they mean in Transformers. Other than there, a push during training leaves no
    weights in the folder of the run, and model and checkpoint come in one commit.
    """

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Saves the model and pushes it; arguments as in `Trainer.push_to_hub`.

        Returns:
            The commit, or with `blocking=False` a future of it; None in all but the main process.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        tags = kwargs.pop("tags", None) or []
        tags = [tags] if isinstance(tags, str) else list(tags)
        model_tags = getattr(self.model, "model_tags", None) or []
        kwargs.setdefault("model_name", str(self.hub_model_id).split("/")[-1])
        self.create_model_card(tags=list(dict.fromkeys([*tags, *model_tags])) or None, **kwargs)
        self._finish_current_push()
        return self._upload_clean(
            {"": Path(str(self.args.output_dir))}, str(commit_message), token=token, revision=revision, wait=blocking
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        running = self._running_push()
        if running is not None and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        folder = Path(checkpoint_folder)
        parts = {"": folder}
        if strategy == HubStrategy.CHECKPOINT:
            parts["last-checkpoint"] = folder
        elif strategy == HubStrategy.ALL_CHECKPOINTS:
            parts[folder.name] = folder
        by_steps = self.args.save_strategy == SaveStrategy.STEPS
        place = f"step {self.state.global_step}" if by_steps else f"epoch {int(self.state.epoch or 0)}"
        job = self._upload_clean(parts, f"Training in progress, {place}", wait=False)
        if running is not None:
            running.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress(jobs=[job])  # type: ignore[assignment, arg-type]

    def _running_push(self) -> Any:
        """The push that is still under way, a `PushInProgress`, or None."""
        push: Any = self.push_in_progress
        return None if push is None or push.is_done() else push

    def push_records(self, commit_message: str) -> None:
        """Pushes card, figures and pictures of the finished run, and whatever else of its folder belongs to the model."""
        self._finish_current_push()
        self._upload_clean({"": Path(str(self.args.output_dir))}, commit_message)

    def _upload_clean(
        self,
        parts: Mapping[str, Path],
        message: str,
        *,
        token: str | None = None,
        revision: str | None = None,
        wait: bool = True,
    ) -> Any:
        """Uploads what may leave of some folders.

        Args:
            parts: folder in the repository -> folder here; of those with a name, all that continues the run.
            message: message of the commit.
            token, revision: default: those of the arguments.
            wait: return the commit, rather than a future of it.
        """
        room = Path(str(self.args.output_dir)) / PUBLISHING_FOLDER
        if self._running_push() is None:
            shutil.rmtree(room, ignore_errors=True)  # of a killed run
        room.mkdir(parents=True, exist_ok=True)
        copy = Path(tempfile.mkdtemp(dir=room))
        try:
            for place, folder in parts.items():
                further = tokenizer_files(self.processing_class)
                written = write_published(folder, copy / place, checkpoint=bool(place), further=further)
                amend_manifest(copy / place, written.changed)
            job: Any = HfApi(library_name="hf_hybrid", token=token or self.args.hub_token).upload_folder(
                repo_id=str(self.hub_model_id),
                folder_path=copy,
                commit_message=message,
                revision=revision if revision is not None else self.args.hub_revision,
                run_as_future=not wait,  # type: ignore[call-overload]
            )
        except BaseException:
            _remove(copy)
            raise
        if wait:
            _remove(copy)
        else:
            job.add_done_callback(lambda _: _remove(copy))
        return job


def _remove(copy: Path) -> None:
    shutil.rmtree(copy, ignore_errors=True)
    with contextlib.suppress(OSError):  # another push is under way
        copy.parent.rmdir()
