"""The shipped demo data is what its script makes."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_requests_are_made_by_their_script(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(EXAMPLES / "make_requests.py"), str(tmp_path / "rows.jsonl")], check=True)
    assert (tmp_path / "rows.jsonl").read_text() == (EXAMPLES / "requests.jsonl").read_text()
