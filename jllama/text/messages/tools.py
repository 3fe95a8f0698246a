"""The functions that a conversation may call, and its calls, as chat templates read them:

{"type": "function", "function": {"name": "add", "parameters": {"type": "object", ...}}}
{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
"""

import json
from collections.abc import Mapping
from typing import Any

from jllama.errors import InputError
from jllama.folders.json_files import kind_of
from jllama.text.messages.message import Message, parsed, text_of, unicode_text

CALLS = ("tool_calls", "function_call")  # of a message: a list of calls, or (formerly) one
OF_TOOL = ("tool_call_id", "name")  # of a message that is a function's answer


def tools_of(row: Mapping, name: str) -> list[Message]:
    """What may be called, as the first message; none where the list is empty.

    Args:
        name: of the column: a list of JSON schemas, or such a list as a text.

    Raises:
        InputError: if it is no such list.
    """
    found = parsed(row[name], f"'{name}'")
    tools = [parsed(x, f"'{name}'") for x in found] if isinstance(found, list) else []
    if not isinstance(found, list | None) or not all(isinstance(x, Mapping) for x in tools):
        raise InputError(f"'{name}' is not a list of functions, as JSON schemas")
    if name == "functions" or row.get("conversations") is not None:  # there they are not wrapped
        tools = [_wrapped(tool) for tool in tools]
    return [Message("tools", "", more=_unicode({"tools": tools}))] if tools else []


def more_of(turn: Mapping, role: str) -> dict[str, Any]:
    """What a message of a conversation with functions has beside its text: `Message.more`.

    Raises:
        InputError: if another than the assistant calls, or a call is none.
    """
    if role == "tool":
        return {name: text_of(turn, name) for name in OF_TOOL if turn.get(name)}
    name = next((name for name in CALLS if turn.get(name)), "")
    if name and role != "assistant":
        raise InputError(f"'{name}' in a message of role {role}; only an assistant calls")
    return {"tool_calls": calls_of(turn, name)} if name else {}


def calls_of(turn: Mapping, name: str) -> list[Mapping]:
    """The calls in a field of a message; their arguments become an object if they are its JSON.

    Raises:
        InputError: if they are no calls.
    """
    said = parsed(turn.get(name), f"'{name}'")
    calls: list[Mapping] = []
    for call in said if isinstance(said, list) else [said]:
        call = parsed(call, f"a call of '{name}'")
        if not isinstance(call, Mapping):
            raise InputError(f"'{name}' is {kind_of(call)}, expected functions and arguments")
        call = _wrapped({key: value for key, value in call.items() if value is not None})
        function = call["function"]
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InputError(f"a call of '{name}' names no function")
        arguments = parsed(function.get("arguments") or {}, "'arguments'")
        if not isinstance(arguments, Mapping):
            raise InputError(f"'arguments' is {kind_of(arguments)}, expected an object")
        calls.append(_unicode({**call, "function": {**function, "arguments": arguments}}))
    return calls


def _wrapped(function: Mapping) -> dict[str, Any]:
    """{"name": "add"} -> {"type": "function", "function": {"name": "add"}}"""
    return {**function} if "function" in function else {"type": "function", "function": function}


def _unicode(value: dict[str, Any]) -> dict[str, Any]:
    unicode_text(json.dumps(value, ensure_ascii=False), "a function's description or call")
    return value
