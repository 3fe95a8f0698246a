"""Rows of the kinds that people have: what is read, what is learned, what is refused."""

import pytest
from row_examples import examples_of

from jllama.errors import InputError
from jllama.text.messages import Message, ignored, row_messages
from jllama.text.prompt import encode, prompt_ids, render
from jllama.text.style_template import style_template


def said(*turns, **more):
    """{"messages": ...} of turns that alternate."""
    roles = ["user", "assistant"] * len(turns)
    return {
        "messages": [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]
    } | more


SAME = [Message("user", "Hi"), Message("assistant", "Hello")]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {"instruction": "Hi", "input": None, "output": "Hello", "system": None, "history": None},
        {"prompt": "Hi", "completion": "Hello", "messages": None},
        {"question": "Hi", "answer": "Hello"},
        {"instruction": "Hi", "context": "", "response": "Hello"},
        said("Hi", "Hello"),
        said("Hi", "Hello", conversations=None, instruction="not this one"),
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"messages": [{"role": " User", "content": "Hi"}, {"role": "MODEL", "content": "Hello"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "H"}, "i"], "name": None},
                {"role": "assistant", "content": "Hello", "tool_calls": [], "weight": 1},
            ]
        },
        {"messages": [{"role": "system", "content": ""}, *said("Hi", "Hello")["messages"]]},
    ],
)
def test_every_kind_of_row_is_the_same_conversation_and_null_is_as_if_missing(row):
    assert row_messages(row) == SAME


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "And a second?", "output": "blue", "system": "One word.",
         "history": [["Name a colour.", "red"]]},
        {"prompt": "And a second?", "completion": "blue", "system_prompt": "One word.",
         "history": [["Name a colour.", "red"]]},
        said("Name a colour.", "red", "And a second?", "blue", system="One word."),
        {"messages": [{"role": "developer", "content": "One word."},
                      *said("Name a colour.", "red", "And a second?", "blue")["messages"]]},
    ],
)  # fmt: skip
def test_system_and_history_stand_before_the_question_in_order(row, tokenizer):
    assert row_messages(row) == [
        Message("system", "One word."),
        Message("user", "Name a colour."),
        Message("assistant", "red"),
        Message("user", "And a second?"),
        Message("assistant", "blue"),
    ]
    text = tokenizer.decode(prompt_ids("plain", row, tokenizer))
    assert text == "One word.\nName a colour.\nredAnd a second?\n"


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss": False}])
@pytest.mark.parametrize("style", ["plain", "llama2-chat", "llama3-chat"])
def test_an_answer_of_weight_0_and_its_end_are_context(mark, style, tokenizer):
    row = said("2+2?", "five", "Sure?", "four")
    row["messages"][1] |= mark
    row["messages"][3] |= {"weight": 1}
    (example,), _ = examples_of([row], tokenizer, style)
    *answer, end = example.ids[example.learned].tolist()
    assert tokenizer.decode(answer) == "four"
    assert end in tokenizer.stop_ids
    (all_learned,), _ = examples_of([said("2+2?", "five", "Sure?", "four")], tokenizer, style)
    assert example.ids.tolist() == all_learned.ids.tolist()


def test_weight_0_holds_also_where_prompts_are_learned_and_a_prompt_may_ask_for_it(tokenizer):
    row = said("a", "b", "c", "d")
    row["messages"][0]["train"] = True
    row["messages"][1]["weight"] = 0
    (example,), _ = examples_of([row], tokenizer, train_on_prompt=True)
    unlearned = example.ids[~example.learned].tolist()
    assert unlearned == [tokenizer.bos_id, *tokenizer.encode("b"), tokenizer.eos_id]
    (example,), _ = examples_of([row], tokenizer)
    assert tokenizer.decode(example.ids[example.learned].tolist()) == "a\nd"


def test_a_row_without_anything_to_learn_is_refused(tokenizer):
    row = said("a", "b")
    row["messages"][1]["weight"] = 0
    with pytest.raises(InputError, match="row 0: each answer is marked as not to be learned"):
        examples_of([row], tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": 3}, "columns 'id'; expected instruction/input/output, .* messages, conversations"),
        ({}, "columns none"),
        ({"prompt": 1.5}, "'prompt' is a number, expected text"),
        ({"prompt": "a", "completion": ["b"]}, "'completion' is a list, expected text"),
        ({"prompt": "\ud800"}, "'prompt' is not valid Unicode at character 0"),
        ({"prompt": "a", "system": 3}, "'system' is a number"),
        ({"prompt": "a", "history": "b"}, "'history' is not a list of"),
        ({"prompt": "a", "history": [["b"]]}, "'history' is not a list of"),
        ({"prompt": "a", "history": [["b", None]]}, "'history' is missing"),
        ({"text": "a", "system": "b"}, "'system' beside 'text'"),
        (said("a", "b", history=[["c", "d"]]), "'history' beside 'messages'"),
        ({"messages": "a"}, "'messages' is not a list"),
        ({"messages": [{"content": "a"}]}, "message 0: 'role' is missing"),
        ({"messages": [{"role": "user"}]}, "message 0: 'content' is missing"),
        ({"messages": [{"role": "judge", "content": "17"}]}, "message 0: role 'judge', expected"),
        ({"messages": [{"role": "user", "content": {}}]}, "'content' is an object"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "message 0: a part of the content is of type 'image_url'; only text is read",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "weight": 0.5}]},
            "message 0: 'weight' is 0.5, expected 0 or 1",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "train": []}]},
            r"message 0: 'train' is \[\], expected 0 or 1",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "reasoning_content": "b"}]},
            "no prompt style here knows reasoning_content",
        ),
    ],
)  # fmt: skip
def test_what_would_change_the_meaning_is_refused_by_its_name(row, message):
    with pytest.raises(InputError, match=message):
        row_messages(row)


def test_columns_that_nothing_is_made_of_are_told():
    assert ignored({"instruction": "a", "output": "b", "text": "c", "id": 0, "x": None}) == {
        "text", "id",
    }  # fmt: skip
    row = said("a", "b", prompt="a")
    row["messages"][0] |= {"name": "Ann", "weight": 1}
    assert ignored(row) == {"prompt", "messages.name"}


def test_a_text_is_learned_whole_and_is_no_prompt(tokenizer):
    for style in ("plain", "llama3-chat", "text"):
        (example,), _ = examples_of([{"text": "abc"}], tokenizer, style)
        ids = [tokenizer.bos_id, *tokenizer.encode("abc"), tokenizer.eos_id]
        assert example.ids.tolist() == ids
        assert example.learned.tolist() == [False] + [True] * 4
    with pytest.raises(InputError, match="a row of text has no prompt"):
        prompt_ids("plain", {"text": "abc"}, tokenizer)
    with pytest.raises(InputError, match="row 0: the answer is empty"):
        examples_of([{"text": " "}], tokenizer)


def test_style_text_takes_rows_of_text_alone_and_a_prompt_as_it_is(tokenizer):
    for row, roles in (
        ({"prompt": "a", "completion": "b"}, "user, assistant"),
        (said("a", "b", "c", "d", system="s"), "system, user, assistant, user, assistant"),
    ):
        with pytest.raises(InputError, match=f"row 0: --prompt-style text .* not for {roles}; giv"):
            examples_of([row], tokenizer, "text")
    ids = [tokenizer.bos_id, *tokenizer.encode("Once upon")]
    for row in ({"text": "Once upon"}, {"prompt": "Once upon", "completion": " a time"}):
        assert prompt_ids("text", row, tokenizer) == ids
    with pytest.raises(InputError, match="is one text, not system, user; drop the system message"):
        prompt_ids("text", {"prompt": "a", "system": "b"}, tokenizer)
    assert style_template("text", tokenizer) is None


def test_turns_after_the_last_answer_are_dropped_and_counted(tokenizer):
    rows = [said("a", "b"), said("a", "b", "Thanks"), said("a")]
    examples, problems = examples_of(rows, tokenizer, skip_bad_rows=1)
    first, second = examples
    assert first.ids.tolist() == second.ids.tolist()
    assert problems == ["row 2: no answer; expected output, completion or an assistant message"]
    ((note, noted),) = examples.notes.items()
    assert "nothing answers" in note
    assert list(noted) == [1]
    asked = encode(render("plain", row_messages(rows[1])), tokenizer)[0]
    assert prompt_ids("plain", rows[1], tokenizer) == asked  # of a prompt it is the question


def test_an_empty_answer_is_never_learned_but_may_be_context(tokenizer):
    row = said("Hello?", "", "Are you there?", "Yes.")
    with pytest.raises(InputError, match="row 0: message 1: the answer is empty"):
        examples_of([row], tokenizer)
    row["messages"][1]["weight"] = 0
    (example,), _ = examples_of([row], tokenizer)
    assert tokenizer.decode(example.ids[example.learned].tolist()) == "Yes."


@pytest.mark.parametrize(
    ("row", "note"),
    [
        (said("a", "red</s>"), "spell out special tokens"),
        (said("[INST] a [/INST]", "b"), "spell out special tokens"),
        ({"instruction": "a", "input": "<|eot_id|>", "output": "b"}, "spell out special tokens"),
        (said("", "Hi."), "have an empty question"),
        (
            {"messages": [{"role": "system", "content": "s", "train": False},
                          *said("a", "b")["messages"]]},
            "marked as not to be learned",
        ),
    ],
)  # fmt: skip
def test_what_one_should_know_of_a_row_is_noted(row, note, tokenizer):
    examples, _ = examples_of([said("a < b", "c|d>"), row], tokenizer)
    ((text, noted),) = examples.notes.items()
    assert note in text
    assert list(noted) == [1]


@pytest.mark.parametrize("style", ["plain", "llama2-chat"])
def test_later_turns_need_no_note_for_chat_shows_them(tokenizer, style):
    examples, _ = examples_of([said("a", "b", "c", "d")], tokenizer, style)
    assert not examples.notes
