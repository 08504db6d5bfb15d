"""Tokenizer: exact round trips, chat templates of every origin, and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from elastic_cache.models import CheckpointError, Tokenizer, load_model
from elastic_cache.models.checkpoint import EMBEDDED
from elastic_cache.models.tokenizer import load_tokenizer

CHAT = [
    {"role": "system", "content": "Count."},
    {"role": "user", "content": " 1+1? "},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2?"},
]


def tokenizer(folder: Path, jinja: str | None = None, **config: Any) -> Tokenizer:
    """The embedded tokenizer in a folder of its own, with templates beside it."""
    shutil.copy(EMBEDDED["tiny"] / "tokenizer.json", folder)
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja)
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(folder)
    assert loaded is not None
    return loaded


def test_round_trip(tmp_path: Path) -> None:
    t = tokenizer(tmp_path)
    text = "Ava has 12 apples.\n\nGrüße, 日本 🙂 <|eot_id|> 3*4=12"
    ids = t.encode(text)
    assert t.decode(ids, skip_special_tokens=False) == text
    assert t.decode(ids) == text.replace("<|eot_id|>", "")
    assert t.encode("") == [] and t.decode([]) == ""


def test_special_tokens_in_a_text_are_single_ids(tmp_path: Path) -> None:
    t = tokenizer(tmp_path)
    assert t.encode("<|startoftext|><|mdm_mask|>") == [0, 2]
    assert t.token(2) == "<|mdm_mask|>"
    assert t.token(10**6) is None


def test_builtin_chat(tmp_path: Path) -> None:
    assert tokenizer(tmp_path).render_chat(CHAT) == (
        "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\nCount.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n 1+1? <|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n2<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


# As LLaDA-8B-Instruct's tokenizer_config.json has it in substance.
LLADA_TEMPLATE = (
    "{% for message in messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@pytest.mark.parametrize("bos", ["<|startoftext|>", {"content": "<|startoftext|>"}])
def test_template_of_the_config(tmp_path: Path, bos: object) -> None:
    t = tokenizer(tmp_path, chat_template=LLADA_TEMPLATE, bos_token=bos)
    expected = tokenizer(tmp_path / "..").render_chat(CHAT).replace(" 1+1? ", "1+1?")
    assert t.render_chat(CHAT) == expected


def test_named_templates_and_file(tmp_path: Path) -> None:
    named = [
        {"name": "rag", "template": "no"},
        {"name": "default", "template": "{{ eos_token }}!{{ bos_token }}"},
    ]
    assert tokenizer(tmp_path, chat_template=named, eos_token="E").render_chat(CHAT) == "E!"
    jinja = "{%- for m in messages %}\n    {% if loop.index > 2 %}{% break %}{% endif %}\n"
    jinja += "{{ m.role }},\n{% endfor %}\nend"
    both = tokenizer(tmp_path, jinja, chat_template="from the config")
    # The file wins over the config; trim_blocks and lstrip_blocks leave no stray blanks.
    assert both.render_chat(CHAT) == "system,\nuser,\nend"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"chat_template": "{% for %}"}, "the chat template is malformed"),
        ({"chat_template": 3}, "chat_template must be a string or a list of named templates"),
        ({"chat_template": [{"name": "rag", "template": ""}]}, "no template named 'default'"),
    ],
)
def test_malformed_template(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        tokenizer(tmp_path, **config)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('system messages are not allowed') }}", "are not allowed"),
        ("{{ messages.append(1) }}", "failed on these messages"),
        ("{{ messages.__class__.__mro__ }}", "failed on these messages"),
        ("{{ 1 / 0 }}", "failed on these messages"),
    ],
)
def test_template_that_fails(tmp_path: Path, template: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tokenizer(tmp_path, template).render_chat(CHAT)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "non-empty list"),
        ("hello", "non-empty list"),
        ([["user", "hi"]], r"messages\[0\] must be a dict .* got list"),
        ([CHAT[0], {"role": "user"}], r'messages\[1\] must have "content"'),
        ([{"content": "hi"}], r'messages\[0\] must have "role"'),
        ([{"role": "user", "content": 3}], r'messages\[0\]\["content"\] must be a string, got int'),
        ([{"role": None, "content": ""}], r'messages\[0\]\["role"\] must be a string'),
        ([{"role": "user", "content": "a\udcff"}], "valid UTF-8 text, .* character 1"),
    ],
)
def test_malformed_messages(tmp_path: Path, messages: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tokenizer(tmp_path).render_chat(messages)


def test_text_that_is_no_text(tmp_path: Path) -> None:
    t = tokenizer(tmp_path)
    with pytest.raises(ValueError, match="text must be valid UTF-8 text, .* character 2"):
        t.encode("ab\udcff")
    with pytest.raises(ValueError, match="text must be a string, got bytes"):
        t.encode(b"ab")  # type: ignore[arg-type]


def test_builtin_chat_needs_its_tokens(tmp_path: Path) -> None:
    import tokenizers

    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
    plain = load_tokenizer(tmp_path)
    assert plain is not None
    with pytest.raises(ValueError, match="no chat template and its tokenizer lacks"):
        plain.render_chat(CHAT)


def test_broken_tokenizer_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer.json is no readable tokenizer"):
        load_model(str(folder), torch.device("cpu"), torch.float32)
