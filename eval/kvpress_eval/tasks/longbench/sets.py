"""The 21 data sets of LongBench v1 with their protocol constants.

Source: THUDM/LongBench 2e00731, LongBench/task.md, config/dataset2maxlen.json, pred.py and eval.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LongBenchSet:
    """One data set. items: of the full split. extended: whether there is an E split."""

    name: str
    kind: str
    items: int
    metric: str
    max_new_tokens: int
    extended: bool

    @property
    def chinese(self) -> bool:
        return self.name in ("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh")

    @property
    def chat(self) -> bool:
        """Few-shot and code sets are fed without a chat template (`pred.py`)."""
        return self.kind not in ("few-shot", "code")

    @property
    def spans(self) -> bool:
        """Whether answers are spans that a passage of the context may hold literally."""
        return self.kind in ("single-document QA", "multi-document QA")


#: the first line rule of `eval.py` belongs to the sets, hence the metrics named -firstline
SETS = (
    LongBenchSet("narrativeqa", "single-document QA", 200, "qa_f1", 128, False),
    LongBenchSet("qasper", "single-document QA", 200, "qa_f1", 128, True),
    LongBenchSet("multifieldqa_en", "single-document QA", 150, "qa_f1", 64, True),
    LongBenchSet("multifieldqa_zh", "single-document QA", 200, "qa_f1_zh", 64, False),
    LongBenchSet("hotpotqa", "multi-document QA", 200, "qa_f1", 32, True),
    LongBenchSet("2wikimqa", "multi-document QA", 200, "qa_f1", 32, True),
    LongBenchSet("musique", "multi-document QA", 200, "qa_f1", 32, False),
    LongBenchSet("dureader", "multi-document QA", 200, "rouge_l_zh", 128, False),
    LongBenchSet("gov_report", "summarization", 200, "rouge_l", 512, True),
    LongBenchSet("qmsum", "summarization", 200, "rouge_l", 512, False),
    LongBenchSet("multi_news", "summarization", 200, "rouge_l", 512, True),
    LongBenchSet("vcsum", "summarization", 200, "rouge_l_zh", 512, False),
    LongBenchSet("trec", "few-shot", 200, "classification-firstline", 64, True),
    LongBenchSet("triviaqa", "few-shot", 200, "qa_f1-firstline", 32, True),
    LongBenchSet("samsum", "few-shot", 200, "rouge_l-firstline", 128, True),
    LongBenchSet("lsht", "few-shot", 200, "classification-firstline", 64, False),
    LongBenchSet("passage_count", "synthetic", 200, "count", 32, True),
    LongBenchSet("passage_retrieval_en", "synthetic", 200, "retrieval", 32, True),
    LongBenchSet("passage_retrieval_zh", "synthetic", 200, "retrieval_zh", 32, False),
    LongBenchSet("lcc", "code", 500, "code_sim", 64, True),
    LongBenchSet("repobench-p", "code", 500, "code_sim", 64, True),
)
