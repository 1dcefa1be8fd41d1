"""Presets: real models, calibration data and benchmarks by name.

    python -m tasks.preset                               lists them
    python -m tasks.preset qwen2-vl-7b sharegpt4v        writes them into params.yaml
    python -m tasks.preset demo                          goes back to the demo; with others: where they say nothing
    python -m tasks.preset --model OWNER/NAME            any model of the hub
    python -m tasks.preset --dataset OWNER/NAME --columns answer=answers

A preset is a file in presets/: the parameters that it sets, and what is to be fetched from the hub. params.yaml keeps
its comments and layout. What comes from the hub is pinned to a commit, the preset's or the newest when it is applied.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from ruamel.yaml.comments import CommentedMap

from tasks.config.editor import ParamsEditor, round_trip, row
from tasks.config.mistakes import reason_of
from tasks.config.params import PARAMS, SECTIONS, Download, ParamsError, parse, repo_type
from tlq.runtime.files import write_text

PRESETS = Path("presets")
KINDS = ("model", "calibration", "benchmarks")
DEMO = "demo"

#: A section that describes one source: nothing of another source may stay.
_REPLACED = "prepare"


@dataclass(frozen=True)
class Preset:
    """Parameters to set, by section, and entries of section `fetch`, whose revision may still be open."""

    kind: str
    name: str
    title: str
    params: Mapping[str, Any]
    fetch: Mapping[str, Any]


def available(folder: Path = PRESETS) -> list[Preset]:
    """All presets, by kind and name."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: not found; run from the project's top folder")
    return [_read(kind, path) for kind in KINDS for path in sorted((folder / kind).glob("*.yaml"))]


def _read(kind: str, path: Path) -> Preset:
    text = path.read_text()
    content = round_trip().load(text)
    title = text.splitlines()[0].removeprefix("# ")
    return Preset(kind, path.stem, title, content["params"], content.get("fetch") or {})


def named(names: Sequence[str], presets: Sequence[Preset]) -> list[Preset]:
    """The presets of these names; `demo` is one of each kind that no other name is of.

    Raises:
        ParamsError: there is no preset of a name.
    """
    known = dict.fromkeys(preset.name for preset in presets)
    for name in names:
        if name not in known:
            raise ParamsError(
                f"unknown preset {name!r}; choose of {', '.join(known)}, or give a hub id with --model or --dataset"
            )
    chosen = [preset for preset in presets if preset.name in names and preset.name != DEMO]
    if DEMO in names:
        taken = {preset.kind for preset in chosen}
        chosen += [preset for preset in presets if preset.name == DEMO and preset.kind not in taken]
    return chosen


def one_of_each_kind(presets: Sequence[Preset]) -> None:
    """Raises ParamsError if two presets would write over each other."""
    for kind in KINDS:
        names = [preset.name for preset in presets if preset.kind == kind]
        if len(names) > 1:
            raise ParamsError(f"{' and '.join(names)} are all {kind} presets; choose one")


def model_of_hub(repo: str) -> Preset:
    """A preset for any model of the hub; batch sizes and token budget stay as they are."""
    name = repo.split("/")[-1].lower()
    out = f"data/models/{name}"
    params = {
        "model": row(path=out, dtype="bfloat16"),
        "evaluate": row(dtype="bfloat16"),
        "register": row(model_name=name),
        "report": row(base_model=repo),
    }
    return Preset("model", name, repo, params, {name: CommentedMap(repo=repo, revision=None, out=out)})


def dataset_of_hub(arguments: argparse.Namespace) -> Preset:
    """A preset for any data set of the hub that has a column of images and columns of text."""
    repo, columns = arguments.dataset, _pairs(arguments.columns, "--columns")
    name = repo.split("/")[-1].lower()
    out = f"data/calibration/{name}"
    prepare = CommentedMap(kind="hub", path=out, split=arguments.split)
    if arguments.subset is not None:
        prepare["name"] = arguments.subset
    if columns:
        prepare["columns"] = row(**columns)
    if arguments.prompt is not None:
        prepare["prompt"] = arguments.prompt
    prepare.update(samples=arguments.samples, seed=0)
    entry = CommentedMap(repo=repo, revision=None, out=out)
    if arguments.files:
        entry["files"] = arguments.files
    params = {"prepare": prepare, "importance": row(samples=arguments.samples)}
    return Preset("calibration", name, repo, params, {name: entry})


def pin(preset: Preset, chosen: Mapping[str, str], newest: Callable[[str, str], str]) -> dict[str, CommentedMap]:
    """Entries of section `fetch` with every revision a commit.

    Args:
        chosen: commits that the user names, by repository.
        newest: gives the newest commit of a repository, from its hub id and type.
    """
    entries = {}
    for key, values in preset.fetch.items():
        entry = CommentedMap(kind=preset.kind, **values)
        known = chosen.get(entry["repo"]) or entry["revision"]
        entry["revision"] = known or newest(entry["repo"], repo_type(preset.kind))
        parse(f"fetch.{key}", dict(entry), Download)
        entries[key] = entry
    return entries


def newest_commit(repo: str, kind: str) -> str:
    """The commit that branch `main` of a repository is at now.

    Raises:
        ConnectionError: the hub cannot be asked, or it has no such repository.
    """
    api = HfApi()
    try:
        info = api.model_info(repo) if kind == "model" else api.dataset_info(repo)
    except (OSError, HTTPError) as error:
        raise ConnectionError(
            f"{repo}: the hub cannot be asked for its newest commit ({reason_of(error)}); go "
            f"online or correct the hub id, or name the commit yourself: --revision {repo}=COMMIT"
        ) from error
    return str(info.sha)


def applied(text: str, presets: Sequence[Preset], fetched: Mapping[str, Mapping[str, CommentedMap]]) -> str:
    """``text`` of a params file with presets written into it, in the same layout.

    Args:
        fetched: entries of section `fetch`, by kind; those of the same kinds go.
    """
    editor = ParamsEditor(text)
    for preset in presets:
        for section, values in preset.params.items():
            edit = editor.replace if section == _REPLACED else editor.update
            edit(section, values)
    entries = editor.sections.get("fetch") or {}
    downloads = CommentedMap({key: entry for key, entry in entries.items() if entry["kind"] not in fetched})
    for kind in fetched:
        downloads.update(fetched[kind])
    if not downloads:
        downloads.fa.set_flow_style()
    editor.sections["fetch"] = downloads
    return editor.text


def check(text: str) -> None:
    """Raises ParamsError for what a stage would refuse."""
    for name, values in yaml.safe_load(text).items():
        if name in SECTIONS:
            parse(name, values, SECTIONS[name])


def changes(before: str, after: str) -> list[str]:
    """Every parameter that differs, and every download, one line each."""
    old, new = (dict(_flat(yaml.safe_load(text))) for text in (before, after))
    lines = []
    for key in dict.fromkeys([*old, *new]):
        if key not in new:
            lines.append(f"{key}: {old[key]} (removed)")
        elif key not in old:
            lines.append(f"{key}: {new[key]} (new)")
        elif old[key] != new[key]:
            lines.append(f"{key}: {old[key]} -> {new[key]}")
    return lines


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and short texts of values."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if prefix == "fetch.":
            yield name, f"{value['repo']} at {value['revision'][:12]} into {value['out']}"
        elif name == "evaluate.benchmarks":
            yield name, ", ".join(source["task"] for source in value)
        elif isinstance(value, dict):
            yield from _flat(value, f"{name}.")
        else:
            yield name, "null" if value is None else str(value)


def _pairs(words: Sequence[str], what: str) -> dict[str, str]:
    pairs = {}
    for word in words:
        key, found, value = word.partition("=")
        if not (key and found and value):
            raise ParamsError(f"{what} {word!r}: must be NAME=VALUE")
        pairs[key] = value
    return pairs


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="presets to apply; none: list them")
    parser.add_argument("--model", metavar="OWNER/NAME", help="any model of the hub")
    parser.add_argument("--dataset", metavar="OWNER/NAME", help="any data set of the hub with images and texts")
    parser.add_argument("--split", default="train", help="of the data set")
    parser.add_argument("--subset", help="of the data set, where it has several")
    parser.add_argument(
        "--columns", nargs="+", default=[], metavar="NAME=COLUMN", help="of image, question, answer, id"
    )
    parser.add_argument("--prompt", help="question asked of every image, where the data set has captions only")
    parser.add_argument("--files", nargs="+", default=[], help="patterns: fetch these files of the data set only")
    parser.add_argument("--samples", type=int, default=256, help="of the data set")
    parser.add_argument(
        "--revision", nargs="+", default=[], metavar="OWNER/NAME=COMMIT", help="instead of the preset's"
    )
    parser.add_argument("--dry-run", action="store_true", help="only show what would change")
    return parser.parse_args()


def _chosen(arguments: argparse.Namespace, presets: Sequence[Preset]) -> list[Preset]:
    chosen = named(arguments.names, presets)
    if arguments.model:
        chosen.append(model_of_hub(arguments.model))
    if arguments.dataset:
        chosen.append(dataset_of_hub(arguments))
    one_of_each_kind(chosen)
    return chosen


def main() -> None:
    arguments = _arguments()
    presets = available()
    chosen = _chosen(arguments, presets)
    if not chosen:
        lines = [f"{preset.kind:12} {preset.name:22} {preset.title}" for preset in presets]
        sys.stdout.write("\n".join(lines) + "\n")
        return
    commits = _pairs(arguments.revision, "--revision")
    fetched = {preset.kind: pin(preset, commits, newest_commit) for preset in chosen}
    before = PARAMS.read_text()
    after = applied(before, chosen, fetched)
    check(after)
    if not arguments.dry_run and after != before:
        write_text(after, PARAMS)
    lines = changes(before, after) or ["nothing changes"]
    sys.stdout.write("\n".join(lines) + "\n")
