"""The part of the trainers whose processes, and the workers of each, read their own shards of a stream.

A checkpoint holds the position of every shard, so that a resumed run, of as many processes or others, reads nothing twice.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import Trainer

from ..data.sharded_stream import ShardedStream, StreamBatches, merge_stream_states

logger = logging.getLogger(__name__)

STREAM_FILE = "stream_{rank}.json"


class StreamsTrainer(Trainer):
    """`Trainer` that reads a `ShardedStream` in every process, without Accelerate's division of the rows."""

    _batches: StreamBatches | None = None

    def get_train_dataloader(self) -> DataLoader:
        """Data loader of the training rows; of a `ShardedStream` those of this process.

        Raises:
            ValueError: the stream belongs to another process, or ends.
        """
        stream: Any = self.train_dataset
        if not isinstance(stream, ShardedStream):
            return super().get_train_dataloader()
        own = (self.args.process_index, self.args.world_size)
        if (stream.rank, stream.world_size) != own:
            raise ValueError(
                f"The stream is that of process {stream.rank} of {stream.world_size}, but this is process {own[0]} of {own[1]}: pass "
                "`rank` and `world_size` of this process to `ShardedStream`."
            )
        if not stream.is_endless:
            raise ValueError(
                "Shards end after different numbers of steps, and processes would wait for each other: make the streams with `repeat=True`."
            )
        self._batches = StreamBatches(
            stream,
            self._train_batch_size,
            self._get_collator_with_removed_columns(self.data_collator, "Training"),
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
        )
        return DataLoader(self._batches, batch_size=None, pin_memory=self.args.dataloader_pin_memory)

    def _save_process_state(self, folder: Path) -> None:
        """Writes what else this process needs to continue into the unfinished checkpoint `folder`."""
        if self._batches is not None:
            path = folder / STREAM_FILE.format(rank=self.args.process_index)
            path.write_text(json.dumps(self._batches.state_dict()) + "\n", encoding="utf-8")

    def _load_stream(self, checkpoint: str) -> None:
        """Goes on with the stream where the processes of a checkpoint, however many, have stopped."""
        if self._batches is None:
            return
        files = sorted(Path(checkpoint).glob(STREAM_FILE.format(rank="*")))
        if not files:
            logger.warning("%s holds no positions of the stream, which is read again up to its step.", checkpoint)
            return
        state = merge_stream_states([json.loads(path.read_text(encoding="utf-8")) for path in files])
        skipped = 0 if self.args.ignore_data_skip else self.state.global_step % max(1, self.state.max_steps)
        self._batches.load_state_dict(state, skipped * self.args.gradient_accumulation_steps)
