"""The engine's rules for when a cache is cut, when an answer ends, and which arms may share what."""

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from eval_support import Toy

import kvpress
from kvpress_eval import engine as engine_module
from kvpress_eval.arms import Arm
from kvpress_eval.data import Data
from kvpress_eval.decode import Stop, decode
from kvpress_eval.engine import Engine
from kvpress_eval.prompt import render
from kvpress_eval.tasks import Request

TOKENIZER = byte_tokenizer()


def contract(name="snapkv", **slots):
    slots = {"protection": {"kind": "standard", "sinks": 2, "recent": 4}, **slots}
    return kvpress.Contract.load(name, 0.4).swap(**slots)


def items(n=2, **changes):
    samples = list(Toy("toy/engine", **changes).samples(Request(TOKENIZER, Data(), limit=n)))
    return samples, [render(TOKENIZER, sample) for sample in samples]


def make(*contracts, **options):
    arms = [Arm("full", kvpress.Contract.load("full"))]
    arms += [Arm(f"arm{i}", each) for i, each in enumerate(contracts)]
    return Engine(options.pop("model", None) or tiny_llama(), TOKENIZER, arms, **options)


def spied_sets(monkeypatch):
    """Kept columns of every cache at the moment when its answer begins."""
    seen = []
    real = engine_module.join

    def join(caches):
        seen.append(
            [[p.tolist() for _, _, p in layer.storage.store.segments()] for layer in caches[1].compressed_layers]
        )
        return real(caches)

    monkeypatch.setattr(engine_module, "join", join)
    return seen


def test_t15_a_query_agnostic_cut_does_not_know_the_question(monkeypatch):
    engine, seen = make(contract()), spied_sets(monkeypatch)
    samples, _ = items(1)
    prompts = [
        render(TOKENIZER, type(samples[0])(**{**samples[0].__dict__, "question": question}))
        for question in ("\nWhat is hidden?", "\nHow many words are there in all of this, and which?")
    ]
    for prompt in prompts:
        engine.answer([prompt], samples, aware=False)
    blind = seen[:]
    seen.clear()
    for prompt in prompts:
        engine.answer([prompt], samples, aware=True)
    assert blind[0] == blind[1]
    assert seen[0] != seen[1]
    assert max(max(map(max, layer)) for layer in blind[0]) < prompts[0].n_context


def test_t15_both_questions_of_one_context_are_asked_of_the_same_cut(monkeypatch):
    engine, seen = make(contract()), spied_sets(monkeypatch)
    samples, prompts = items(2)
    assert prompts[0].context_sha == prompts[1].context_sha
    engine.answer(prompts, samples, aware=False)
    assert len(seen) == 2
    assert seen[0] == seen[1]


def test_t4_every_stop_id_ends_an_answer():
    model = tiny_llama()
    samples, prompts = items(1, max_new_tokens=6)
    whole = make(model=model).answer(prompts, samples, aware=True)[0][0]
    assert (whole.stopped, whole.n_new) == ("length", 6)
    ids = torch.tensor([prompts[0].ids])
    new = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=2)[0, ids.shape[1] :].tolist()
    third = new[2]
    model.generation_config.eos_token_id = [1, third]
    short = make(model=model).answer(prompts, samples, aware=True)[0][0]
    assert (short.stopped, short.n_new) == ("eos", new.index(third) + 1)
    assert short.text == TOKENIZER.decode(new[: new.index(third)], skip_special_tokens=True)


def test_t2_only_new_tokens_are_in_the_prediction():
    samples, prompts = items(2)
    for answers, prompt in zip(make(contract()).answer(prompts, samples, aware=True), prompts, strict=True):
        for answer in answers:
            assert len(TOKENIZER(answer.text, add_special_tokens=False)["input_ids"]) <= answer.n_new * 4
            assert TOKENIZER.decode(list(prompt.ids[-12:])) not in answer.text


def fixed_logits(rows):
    """A model that says what it is told: rows of token ids, one for each row of the batch."""

    class Told:
        def __init__(self):
            self.step, self.alive = 0, list(range(len(rows)))

        def __call__(self, input_ids, past_key_values, use_cache, logits_to_keep):
            self.step += 1
            self.alive = (
                [self.alive[i] for i in past_key_values.rows] if past_key_values.rows is not None else self.alive
            )
            past_key_values.rows = None
            assert input_ids.flatten().tolist() == [rows[r][self.step - 1] for r in self.alive]
            logits = torch.zeros(len(self.alive), 1, 20)
            for place, r in enumerate(self.alive):
                logits[place, 0, rows[r][self.step]] = 1
            return type("Output", (), {"logits": logits})

    first = torch.zeros(len(rows), 20)
    for r, row in enumerate(rows):
        first[r, row[0]] = 1
    return Told(), first


class Rows:
    rows = None


@pytest.fixture
def rows_leave(monkeypatch):
    monkeypatch.setattr("kvpress_eval.decode._keep_rows", lambda cache, rows: setattr(cache, "rows", rows))


def test_t17_every_row_of_a_batch_is_decoded_to_its_own_end(rows_leave):
    rows = [[5, 6, 1], [7, 1], [8, 9, 10, 11, 12], [13, 14, 15, 1]]
    model, first = fixed_logits(rows)
    found = decode(model, Rows(), first, Stop(frozenset({1}), frozenset(), 5))
    assert [one.ids for one in found] == rows
    assert [one.stopped for one in found] == ["eos", "eos", "length", "eos"]
    assert [one.answer for one in found] == [[5, 6], [7], [8, 9, 10, 11, 12], [13, 14, 15]]
    assert all(
        a.seconds <= b.seconds
        for a, b in zip([found[1], found[0], found[3]], [found[0], found[3], found[2]], strict=True)
    )


def test_samsum_ends_at_a_newline_but_not_before_its_first_token(rows_leave):
    model, first = fixed_logits([[5, 3, 9]])
    first[0, 3], first[0, 1] = 5.0, 4.0  # it would rather begin with a newline, or with nothing
    found = decode(model, Rows(), first, Stop(frozenset({1}), frozenset({3}), 5))[0]
    assert (found.ids, found.stopped, found.answer) == ([5, 3], "newline", [5])


@pytest.mark.parametrize("chunk", [16, 50])
def test_reading_in_chunks_changes_nothing(chunk):
    samples, prompts = items(2)
    arms = contract(), contract("h2o", protection={"kind": "standard", "recent_share": 0.5})
    model = tiny_llama()
    whole = make(*arms, model=model).answer(prompts, samples, aware=True)
    parts = make(*arms, model=model, chunk=chunk).answer(prompts, samples, aware=True)
    assert [[a.text for a in ones] for ones in whole] == [[a.text for a in ones] for ones in parts]
    assert [[a.held.kept_bytes for a in ones] for ones in whole] == [
        [a.held.kept_bytes for a in ones] for ones in parts
    ]


def test_arms_that_evict_between_chunks_or_while_answering_go_their_own_way():
    per_chunk = contract(schedule={"kind": "per_prefill_chunk"})
    later = contract(schedule={"kind": "every_decode_steps", "n": 2})
    model = tiny_llama()
    samples, prompts = items(1, max_new_tokens=8)
    engine = make(contract(), per_chunk, later, model=model, chunk=32)
    answers = engine.answer(prompts, samples, aware=True)[0]
    assert [answer.decode_rows for answer in answers] == [3, 3, 3, 1]
    ids = torch.tensor([prompts[0].ids])
    for answer, each in zip(answers[1:], (contract(), per_chunk, later), strict=True):
        with kvpress.compress(model, each):
            out = model.generate(
                ids, max_new_tokens=8, do_sample=False, pad_token_id=2,
                **({"prefill_chunk_size": 32} if each is per_chunk else {}),
            )  # fmt: skip
        assert answer.text == TOKENIZER.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert not engine.shares_contexts
    assert make(contract(), model=model).shares_contexts
    assert not make(contract("oracle_mass"), model=model).shares_contexts


def test_the_model_is_as_it_was_before():
    model = tiny_llama()
    before = model.config._attn_implementation
    samples, prompts = items(1)
    engine = make(contract(), contract("kvzip", query_law={"kind": "reconstruction", "chunk": 64}), model=model)
    engine.answer(prompts, samples, aware=True)
    engine.repeat_full(prompts[0], samples[0])
    assert model.config._attn_implementation == before
    assert "generate" not in vars(model)
    assert not model._forward_hooks
