"""Run the commands of README and docs, and check their arguments, code blocks and links.

    python scripts/docs_check.py              # some minutes on two CPU cores, no network
    python scripts/docs_check.py --no-run     # only parse
    python scripts/docs_check.py docs/cost.md  # only some pages

Commands are the lines of indented and of `bash` blocks. They run in a copy of the checkout with a tiny model in FOLDER
and problems in train.jsonl, so they leave nothing behind. A comment before a block decides: `<!-- docs-check: run -->`
or `<!-- docs-check: parse -->`. Without one, `make quickstart` and the `trl-learnalign` commands that need no GPU run,
and everything else is parsed: the program, the files and every option that a command names must exist.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROGRAMS = (
    "make",
    "pip",
    "accelerate",
    "torchrun",
    "python",
    "trl-learnalign",
    "apt-get",
    "pytest",
)
RUN = (
    "make quickstart",
    "trl-learnalign plan",
    "trl-learnalign report",
    "trl-learnalign compare",
    "trl-learnalign --",
)
COPIED = (
    "recipes",
    "accelerate_configs",
    "benchmarks",
    "tests",
    "scripts",
    "Makefile",
    "pyproject.toml",
)


@dataclass(frozen=True)
class Command:
    """A command of a page.

    Args:
        page (`Path`): The page.
        line (`int`): Where it stands.
        text (`str`): The command, on one line.
        mark (`str`, *optional*): `"run"` or `"parse"`, if the page says so.
    """

    page: Path
    line: int
    text: str
    mark: str | None

    @property
    def runs(self) -> bool:
        """Whether it is run rather than parsed."""
        return self.mark == "run" or (self.mark is None and self.text.startswith(RUN))


# ---- Reading pages --------------------------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[Command]:
    """The commands of a page, continued lines joined and comments cut off."""
    mark, fence, whole, start = None, None, "", 0
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if found := re.match(r"<!-- docs-check: (run|parse) -->", line):
            mark = found[1]
        elif line.startswith("```"):
            fence = line[3:] or "text" if fence is None else None
            mark = mark if fence else None
        elif fence not in (None, "bash", "sh") or (fence is None and not line.startswith("    ")):
            mark = mark if fence or not line.strip() else None
        elif line.strip():
            start = start or number
            whole += re.sub(r"\s+# .*$", "", line.strip())
            if whole.endswith("\\"):
                whole = whole[:-1].rstrip() + " "
                continue
            if (
                whole.removeprefix("$ ").split()[:1]
                and whole.removeprefix("$ ").split()[0] in PROGRAMS
            ):
                yield Command(page, start, whole.removeprefix("$ "), mark)
            whole, start = "", 0


def code_blocks(page: Path) -> Iterator[tuple[int, str]]:
    """Python blocks, and the new side of diffs."""
    for block in re.finditer(
        r"^```(python|diff)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL
    ):
        line = page.read_text()[: block.start()].count("\n") + 1
        text = block[2]
        if block[1] == "diff":
            text = "\n".join(part[1:] for part in text.splitlines() if not part.startswith("-"))
        yield line, text


def dead_links(page: Path) -> list[str]:
    """Relative links that lead nowhere: to no file, or to no heading of a page."""
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    return [link for link in links if "://" not in link and not leads_somewhere(page, link)]


def leads_somewhere(page: Path, link: str) -> bool:
    """Whether a relative link's file is there, and its heading."""
    name, _, anchor = link.partition("#")
    target = page.parent / name if name else page
    if not target.exists():
        return False
    return not anchor or target.suffix != ".md" or anchor in anchors(target)


def anchors(page: Path) -> set[str]:
    """What links into a page may name: its headings as GitHub spells them, and marks of its own."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    marks = set(re.findall(r'<a id="([^"]+)">', text))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return marks | {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings
    }


# ---- Parsing commands -----------------------------------------------------------------------------------------------


@functools.cache
def help_of(*command: str) -> str:
    """What a program prints with `--help`."""
    done = subprocess.run(
        [*command, "--help"], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    return done.stdout + done.stderr if done.returncode == 0 else ""


def environment() -> dict[str, str]:
    """Programs of this interpreter first; no network."""
    own = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    own["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{own['PATH']}"
    return own | {"OMP_NUM_THREADS": own.get("OMP_NUM_THREADS", "1"), "COLUMNS": "120"}


def dry_make(target: str) -> subprocess.CompletedProcess[str]:
    """What make would run for a target; this script may itself have been started by make."""
    inherited = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    own = {name: value for name, value in os.environ.items() if name not in inherited}
    return subprocess.run(["make", "-n", target], cwd=ROOT, env=own, capture_output=True, text=True)


def recipe_line(printed: str) -> str:
    """The last command of `make -n`, which comes after those that set the environment up."""
    lines = [line for line in printed.splitlines() if not re.match(r"make(\[\d+\])?: ", line)]
    return lines[-1].replace(".venv/bin/", "")


def problem_with(command: Command) -> str | None:
    """Why a command could not be meant, or `None`."""
    words = [word for word in shlex.split(command.text) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    program, rest = words[0], words[1:]
    if program == "make":
        unknown = [word for word in rest if dry_make(word).returncode]
        return f"no such target: {unknown}" if unknown else None
    if program == "pip":
        return _missing_extras(rest)
    if program in ("apt-get", "pytest"):
        return None
    if program == "trl-learnalign":
        return (
            _unknown_options((program, *rest[:1]), rest[1:])
            if rest and not rest[0].startswith("-")
            else None
        )
    script = next(
        (i for i, word in enumerate(rest) if word.endswith(".py") or word in ("-m", "--module")),
        None,
    )
    if script is None:
        return f"no script in {command.text!r}"
    launcher = [word for word in (program, *rest[: 1 if program == "accelerate" else 0])]
    problem = _unknown_options(tuple(launcher), rest[:script]) if program != "python" else None
    if rest[script].endswith(".py"):
        if not (ROOT / rest[script]).exists():
            return f"{rest[script]} does not exist"
        return problem or _unknown_options((sys.executable, rest[script]), rest[script + 1 :])
    return problem


def _unknown_options(program: tuple[str, ...], words: list[str]) -> str | None:
    options = [word.split("=")[0] for word in words if word.startswith("--")]
    known = help_of(*program)
    if not known:
        return f"{' '.join(program)} --help fails"
    unknown = [option for option in options if not re.search(rf"{re.escape(option)}\b", known)]
    # Commands of the settings take all of them; theirs are listed by the recipe.
    if unknown and program[0] == "trl-learnalign":
        known = help_of(sys.executable, "recipes/gsm8k_staged.py")
        unknown = [option for option in unknown if not re.search(rf"{re.escape(option)}\b", known)]
    missing = [
        word
        for word in words
        if re.match(r"(recipes|accelerate_configs)/", word) and not (ROOT / word).exists()
    ]
    if missing:
        return f"{missing} do not exist"
    return f"{' '.join(program)} has no {', '.join(unknown)}" if unknown else None


def _missing_extras(words: list[str]) -> str | None:
    text = (ROOT / "pyproject.toml").read_text()
    for word in words:
        if found := re.search(r"trl-learnalign\[([\w,]+)\]", word):
            missing = [
                extra
                for extra in found[1].split(",")
                if not re.search(rf"^{extra} = \[", text, re.MULTILINE)
            ]
            if missing:
                return f"no such extra: {missing}"
        if word.endswith(".txt") and not (ROOT / word).exists():
            return f"{word} does not exist"
    return None


# ---- Running commands -----------------------------------------------------------------------------------------------


def workplace(folder: Path) -> None:
    """A copy of the checkout's files with a model in FOLDER and problems in train.jsonl."""
    for name in COPIED:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    if (ROOT / "outputs" / "toy").is_dir():  # made by an earlier quickstart; else it is made now
        shutil.copytree(ROOT / "outputs" / "toy", folder / "outputs" / "toy")
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    import cases
    import question_files

    cases.model(max_position_embeddings=512).save_pretrained(folder / "FOLDER")
    cases.tokenizer().save_pretrained(folder / "FOLDER")
    rows = question_files.questions(40)
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))


def run(command: Command, folder: Path) -> str | None:
    """Run a command; why it failed, or `None`."""
    text = command.text
    if text.startswith("make "):  # the same command, in this environment rather than a new one
        text = recipe_line(dry_make(text.split()[1]).stdout)
    # No time limit: how long a command takes says nothing about it where others use the machine.
    done = subprocess.run(
        text, shell=True, cwd=folder, env=environment(), capture_output=True, text=True
    )
    return (
        None
        if done.returncode == 0
        else f"ended with {done.returncode}:\n{done.stdout[-1500:]}{done.stderr[-3000:]}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "pages",
        nargs="*",
        type=Path,
        help="default: README.md, CONTRIBUTING.md, docs/*.md, docs/results/*.md",
    )
    parser.add_argument("--no-run", action="store_true", help="parse, run nothing")
    given = parser.parse_args()
    pages = [page.resolve() for page in given.pages]
    pages = pages or [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "docs" / "results").glob("*.md")),
    ]
    problems: list[str] = []
    counts = {"run": 0, "parsed": 0, "code": 0}
    done: set[str] = set()  # what several pages say is run once
    with tempfile.TemporaryDirectory(prefix="docs-check-") as name:
        folder = Path(name)
        if not given.no_run:
            workplace(folder)
        for page in pages:
            place = page.relative_to(ROOT)
            problems += [f"{place}: {link} leads nowhere" for link in dead_links(page)]
            for line, text in code_blocks(page):
                counts["code"] += 1
                try:
                    compile(text, f"{place}:{line}", "exec")
                except SyntaxError as error:
                    problems.append(f"{place}:{line}: {error}")
            for command in commands(page):
                running = command.runs and not given.no_run and command.text not in done
                done |= {command.text} if running else set()
                counts["run" if running else "parsed"] += 1
                print(
                    f"{'run   ' if running else 'parsed'} {place}:{command.line}: {command.text}",
                    flush=True,
                )
                problem = problem_with(command) or (run(command, folder) if running else None)
                if problem:
                    problems.append(f"{place}:{command.line}: {command.text}\n    {problem}")
    print("\n".join(["", *problems]))
    print(
        f"{counts['run']} commands run, {counts['parsed']} parsed, {counts['code']} code blocks compiled; "
        f"{len(problems)} problem(s)"
    )
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
