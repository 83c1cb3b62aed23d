"""At 100 % budget the tokens are those of transformers' own cache: every family, every way of generating."""

import pytest
import torch
from tiny_models import CONFIGS, prompts, tiny
from transformers import DynamicCache

import kvpress

pytestmark = pytest.mark.usefixtures("store")

GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


def both(model, seed=0, **inputs):
    """Tokens of transformers' cache and of ours."""
    torch.manual_seed(seed)
    expected = model.generate(**inputs)
    torch.manual_seed(seed)
    with kvpress.compress(model, "full"):
        return expected, model.generate(**inputs)


@pytest.fixture(params=sorted(CONFIGS))
def model(request):
    return tiny(request.param)


def test_greedy(model):
    ids, _ = prompts(1, 30)
    expected, got = both(model, input_ids=ids, **GREEDY)
    assert torch.equal(expected, got)


def test_left_padded_batch(model):
    ids, mask = prompts(3, 30, [9, 0, 17])
    expected, got = both(model, input_ids=ids, attention_mask=mask, **GREEDY)
    assert torch.equal(expected, got)


def test_three_beams(model):
    ids, mask = prompts(2, 30, [9, 0])
    expected, got = both(model, input_ids=ids, attention_mask=mask, num_beams=3, **GREEDY)
    assert torch.equal(expected, got)


def test_sampling_with_a_seed(model):
    ids, mask = prompts(2, 30, [9, 0])
    settings = {**GREEDY, "do_sample": True, "temperature": 0.8, "top_k": 20, "num_return_sequences": 2}
    expected, got = both(model, seed=7, input_ids=ids, attention_mask=mask, **settings)
    assert torch.equal(expected, got)
    other, _ = both(model, seed=8, input_ids=ids, attention_mask=mask, **settings)
    assert not torch.equal(expected, other)  # the seed matters, so equality above means something


def test_chunked_prefill(model):
    ids, mask = prompts(2, 30, [9, 0])
    expected, got = both(model, input_ids=ids, attention_mask=mask, prefill_chunk_size=8, **GREEDY)
    assert torch.equal(expected, got)


def test_assisted_decoding(model):
    ids, _ = prompts(1, 30)
    family = next(name for name in CONFIGS if tiny(name) is model)
    assistant = tiny(family, layers=1 if len(set(getattr(model.config, "layer_types", None) or [])) < 2 else 2)
    expected, got = both(model, input_ids=ids, assistant_model=assistant, **GREEDY)
    assert torch.equal(expected, got)


def test_second_turn_on_the_same_cache(model):
    ids, mask = prompts(2, 20, [5, 0])
    more, _ = prompts(2, 9, seed=1)

    def two_turns(cache):
        first = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **GREEDY)
        everything = torch.cat([first, more], 1)
        full_mask = torch.cat([mask, torch.ones(2, everything.shape[1] - mask.shape[1], dtype=mask.dtype)], 1)
        return model.generate(input_ids=everything, attention_mask=full_mask, past_key_values=cache, **GREEDY)

    expected = two_turns(DynamicCache(config=model.config))
    with kvpress.CompressedCache(model, "full") as cache:
        assert torch.equal(expected, two_turns(cache))


def test_plain_forward_passes(model):
    """Without generate: a prompt, then tokens one by one, by hand."""
    ids, _ = prompts(2, 20)
    with torch.no_grad(), kvpress.compress(model, "full"):
        out = model(input_ids=ids[:, :15], use_cache=True)
        assert isinstance(out.past_key_values, kvpress.CompressedCache)
        steps = [out.logits] + [
            model(input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values).logits for i in range(15, 20)
        ]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    torch.testing.assert_close(torch.cat(steps, 1), expected, atol=2e-4, rtol=1e-4)
