"""Support coupling phi of a text: how much of it only makes sense together with other parts of it.

arXiv 2605.08234 section 4 takes a grammar score "from code-line density, label-marker density and density of
delimiter-bounded records", low below 0.10, and gives neither patterns nor weights. These are ours:

    phi = sum over lines of weight(line) * length(line)  /  sum over lines of length(line)

length: characters that are not white space, so that it does not matter how prose is wrapped. A line is the first of:
a record (table rows, JSON, markup, log lines), code, labelled ("Question: ...", "[3] ..."), or prose. Prose weighs
nothing. Of a labelled line only the first `label_reach` characters count: a label binds what stands next to it, not
the paragraph that follows.

    phi(context)              # one text
    task_coupling(contexts)   # of a task, the median; fix it before any score is seen
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import median

from pydantic import BaseModel, ConfigDict, Field

from kvpress.errors import InputError


class Coupling(BaseModel):
    """Weights of the grammar score.

    code, record: 1, for a line of code needs its block and its definitions, a row its header and its other fields.
    label: 0.5, for a label needs its own content only.
    label_reach: characters of a labelled line that count: one line of a page.
    min_fields: fields of a row of a table; two are a pair that any comma makes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    code: float = Field(default=1.0, ge=0, le=1)
    record: float = Field(default=1.0, ge=0, le=1)
    label: float = Field(default=0.5, ge=0, le=1)
    label_reach: int = Field(default=80, ge=1)
    min_fields: int = Field(default=3, ge=2)


#: a line of code by its shape; words of prose at the start of a wrapped line ("for the", "return to") must not do
_CODE = re.compile(
    r"""
      [{}()\[\];,]+ $                                                     # nothing but closing marks
    | .* (?: [{;] | \) \s* (?: -> [^:]+ )? : ) $                          # ends as a statement or a block does
    | (?: def | class | async | func | fn | function ) \s \w+ \s* [(:<{]
    | (?: if | elif | for | while | with | except | try | else | finally | match | case )\b [^.?!]* : $
    | import \s [\w.]+ (?: \s as \s \w+ )? $ | from \s [\w.]+ \s import \s .+
    | (?: return | yield | raise | del | assert ) (?: \s [^\s]+ | \s .* [()\[\]=+*/<>] .* )? $
    | (?: pass | break | continue ) $
    | \# (?: include | define | ifdef | endif | pragma )\b | // | /\* | \*/ | @ \w+
    | (?: const | let | var | val | static | public | private | protected | final ) \s \w+ .* [=({;]
    | (?: [\w.]+ \s )? [\w.\[\]'"]+ (?: \s* , \s* [\w.\[\]'"]+ )* (?: \s* : \s* [\w\[\], .|]+ )? \s* [-+*/|&:]? = [^=]
    | [\w.]+ \( .* \) ,? $
    """,
    re.VERBOSE,
)
#: one line that is a record by itself
_RECORD = re.compile(
    r"""
      [{\[] .* [:,] .* [}\]] ,? $                                         # JSON on one line
    | "[^"]+" \s* : \s .*                                                 # a field of JSON
    | < /? \w [^<>]* > .* | .* </ \w+ > $                                 # markup
    | \|? (?: [^|]* \| ){2,} .*                                           # a row between bars
    | .{0,40} \d{4}-\d\d-\d\d [T\s] \d\d:\d\d .*                          # a log line by its time
    | [A-Z][a-z]{2} \s{1,2} \d{1,2} \s \d\d:\d\d:\d\d \s .*
    """,
    re.VERBOSE,
)
_LABEL = re.compile(
    r"""
      [-*\#>\s]* [A-Z\d][\w'#.-]* (?: \s [\w'#.&/-]+ ){0,3} \s? [:：]       # Passage 3: ...
    | [-*\s]* [\w.-]+ \s? [:：] (?: \s | $ )                                # key: value
    | \[ [\w\s]{1,20} \]
    """,
    re.VERBOSE,
)
_PAIR = re.compile(r"\b[\w.]+=\S+")
_DELIMITERS = re.compile(r"\t|;|[,:](?=\S)|\s{3,}(?=\S)")
#: characters of either end of a line that its kind is read from: a line of a megabyte costs no more than one of a page
_ENDS = 200


def phi(text: str, coupling: Coupling | None = None) -> float:
    """Coupling of a text in [0, 1]; 0 for an empty one."""
    coupling = coupling or Coupling()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    fields = [1 + len(_DELIMITERS.findall(line)) for line in lines]
    total = coupled = 0.0
    for place, line in enumerate(lines):
        length = len("".join(line.split()))
        total += length
        # a table's row has as many fields as the row before or after it
        neighbours = fields[max(place - 1, 0) : place] + fields[place + 1 : place + 2]
        shape = line if len(line) <= 2 * _ENDS else line[:_ENDS] + line[-_ENDS:]
        is_row = fields[place] >= coupling.min_fields and fields[place] in neighbours
        if is_row or _RECORD.match(shape) or len(_PAIR.findall(shape)) >= coupling.min_fields:
            coupled += coupling.record * length
        elif _CODE.match(shape):
            coupled += coupling.code * length
        elif _LABEL.match(shape):
            coupled += coupling.label * min(length, coupling.label_reach)
    return coupled / total if total else 0.0


def task_coupling(contexts: Sequence[str], coupling: Coupling | None = None) -> float:
    """phi of a task: the median over its samples' contexts.

    Raises:
        InputError: there is no context.
    """
    if not contexts:
        raise InputError(
            "the coupling of a task is the median over its contexts, and there are none; draw a sample first"
        )
    return float(median(phi(context, coupling) for context in contexts))
