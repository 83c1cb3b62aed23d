"""From a sample to the token ids that the model reads, with the borders of context, question and answer prefix kept.

Ids are made once, from the whole text, and never decoded and encoded again: truncation takes ids out of the middle of
the context and touches nothing else (benchmarks that truncate text and encode it anew change its length and lose
special tokens).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from kvpress.errors import InputError
from kvpress_eval.sample import Sample

#: templates that write today's date get this one, Llama 3's own default: a run must not depend on its day
DATE = "26 Jul 2024"
#: stands for the user's turn while a chat template is rendered; templates trim a turn, so it begins and ends in letters
_TURN = "KVPRESSUSERTURN"


@dataclass(frozen=True)
class Prompt:
    """Token ids of one prompt: `ids[:n_context]` is everything up to the end of the context, chat header included.

    n_cut: ids that truncation took out of the context. n_prefix: ids of the forced answer prefix, at the end.
    evidence_left: share of what the sample's answer needs that survived truncation; None where it names none. facts: [start,
        end) ids of each piece of evidence that did.
    flags: what is odd about it.
    """

    ids: tuple[int, ...]
    n_context: int
    n_prefix: int
    n_cut: int = 0
    evidence_left: float | None = None
    facts: tuple[tuple[int, int], ...] = ()
    flags: tuple[str, ...] = ()

    @property
    def sha(self) -> str:
        """Digest of the ids."""
        return hashlib.sha256(array("q", self.ids).tobytes()).hexdigest()[:16]

    @property
    def context_sha(self) -> str:
        """Digest of the ids up to the end of the context: prompts that share it can share a prefill."""
        return hashlib.sha256(array("q", self.ids[: self.n_context]).tobytes()).hexdigest()[:16]


def render(
    tokenizer: PreTrainedTokenizerBase, sample: Sample, *, chat: bool | None = None, max_tokens: int | None = None
) -> Prompt:
    """Token ids of a sample's prompt.

    chat: None uses the chat template where the tokenizer has one and the sample allows it; False never does.
    max_tokens: of the whole prompt; what is too much is taken out of the middle of the context (LongBench's rule). None
        truncates nothing.

    Raises:
        InputError: the tokenizer cannot say where its tokens come from, the prompt has more than one BOS, the answer
            prefix is not at its end, or the prompt does not fit even without its context.
    """
    before, after = _frame(tokenizer, chat is not False and sample.chat)
    head, context, question = before + sample.lead, sample.context, sample.question + after
    ids, spans = _encode(tokenizer, head + context + question + sample.answer_prefix, special=not before)
    context_end, prefix_start = len(head) + len(context), len(head) + len(context) + len(question)
    # a token that reaches over a border belongs to what comes behind it: the context's ids must not know the question
    n_context = next((i for i, (_, end) in enumerate(spans) if end > context_end), len(ids))
    n_head = min(next((i for i, (start, end) in enumerate(spans) if end > len(head)), len(ids)), n_context)
    n_prefix = sum(end > prefix_start for _, end in spans) if sample.answer_prefix else 0
    _check_bos(tokenizer, ids)
    _check_prefix(tokenizer, ids, n_prefix, sample.answer_prefix)
    n_cut = max(len(ids) - max_tokens, 0) if max_tokens is not None else 0
    if n_cut > n_context - n_head:
        raise InputError(
            f"sample '{sample.id}' needs {len(ids) - (n_context - n_head):,} tokens without its context, but the prompt may "
            f"have {max_tokens:,}: raise the length"
        )
    text, gone = context, slice(0)
    if n_cut:
        first, last = _kept_halves(n_context - n_head, n_cut)
        left, right = n_head + first, n_context - last
        resumes = spans[right][0] - len(head) if right < n_context else len(context)
        text = context[: max(spans[left][0] - len(head), 0)] + "\0" + context[resumes:]
        ids, gone = ids[:left] + ids[right:], slice(left, right)
    return Prompt(
        ids=tuple(ids),
        n_context=n_context - n_cut,
        n_prefix=n_prefix,
        n_cut=n_cut,
        evidence_left=_evidence_left(sample, text),
        facts=tuple(_facts(sample, len(head), spans, gone)),
        flags=tuple(_flags(tokenizer, ids, n_head, n_context - n_cut)),
    )


def _evidence_left(sample: Sample, text: str) -> float | None:
    if not sample.evidence:
        return None
    left = [piece in text for piece in sample.evidence]
    return float(any(left)) if sample.any_evidence else sum(left) / len(left)


def _facts(sample: Sample, n_head: int, spans: list[tuple[int, int]], gone: slice) -> Iterator[tuple[int, int]]:
    """[start, end) ids of the first occurrence of each piece of evidence, of those that truncation left whole.

    n_head: characters before the context. spans: of the ids before truncation; `gone` are those that it took.
    """
    for piece in sample.evidence:
        at = sample.context.find(piece)
        if at < 0 or not piece:
            continue
        first, last = n_head + at, n_head + at + len(piece)
        inside = [i for i, (start, end) in enumerate(spans) if start < last and end > first]
        if gone.stop and any(gone.start <= i < gone.stop for i in inside):
            continue
        shift = gone.stop - gone.start if gone.stop and inside[0] >= gone.stop else 0
        yield inside[0] - shift, inside[-1] + 1 - shift


def _flags(tokenizer: PreTrainedTokenizerBase, ids: list[int], n_head: int, n_context: int) -> Iterator[str]:
    """ "no_bos": a plain text would begin with BOS, this prompt does not; "special_tokens_in_context": text that is read
    as control tokens."""
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("")["input_ids"][:1] == [bos] and ids[:1] != [bos]:
        yield "no_bos"
    if not set(tokenizer.all_special_ids).isdisjoint(ids[n_head:n_context]):
        yield "special_tokens_in_context"


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The special token by which the chat template ends a turn; a model that was trained with it ends its answers so."""
    after = _frame(tokenizer, True)[1]
    first = tokenizer(after, add_special_tokens=False)["input_ids"][:1] if after else []
    return frozenset(first) & frozenset(tokenizer.all_special_ids)


def _kept_halves(n_tokens: int, n_cut: int) -> tuple[int, int]:
    """How many ids of the context stay at its beginning and at its end; the beginning gets an odd one."""
    kept = n_tokens - n_cut
    return kept - kept // 2, kept // 2


def _frame(tokenizer: PreTrainedTokenizerBase, chat: bool) -> tuple[str, str]:
    """Text of the chat template before and behind the user's turn; empty without a template."""
    if not chat or not tokenizer.chat_template:
        return "", ""
    return _chat_frame(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _chat_frame(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, str]:
    if "strftime_now" in template:
        template = "{%- macro strftime_now(format) -%}" + DATE + "{%- endmacro -%}" + template
    rendered = str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": _TURN}],
            chat_template=template,
            date_string=DATE,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,  # a thinking model would spend the answer's tokens on its thoughts
        )
    )
    if rendered.count(_TURN) != 1:
        raise InputError("this tokenizer's chat template does not show the user's message once: run with --no-chat")
    before, after = rendered.split(_TURN)
    return before, after


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and their character spans; `special` adds what the tokenizer puts around a text (a chat template has its own)."""
    if not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__} does not say which characters its tokens come from: use a fast tokenizer "
            f"(a tokenizer.json)"
        )
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    ids, spans = list(encoded["input_ids"]), [tuple(span) for span in encoded["offset_mapping"]]
    # an EOS that the tokenizer adds behind a plain text would end the answer before it begins
    while special and ids and ids[-1] == tokenizer.eos_token_id and spans[-1] == (0, 0):
        ids, spans = ids[:-1], spans[:-1]
    return ids, spans


def _check_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> None:
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise InputError("the prompt begins with two BOS tokens: the chat template and the tokenizer both add one")


def _check_prefix(tokenizer: PreTrainedTokenizerBase, ids: list[int], n_prefix: int, prefix: str) -> None:
    if prefix and not str(tokenizer.decode(ids[len(ids) - n_prefix :])).rstrip().endswith(prefix.strip()):
        raise InputError(f"the answer prefix {prefix!r} is not at the end of the prompt's tokens")
