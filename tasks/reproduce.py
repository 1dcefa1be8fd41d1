"""`dvc repro` that keeps files of the user's own: DVC deletes an output folder before its stage runs.

    python -m tasks.reproduce
    python -m tasks.reproduce --single-item calibrate@tlq-w3a16

Takes the options and targets of `dvc repro`. Files that no stage wrote are moved to `kept/` first, with a warning. The
folder is then as its stage left it, so that a file in it does not make the stage run again either.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

#: Where files of the user's own are moved, below the project's folder.
KEPT = Path("kept")

_NAMED = 3  # files that a warning names
_COMMAND = ("--wait-for-lock", "repro")
_USAGE = 254  # DVC's exit status for unknown options

logger = logging.getLogger("tlq")


def move_own_files(outs: Iterable[Any], root: Path) -> None:
    """Move the files that no stage wrote from output folders to ``root``/kept, with a warning for each folder.

    Args:
        outs: outputs of DVC's stages.

    Raises:
        OSError: a file cannot be moved.
    """
    for out in outs:
        folder = Path(out.fs_path)
        files = sorted(own_files(out))
        if not files:
            continue
        place = root / KEPT / os.path.relpath(folder, root)
        for name in files:
            _move(folder / name, place / name)
        named = ", ".join(files[:_NAMED]) + (f" and {len(files) - _NAMED} more" if len(files) > _NAMED else "")
        logger.warning(
            "%s: %s (written by no stage) moved to %s, because DVC empties the folder before its stage runs",
            os.path.relpath(folder, root),
            named,
            os.path.relpath(place, root),
        )


def own_files(out: Any) -> Iterator[str]:
    """Files in an output's folder, relative to it, that no stage wrote: neither in DVC's list of it nor in DVC's cache.

    Files that .dvcignore names, such as model cards, belong to the stage that wrote them. A folder without a list in
    DVC's cache is compared as a whole: if it has the hash of dvc.lock, the stage wrote all of it.
    """
    from dvc_data.hashfile.tree import Tree

    folder = Path(out.fs_path)
    if folder.is_symlink() or not folder.is_dir():
        return
    listing = out.get_obj()
    if listing is None and out.hash_info and not out.changed_checksum():
        return
    written = {"/".join(key) for key, *_ in listing} if isinstance(listing, Tree) else set()
    for parent, _folders, names in os.walk(folder):
        for name in names:
            file = Path(parent, name)
            relative = file.relative_to(folder).as_posix()
            if relative not in written and not out.dvcignore.is_ignored_file(str(file)) and not _cached(out, file):
                yield relative


def _cached(out: Any, file: Path) -> bool:
    """Whether DVC's cache has a file: it is the result of another commit's run, and DVC can bring it back."""
    if not file.is_file():  # a link to nothing, a FIFO
        return False
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "md5").hexdigest()
    return bool(out.cache.exists(digest))


def _move(file: Path, target: Path) -> None:
    """Move a file; if the target exists, to a name with a number."""
    target.parent.mkdir(parents=True, exist_ok=True)
    free, number = target, 1
    while os.path.lexists(free):
        free, number = target.with_name(f"{target.name}.{number}"), number + 1
    shutil.move(file, free)


def _stages(repo: Any, options: Namespace) -> list[Any]:
    """The stages that `dvc repro` may run: its targets, or the whole pipeline."""
    if options.single_item and options.targets and not options.glob:
        return [stage for target in options.targets for stage in repo.stage.collect(target)]
    return list(repo.index.stages)


def main(arguments: list[str]) -> int:
    """Run `dvc repro` with these arguments; returns its exit status."""
    from dvc.cli import DvcParserError, parse_args
    from dvc.cli import main as dvc
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        options = parse_args([*_COMMAND, *arguments])
    except DvcParserError:  # DVC has said what is wrong
        return _USAGE
    with suppress(DvcException), Repo() as repo:  # DVC meets the error again, reports it, and deletes nothing
        if not options.dry:
            move_own_files((out for stage in _stages(repo, options) for out in stage.outs), Path(repo.root_dir))
    return int(dvc([*_COMMAND, *arguments]))


if __name__ == "__main__":
    handler = logging.StreamHandler()  # of this logger alone: DVC has handlers of its own
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
    try:
        status = main(sys.argv[1:])
    except OSError as error:
        logger.error("%s; move your own files out of the output folders, and run the same command again", error)
        status = 1
    except KeyboardInterrupt:
        logger.error("interrupted; run the same command again to continue")
        status = 130
    sys.exit(status)
