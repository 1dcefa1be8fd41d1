"""Bad inputs, attacks and kills: run all of them, and write the page about what came of them.

    make hardening                  runs everything, about 45 minutes on two cores, and writes docs/hardening.md
    make hardening PARTS=kills      one part again, and the page: before, inputs, attacks or kills
    make hardening PARTS=page       the page from the results of earlier runs

Results are tables in ``bench/results``. The part ``before`` tries the bad inputs on the commit before the hardening.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from support.attacks import ATTACKS, ROOT, Attack, outcomes
from support.kill_series import ORPHAN_SECONDS
from support.outcomes import MEMORY, OUTCOMES, RIGHT, SECONDS

#: The last commit before the first one of the hardening, "Sign what agents and ranks write to the job's store".
BEFORE = "88f62d6"
PAGE = ROOT / "docs/hardening.md"
RESULTS = ROOT / "bench/results"


def results(part: str) -> Path:
    return RESULTS / f"hardening-{part}.csv"


# --- the runs


def run_module(module: str, part: str, code: Path = ROOT) -> None:
    """Run a module of tests/support that writes the results of ``part``, on the code in ``code``."""
    path = os.pathsep.join(map(str, (code, ROOT / "tests")))
    command = [sys.executable, "-m", f"support.{module}", str(results(part))]
    subprocess.run(command, cwd=code, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, check=True)


def run_before() -> None:
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", BEFORE], cwd=ROOT, capture_output=True, check=True)
        subprocess.run(["tar", "--extract", "--directory", folder], input=archive.stdout, check=True)
        run_module("outcomes", "before", Path(folder))
    found = pd.read_csv(results("before"), keep_default_na=False)
    absent = found["input"].str.startswith("TLQ_IMAGE_PIXELS=")  # a variable that this commit does not read
    found[~absent].to_csv(results("before"), index=False)


def run_attacks() -> None:
    found = outcomes()
    rows = [(test, *(counts[word] for word in ("passed", "failed", "skipped"))) for test, counts in found.items()]
    pd.DataFrame(rows, columns=["test", "passed", "failed", "skipped"]).to_csv(results("attacks"), index=False)


PARTS = {
    "before": run_before,
    "inputs": lambda: run_module("outcomes", "inputs"),
    "attacks": run_attacks,
    "kills": lambda: run_module("kill_series", "kills"),
    "page": lambda: None,
}


# --- the page


def page() -> str:
    """The page, from the results of all parts."""
    before, now, attacks, kills = (
        pd.read_csv(results(part), keep_default_na=False) for part in ("before", "inputs", "attacks", "kills")
    )
    lines = [
        "# Hardening",
        "",
        "[All pages](README.md)",
        "",
        *_paragraph(
            "`make hardening` tried these bad inputs, attacks and kills, and wrote this page.",
            "[SECURITY.md](../SECURITY.md) says what is trusted.",
        ),
        *_inputs(before, now),
        *_attacks(attacks.set_index("test")),
        *_kills(kills),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _paragraph(*sentences: str) -> list[str]:
    return [*textwrap.wrap(" ".join(sentences), 120, break_long_words=False, break_on_hyphens=False), ""]


def _inputs(before: pd.DataFrame, now: pd.DataFrame) -> Iterator[str]:
    yield from ("## Bad inputs", "")
    yield from _paragraph(
        f"{len(now)} inputs, each given to the stage that meets it, in a project with a tiny model. A right end is an",
        f"error in one line that names the input, within {SECONDS:.0f} seconds (clear error), a warning that names it",
        "(listed), or success where the input may be taken (accepted). A wrong end is an error in other words or in",
        "several lines (poor line), a success that should have been an error (silent), a traceback, no end within",
        f"{2 * SECONDS:.0f} seconds (hang), or that a stranger's code ran. A stage may use {MEMORY >> 30} GiB.",
        f"[{results('inputs').name}](../bench/results/{results('inputs').name}) has every input with its last line.",
    )
    yield from _table(now)
    wrong = now[~now["outcome"].isin(RIGHT)]
    yield from _paragraph("All inputs end right." if wrong.empty else f"{len(wrong)} inputs end wrong:")
    yield from (f"- {row.door}, {row.input}: {row.outcome}" for row in wrong.itertuples())
    yield from ("### Before the hardening", "")
    known = now.merge(before, on=["door", "input"])
    yield from _paragraph(
        f"{len(known)} of these inputs with the code of commit {BEFORE}, before the first change of the hardening. The",
        "others are about parameters and variables that it does not have.",
        "The measure is today's: a line counts as clear if it names what today's line must name.",
        f"[{results('before').name}](../bench/results/{results('before').name}) has every input with its last line.",
    )
    yield from _table(before)


def kind(door: str, name: str) -> str:
    """What an input of a door is counted under: the value of a parameter, the variable, the file, the key."""
    if door == "params.yaml":
        return f"{door}, a value is {name.partition(' is ')[2]}" if " is " in name else f"{door}, the whole file"
    if door == "environment":
        return f"{door}, {name.partition('=')[0]}"
    if door == "processor":
        return name.partition(" is ")[0]
    if door == "config.json":
        key = name.partition(" is ")[0]
        return f"{door}, {key}" if key.endswith("_size") or key.startswith("num_") else door
    return door


def _table(found: pd.DataFrame) -> Iterator[str]:
    """Outcomes by kind, and their sums."""
    kinds = [kind(row.door, row.input) for row in found.itertuples()]
    counts = pd.crosstab(pd.Categorical(kinds, list(dict.fromkeys(kinds))), found["outcome"].to_numpy())
    counts = counts.reindex(columns=list(OUTCOMES), fill_value=0)
    yield f"| input | tried | {' | '.join(OUTCOMES)} |"
    yield "|---" * (len(OUTCOMES) + 2) + "|"
    for name, row in counts.iterrows():
        yield f"| {name} | {row.sum()} | {' | '.join(str(value or '') for value in row)} |"
    yield f"| **all** | **{len(found)}** | {' | '.join(f'**{value}**' for value in counts.sum())} |"
    yield ""


def _attacks(found: pd.DataFrame) -> Iterator[str]:
    yield from ("## Attacks", "")
    yield from _paragraph(
        "Tests carry out each attack, and pass if it is refused. The number is that of their cases, which include some",
        'that must be let through. The column "before" says what was found before the hardening, with the inputs above',
        "or when the attack was first described. It is empty where no outcome is known.",
    )
    yield from ("| aimed at | attack | before | today | tests |", "|---|---|---|---|---|")
    for attack in ATTACKS:
        tests = "<br>".join(f"[{test.partition('::')[2]}](../{test.partition('::')[0]})" for test in attack.tests)
        yield f"| {attack.group} | {attack.words} | {attack.before} | {_refused(attack, found)} | {tests} |"
    yield ""


def _refused(attack: Attack, found: pd.DataFrame) -> str:
    counts = found.loc[list(attack.tests)].sum()
    if counts["failed"]:
        return f"**{counts['failed']} not refused**"
    skipped = f", {counts['skipped']} not tried" if counts["skipped"] else ""
    return f"refused, {counts['passed']}{skipped}" if counts["passed"] else "not tried"


def _kills(found: pd.DataFrame) -> Iterator[str]:
    total = found.sum(numeric_only=True).astype(int)
    yield from ("## Kills", "")
    yield from _paragraph(
        f"One series of {total['kills']} times SIGKILL. A job is killed one to three times, and then the same command",
        "runs it to its end. A kill is placed by time, at a random moment of the job, or by phase: just after a layer",
        "or micro-batch was finished, an answer was written, or a result got its first file, its config or its name.",
        "With two ranks, a kill hits the command's own process, one rank, or all processes at once. The export is the",
        "end of `calibrate`, after the last layer. A job has the same bits if all tensors and tables have the SHA-256",
        "of an undisturbed job on one rank.",
    )
    yield from _paragraph(
        f"{total['same_bits']} of {total['jobs']} jobs have the same bits. {total['lost']} kills lost a finished part",
        f"or a result, {total['leftovers']} temporary files were left, and {total['orphans']} processes lived",
        f"{ORPHAN_SECONDS} seconds after the process that had started them; the longest lived",
        f"{found['longest'].max():.1f} seconds.",
    )
    yield "| killed | ranks | placed by | kills | command | one rank | all | jobs | same bits | lost | left | orphans |"
    yield "|---" * 12 + "|"
    for row in found.itertuples():
        hit = (row.launcher, row.one_rank, row.all_processes) if row.ranks > 1 else ("", "", row.all_processes)
        cells = (row.work, row.ranks, row.placement, row.kills, *hit, row.jobs, row.same_bits)
        yield "| " + " | ".join(map(str, (*cells, row.lost, row.leftovers, row.orphans))) + " |"


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", choices=[[], *PARTS], default=[], help=f"{', '.join(PARTS)}; default: all"
    )
    for part in parser.parse_args().parts or PARTS:
        PARTS[part]()
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
