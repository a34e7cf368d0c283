import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import configuration_reference  # noqa: E402
import docs_check  # noqa: E402


def test_the_reference_of_settings_is_current():
    assert configuration_reference.PAGE.read_text() == configuration_reference.page(), "run make docs"


def test_every_setting_of_the_selection_has_an_entry():
    from trl_learnalign import LearnAlignConfig

    page = configuration_reference.PAGE.read_text()
    for name in LearnAlignConfig.__dataclass_fields__:
        assert f"**`{name}`**" in page


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
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

[dead](nowhere.md) [alive](page.md#part) [far](https://example.org)
"""


@pytest.fixture
def page(tmp_path):
    (tmp_path / "page.md").write_text(PAGE)
    return tmp_path / "page.md"


def test_commands_are_found_with_their_marks(page):
    found = [(command.line, command.text, command.mark, command.runs) for command in docs_check.commands(page)]
    assert found == [
        (3, "make nothing", None, False),
        (8, "accelerate launch --no_such_option 1 recipes/gsm8k_staged.py --stages 0.5", "run", True),
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
    assert docs_check.dead_links(page) == ["nowhere.md"]
    ((_, text),) = docs_check.code_blocks(page)
    with pytest.raises(SyntaxError):
        compile(text, "page", "exec")


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
