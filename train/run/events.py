"""Figures for TensorBoard, by its own event writer: the usual ones bring torch or TensorFlow."""

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class Events:
    """An event file in `folder`; TensorBoard reads all that lie there as one run.

    Args:
        first_step: TensorBoard drops what earlier files hold of this step and later ones, so a
            resumed run shows no step twice.
    """

    def __init__(self, folder: Path, first_step: int):
        self._file = EventFileWriter(str(folder))
        self._add(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, figures: Mapping[str, float], step: int) -> None:
        """Figures of one step, kept in fp32."""
        values = [Summary.Value(tag=name, simple_value=x) for name, x in figures.items()]
        self._add(Event(step=step, summary=Summary(value=values)))

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._file.add_event(event)

    def close(self) -> None:
        self._file.close()
