"""From a recipe to a projection file: moments, start, training, search, and the table that judges them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvpress.errors import InputError, KvpressError
from kvpress.matryoshka.bases import Bases, Ranks
from kvpress.matryoshka.checkpoint import (
    Header,
    ModelId,
    Projection,
    RankTable,
    check_fits,
    load_projection,
    model_fingerprint,
    save_projection,
)
from kvpress.matryoshka.entries import Entries, Watch
from kvpress.matryoshka.init import initial_bases
from kvpress.matryoshka.judge import Judged, judge
from kvpress.matryoshka.passing import compressed_shapes
from kvpress.matryoshka.rank_score import RankScore
from kvpress.matryoshka.recipe import Recipe
from kvpress.matryoshka.schedule import Schedule
from kvpress.matryoshka.search_evolution import Round, evolve
from kvpress.matryoshka.search_exchange import exchange
from kvpress.matryoshka.search_greedy import greedy
from kvpress.matryoshka.search_sensitivity import measure_sensitivity
from kvpress.matryoshka.statistics import collect, load_moments, save_moments
from kvpress.matryoshka.text import Text
from kvpress.matryoshka.train import Trainer, TrainingStopped
from kvpress.matryoshka.training_state import Point, TrainingFolder


class Starts:
    """The bases that a recipe could begin with, from one reading of its text; the moments are kept in the folder.

    Raises:
        InputError: the text cannot be read or is too short.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        recipe: Recipe,
        folder: Path,
        watch: Watch = lambda done, total: None,
    ) -> None:
        self.recipe, start = recipe, recipe.start
        self.layers, _ = compressed_shapes(model)
        text = Text(recipe.text, "train", tokenizer, start.window, start.windows)
        made = f"{model_fingerprint(model)} {text.digest} {start.window} {len(text)}"
        path = folder / "moments.safetensors"
        known = load_moments(path, made)
        if known is None:
            known = collect(model, text.ids.split(1), lambda done: watch(done, len(text)))
            save_moments(path, known, made)
        self.moments = known

    def bases(self, kind: str | None = None) -> Bases:
        """The bases of a kind, None for the recipe's.

        Raises:
            InputError: the kind is unknown.
        """
        start = self.recipe.start
        return initial_bases(kind or start.kind, self.layers, self.moments, start.seed, self.recipe.means)


def train_projection(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    name: str,
    folder: Path,
    watch: Callable[[Point], None] = lambda point: None,
    watch_reading: Watch = lambda done, total: None,
) -> tuple[Projection, Starts]:
    """Train, or go on with, the projection of a folder, and write it there. name: of the model, for people.

    Raises:
        InputError, KvpressError: see `Text`, `Trainer` and `save_projection`.
    """
    training = recipe.training
    if training.train_means and not recipe.means:
        training = training.model_copy(update={"train_means": False})
    # everything that can be wrong with model and recipe is told before the long work begins
    devices = sorted({str(weight.device) for weight in model.parameters()})
    if len(devices) > 1:
        raise InputError(
            f"a projection is trained with the whole model on one device, and this one lies on {' and '.join(devices)}: name one of them "
            f"with --device"
        )
    _check_start(recipe.start.kind, model)
    text = Text(recipe.text, "train", tokenizer, training.window, max(1, training.steps * training.windows))
    judged = Text(recipe.text, "judge", tokenizer, training.window, training.judge_windows)
    shapes = compressed_shapes(model)[1]
    Schedule(shapes, training.shares)
    Ranks.uniform(shapes, training.judge_share)
    identity = ModelId.of(model, name)
    made = {
        "model": model_fingerprint(model),
        "recipe": recipe.model_copy(update={"training": training}).model_dump(
            mode="json", exclude={"search", "judging"}
        ),
        "text": text.digest,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    place = TrainingFolder(folder, made)  # another training is refused before anything of it is replaced
    starts = Starts(model, tokenizer, recipe, folder, watch_reading)
    trainer = Trainer(model, starts.bases(), training, text, judged, folder, made, watch)

    def as_projection(bases: Bases, **noted: Any) -> Projection:
        header = Header(model=identity, layers=bases.layers, history=({"step": "train", **made, **noted},))
        return Projection(header=header, bases=bases)

    try:
        bases = trainer.run()
    except TrainingStopped as stopped:
        good = trainer.last_good()
        if good is None:
            raise
        _written(place.projection, as_projection(good[1], stopped_after=good[0]))
        raise KvpressError(f"{stopped}; '{place.projection}' holds the bases of step {good[0]}") from None
    return _written(place.projection, as_projection(bases)), starts


def _written(path: Path, projection: Projection) -> Projection:
    """The projection in its file; one with the same bases stays, with the ranks that were searched for it."""
    known = load_projection(path) if path.exists() else None
    if known is not None and _same(known.bases, projection.bases):
        return known
    save_projection(path, projection)
    return projection


def _check_start(kind: str, model: PreTrainedModel) -> None:
    """Raise InputError where a start takes something for granted that the model does not do."""
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    # in some models there is one for each type of layer
    parts = [one for one in (rope, *rope.values()) if isinstance(one, dict)]
    share = min((one.get("partial_rotary_factor") or 1.0 for one in parts), default=1.0)
    if kind == "planes" and share < 1:
        raise InputError(
            f"start 'planes' orders the rotary planes of all dimensions, and this model rotates {share:.0%} of them: use start 'query'"
        )


def _same(one: Bases, other: Bases) -> bool:
    pairs = zip(
        (*one.keys, *one.values, *(one.means or ())), (*other.keys, *other.values, *(other.means or ())), strict=False
    )
    return (one.means is None) == (other.means is None) and all(torch.equal(a, b) for a, b in pairs)


def search_ranks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    path: Path,
    watch: Watch = lambda done, total: None,
) -> Projection:
    """Search ranks for the shares of a recipe and add them to the projection's file; tables for the same shares are replaced.

    Raises:
        InputError: the file is not a projection of this model, or a share or step does not fit.
        KvpressError: the model's numbers are not finite.
    """
    search = recipe.search
    projection = load_projection(path)
    layers, shapes = compressed_shapes(model)
    check_fits(projection, model, layers, shapes, str(path))
    for share in search.shares:
        Entries.of(shapes, search.step).budget(share)
    text = Text(recipe.text, "ranks", tokenizer, search.window, search.windows)
    bases = projection.bases.to(model.device, model.dtype)
    with RankScore(model, bases, text.ids) as score:
        found = _search(score, shapes, recipe, watch)
    tables = {table.share: table for table in projection.header.tables}
    for share, ranks in found.items():
        tables[share] = RankTable(share=share, method=search.method, keys=ranks.keys, values=ranks.values)
    history = (
        *projection.header.history,
        {"step": "ranks", "search": search.model_dump(mode="json"), "text": text.digest},
    )
    header = projection.header.model_copy(
        update={"tables": tuple(tables[share] for share in sorted(tables)), "history": history}
    )
    projection = Projection(header=header, bases=projection.bases)
    save_projection(path, projection)
    return projection


def _search(
    score: RankScore, shapes: Sequence[tuple[int, int, int]], recipe: Recipe, watch: Watch
) -> dict[float, Ranks]:
    search = recipe.search
    if search.method == "greedy":
        return {share: greedy(score, shapes, share, search.step, watch) for share in search.shares}
    if search.method == "exchange":
        moving: dict[str, Any] = {"rounds": search.rounds, "step": search.step, "watch": watch}
        return {share: exchange(score, score.worth, shapes, share, **moving) for share in search.shares}
    table = measure_sensitivity(score, shapes, search.step, watch)
    found = {share: table.allocate(share) for share in search.shares}
    if search.method == "sensitivity":
        return found
    rounds = (Round(max(2, search.children // 4), 1), Round(1, search.windows))
    options: dict[str, Any] = {"generations": search.generations, "children": search.children, "rounds": rounds}
    options |= {"step": search.step, "seed": search.seed, "watch": watch}
    return {share: evolve(score, shapes, ranks, **options) for share, ranks in found.items()}


def judged_table(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    arms: dict[str, Bases],
    searched: Projection | None = None,
    watch: Watch = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Arms at the shares of a recipe on its judging text: a row for each with kl, loss and perplexity, and every window's values.

    arms: bases by name, with the same ranks everywhere. searched: adds its tables as arm "searched".

    Raises:
        InputError: no share fits, or the judging text is too short.
    """
    judging = recipe.judging
    windows = Text(recipe.text, "judge", tokenizer, judging.window, judging.windows).ids
    keys: list[tuple[str, float]] = []
    settings: list[tuple[Bases, Ranks]] = []
    for name, bases in arms.items():
        moved = bases.to(model.device, model.dtype)
        for share in judging.shares:
            if Ranks.is_uniform(bases.shapes, share):
                keys.append((name, share))
                settings.append((moved, Ranks.uniform(bases.shapes, share)))
    if searched is not None:
        moved = searched.bases.to(model.device, model.dtype)
        for table in searched.header.tables:
            keys.append(("searched", table.share))
            settings.append((moved, table.ranks))
    if not settings:
        raise InputError("there is nothing to judge: give a share")
    parts: list[list[Judged]] = []
    for found in judge(model, windows, settings):
        parts.append(found)
        watch(len(parts), len(windows))
    rows = []
    for index, ((name, share), (bases, ranks)) in enumerate(zip(keys, settings, strict=True)):
        kl, loss = (torch.cat([getattr(part[index], field) for part in parts]) for field in ("kl", "loss"))
        rows.append(
            {
                "arm": name,
                "share": share,
                "bytes": ranks.share(bases.shapes),
                "kl": float(kl.mean()),
                "loss": float(loss.mean()),
                "perplexity": math.exp(float(loss.mean())),
                "windows": {"kl": kl.tolist(), "loss": loss.tolist()},
            }
        )
    return rows
