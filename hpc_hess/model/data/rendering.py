"""From records to tokens: texts, prompts with completions, conversations, ids; and which tokens the loss predicts.

What a record is, its columns say. Spans of characters become spans of tokens by the tokenizer's offsets: a token that
overlaps a span belongs to it, as in transformers' own masks of assistant tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from hpc_hess.errors import DataError
from hpc_hess.intake import masks
from hpc_hess.intake.findings import noted
from hpc_hess.model.data.documents import Document, Reading

CHATS = ("messages", "conversations", "conversation", "dialog")
_PREFERENCES = ("chosen", "rejected")
_ROLES = {  # of "from" and "value", as ShareGPT writes turns
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "function_call": "assistant",
    "function_response": "tool",
    "observation": "tool",
}
Span = tuple[int, int]


class Renderer:
    """Turns the records of one source into documents. ``where`` names the source in what is noted about it."""

    def __init__(self, reading: Reading, where: str) -> None:
        self._reading, self._where = reading, where
        self._told: set[str] = set()
        self._kind = ""

    def __call__(self, record: Mapping[str, Any], place: str) -> Document:
        """Return the tokens of a record, and which are predicted. Raises DataError about ``place``."""
        kind, used = self._look(record)
        if self._kind not in ("", kind) and used[0] in record:
            raise DataError(f"{place} is {kind}, the records before it {self._kind}: keep one kind in a source")
        self._kind = self._kind or kind
        beside = masks.suspicious(record)
        if kind == "ids":
            used += beside
        for name in [] if kind == "ids" else beside:
            if isinstance(record[name], list):
                raise DataError(
                    f"{place}: '{name}' is a list beside {kind}, whose tokens it cannot be matched with: take it out, or "
                    "save input_ids and labels with the datasets library"
                )
        if others := [name for name in record if name not in (*used, "tools")]:
            only = f"'{used[0]}' is" if kind != "a prompt" else "'prompt' and 'completion' are"
            self._tell("data.columns", f"{self._where}: only {only} read; left out: {', '.join(sorted(others))}")
        if kind == "ids":
            return self._ids(record, beside, place)
        if kind == "a conversation":
            return self._conversation(record, used[0], place)
        if kind == "a prompt":
            return self._completion(record, place)
        self._only("all", f"texts ('{used[0]}'), which have no turns", place)
        return Document(_array(self._reading.tokenise(text_of(record, used[0], place))), place=place)

    def _look(self, record: Mapping[str, Any]) -> tuple[str, list[str]]:
        """Return what a record is, and which columns hold it."""
        field = self._reading.text_field
        if "input_ids" in record:
            return "ids", ["input_ids"]
        if isinstance(record.get(field), list) and _is_chat(record[field]):
            return "a conversation", [field]
        if field in record:
            return "a text", [field]
        if chat := next((name for name in CHATS if name in record), None):
            return "a conversation", [chat]
        if "prompt" in record and "completion" in record:
            return "a prompt", ["prompt", "completion"]
        return "a text", [field]

    def _tell(self, check: str, text: str) -> None:
        if check not in self._told:
            self._told.add(check)
            self._reading.say(noted(check, text))

    def _only(self, possible: str, what: str, place: str) -> None:
        """Refuse a data.loss_on that the data do not know."""
        asked = self._reading.section.loss_on
        if asked not in ("auto", *possible.split()):
            remedy = " or ".join(f"'{each}'" for each in ("auto", *possible.split()))
            raise DataError(f"data.loss_on = '{asked}' does not fit {place}, {what}: set it to {remedy}")

    def _loss_on(self, usual: str) -> str:
        asked = self._reading.section.loss_on
        found = usual if asked == "auto" else asked
        words = {"assistant": "the assistant's tokens", "completion": "the completions", "all": "all tokens"}[found]
        self._tell("data.mask", f"the loss is over {words} (data.loss_on = '{asked}')")
        return found

    def _ids(self, record: Mapping[str, Any], beside: list[str], place: str) -> Document:
        value = record["input_ids"]
        if not (isinstance(value, list | np.ndarray) and all(isinstance(i, int | np.integer) for i in value)):
            raise DataError(f"{place}: column 'input_ids' should be a list of token ids")
        asked = self._reading.section.loss_on
        marks = {"assistant": ("assistant_masks", "assistant_mask"), "completion": ("completion_mask",)}.get(asked, ())
        if marks and not any(name in record for name in marks):
            raise DataError(
                f"data.loss_on = '{asked}' does not fit {place}, which has token ids and no column '{marks[0]}': set it to "
                "'auto' or 'all'"
            )
        if asked == "all":
            beside = [name for name in beside if name == "attention_mask"]
        if beside:
            self._tell("data.mask", f"tokens that are predicted follow {', '.join(beside)}")
        ids, predicted = masks.applied(_array(value), {name: record[name] for name in beside}, place)
        return Document(ids, predicted, place)

    def _completion(self, record: Mapping[str, Any], place: str) -> Document:
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            turns, more = _turns(prompt, place), _turns(completion, place)
            if self._reading.section.loss_on == "assistant":
                return self._chat([*turns, *more], record, place)
            chat = _Chat(self._reading.tokenizer, record.get("tools"), place)
            text, start = chat.rendered([*turns, *more]), len(chat.prefix(turns, [*turns, *more]))
            span = chat.trimmed(text, (start, len(text)))
            return self._marked(text, [span], self._loss_on("completion"), place, special=False)
        first, last = text_of(record, "prompt", place), text_of(record, "completion", place)
        self._only("completion all", "a prompt and a completion", place)
        return self._marked(first + last, [(len(first), len(first + last))], self._loss_on("completion"), place)

    def _conversation(self, record: Mapping[str, Any], name: str, place: str) -> Document:
        self._only("assistant all", "conversations", place)
        return self._chat(_turns(record[name], f"{place}, field '{name}'"), record, place)

    def _chat(self, turns: list[dict[str, Any]], record: Mapping[str, Any], place: str) -> Document:
        loss_on = self._loss_on("assistant")
        chat = _Chat(self._reading.tokenizer, record.get("tools"), place)
        if loss_on == "assistant" and chat.has_marks:
            ids, predicted = chat.marked(turns)
            return Document(_array(ids), np.asarray(predicted, bool), place)
        text = chat.rendered(turns)
        spans = chat.spans(turns, text) if loss_on == "assistant" else []
        return self._marked(text, spans, loss_on, place, special=False)

    def _marked(self, text: str, spans: list[Span], loss_on: str, place: str, *, special: bool = True) -> Document:
        """Return the tokens of a text, those predicted that overlap ``spans``; ``special``: with the tokenizer's own."""
        ids, offsets = self._reading.tokenizer.with_offsets(_valid(text, place), special=special, place=place)
        if loss_on == "all":
            return Document(_array(ids), place=place)
        starts, ends = offsets[:, 0], offsets[:, 1]
        predicted = np.zeros(len(ids), bool)
        for low, high in spans:
            predicted |= (starts < high) & (ends > low)
        return Document(_array(ids), predicted, place)


class _Chat:
    """The chat template of a tokenizer, for one conversation."""

    def __init__(self, tokenizer: Any, tools: Any, place: str) -> None:
        self._tokenizer, self._place = tokenizer, place
        self._tools = _tools(tools, place)

    @property
    def has_marks(self) -> bool:
        """Whether the template says itself what the assistant wrote, by {% generation %}."""
        return bool(self._tokenizer.marks_generation)

    def rendered(self, turns: list[dict[str, Any]], *, prompt: bool = False) -> str:
        """Return the text of a conversation; ``prompt``: and of the assistant's next turn, as far as it is not its own."""
        return str(self._tokenizer.chat(turns, self._place, tools=self._tools, tokenize=False, add_generation_prompt=prompt))

    def marked(self, turns: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
        """Return the ids, and 1 for each that the template marks."""
        found = self._tokenizer.chat(
            turns, self._place, tools=self._tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        _valid(self.rendered(turns), self._place)
        return found["input_ids"], found["assistant_masks"]

    def prefix(self, before: list[dict[str, Any]], turns: list[dict[str, Any]]) -> str:
        """Return the text that comes before the turns after ``before``. Raises DataError: the template changes it."""
        text, whole = self.rendered(before, prompt=True), self.rendered(turns)
        if not whole.startswith(text):
            raise self._changes(len(before))
        return text

    def spans(self, turns: list[dict[str, Any]], text: str) -> list[Span]:
        """Return the characters of the assistant's turns: what the template adds to the text of the turns before."""
        found = []
        for number, turn in enumerate(turns):
            if turn["role"] == "assistant":
                before = self.rendered(turns[:number], prompt=True)
                with_it = self.rendered(turns[: number + 1])
                if not (text.startswith(with_it) and with_it.startswith(before)):
                    raise self._changes(number)
                found.append(self.trimmed(text, (len(before), len(with_it))))
        return found

    def trimmed(self, text: str, span: Span) -> Span:
        """Return a span without the blanks behind the token that ends the turn: a template's, not the assistant's."""
        own = text[span[0] : span[1]].rstrip()
        ended = any(own.endswith(token) for token in self._tokenizer.special_tokens)
        return (span[0], span[0] + len(own)) if ended else span

    def _changes(self, number: int) -> DataError:
        return DataError(
            f"{self._place}: the chat template writes the turns up to turn {number + 1} otherwise where others follow, so "
            "what the assistant wrote cannot be told: set model.tokenizer to a directory whose template has "
            "{% generation %} marks, or data.loss_on = 'all'"
        )


def text_of(record: Mapping[str, Any], field: str, place: str) -> str:
    """Return the text of a record, or raise DataError: it has none, or one that is not valid Unicode."""
    value = record.get(field)
    if isinstance(value, str):
        return _valid(value, f"{place}, field '{field}'")
    if field in record:
        kinds = {type(None): "null", list: "a list", dict: "an object", bool: "true or false"}
        raise DataError(f"{place}, field '{field}' is {kinds.get(type(value), 'a number')}: it should be a text")
    if pair := [name for name in _PREFERENCES if name in record]:
        raise DataError(
            f"{place} holds answers to prefer ({', '.join(pair)}): set data.text_field to the one that the loss is over"
        )
    texts = [name for name, each in record.items() if isinstance(each, str)]
    remedy = f"set data.text_field to one of: {', '.join(texts)}" if texts else "each record should hold a text"
    raise DataError(f"{place} has no field '{field}' (it has {', '.join(record) or 'nothing'}): {remedy}")


def _valid(text: str, place: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{place} is not valid Unicode (a lone surrogate): mend it") from None
    return text


def _array(ids: Any) -> np.ndarray:
    return np.asarray(ids, dtype=np.int64)


def _is_chat(value: list[Any]) -> bool:
    return bool(value) and isinstance(value[0], Mapping)


def _tools(value: Any, place: str) -> Any:
    """Return the tools of a conversation; some data sets hold them as JSON in a text."""
    if not isinstance(value, str):
        return value or None
    try:
        return json.loads(value) or None if value.strip() else None
    except ValueError:
        raise DataError(f"{place}, field 'tools' is no JSON: it should be a list of functions") from None


def _turns(value: Any, place: str) -> list[dict[str, Any]]:
    """Return turns as chat templates take them, each with a role and a content. Raises DataError."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{place} should be a list of turns, each with 'role' and 'content'")
    return [_turn(turn, f"{place}, turn {number}") for number, turn in enumerate(value, 1)]


def _turn(turn: Any, place: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise DataError(f"{place} should be an object with 'role' and 'content'")
    found = {key: value for key, value in turn.items() if value is not None or key == "content"}
    if "role" not in found and "from" in found:  # as ShareGPT has it
        said = str(found.pop("from"))
        found["role"], found["content"] = _ROLES.get(said, said), found.pop("value", None)
    if not isinstance(found.get("role"), str) or ("content" not in found and "tool_calls" not in found):
        raise DataError(f"{place} has {', '.join(map(str, turn)) or 'nothing'}: it should have 'role' and 'content'")
    content = found.get("content")
    if isinstance(content, list):
        other = [part for part in content if not (isinstance(part, Mapping) and isinstance(part.get("text"), str))]
        if other:
            kind = other[0].get("type", "no text") if isinstance(other[0], Mapping) else "no text"
            raise DataError(f"{place} holds a part of type '{kind}': only parts of type 'text' are read")
        found["content"] = "".join(part["text"] for part in content)
    elif not isinstance(content, str | None):
        raise DataError(f"{place}: 'content' is {type(content).__name__}: it should be a text")
    return found
