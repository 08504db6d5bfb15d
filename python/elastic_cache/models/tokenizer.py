"""Text and token ids of a checkpoint, and its chat template.

The subtle thing: special tokens written in a text become their ids, which is how a rendered chat
gets its header tokens; nothing else is added to a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from elastic_cache.models.checkpoint import CheckpointError, read_json
from elastic_cache.types import Message

if TYPE_CHECKING:
    import jinja2

_BOS, _TURN_END = "<|startoftext|>", "<|eot_id|>"
_HEADER, _HEADER_END = "<|start_header_id|>", "<|end_header_id|>"


class Tokenizer:
    """Encodes, decodes and renders chats as the checkpoint was trained to see them."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        template: jinja2.Template | None = None,
        special: dict[str, str] | None = None,
    ) -> None:
        """`template` None means LLaDA's own chat format; `special` are variables for a template."""
        self._backend = backend
        self._template = template
        self._special = special or {}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, no special tokens added."""
        check_text("text", text)
        # A batch of one, because only batches let other threads run meanwhile: a long text takes
        # a second, in which a server has others to answer.
        return list(self._backend.encode_batch([text], add_special_tokens=False)[0].ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids beyond the tokenizer's vocabulary decode to nothing."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token(self, token_id: int) -> str | None:
        """How a token is written, None if the tokenizer does not know the id."""
        text: str | None = self._backend.id_to_token(token_id)
        return text

    def render_chat(self, messages: Sequence[Message]) -> str:
        """The prompt text for a chat, up to and including the header of the answer.

        Args:
            messages: one or more of {"role": str, "content": str}, in order.

        Raises:
            ValueError: a message is malformed, or the checkpoint's template refuses the chat.
        """
        check_messages(messages)
        if self._template is None:
            return self._render_builtin(messages)
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=True, **self._special
            )
        except Exception as error:  # the template is foreign code: it can fail in any way
            raise ValueError(
                f"the checkpoint's chat template failed on these messages: {error}"
            ) from error

    def _render_builtin(self, messages: Sequence[Message]) -> str:
        for token in (_BOS, _HEADER, _HEADER_END, _TURN_END):
            if self._backend.token_to_id(token) is None:
                raise ValueError(
                    f"the checkpoint has no chat template and its tokenizer lacks {token} of "
                    "LLaDA's own: give the prompt as token ids, or add a chat_template.jinja"
                )
        turns = [_header(m["role"]) + m["content"] + _TURN_END for m in messages]
        return _BOS + "".join(turns) + _header("assistant")


def _header(role: str) -> str:
    return f"{_HEADER}{role}{_HEADER_END}\n\n"


def check_text(name: str, text: object) -> None:
    """Refuses what is no text that can be written as UTF-8."""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a string, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must be valid UTF-8 text, got an undecodable byte or lone surrogate at "
            f"character {error.start}"
        ) from None


def check_messages(messages: object) -> None:
    """Refuses what is no non-empty list of {"role": str, "content": str}."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(
            'messages must be a non-empty list of {"role": ..., "content": ...}, got '
            f"{messages!r}"
        )
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(
                f'messages[{i}] must be a dict with "role" and "content", got '
                f"{type(message).__name__}"
            )
        for key in ("role", "content"):
            if key not in message:
                raise ValueError(f'messages[{i}] must have "{key}", got the keys {list(message)}')
            check_text(f'messages[{i}]["{key}"]', message[key])


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint folder, None if it has no tokenizer.json."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception on a malformed file
        raise CheckpointError(f"{path} is no readable tokenizer: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path) if config_path.is_file() else {}
    source_path, source = _template_source(folder, config_path, config)
    template = None if source is None else _compile(source, source_path)
    return Tokenizer(backend, template, _special_tokens(config))


def _template_source(
    folder: Path, config_path: Path, config: dict[str, Any]
) -> tuple[Path, str | None]:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file, file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} is not readable text: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
        if template is None:
            raise CheckpointError(
                f"{config_path}: chat_template lists no template named 'default', only "
                f"{sorted(str(name) for name in named)}"
            )
    if template is not None and not isinstance(template, str):
        raise CheckpointError(
            f"{config_path}: chat_template must be a string or a list of named templates, got "
            f"{type(template).__name__}"
        )
    return config_path, template


def _compile(source: str, path: Path) -> jinja2.Template:
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise CheckpointError(
            f"{path} holds a chat template, which needs jinja2: run pip install jinja2"
        ) from None

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    # A template is code from whoever made the checkpoint: it runs in a sandbox.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(f"{path}: the chat template is malformed: {error}") from error


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """bos_token and eos_token, which a config writes as a string or as {"content": ...}."""
    special = {}
    for name in ("bos_token", "eos_token"):
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        special[name] = value if isinstance(value, str) else ""
    return special
