"""Stage `fetch`: download a model or data set of the Hugging Face hub, at one commit, into a folder.

    python -m tasks.stages.fetch --kind model --repo OWNER/NAME --revision COMMIT --out data/models/NAME

Every entry of section `fetch` of params.yaml is a stage of its own; `python -m tasks.preset` writes the entries. An
interrupted download continues. A model of an unsupported family is refused before its weights are downloaded.
"""

from __future__ import annotations

import logging
import shutil
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError

from tasks.command import command_line
from tasks.config.mistakes import reason_of
from tasks.config.params import parse
from tasks.config.sections import Download
from tlq.models.checkpoint import read_config
from tlq.runtime.files import new_directory

logger = logging.getLogger("tlq.fetch")

#: Files of a model's repository that calibration, evaluation and the model cards read.
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "README.md")


def fetch(download: Download) -> None:
    """Download the files into a folder next to ``out``, then rename that folder to ``out``.

    Raises:
        ValueError: the model's family is not supported.
        OSError: the hub does not answer, it has no such repository, commit or file, or the disk is too small.
    """
    out = Path(download.out)
    partial = out.with_name(f".{out.name}-{download.revision[:12]}.partial")
    if download.kind == "model":
        _load(download, partial, ["config.json"])
        read_config(partial)
    wanted = list(download.files or (MODEL_FILES if download.kind == "model" else ("*",)))
    _refuse_small_disk(_load(download, partial, wanted, dry_run=True), download, partial)
    _load(download, partial, wanted)
    shutil.rmtree(partial / ".cache", ignore_errors=True)  # it holds times, which would change DVC's hash
    with new_directory(out) as folder:
        partial.replace(folder)


def _load(download: Download, folder: Path, files: Sequence[str], dry_run: bool = False) -> Any:
    """Download files of the repository into ``folder``; with ``dry_run``, return their list with sizes."""
    try:
        return snapshot_download(
            download.repo,
            repo_type=download.repo_type,
            revision=download.revision,
            local_dir=folder,
            allow_patterns=list(files),
            dry_run=dry_run,
        )
    except (OSError, HTTPError) as error:
        raise OSError(
            f"{download.repo} at {download.revision[:12]} cannot be downloaded ({reason_of(error)}); check the hub id, "
            "the commit, the network and, for a gated repository, `hf auth login`; the same command continues"
        ) from error


def _refuse_small_disk(files: Sequence[Any], download: Download, folder: Path) -> None:
    if not files:
        raise FileNotFoundError(
            f"{download.repo} at {download.revision[:12]}: no file matches {', '.join(download.files or MODEL_FILES)}; "
            "correct fetch.<name>.files in params.yaml"
        )
    needed = sum(file.file_size or 0 for file in files if file.will_download)
    existing = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise OSError(f"{existing}: {needed / 2**30:.1f} GiB are to be downloaded, {free / 2**30:.1f} GiB are free")
    logger.info("%s: %d files, %.2f GiB to download", download.repo, len(files), needed / 2**30)


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--kind", required=True, choices=("model", "calibration", "benchmarks"))
    parser.add_argument("--repo", required=True, help="hub id, OWNER/NAME")
    parser.add_argument("--revision", required=True, help="commit, 40 hexadecimal digits")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--files", nargs="+", help="patterns of the files to download")


def main(**entry: Any) -> None:
    """Download an entry of section `fetch`; its values are the options."""
    download = parse("fetch", entry, Download)
    fetch(download)
    logger.info("%s is in %s", download.repo, download.out)


if __name__ == "__main__":
    command_line(main, __doc__, add_options)
