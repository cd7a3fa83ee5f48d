"""Every command and path that the README shows exists and is accepted."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from ray.scripts.scripts import cli as ray_cli
from typer.testing import CliRunner

from raylora.cli.app import app
from raylora.cli.command import parse_overrides
from raylora.config.load import build_merge_config, load_config
from raylora.config.schema import SearchConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


def check_raylora(command: list[str]) -> None:
    """The module is a command, its options exist, and the overrides fit the search space file."""
    module, *arguments = command
    name = module.removeprefix("raylora.")
    help_text = re.sub(r"\x1b\[[0-9;]*m", "", CliRunner().invoke(app, [name, "--help"]).output)
    overrides, options, rest = [], {}, list(arguments)
    space = "search_spaces/qlora.yaml"
    while rest:
        argument = rest.pop(0)
        if argument in {"--resume", "--dry-run"}:
            assert argument in help_text
        elif argument.startswith("--") and "." not in argument and argument[2:] not in SearchConfig.model_fields:
            assert argument in help_text
            options[argument] = rest.pop(0)
        elif argument.startswith("--"):
            overrides += [argument, rest.pop(0)]
        elif name in {"search", "trial"}:
            space = argument
    if name == "merge":
        build_merge_config(options.get("--base", "any"), parse_overrides(overrides))
        return
    if name == "trial":
        overrides += ["--starting_points", "[]"]  # as the command does for a changed space
    load_config(ROOT / space, parse_overrides(overrides))


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_accepted(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)
    if words[0] == "make":
        subprocess.run(["make", "--dry-run", *words[1:]], check=True, capture_output=True)
    elif words[:2] == ["python", "-m"]:
        check_raylora(words[2:])
    else:
        assert words[0] == "ray"
        assert words[1] in ray_cli.commands
        inner = re.search(r"python -m (raylora\S*.*?)'", line)
        if inner:
            check_raylora(shlex.split(inner.group(1)))


def test_the_tree_matches_the_files() -> None:
    tree = README.split("## What is where")[1].split("```")[1]
    inside = re.findall(r"^  (\S+) ", tree, re.MULTILINE)
    modules = [path.name for path in (ROOT / "raylora").glob("*.py") if path.name != "__init__.py"]
    folders = [f"{path.parent.relative_to(ROOT / 'raylora')}/" for path in (ROOT / "raylora").rglob("*/__init__.py")]
    assert sorted(inside) == sorted(modules + folders)
    for path in re.findall(r"^(\S+)/? ", tree, re.MULTILINE):
        assert (ROOT / path).exists()


def test_the_yaml_is_a_search_space(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(block)
    assert load_config(tmp_path / "mine.yaml").n_trials() == 27


def test_every_link_leads_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_no_placeholder_is_left() -> None:
    for page in (README, *((ROOT / "docs" / name).read_text() for name in ("design.md", "search.md"))):
        assert not re.search(r"<!--|^[A-Z]+_[A-Z_]+$", page, re.MULTILINE)
