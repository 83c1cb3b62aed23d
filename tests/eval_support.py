"""A benchmark of a few short samples, and the sweep that runs it on the tiny model, for tests of the runner."""

from kvpress_eval.sample import Sample
from kvpress_eval.sweep import parse_sweep
from kvpress_eval.tasks import TASKS, Task, register

WORDS = ["amber", "birch", "cedar", "delta", "ember", "flint", "grove", "haven", "inlet", "jetty", "knoll", "larch"]


class Toy(Task):
    """Twelve questions, two for each of six contexts; the tiny model answers noise, which is enough to compare arms."""

    family, description = "toy", "which word is hidden"

    def __init__(self, name, **changes):
        self.name, self.changes = name, changes

    def samples(self, request):
        for index in request.indices(12):
            document, part = divmod(index, 2)
            context = " ".join(WORDS[(document + i) % len(WORDS)] for i in range(24))
            fields = {
                "id": f"q{index}",
                "cluster": f"document{document}",
                "lead": "Read this.\n",
                "context": context,
                "question": f"\nWhat is hidden at {part}?",
                "answer_prefix": " It is",
                "answers": (WORDS[index],),
                "metric": "ruler_part",
                "max_new_tokens": 4 + index % 3,
                "evidence": (WORDS[document],),
                "meta": {"depth": 50 * part},
            }
            yield Sample(**{**fields, **self.changes})


for toy in (Toy("toy/one"), Toy("toy/two", stop_at_newline=True)):
    if toy.name not in TASKS:
        register(toy)


def toy_sweep(model_folder, **changes):
    fields = {
        "model": str(model_folder),
        "tasks": [{"task": "toy/one"}],
        "contracts": ["snapkv", "streaming_llm", "kvzip", "oracle_mass"],
        "budgets": ["40%"],
        "dtype": "float32",
        "noise_floor": 1,
    }
    return parse_sweep({**fields, **changes}, "test")
