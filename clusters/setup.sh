#!/usr/bin/env bash
# Sets up a node: Python 3.11, raylora with the pinned packages, and a shell that finds them.
# The cluster files run it on every node; where nothing has changed, it is done in a second.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# the same minor version on all nodes, since Ray passes pickled functions between them
version=3.11
export PATH="$HOME/.local/bin:$PATH"
python=$(command -v "python$version" || true)
if [ -z "$python" ]; then
    command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    uv python install "$version"
    python=$(uv python find "$version")
fi

if [ ! -x .venv/bin/ray ] || [ pyproject.toml -nt .venv/ready ] || [ constraints.txt -nt .venv/ready ]; then
    "$python" -m venv .venv
    .venv/bin/pip install --quiet --constraint constraints.txt --editable .
    touch .venv/ready
fi

# Ray's processes and every shell get these: token authentication, our Python, and a place for bases
line="export RAY_AUTH_MODE=token PATH=$PWD/.venv/bin:\$PATH HF_HOME=${RAYLORA_HF_HOME:-$HOME/.cache/huggingface}"
grep -qxF "$line" ~/.bashrc 2>/dev/null || echo "$line" >>~/.bashrc
