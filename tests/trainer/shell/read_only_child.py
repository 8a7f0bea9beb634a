"""The shell trainer as somebody who may not write: python read_only_child.py FOLDER, with FOLDER/cases.json.

It is a process of its own because it gives its rights away for good. As root it becomes nobody, after one training has
loaded all that is loaded late: afterwards Python's own files may be out of reach. Prints a JSON line for each case.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
import traceback
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
package = types.ModuleType("subjectbooth")
package.__path__ = [str(ROOT)]
sys.modules.setdefault("subjectbooth", package)

from subjectbooth.tests.layout_pair import NARROW  # noqa: E402
from subjectbooth.tests.small_base import folder_bytes  # noqa: E402
from subjectbooth.trainer.__main__ import main  # noqa: E402
from subjectbooth.trainer.base.sd import families  # noqa: E402

NOBODY = 65534
NO_RIGHT = 77
"""Exit code: this system does not let root become somebody else."""


def run(arguments: list[str]) -> dict[str, object]:
    """The exit code and what was said."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            code = main(arguments)
        except BaseException:
            code = 1
            traceback.print_exc()
    return {"code": code, "out": out.getvalue(), "error": error.getvalue()}


def digests(folder: Path) -> dict[str, str]:
    """Of every file below, by its name there."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in folder_bytes(folder).items()}


def give_up_rights() -> None:
    """Become nobody, if this is root. Ends the program where that is not possible."""
    if os.geteuid() != 0:
        return
    try:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    except OSError as problem:
        print(problem, file=sys.stderr)
        sys.exit(NO_RIGHT)


def try_all(folder: Path) -> None:
    """Prepare what has to be there before, take the rights away, and try each case."""
    families.FAMILIES = tuple(NARROW.values())
    plan = json.loads((folder / "cases.json").read_text("utf-8"))
    done = run(plan["before"])
    assert done["code"] == 0, done["error"]
    made = Path(plan["made"])
    shutil.copytree(made, plan["copy"])
    print(json.dumps({"case": "before", "files": digests(made)}))
    for path in [made, *made.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    for name, mode in plan["modes"].items():
        Path(name).chmod(mode)
    give_up_rights()
    for name, arguments in plan["cases"].items():
        print(json.dumps({"case": name, **run(arguments)}), flush=True)


if __name__ == "__main__":
    try_all(Path(sys.argv[1]))
