"""Words of a Chinese text, as LongBench cuts it: jieba's precise mode with its default dictionary."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from kvpress.errors import InputError


def chinese_words(text: str) -> list[str]:
    """The words in order; joined, they are the text.

    Raises:
        InputError: jieba is not installed.
    """
    return _segmenter()(text)


@cache
def _segmenter() -> Callable[[str], list[str]]:
    """jieba's `lcut` with the dictionary of its wheel. It takes about a second to load, hence not at import."""
    try:
        import jieba
    except ImportError:
        raise InputError(
            "scoring Chinese answers needs the package jieba, which is not installed: "
            "`pip install 'kvpress-engine[eval]'` brings it"
        ) from None
    # jieba.initialize() would trust a cache file in the shared temporary folder; words added to the global segmenter
    # by somebody else would change scores
    segmenter = jieba.Tokenizer()
    segmenter.FREQ, segmenter.total = segmenter.gen_pfdict(segmenter.get_dict_file())
    segmenter.initialized = True
    cut: Callable[[str], list[str]] = segmenter.lcut
    return cut
