"""Writes an Ollama Modelfile: which file to run, how to ask it, and where it stops."""

from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from raylora.base.serving import adds_bos, end_tokens
from raylora.data.chat_template import TEMPLATE_ERRORS, USER, ChatTemplate
from raylora.errors import MergeError
from raylora.run.atomic import write_text

SYSTEM, PROMPT = "some-system", "some-prompt"
"""Contents that the chat template is asked to write."""


def write_modelfile(path: Path, file: str, model: Path) -> None:
    """Write the Modelfile of a merged model.

    Args:
        path: file to write.
        file: name of the GGUF file beside it.
        model: directory of the merged model, with its tokenizer and generation settings.
    """
    settings = GenerationConfig.from_pretrained(model)
    write_text(path, modelfile(file, AutoTokenizer.from_pretrained(model), settings))


def modelfile(file: str, tokenizer: PreTrainedTokenizerBase, settings: GenerationConfig) -> str:
    """Return the content of a Modelfile.

    Ollama's templates are not Jinja, so the chat template is asked how it writes a system message, a user's message and
    the generation prompt. Calls of tools are left to Ollama's own templates.

    Args:
        file: name of the GGUF file beside the Modelfile.
        tokenizer: tokenizer of the model.
        settings: generation settings, whose end tokens become stop words.

    Raises:
        MergeError: the chat template does not write a user's message as it is.
    """
    stops = [tokenizer.decode([token]) for token in sorted(end_tokens(settings))]
    lines = [f"FROM ./{file}"]
    if tokenizer.chat_template:
        lines.append(f'TEMPLATE """{_template(tokenizer)}"""')
    return "\n".join([*lines, *(f'PARAMETER stop "{stop}"' for stop in stops)]) + "\n"


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the chat template of one exchange in Go's template language, without BOS, which Ollama adds."""
    template = ChatTemplate(tokenizer)
    user = {**USER, "content": PROMPT}
    options = {"add_generation_prompt": True, "enable_thinking": False, "thinking": False}
    before, found, after = _without_bos(template.text([user], **options), tokenizer).partition(PROMPT)
    if not found:
        raise MergeError("the chat template does not write a user's message as it is, so Ollama cannot ask as it does")
    try:
        whole = _without_bos(template.text([{"role": "system", "content": SYSTEM}, user], **options), tokenizer)
    except TEMPLATE_ERRORS:
        whole = ""
    opening, found, rest = whole.partition(SYSTEM)
    between, found_prompt, _ = rest.partition(PROMPT)
    if not (found and found_prompt):  # the template knows no system message
        return f"{before}{{{{ .Prompt }}}}{after}{{{{ .Response }}}}"
    start = f"{{{{ if .System }}}}{opening}{{{{ .System }}}}{between}{{{{ else }}}}{before}{{{{ end }}}}"
    return f"{start}{{{{ .Prompt }}}}{after}{{{{ .Response }}}}"


def _without_bos(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return text without the BOS token at its start, if the tokenizer adds one by itself, as Ollama then does."""
    return text.removeprefix(tokenizer.bos_token) if adds_bos(tokenizer) else text
