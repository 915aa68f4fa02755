import pytest
from tokenizers import AddedToken

import tiny
from fastguard.data.chat import encode, encode_prompt, end_of_turn, is_cut
from fastguard.data.conversation import (
    EmptyText,
    as_text,
    asked,
    checked_answer,
    checked_prompt,
    identity,
    last_turn,
    split_conversation,
)
from fastguard.data.sets import Example

TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "how are you"},
]


def said(role, content):
    return {"role": role, "content": content}


def test_prompts_in_all_their_forms():
    assert checked_prompt("hi") == "hi"
    assert checked_prompt("hi", "be kind") == [said("system", "be kind"), said("user", "hi")]
    assert checked_prompt(TURNS, "be kind") == TURNS  # its own system prompt counts
    assert checked_prompt(TURNS[1:], "be kind") == [said("system", "be kind"), *TURNS[1:]]
    assert checked_prompt(({**TURNS[1], "weight": 1, "tool_calls": None},)) == [TURNS[1]]
    assert split_conversation([*TURNS, said("assistant", "well")]) == (TURNS, "well")
    assert last_turn(TURNS) == "how are you" and asked(TURNS) == "hi\nhow are you"
    assert as_text(TURNS).splitlines()[0] == "system: be brief" and as_text("hi") == "hi"
    assert identity("hi  you") == identity([said("user", "hi you")]) != identity(TURNS)


def test_answers_in_all_their_forms():
    for answer in ("yes", said("assistant", "yes"), [said("assistant", "yes")]):
        assert checked_answer(answer) == "yes"


@pytest.mark.parametrize(
    ("read", "value", "kind", "error"),
    [
        (checked_prompt, 3, TypeError, "expected a string or a list of messages, got int"),
        (checked_prompt, None, TypeError, "got null"),
        (checked_prompt, " ", EmptyText, "got an empty string"),
        (checked_prompt, [], ValueError, "at least one message"),
        (checked_prompt, ["hi"], TypeError, "message 0: expected a mapping with role and content, got a string"),
        (
            checked_prompt,
            [{"from": "human", "value": "hi"}],
            TypeError,
            "message 0: expected the keys role and content",
        ),
        (checked_prompt, [said("human", "hi")], ValueError, "message 0: expected a role of system, .*got 'human'"),
        (checked_prompt, [said("user", ["hi"])], TypeError, "message 0: expected a string as content, got a list"),
        (checked_prompt, [said("user", "")], EmptyText, r"message 0 \(user\)"),
        (checked_prompt, [*TURNS, said("assistant", "x")], ValueError, "end with the user's turn, got assistant's"),
        (checked_prompt, [TURNS[1], TURNS[0]], ValueError, "message 1: a system message comes first"),
        (checked_prompt, [{**TURNS[1], "tool_calls": [1]}], ValueError, "message 0: tool calls"),
        (checked_answer, said("user", "x"), ValueError, "expected one assistant's message, got user"),
        (checked_answer, [said("assistant", "x")] * 2, ValueError, "got assistant, assistant"),
        (checked_answer, 1.5, TypeError, "got float"),
        (
            split_conversation,
            TURNS,
            ValueError,
            "ends with an answer of the assistant, got system, user, assistant, user",
        ),
        (split_conversation, [said("assistant", "x")], ValueError, "got assistant"),
        (split_conversation, "hi", TypeError, "expected a list of messages, got a string"),
    ],
)
def test_what_is_refused(read, value, kind, error):
    with pytest.raises(kind, match=error):
        read(value)


def test_several_turns_go_through_the_tokenizers_own_template():
    tokenizer = tiny.tokenizer()
    e = encode(tokenizer, Example(TURNS, "fine"), 16)
    whole = tokenizer.apply_chat_template([*TURNS, said("assistant", "fine")], tokenize=False)
    assert tokenizer.decode(e.ids) == whole.removesuffix("\n")
    assert list(e.ids[: e.prompt]) == encode_prompt(tokenizer, TURNS)
    assert not is_cut(tokenizer, e) and is_cut(tokenizer, encode(tokenizer, Example(TURNS, "fine"), 4))


def gemma_like():
    """Turns end with a token of their own, which is not the end of a sequence; no system turns."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([AddedToken("<end_of_turn>", special=True)])
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{{ m['role'] }}: {{ m['content'] }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}model: {% endif %}"
    )
    return tokenizer


def test_an_answer_ends_as_the_template_ends_a_turn():
    tokenizer = gemma_like()
    assert tokenizer.decode(encode(tokenizer, Example("hi", "yes"), 16).ids) == (
        "user: hi<end_of_turn>\nmodel: yes<end_of_turn>"
    )
    plain = tiny.tokenizer()
    assert end_of_turn(plain) == plain.eos_token_id
    plain.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"  # says nothing
    assert end_of_turn(plain) == plain.eos_token_id


def test_a_template_that_refuses_and_one_that_is_missing():
    with pytest.raises(ValueError, match=r"the chat template refuses a conversation of system, user.*no system here"):
        encode_prompt(gemma_like(), TURNS[:2])
    bare = tiny.tokenizer()
    bare.chat_template, bare.name_or_path = None, "some/base-model"
    with pytest.raises(ValueError, match="tokenizer: 'some/base-model' has no chat template"):
        encode_prompt(bare, "hi")
