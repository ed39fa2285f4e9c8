"""Messages to one prompt, by the model's own Jinja template as Hugging Face renders it, in a sandbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fourfold.checkpoint.source import optional_json
from fourfold.errors import CheckpointError, UserError
from fourfold.sandbox import Refused, make_sandbox, render_bounded
from fourfold.tokenizer import Tokenizer, token_text

Message = Mapping[str, Any]  # "role" and "content"; of an assistant also "tool_calls", of a tool "tool_call_id"
FIELDS = {"assistant": {"tool_calls"}, "tool": {"tool_call_id"}}  # beside role and content

# Yuan 2.0: turns joined, <sep> behind the last; the published chat models and the training data differ in the joiner.
_YUAN = """\
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{{ raise_exception('Yuan 2.0 has no system role') }}{% endif %}
    {{- message['content'] + ('' if loop.last else JOINER) }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<sep>' }}{% endif %}"""
SEPARATOR = "<sep>"
BUILT_IN = {"yuan-n": _YUAN.replace("JOINER", "'<n>'"), "yuan-newline": _YUAN.replace("JOINER", r"'\n'")}


class ChatTemplate:
    """A template and the tokens that it may name. Frozen; a rendering leaves nothing behind."""

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None, name: str = "the model's chat template"):
        """Raises CheckpointError where the template is not valid Jinja."""
        self._source, self._tokens, self._name = source, dict(tokens or {}), name
        try:
            make_sandbox().compile_bounded(source)
        except Exception as error:
            raise CheckpointError(f"{name} is not valid ({_line(error)})") from None

    @classmethod
    def built_in(cls, name: str) -> ChatTemplate:
        """One of `BUILT_IN`. Raises UserError for another name."""
        if name not in BUILT_IN:
            raise UserError(f"there is no chat template {name!r}; fourfold has {', '.join(BUILT_IN)}")
        return cls(BUILT_IN[name], name=f"the chat template {name}")

    @classmethod
    def from_directory(cls, path: str | Path) -> ChatTemplate | None:
        """The template of a model's directory; for Yuan without one `yuan-n`, else None: it is not guessed."""
        root = Path(path)
        facts = optional_json(root / "tokenizer_config.json")
        file = root / "chat_template.jinja"
        try:
            source = file.read_text(encoding="utf-8") if file.is_file() else _default(facts.get("chat_template"), root)
        except (OSError, UnicodeDecodeError):
            raise CheckpointError(f"{file} cannot be read as UTF-8 text") from None
        if source is not None:
            tokens = {
                name: token_text(facts.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")
            }
            return cls(source, {name: text for name, text in tokens.items() if text is not None})
        config = optional_json(root / "config.json")
        config = config["model"] if isinstance(config.get("model"), dict) else config
        return cls.built_in("yuan-n") if config.get("model_type") == "yuan" else None

    def check_fits(self, tokenizer: Tokenizer) -> None:
        """Raises UserError where a built-in template separates with a token that the tokenizer does not have."""
        if self._source in BUILT_IN.values() and tokenizer.id_of(SEPARATOR) is None:
            raise UserError(
                f"{self._name} writes {SEPARATOR}, which the model's tokenizer does not know; it is for Yuan alone"
            )

    @property
    def source(self) -> str:
        """The template itself."""
        return self._source

    def names(self, variable: str) -> bool:
        """Whether the template reads a variable, such as `tools`."""
        from jinja2.meta import find_undeclared_variables

        return variable in find_undeclared_variables(make_sandbox().parse(self._source))

    def mentions(self, text: str) -> bool:
        """Whether the template has this text in it."""
        return text in self._source

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt, special tokens included: encode it with `add_special_tokens=False`.

        `tools`: descriptions as OpenAI writes them, for a template that names them.

        Raises UserError where the template refuses the messages, or where the sandbox refuses the template.
        """
        from jinja2.exceptions import SecurityError

        check_messages(messages)
        try:
            values = {"messages": [dict(m) for m in messages], "add_generation_prompt": add_generation_prompt}
            values |= {"tools": [dict(tool) for tool in tools]} if tools else {}
            return render_bounded(self._source, self._tokens | values)
        except Refused as error:
            raise UserError(f"{self._name} refuses these messages: {_line(error)}") from None
        except SecurityError as error:
            raise UserError(f"{self._name} was stopped because it is not safe to run ({_line(error)})") from None
        except Exception as error:
            raise UserError(
                f"{self._name} does not fit these messages ({_line(error) or type(error).__name__})"
            ) from None


def check_messages(messages: Sequence[Message]) -> None:
    """Raises UserError unless every message is a role and a content, both text."""
    if not messages:
        raise UserError("there are no messages to answer; pass at least one")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise UserError(f"message {i} must have a 'role' and a 'content', both text")
        known = {"role", "content", *FIELDS.get(message["role"], ())}
        if extra := sorted(set(message) - known):
            raise UserError(
                f"message {i} has a field {extra[0]!r}, which is not supported; "
                f"{message['role']!r} has {', '.join(map(repr, sorted(known, reverse=True)))}"
            )


def _default(templates: object, root: Path) -> str | None:
    """The template to chat with, among those of `chat_template`: text, or a list of names and texts."""
    if templates is None or isinstance(templates, str):
        return templates
    try:
        named = {str(entry["name"]): str(entry["template"]) for entry in templates}  # type: ignore[attr-defined]
    except (TypeError, KeyError):
        raise CheckpointError(f"{root / 'tokenizer_config.json'} has a chat_template that is not text") from None
    if "default" not in named:
        raise CheckpointError(
            f"the model has no default chat template, only {', '.join(sorted(named)) or 'an empty list'}"
        )
    return named["default"]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
