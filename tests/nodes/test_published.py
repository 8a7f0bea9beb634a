"""What ComfyUI may serve from its cache when one file is published for several steps in turn; needs no ComfyUI."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from subjectbooth.tests.conftest import module_alone


@pytest.fixture
def published() -> ModuleType:
    """A new one for each test, because it remembers."""
    return module_alone("published")


def test_what_is_cached_for_another_step_is_stale_once_its_file_was_replaced(
    published: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "rex.safetensors"

    def publish(use_step: int, content: str) -> None:
        path.write_text(content, "utf-8")
        published.remember("rex", path, use_step)

    def seen(use_step: int | None, name: str | None = "rex") -> int:
        return int(published.replaced_files(name, use_step))

    publish(0, "own")
    assert [seen(0), seen(200)] == [0, 0]
    published.remember("rex", path, 0)
    assert seen(200) == 0, "nothing was replaced"
    publish(200, "chosen")
    assert [seen(0), seen(200), seen(0, "max")] == [1, 0, 0], "its own result stays cached"
    publish(0, "own again")
    assert [seen(0), seen(200), seen(300)] == [1, 1, 2]
    assert seen(None) == seen(None, None) == 2, "a linked input is not known yet"
    assert published.lost_files("rex") == 0
