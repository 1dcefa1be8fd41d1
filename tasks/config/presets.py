"""Presets: real models, calibration data and benchmarks by name.

    python -m tasks.preset                               lists them
    python -m tasks.preset qwen2-vl-7b sharegpt4v benchmarks   writes them into params.yaml
    python -m tasks.preset demo                          restores the demo, except what other named presets set
    python -m tasks.preset --model OWNER/NAME textvqa-train benchmarks   any model of the hub
    python -m tasks.preset --dataset OWNER/NAME --columns answer=answers

A preset is a file in presets/ with parameters to set and files to fetch from the hub. params.yaml keeps its comments
and layout. Each download is pinned to a commit: the preset's, or the newest one when the preset is applied. A real
model meets demo data or demo benchmarks only if `demo` is named too.
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

from tasks.config.consistency import check_gate, check_served, demo_inputs
from tasks.config.editor import ParamsEditor, round_trip, row
from tasks.config.mistakes import reason_of
from tasks.config.params import PARAMS, ParamsError, parse
from tasks.config.sections import SECTIONS, Download, repo_type
from tlq.runtime.files import write_text

PRESETS = Path("presets")
KINDS = ("model", "calibration", "benchmarks")
DEMO = "demo"

#: A section that describes one source. A preset replaces all its keys, so that no key of another source stays.
_REPLACED = "prepare"


@dataclass(frozen=True)
class Preset:
    """Parameters to set, by section, and entries of section `fetch`, whose revisions may be missing."""

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
    """The presets of these names; `demo` adds the demo preset of each kind that no other name covers.

    Raises:
        ParamsError: a name is unknown.
    """
    known = dict.fromkeys(preset.name for preset in presets)
    for name in names:
        if name not in known:
            raise ParamsError(
                f"unknown preset {name!r}; choose one of {', '.join(known)}, or give a hub id with --model or --dataset"
            )
    chosen = [preset for preset in presets if preset.name in names and preset.name != DEMO]
    if DEMO in names:
        taken = {preset.kind for preset in chosen}
        chosen += [preset for preset in presets if preset.name == DEMO and preset.kind not in taken]
    return chosen


def one_of_each_kind(presets: Sequence[Preset]) -> None:
    """Raise ParamsError if two presets of one kind are named, because one would overwrite the other."""
    for kind in KINDS:
        names = [preset.name for preset in presets if preset.kind == kind]
        if len(names) > 1:
            raise ParamsError(f"{' and '.join(names)} are all {kind} presets; choose one")


def model_of_hub(repo: str) -> Preset:
    """A preset for any model of the hub; it does not change batch sizes and token budget."""
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
    """Entries of section `fetch` in which every revision is a commit.

    Args:
        chosen: commits from the command line, by repository.
        newest: function from a repository's hub id and type to its newest commit.
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
    """The newest commit on branch `main` of a repository.

    Raises:
        ConnectionError: the hub does not answer, or it has no such repository.
    """
    api = HfApi()
    try:
        info = api.model_info(repo) if kind == "model" else api.dataset_info(repo)
    except (OSError, HTTPError) as error:
        raise ConnectionError(
            f"{repo}: the hub does not give its newest commit ({reason_of(error)}); go "
            f"online, correct the hub id, or give the commit: --revision {repo}=COMMIT"
        ) from error
    return str(info.sha)


def applied(text: str, presets: Sequence[Preset], fetched: Mapping[str, Mapping[str, CommentedMap]]) -> str:
    """Apply presets to the ``text`` of a params file, and keep its layout.

    Args:
        fetched: entries of section `fetch`, by kind; they replace all entries of these kinds.
    """
    editor = ParamsEditor(text)
    for preset in presets:
        _apply(preset, editor)
    entries = editor.sections.get("fetch") or {}
    downloads = CommentedMap({key: entry for key, entry in entries.items() if entry["kind"] not in fetched})
    for kind in fetched:
        downloads.update(fetched[kind])
    if not downloads:
        downloads.fa.set_flow_style()
    editor.sections["fetch"] = downloads
    return editor.text


def _apply(preset: Preset, editor: ParamsEditor) -> None:
    """Set a preset's parameters. A preset of benchmarks replaces all floors of the gate, because they name its tasks.

    A params file without section `register` records nothing, and stays without it.
    """
    params = dict(preset.params)
    registered = editor.sections.get("register")
    if registered is None:
        params.pop("register", None)
    elif preset.kind == "benchmarks":
        floors = params.get("register", {}).get("floors", {})
        if registered.get("floors", {}) != floors:
            editor.set("register.floors", row(**floors))
    for section, values in params.items():
        edit = editor.replace if section == _REPLACED else editor.update
        edit(section, values)


def check(text: str) -> None:
    """Raise ParamsError for parameters that a stage would refuse.

    Also for a gate that no version can pass, and for a scheme that the engine to serve with does not run.
    """
    content = yaml.safe_load(text)
    for name, values in content.items():
        if name in SECTIONS:
            parse(name, values, SECTIONS[name])
    check_gate(content)
    check_served(content)


def check_inputs(text: str, presets: Sequence[Preset]) -> None:
    """Raise ParamsError if a real model has inputs of the demo; the message lists the other ``presets``."""
    content = yaml.safe_load(text)
    inputs = demo_inputs(content)
    if inputs:
        choices = [f"{kind} ({names_of(kind, presets)})" for kind in inputs]
        raise ParamsError(
            f"{content['model']['path']} would be {' and '.join(inputs.values())}; also name a preset of "
            f"{' and one of '.join(choices)}, or `demo` to keep the demo's"
        )


def names_of(kind: str, presets: Sequence[Preset]) -> str:
    """Names of the presets of a kind except the demo's: `sharegpt4v or textvqa-train`."""
    return " or ".join(preset.name for preset in presets if preset.kind == kind and preset.name != DEMO)


def changes(before: str, after: str) -> list[str]:
    """One line for every parameter and download that differs."""
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
    parser.add_argument("names", nargs="*", help="presets to apply; without names, all presets are listed")
    parser.add_argument("--model", metavar="OWNER/NAME", help="any model of the hub")
    parser.add_argument("--dataset", metavar="OWNER/NAME", help="any data set of the hub with images and texts")
    parser.add_argument("--split", default="train", help="split of the data set")
    parser.add_argument("--subset", help="subset of a data set that has several")
    parser.add_argument(
        "--columns", nargs="+", default=[], metavar="NAME=COLUMN", help="columns of image, question, answer, id"
    )
    parser.add_argument("--prompt", help="question for every image, if the data set has only captions")
    parser.add_argument("--files", nargs="+", default=[], help="patterns of files to fetch; default: all")
    parser.add_argument("--samples", type=int, default=256, help="number of calibration samples")
    parser.add_argument(
        "--revision", nargs="+", default=[], metavar="OWNER/NAME=COMMIT", help="commits that replace the presets'"
    )
    parser.add_argument("--dry-run", action="store_true", help="only print the changes")
    return parser.parse_args()


def _chosen(arguments: argparse.Namespace, presets: Sequence[Preset]) -> list[Preset]:
    of_hub = []
    if arguments.model:
        of_hub.append(model_of_hub(arguments.model))
    if arguments.dataset:
        of_hub.append(dataset_of_hub(arguments))
    taken = {preset.kind for preset in of_hub}
    found = named(arguments.names, presets)
    chosen = [preset for preset in found if preset.name != DEMO or preset.kind not in taken] + of_hub
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
    if DEMO not in arguments.names:
        check_inputs(after, presets)
    if not arguments.dry_run and after != before:
        write_text(after, PARAMS)
    lines = changes(before, after) or ["nothing changes"]
    sys.stdout.write("\n".join(lines) + "\n")
