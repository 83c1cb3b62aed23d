"""Registers RULER's tasks: three families of 13, each in the published order."""

from __future__ import annotations

from kvpress_eval.tasks.base import register
from kvpress_eval.tasks.ruler.common_words import CommonWords
from kvpress_eval.tasks.ruler.freq_words import FreqWords
from kvpress_eval.tasks.ruler.niah import SETTINGS, Niah
from kvpress_eval.tasks.ruler.qa import QuestionAnswering
from kvpress_eval.tasks.ruler.variable_tracking import VariableTracking
from kvpress_eval.tasks.ruler.variants import VARIANTS

for variant in VARIANTS:
    for task in SETTINGS:
        register(Niah(variant, task))
    register(VariableTracking(variant))
    register(CommonWords(variant))
    register(FreqWords(variant))
    register(QuestionAnswering(variant, "qa_1"))
    register(QuestionAnswering(variant, "qa_2"))
