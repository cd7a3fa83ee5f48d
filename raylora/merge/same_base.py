"""Checks that an adapter is merged into the base that it was trained on: by fingerprint, else by name."""

import json
import re
from pathlib import Path

from peft.utils import CONFIG_NAME

from raylora.base.checkpoint_io import fingerprint
from raylora.base.locate import is_hub_id
from raylora.config.schema import BaseModelSection
from raylora.errors import MergeError, first_line
from raylora.run.atomic import read_json, write_json

BASE_FILE = "base.json"
"""File beside an adapter of raylora with the name, revision and fingerprint of its base."""

_QUANTIZED = re.compile(r"(-unsloth)?-bnb-4bit$|-gguf$")
"""End of a Hub id that names a quantized copy of a base."""


def write_base_file(adapter: Path, base: BaseModelSection, checkpoint: str) -> None:
    """Write beside an adapter which base it was trained on.

    Args:
        adapter: directory of the adapter.
        base: the base model.
        checkpoint: directory or Hub id of the base.
    """
    values = {"name": base.name, "revision": base.revision, "fingerprint": fingerprint(checkpoint, base.revision)}
    write_json(adapter / BASE_FILE, values)


def check_same_base(adapter: Path, base: BaseModelSection, checkpoint: str) -> None:
    """Check that an adapter was trained on a base.

    An adapter of raylora is told by the fingerprint of its base. For another one, the names are compared if both are
    Hub ids: without the owner, and without the endings of quantized copies such as Unsloth's.

    Raises:
        MergeError: it was trained on another base.
    """
    if (adapter / BASE_FILE).is_file():
        trained, found = read_json(adapter / BASE_FILE), fingerprint(checkpoint, base.revision)
        if trained["fingerprint"] != found:
            raise MergeError(
                f"{adapter} was trained on {trained['name']} (fingerprint {trained['fingerprint']}), and {base.name} "
                f"has other weights (fingerprint {found})"
            )
        return
    try:
        settings = json.loads((adapter / CONFIG_NAME).read_text(encoding="utf-8"))
    except ValueError as error:
        raise MergeError(f"{adapter / CONFIG_NAME} is no JSON: {first_line(error)}") from error
    if not isinstance(settings, dict):
        raise MergeError(f"{adapter / CONFIG_NAME} must hold the settings of an adapter, found {settings!r:.60}")
    named = settings.get("base_model_name_or_path") or ""
    if is_hub_id(named) and is_hub_id(base.name) and _plain(named) != _plain(base.name):
        raise MergeError(
            f"{adapter} was trained on {named}, and the base is {base.name}; if they are the same model, change "
            f"base_model_name_or_path in its {CONFIG_NAME}"
        )


def _plain(name: str) -> str:
    """Return a Hub id without its owner and the ending of a quantized copy, in lower case."""
    return _QUANTIZED.sub("", name.rpartition("/")[2].lower())
