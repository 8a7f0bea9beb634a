"""What a run is made of, as one value: the node, the shell and experiments make their runs from it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..base.base_model import BaseModel
from ..config import TrainConfig
from ..memory.plan import FreeMemory
from ..preserve.none import NoPreservation
from ..preserve.preservation import Preservation
from ..subject.subject import Subject
from .encodings import EncodingCache
from .evaluator import Evaluator
from .run import Run
from .writer import FolderWriter, MakeWriter


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes of a run.

    Many runs from one recipe:

    .. code-block:: python

        cache = EncodingCache()
        for seed in range(3):
            for event in recipe.vary(seed=seed).run(root, encodings=cache).events():
                ...

    Attributes:
        base: what to train on.
        subject: photos and words.
        config: the requested settings.
        preservation: how the class is kept.
    """

    base: BaseModel
    subject: Subject
    config: TrainConfig
    preservation: Preservation = field(default_factory=NoPreservation)

    def vary(self, **settings: Any) -> Recipe:
        """The same with other settings.

        Raises:
            SubjectBoothError: a value is out of range.
            TypeError: there is no such setting.
        """
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **settings))

    def run(
        self,
        root: Path,
        device: torch.device | None = None,
        free: FreeMemory | None = None,
        *,
        encodings: EncodingCache | None = None,
        make_writer: MakeWriter = FolderWriter,
        evaluator: Evaluator | None = None,
    ) -> Run:
        """The run of this recipe; see :class:`trainer.runs.run.Run` for what it takes.

        Raises:
            SubjectBoothError: photos, class images, base and settings do not fit.
        """
        return Run(
            self.base,
            self.subject,
            self.preservation,
            self.config,
            root,
            device,
            free,
            encodings=encodings,
            make_writer=make_writer,
            evaluator=evaluator,
        )
