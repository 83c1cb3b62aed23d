"""Prompts as token ids: borders of the segments, truncation inside the context only, one BOS, the prefix at the end."""

import pytest
from conftest import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpress.errors import InputError
from kvpress_eval.prompt import end_of_turn, render
from kvpress_eval.sample import Sample

LLAMA_LIKE = (
    "{{ bos_token }}{% for m in messages %}[user]{{ m['content'] | trim }}[/user]{% endfor %}[assistant]{{ '\n\n' }}"
)


def sample(**changes):
    fields = {
        "id": "1",
        "cluster": "1",
        "lead": "Read this.\n",
        "context": "alpha beta gamma delta epsilon zeta eta theta",
        "question": "\nWhich word is third?",
        "answer_prefix": " The word is",
        "answers": ("gamma",),
        "metric": "ruler_part",
        "max_new_tokens": 8,
    }
    return Sample(**{**fields, **changes})


def text(tokenizer, ids):
    return tokenizer.decode(list(ids), skip_special_tokens=False)


@pytest.fixture(scope="module")
def chat():
    return byte_tokenizer(LLAMA_LIKE)


@pytest.fixture(scope="module")
def merging():
    """A tokenizer whose tokens are words with the space in front, so that some reach over the segments' borders."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator([sample().text + sample().answer_prefix, "theta\nWhich delta epsilon"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_the_whole_prompt_is_the_frame_with_the_prefix_behind_the_assistant(chat):
    prompt = render(chat, sample())
    expected = f"<s>[user]{sample().text}[/user][assistant]\n\n The word is"
    assert text(chat, prompt.ids) == expected
    assert text(chat, prompt.ids[: prompt.n_context]) == f"<s>[user]{sample().lead}{sample().context}"
    assert text(chat, prompt.ids[-prompt.n_prefix :]) == " The word is"
    assert prompt.n_cut == 0


def test_white_space_at_the_edges_of_the_turn_is_kept(chat):
    # templates trim a turn; benchmarks whose prompt ends in a space need it
    prompt = render(chat, sample(question="\nThe final answer is: ", answer_prefix=""))
    assert "answer is: [/user]" in text(chat, prompt.ids)


def test_t3_sets_without_chat_get_none(chat):
    plain = "<s>" + sample().text + sample().answer_prefix
    assert text(chat, render(chat, sample(chat=False)).ids) == plain
    assert text(chat, render(chat, sample(), chat=False).ids) == plain
    assert text(byte_tokenizer(None), render(byte_tokenizer(None), sample()).ids) == plain


def test_t5_exactly_one_bos(chat):
    assert list(render(chat, sample()).ids).count(chat.bos_token_id) == 1
    assert list(render(chat, sample(chat=False)).ids).count(chat.bos_token_id) == 1
    doubled = byte_tokenizer("{{ bos_token }}" + LLAMA_LIKE)
    with pytest.raises(InputError, match="two BOS"):
        render(doubled, sample())


def test_t1_a_lost_prefix_is_noticed(chat, monkeypatch):
    assert text(chat, render(chat, sample()).ids).endswith(" The word is")
    real = type(chat).__call__

    def without_end(self, text, **options):
        return real(self, text.removesuffix(" The word is"), **options)

    monkeypatch.setattr(type(chat), "__call__", without_end)
    with pytest.raises(InputError, match="answer prefix"):
        render(chat, sample())


@pytest.mark.parametrize("n_cut", [1, 2, 9, 33])
def test_t14_truncation_takes_ids_out_of_the_middle_of_the_context(chat, n_cut):
    whole = render(chat, sample())
    room = len(whole.ids) - n_cut
    cut = render(chat, sample(), max_tokens=room)
    assert len(cut.ids) == room
    assert cut.n_cut == len(whole.ids) - room
    n_head = len("<s>") - 2 + len("[user]Read this.\n")
    kept = cut.n_context - n_head
    first, last = kept - kept // 2, kept // 2
    context = whole.ids[n_head : whole.n_context]
    assert cut.ids[:n_head] == whole.ids[:n_head]
    assert cut.ids[n_head : cut.n_context] == context[:first] + context[len(context) - last :]
    assert cut.ids[cut.n_context :] == whole.ids[whole.n_context :]


def test_truncation_that_would_eat_the_question_is_refused(chat):
    with pytest.raises(InputError, match="without its context"):
        render(chat, sample(), max_tokens=40)


def test_evidence_that_truncation_took_is_counted(chat):
    asked = sample(evidence=("alpha", "delta", "theta"))
    assert render(chat, asked).evidence_left == 1
    room = len(render(chat, asked).ids) - 20  # of the 45 characters of the context
    assert render(chat, asked, max_tokens=room).evidence_left == pytest.approx(2 / 3)
    assert render(chat, sample()).evidence_left is None
    # both halves together must not make up a string that is in neither
    assert render(chat, sample(evidence=("alpha beta ta eta theta",)), max_tokens=room).evidence_left == 0


def test_facts_are_the_tokens_of_the_evidence(chat):
    asked = sample(evidence=("beta", "zeta eta", "not there"))
    prompt = render(chat, asked)
    assert [text(chat, prompt.ids[start:end]) for start, end in prompt.facts] == ["beta", "zeta eta"]
    shorter = render(chat, asked, max_tokens=len(prompt.ids) - 12)  # takes the middle of the context out
    assert [text(chat, shorter.ids[start:end]) for start, end in shorter.facts] == ["beta", "zeta eta"]
    assert shorter.facts[1][0] == prompt.facts[1][0] - 12
    without = render(chat, asked, max_tokens=len(prompt.ids) - 33)
    assert [text(chat, without.ids[start:end]) for start, end in without.facts] == []
    assert render(chat, sample()).facts == ()


def test_a_fact_whose_tokens_reach_over_its_ends_is_whole(merging):
    prompt = render(merging, sample(evidence=("gamma delta",)))
    ((start, end),) = prompt.facts
    assert "gamma delta" in text(merging, prompt.ids[start:end])
    assert "gamma delta" not in text(merging, prompt.ids[start + 1 : end])
    assert "gamma delta" not in text(merging, prompt.ids[start : end - 1])


def test_a_token_over_the_border_belongs_to_the_question(merging):
    prompts = [render(merging, sample(question=q)) for q in ("\nWhich word is third?", "theta?", " Which?")]
    assert len({prompt.n_context for prompt in prompts}) > 1  # in some a token reaches over the border
    for prompt in prompts:
        assert (sample().lead + sample().context).startswith(merging.decode(list(prompt.ids[: prompt.n_context])))
    whole = merging.decode(list(prompts[0].ids))
    assert whole == sample().text + sample().answer_prefix


def test_alternative_evidence_is_there_as_long_as_one_of_it_is(chat):
    room = len(render(chat, sample()).ids) - 20
    some = sample(evidence=("alpha", "delta"), any_evidence=True)
    assert render(chat, some, max_tokens=room).evidence_left == 1
    assert render(chat, sample(evidence=("delta",), any_evidence=True), max_tokens=room).evidence_left == 0


def test_a_prompt_does_not_depend_on_the_day():
    dated = byte_tokenizer(
        "{{ bos_token }}{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }} {{ date_string }}>"
    )
    assert text(dated, render(dated, sample()).ids).startswith("<s>26 Jul 2024 Read this.")


def test_missing_bos_and_control_tokens_in_the_context_are_flagged(chat):
    assert render(chat, sample()).flags == ()
    bare = byte_tokenizer("{% for m in messages %}user: {{ m['content'] }}{% endfor %}")
    assert render(bare, sample()).flags == ("no_bos",)
    assert render(bare, sample(chat=False)).flags == ()
    assert render(chat, sample(context="a <s> b </s> c")).flags == ("special_tokens_in_context",)


def test_the_end_of_a_turn_is_a_stop():
    turns = byte_tokenizer("{{ bos_token }}{% for m in messages %}user: {{ m['content'] }}</s>{% endfor %}assistant: ")
    assert end_of_turn(turns) == {turns.eos_token_id}
    assert end_of_turn(byte_tokenizer()) == frozenset()
    assert end_of_turn(byte_tokenizer(None)) == frozenset()


def test_nothing_behind_the_context(chat):
    ending = sample(question="", answer_prefix="", chat=False)
    whole = render(chat, ending)
    for n_cut in (1, 2, 40, 44, 45):
        assert len(render(chat, ending, max_tokens=len(whole.ids) - n_cut).ids) == len(whole.ids) - n_cut


def test_prompts_of_one_context_share_its_digest(chat):
    a, b = render(chat, sample()), render(chat, sample(question="\nWhich word is last?"))
    assert a.context_sha == b.context_sha
    assert a.sha != b.sha
    assert render(chat, sample(context="another")).context_sha != a.context_sha


def test_a_slow_tokenizer_is_refused(chat, monkeypatch):
    monkeypatch.setattr(type(chat), "is_fast", property(lambda self: False))
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        render(chat, sample())


@settings(max_examples=60, deadline=None)
@given(
    lead=st.text("ab \n", max_size=9),
    context=st.text("xyz é\n", min_size=8, max_size=60),
    question=st.text("pq? \n", max_size=9),
    room=st.integers(20, 110),
)
def test_any_prompt_is_its_frame_minus_a_run_of_context(chat, lead, context, question, room):
    asked = sample(lead=lead, context=context, question=question)
    whole = render(chat, asked)
    if len(whole.ids) - whole.n_context + len(lead) + 8 > room:
        return
    prompt = render(chat, asked, max_tokens=room)
    assert len(prompt.ids) == min(room, len(whole.ids))
    n_tail = len(whole.ids) - whole.n_context
    assert prompt.ids[len(prompt.ids) - n_tail :] == whole.ids[whole.n_context :]
    assert prompt.n_context + n_tail == len(prompt.ids)
