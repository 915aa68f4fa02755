"""Prompts and answers as data sets hold them: strings, or chat messages ``{"role", "content"}``.

Nothing here quotes a text in an error: it may be a harmful one. Callers add the row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, str]
Prompt = str | Sequence[Mapping[str, str]]
"""A string is a user's turn; messages end with one."""

ROLES = ("system", "developer", "user", "assistant")


class EmptyText(ValueError):
    """A prompt or an answer without a word."""


def kind(value: object) -> str:
    """What a value is, for an error, without its content."""
    if value is None:
        return "null"
    if isinstance(value, str) and not value.strip():
        return "an empty string"
    if isinstance(value, str):
        return "a string"
    return {"list": "a list", "dict": "a mapping"}.get(type(value).__name__, type(value).__name__)


def checked_messages(value: object) -> list[Message]:
    """Chat messages with their roles and contents alone.

    Raises TypeError for another type, ValueError for an unknown role, an empty content, a system message that is not
    the first, or a tool call, which cannot be told as text.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise TypeError(f"expected a list of messages, got {kind(value)}")
    if not value:
        raise ValueError("expected at least one message, got none")
    made: list[Message] = []
    for i, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise TypeError(f"message {i}: expected a mapping with role and content, got {kind(message)}")
        if "role" not in message or "content" not in message:
            raise TypeError(f"message {i}: expected the keys role and content, got {sorted(map(str, message))}")
        role, content = message["role"], message["content"]
        if message.get("tool_calls"):
            raise ValueError(f"message {i}: tool calls are not supported")
        if role not in ROLES:
            raise ValueError(f"message {i}: expected a role of {', '.join(ROLES)}, got {role!r}")
        if not isinstance(content, str):
            raise TypeError(f"message {i}: expected a string as content, got {kind(content)}")
        if not content.strip():
            raise EmptyText(f"message {i} ({role}): expected a content, got an empty string")
        if role in ("system", "developer") and i:
            raise ValueError(f"message {i}: a {role} message comes first or not at all")
        made.append({"role": role, "content": content})
    return made


def checked_prompt(value: object, system: str | None = None) -> Prompt:
    """A prompt: the string itself, or messages that end with the user's turn.

    system: put before a prompt that brings no system message of its own.
    Raises TypeError or ValueError.
    """
    if isinstance(value, str):
        if not value.strip():
            raise EmptyText("expected a prompt, got an empty string")
        return value if system is None else [{"role": "system", "content": system}, {"role": "user", "content": value}]
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise TypeError(f"expected a string or a list of messages, got {kind(value)}")
    messages = checked_messages(value)
    if messages[-1]["role"] != "user":
        raise ValueError(f"expected messages that end with the user's turn, got {messages[-1]['role']}'s")
    if system is not None and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": system})
    return messages


def checked_answer(value: object) -> str:
    """The text of an answer: a string, an assistant's message, or a list of that one message.

    Raises TypeError or ValueError.
    """
    if isinstance(value, str):
        if not value.strip():
            raise EmptyText("expected an answer, got an empty string")
        return value
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise TypeError(f"expected a string or an assistant's message, got {kind(value)}")
    messages = checked_messages(value)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise ValueError(f"expected one assistant's message, got {', '.join(m['role'] for m in messages)}")
    return messages[0]["content"]


def split_conversation(value: object, system: str | None = None) -> tuple[Prompt, str]:
    """A whole conversation as prompt and answer: the last turn, the assistant's, is the answer.

    Raises TypeError or ValueError.
    """
    messages = checked_messages(value)
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise ValueError(
            f"expected a conversation that ends with an answer of the assistant, got {', '.join(_roles(messages))}"
        )
    return checked_prompt(messages[:-1], system), messages[-1]["content"]


def as_messages(prompt: Prompt) -> list[Message]:
    """A prompt as the chat template takes it."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]


def as_text(prompt: Prompt) -> str:
    """A prompt for a reader: the string itself, or one paragraph a message."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def asked(prompt: Prompt) -> str:
    """All that the user says, by which prompts are compared; system prompts are shared by whole sets."""
    return prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt if m["role"] == "user")


def last_turn(prompt: Prompt) -> str:
    """The user's last turn: the request."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def identity(prompt: Prompt) -> tuple[Any, ...]:
    """Equal for prompts that differ in white space only."""
    return tuple((m["role"], " ".join(m["content"].split())) for m in as_messages(prompt))


def _roles(messages: Sequence[Message]) -> list[str]:
    roles = [m["role"] for m in messages]
    return roles if len(roles) < 5 else [*roles[:2], "...", *roles[-2:]]
