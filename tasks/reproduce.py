"""`dvc repro` that keeps files of the user's own: DVC deletes an output folder before its stage runs.

    python -m tasks.reproduce
    python -m tasks.reproduce --single-item calibrate@tlq-w3a16

Takes the options and targets of `dvc repro`. Files that no stage wrote are moved to `kept/` first, with a warning. The
folder is then as its stage left it, so that a file in it does not make the stage run again either. While another
command runs one of the stages or reads its folder, the files stay, and nothing runs.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

#: Where files of the user's own are moved, below the project's folder.
KEPT = Path("kept")

_NAMED = 3  # files that a warning names
_COMMAND = ("--wait-for-lock", "repro")
_USAGE = 254  # DVC's exit status for unknown options
_ERROR = 255  # DVC's exit status after an error

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
    """Files and links in an output's folder, relative to it, that no stage wrote.

    They are neither in DVC's list of the folder nor, with this path and content, in a list of another commit's run.
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
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        for name in [*names, *links]:
            file = Path(parent, name)
            relative = file.relative_to(folder).as_posix()
            if relative in written or out.dvcignore.is_ignored_file(str(file)):
                continue
            if not _is_another_result(out, file, relative):
                yield relative


def _is_another_result(out: Any, file: Path, relative: str) -> bool:
    """Whether a file is the result of another commit's run, which DVC can bring back.

    DVC's cache has its content, and some list in the cache has this content under this path. The content alone could be
    the user's copy of a result under another name, or an empty file.
    """
    if not file.is_file():  # a link to nothing or to a folder, a FIFO
        return False
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "md5").hexdigest()
    return bool(out.cache.exists(digest)) and (relative, digest) in _listed(out.cache)


@cache
def _listed(odb: Any) -> set[tuple[str, str]]:
    """Path and hash of every file in the lists of folders in DVC's cache, which do not say which output they are of."""
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import ObjectFormatError, Tree

    files: set[tuple[str, str]] = set()
    for digest in [each for each in odb.all() if each.endswith(".dir")]:
        with suppress(ObjectFormatError, FileNotFoundError):
            tree = Tree.load(odb, HashInfo(odb.hash_name, digest))
            files.update(("/".join(key), hash_info.value) for key, _meta, hash_info in tree)
    return files


def _move(file: Path, target: Path) -> None:
    """Move a file; if the target exists, to a name with a number. A relative link still leads to the same place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    free, number = target, 1
    while os.path.lexists(free):
        free, number = target.with_name(f"{target.name}.{number}"), number + 1
    if file.is_symlink() and not os.path.isabs(os.readlink(file)):
        free.symlink_to(os.path.relpath(file.parent / os.readlink(file), free.parent))
        file.unlink()
    else:
        shutil.move(file, free)


def _stages(repo: Any, options: Namespace) -> list[Any]:
    """The stages that `dvc repro` may run, planned as it does."""
    from dvc.dvcfile import PROJECT_FILE
    from dvc.repo.reproduce import collect_stages, get_active_graph, plan_repro

    targets = [] if options.all_pipelines else options.targets or [PROJECT_FILE]
    stages = collect_stages(repo, targets, recursive=options.recursive, glob=options.glob)
    if options.single_item and not (options.all_pipelines or options.pipeline):
        return list(stages)
    graph = get_active_graph(repo.index.graph)
    return list(plan_repro(graph, stages, pipeline=options.pipeline, downstream=options.downstream))


@contextmanager
def _writing(repo: Any, outs: Iterable[Any]) -> Iterator[None]:
    """Hold DVC's lock on outputs as the command of their stage does; DVC's own lock must be held.

    Raises:
        LockError: another command runs the stage, or reads its outputs.
    """
    from dvc.rwlock import rwlock

    hardlink = repo.config["core"].get("hardlink_lock", False)
    with rwlock(repo.tmp_dir, repo.fs, " ".join(sys.argv), [], [out.fs_path for out in outs], hardlink):
        yield


def _keep_own_files(options: Namespace) -> None:
    """Move the user's files out of the folders of the stages that `dvc repro` may run.

    Raises:
        LockError: another command is at work in one of the folders. DVC could wait for longer than that command runs,
            and then delete the files.
    """
    from dvc.repo import Repo, lock_repo

    with Repo(_wait_for_lock=True) as repo, lock_repo(repo):
        for stage in _stages(repo, options):
            with _writing(repo, stage.outs):
                move_own_files(stage.outs, Path(repo.root_dir))


def main(arguments: list[str]) -> int:
    """Run `dvc repro` with these arguments; returns its exit status."""
    from dvc.cli import DvcParserError, parse_args
    from dvc.cli import main as dvc
    from dvc.exceptions import DvcException
    from dvc.lock import LockError

    try:
        options = parse_args([*_COMMAND, *arguments])
    except DvcParserError:  # DVC has said what is wrong
        return _USAGE
    if not options.dry:
        try:
            _keep_own_files(options)
        except LockError as error:
            logger.error("%s", error)
            return _ERROR
        except DvcException:  # DVC meets the error again, reports it, and deletes nothing
            pass
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
