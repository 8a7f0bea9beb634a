"""The inputs of a run as one value, from which the node, the shell and experiments create their runs."""

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
from .writer import MakeWriter


@dataclass(frozen=True)
class Recipe:
    """All inputs that determine the result of a run.

    To run variations of a recipe:

    .. code-block:: python

        cache = EncodingCache()
        for seed in range(3):
            for event in recipe.vary(seed=seed).run(root, encodings=cache).events():
                ...

    Attributes:
        base: the base to train on.
        subject: photos and words.
        config: the requested settings.
        preservation: the method of class preservation.
    """

    base: BaseModel
    subject: Subject
    config: TrainConfig
    preservation: Preservation = field(default_factory=NoPreservation)

    def vary(self, **settings: Any) -> Recipe:
        """A copy of the recipe with other settings.

        Raises:
            SubjectBoothError: a value is out of range.
            TypeError: a setting does not exist.
        """
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **settings))

    def run(
        self,
        root: Path,
        device: torch.device | None = None,
        free: FreeMemory | None = None,
        *,
        encodings: EncodingCache | None = None,
        make_writer: MakeWriter | None = None,
        evaluator: Evaluator | None = None,
    ) -> Run:
        """Create a run of this recipe; for the arguments, see :class:`trainer.runs.run.Run`.

        Raises:
            SubjectBoothError: photos, class images, base and settings are not compatible.
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
