"""The runs that a report is made of: records with their findings, and the study that they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from kvpress.errors import InputError
from kvpress_eval.diagnostic.finding import Finding, finding_of
from kvpress_eval.diagnostic.study import Study
from kvpress_eval.records import FULL, Key, Record
from kvpress_eval.report.plan import check_one_run
from kvpress_eval.sweep import parse_sweep


@dataclass(frozen=True)
class Run:
    """One model's run. findings: by the key of their record; couplings: phi of each task that the manifest knows."""

    model: str
    study: Study
    records: tuple[Record, ...]
    findings: dict[Key, Finding]
    couplings: dict[str, float]
    manifest: dict[str, Any]


def read(runs: Sequence[tuple[Sequence[Record], Mapping[str, Any]]]) -> tuple[Run, ...]:
    """Check runs and put them together.

    Raises:
        InputError: there is none; one is empty, is no run of a study, or holds records of another run or broken findings; two
            are of one model, or their hosts or arms differ.
    """
    if not runs:
        raise InputError("a report needs a run; give the folder of one or more")
    found = tuple(_read(records, manifest) for records, manifest in runs)
    for run in found[1:]:
        _check_alike(found[0], run)
    models = [run.model for run in found]
    twice = sorted({model for model in models if models.count(model) > 1})
    if twice:
        raise InputError(
            f"two of the runs are of the model '{twice[0]}': a report puts runs of different models together, so give one of them"
        )
    return found


def _read(records: Sequence[Record], manifest: Mapping[str, Any]) -> Run:
    if not records:
        raise InputError("the run holds no records yet; run or resume it first")
    check_one_run(records, manifest)
    sweep = manifest.get("sweep")
    if not isinstance(sweep, dict):
        raise InputError(
            "the manifest of the run names no sweep, so nothing is known of its arms; use the run's own manifest"
        )
    study = parse_sweep(sweep, "the sweep in the manifest of the run")
    if not isinstance(study, Study):
        raise InputError("this is a run of `kvpress eval`: `kvpress eval report` shows it")
    if not any(record.arm == FULL for record in records):
        raise InputError(
            f"the run holds no records of the arm '{FULL}', so there is nothing to compare with; resume it"
        )
    # sums of floats and resamples depend on the order, and a resumed run has another one
    ordered = tuple(sorted(records, key=lambda r: (r.task, r.length or 0, r.sample, r.mode, r.arm)))
    found = {record.key: finding for record in ordered if (finding := _finding(record)) is not None}
    model = manifest.get("model")
    source = model.get("source") if isinstance(model, Mapping) else None
    return Run(
        model=str(source or study.model),
        study=study,
        records=ordered,
        findings=found,
        couplings=_couplings(manifest.get("coupling", {})),
        manifest=dict(manifest),
    )


def _finding(record: Record) -> Finding | None:
    try:
        return finding_of(record)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(
            f"the measures of sample '{record.sample}' of '{record.task}' under '{record.arm}' are no finding of this version "
            f"({place}: {first['msg']}): measure the sample again"
        ) from None


def _couplings(given: Any) -> dict[str, float]:
    if not isinstance(given, Mapping):
        raise InputError(f"'coupling' of the manifest is {given!r}; it must be a mapping from tasks to phi")
    for task, phi in given.items():
        if isinstance(phi, bool) or not isinstance(phi, int | float) or not 0 <= phi <= 1:
            raise InputError(f"the coupling of '{task}' in the manifest is {phi!r}; it must be a number from 0 to 1")
    return {str(task): float(phi) for task, phi in given.items()}


def _check_alike(first: Run, other: Run) -> None:
    one, two = first.study, other.study
    if one.host_name != two.host_name or _text(one, one.host_name) != _text(two, two.host_name):
        raise InputError(
            f"the run of '{first.model}' has the host '{one.host_name}' and that of '{other.model}' another, '{two.host_name}': "
            "only runs of one study are put together"
        )
    if one.comparisons != two.comparisons:
        names = ({each.arm for each in study.comparisons} for study in (one, two))
        differ = sorted(next(names) ^ next(names)) or [
            a.arm for a, b in zip(one.comparisons, two.comparisons, strict=True) if a != b
        ]
        raise InputError(
            f"the runs of '{first.model}' and '{other.model}' have different arms, such as '{differ[0]}': only runs of one study are "
            "put together"
        )
    for each in one.comparisons:
        if _text(one, each.arm) != _text(two, each.arm):
            raise InputError(
                f"arm '{each.arm}' is not the same contract in the runs of '{first.model}' and '{other.model}': only runs of one "
                "study are put together"
            )


def _text(study: Study, name: str) -> str:
    """The contract without its budget, which is the study's."""
    host = study.contract(study.host_name)
    return study.contract(name).swap(budget=host.budget).canonical_json()
