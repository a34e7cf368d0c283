import dataclasses
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import api_reference
import configuration_reference
import docs_check
import pytest
import yaml

import trl_learnalign
import trl_learnalign.report
from trl_learnalign import version

ROOT = Path(__file__).parent.parent


def test_the_reference_of_settings_is_current():
    assert configuration_reference.PAGE.read_text() == configuration_reference.page(), (
        "run make docs"
    )


def test_every_setting_of_the_selection_has_an_entry():
    from trl_learnalign import LearnAlignConfig

    page = configuration_reference.PAGE.read_text()
    for name in (field.name for field in dataclasses.fields(LearnAlignConfig)):
        assert f"**`{name}`**" in page


def test_settings_that_most_runs_decide_come_first_with_when_to_change_them():
    page = configuration_reference.PAGE.read_text()
    opening, _ = page.split("\n## ", 1)
    rows = dict(re.findall(r"^\| \[`(\w+)`\]\(#\w+\) \| (.+) \|$", opening, re.MULTILINE))
    assert {"stages", "order", "selector", "completions_per_step"} <= set(rows)
    assert 8 <= len(rows) <= 10
    for name in rows:
        assert page.count(f'<a id="{name}"></a>**`{name}`**') == 1


def test_the_api_page_is_current():
    assert api_reference.PAGE.read_text() == api_reference.page(), "run make docs"


def test_every_public_name_is_on_the_api_page():
    page = api_reference.PAGE.read_text()
    for name in (*trl_learnalign.__all__, *trl_learnalign.report.__all__):
        assert f"\n### {name}\n" in page
        assert f"[`{name}`](#{name.lower()})" in page


def test_the_api_page_names_every_argument_and_links_to_its_own_headings():
    page = api_reference.PAGE.read_text()
    headings = {heading.lower() for heading in re.findall(r"^### (\w+)$", page, re.MULTILINE)}
    assert set(re.findall(r"\]\(#(\w+)\)", page)) <= headings
    callback = page.split("\n### LearnAlignCallback\n")[1].split("\n### ")[0]
    for name in (*inspect.signature(trl_learnalign.LearnAlignCallback).parameters, "stage"):
        assert f"- **`{name}`** (" in callback
    assert "LearnAlignCallback.table(stage)" in callback


def test_a_docstring_in_another_form_is_refused():
    with pytest.raises(ValueError, match="'size in bytes' is not of the form"):
        api_reference.argument("size in bytes")


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
)
def test_code_blocks_compile(page):
    for line, text in docs_check.code_blocks(ROOT / page):
        compile(text, f"{page}:{line}", "exec")


PAGE = """# A page

    make nothing        # no such target
    not a command

<!-- docs-check: run -->

    accelerate launch --no_such_option 1 \\
        recipes/gsm8k_staged.py --stages 0.5

Text ends a mark.

    python benchmarks/missing.py
    trl-learnalign plan --pool_size 10

```bash
make test
```

```python
x = (
```

[dead](nowhere.md) [alive](page.md#a-page) [here](#a-page) [no part](page.md#part) [far](https://example.org#x)
"""


@pytest.fixture
def page(tmp_path):
    (tmp_path / "page.md").write_text(PAGE)
    return tmp_path / "page.md"


def test_commands_are_found_with_their_marks(page):
    found = [
        (command.line, command.text, command.mark, command.runs)
        for command in docs_check.commands(page)
    ]
    assert found == [
        (3, "make nothing", None, False),
        (
            8,
            "accelerate launch --no_such_option 1 recipes/gsm8k_staged.py --stages 0.5",
            "run",
            True,
        ),
        (13, "python benchmarks/missing.py", None, False),
        (14, "trl-learnalign plan --pool_size 10", None, True),
        (17, "make test", None, False),
    ]


def test_wrong_commands_links_and_code_are_found(page):
    commands = list(docs_check.commands(page))
    assert docs_check.problem_with(commands[0]) == "no such target: ['nothing']"
    assert "has no --no_such_option" in docs_check.problem_with(commands[1])
    assert docs_check.problem_with(commands[2]) == "benchmarks/missing.py does not exist"
    assert docs_check.problem_with(commands[4]) is None
    assert docs_check.dead_links(page) == ["nowhere.md", "page.md#part"]
    ((_, text),) = docs_check.code_blocks(page)
    with pytest.raises(SyntaxError):
        compile(text, "page", "exec")


MADE = """make[1]: Entering directory '/home/me/trl-learnalign'
python3 -m venv .venv
.venv/bin/accelerate launch recipes/gsm8k_staged.py
make[1]: Leaving directory '/home/me/trl-learnalign'
"""


def test_what_make_says_about_itself_is_no_command():
    assert docs_check.recipe_line(MADE) == "accelerate launch recipes/gsm8k_staged.py"
    assert (
        docs_check.recipe_line(MADE.replace("[1]", ""))
        == "accelerate launch recipes/gsm8k_staged.py"
    )


def test_a_target_is_run_also_if_make_started_the_check(monkeypatch, tmp_path):
    for name, value in {
        "MAKEFLAGS": "w",
        "MAKELEVEL": "1",
        "MFLAGS": "-w",
    }.items():  # as make sets them
        monkeypatch.setenv(name, value)
    ran = []

    start = subprocess.run

    def note(command, **options):
        if not options.get("shell"):
            return start(command, **options)
        ran.append((command, options.get("timeout")))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", note)
    command = docs_check.Command(tmp_path, 1, "make quickstart", None)
    assert docs_check.problem_with(command) is None
    assert docs_check.run(command, tmp_path) is None
    ((text, timeout),) = ran
    assert "accelerate launch" in text
    assert text.endswith("recipes/quickstart.py")
    assert timeout is None  # others may use the machine


def exactness_page():
    """The script; its name is also that of the tests' helper."""
    path = ROOT / "scripts" / "exactness.py"
    spec = importlib.util.spec_from_file_location("exactness_page", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exactness_case(name, status="exact", error=1e-7, note="", **other):
    empty = {"direct": [], "missing": [], "alone": False, "equal_lengths": False}
    case = f"architecture/{name}"
    return {"case": case, "status": status, "error": error, "note": note, **empty, **other}


def test_the_exactness_page_names_every_case_once_with_the_largest_error_of_its_kind():
    page = exactness_page()
    lines = [
        exactness_case("ape"),
        exactness_case("bee", error=3e-6),
        exactness_case("cat", alone=True, equal_lengths=True),
        exactness_case("dog", "direct", direct=["layers.0.scale"]),
        exactness_case("elk", "missing", missing=["layers.0.scale"]),
        exactness_case("fox", "refused", note="no gradient"),
        exactness_case("gnu", "refused", note="no gradient"),
        exactness_case("hen", "refused", note="no gradient"),
        exactness_case("jay", "crash", note="out of memory"),
    ]
    table, rest = page.group_table(lines), page.lists(lines)
    for name in ("ape", "bee", "cat", "dog", "elk"):
        assert len(re.findall(rf"\b{name}\b", table)) == 1
    assert "| 2 | 3e-06 | ape; bee |" in table
    assert "| 1 | 1e-07 | cat\\* |" in table
    assert "elk (`layers.scale`)" in table
    assert "- 3 cases, as architecture/fox: no gradient" in rest
    assert "- architecture/jay: out of memory" in rest


@pytest.mark.slow
def test_every_command_of_the_docs_can_be_meant():
    done = subprocess.run(
        [sys.executable, "scripts/docs_check.py", "--no-run"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


# ---- whom to cite ---------------------------------------------------------------------------------------------------


def test_readme_citation_file_and_model_card_cite_the_same_paper():
    readme = re.search(r"```bibtex\n(.*?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert readme == version.BIBTEX
    fields = dict(re.findall(r"^  (\w+)\s+= \{(.*?)\},?$", readme, re.MULTILINE | re.DOTALL))
    (paper,) = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    authors = [f"{person['family-names']}, {person['given-names']}" for person in paper["authors"]]
    assert re.split(r"\s+and\s+", fields["author"]) == authors
    assert len(authors) == 10
    assert fields["title"] == paper["title"]
    assert fields["booktitle"] == paper["collection-title"]
    assert fields["pages"] == f"{paper['start']}--{paper['end']}" == "40417--40434"
    assert fields["year"] == str(paper["year"])
    assert fields["url"] == paper["url"] == "https://aclanthology.org/2026.findings-acl.2009"
    assert paper["identifiers"] == [{"type": "other", "value": f"arXiv:{version.ARXIV}"}]
