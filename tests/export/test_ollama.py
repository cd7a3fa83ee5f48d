"""An Ollama Modelfile asks and stops as the chat template does."""

from pathlib import Path

from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GenerationConfig

from raylora.data.chat_template import CHATML
from raylora.export.ollama import modelfile

WITHOUT_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_the_template_and_the_stop_words_are_in_the_modelfile(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = CHATML
    assert modelfile("m.gguf", tokenizer, GenerationConfig(eos_token_id=[1, 3])) == (
        "FROM ./m.gguf\n"
        'TEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n<|im_start|>user\n{{ else }}'
        '<|im_start|>user\n{{ end }}{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n{{ .Response }}"""\n'
        'PARAMETER stop "</s>"\nPARAMETER stop "<|im_end|>"\n'
    )


def test_a_template_without_system_messages_and_with_bos(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = WITHOUT_SYSTEM
    written = modelfile("m.gguf", tokenizer, GenerationConfig(eos_token_id=1))
    assert 'TEMPLATE """<s>[user]{{ .Prompt }}' in written  # this tokenizer adds no BOS, so Ollama would not either
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    written = modelfile("m.gguf", tokenizer, GenerationConfig(eos_token_id=1))
    assert 'TEMPLATE """[user]{{ .Prompt }}[assistant]{{ .Response }}"""' in written


def test_a_model_without_a_chat_template_gets_none(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    written = modelfile("m.gguf", tokenizer, GenerationConfig(eos_token_id=1))
    assert written == 'FROM ./m.gguf\nPARAMETER stop "</s>"\n'
