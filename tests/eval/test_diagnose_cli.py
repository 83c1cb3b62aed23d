"""`kvpress diagnose` from the sweep file to the page, with a model that answers; and its mistakes in one sentence."""

import json

import pytest
from induction_model import induction_model, induction_tokenizer, lookup_sample

from kvpress.cli import main
from kvpress_eval.records import read_run
from kvpress_eval.tasks import TASKS, Task, register

SWEEP = """
model: {model}
tasks: [{tasks}]
limit: 8
budgets: [15%, 25%]
host:
  name: host
  query_law: {{kind: tail, window: 8}}
  access: {{kind: aggregate, pooling: avg, kernel: 7}}
  protection: {{kind: standard, recent: 8}}
swaps:
  unpooled: {{swap: {{access: aggregate}}}}
  nolev: {{swap: {{ranking: nolev}}}}
  mii: {{swap: {{ranking: mii}}}}
  blocks: {{transfer: fit, swap: {{granularity: {{kind: block, size: 8}}, retention: strict_blocks}}}}
dtype: float32
measure: {{boundary: 0.5, units: 6, draws: 1}}
"""
N_TASKS = 5


class Lookup(Task):
    family = "toy"

    def __init__(self, number):
        self.name, self.number = f"toy/lookup_{number}", number

    def samples(self, request):
        for index in request.indices(20):
            yield lookup_sample(100 * self.number + index, 150 + 30 * self.number)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    for number in range(N_TASKS):
        register(Lookup(number))
    folder = tmp_path_factory.mktemp("diagnose")
    induction_model().save_pretrained(folder / "model")
    induction_tokenizer().save_pretrained(folder / "model")
    tasks = ", ".join(f"{{task: toy/lookup_{number}}}" for number in range(N_TASKS))
    (folder / "study.yaml").write_text(SWEEP.format(model=folder / "model", tasks=tasks))
    yield folder
    for number in range(N_TASKS):
        del TASKS[f"toy/lookup_{number}"]


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["kvpress", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    told = capsys.readouterr()
    return caught.value.code, told.out, told.err


@pytest.fixture(scope="module")
def run(place):
    from kvpress_eval.runner import Runner
    from kvpress_eval.sweep import load_sweep

    Runner.begin(load_sweep(place / "study.yaml"), place / "run").run()
    return place / "run"


def test_run_makes_a_finding_for_every_answer_and_knows_its_coupling(run):
    records = read_run(run)
    assert len(records) == N_TASKS * 8 * (1 + 2 * 7)
    assert all(record.measures for record in records)
    manifest = json.loads((run / "manifest.json").read_text())
    assert set(manifest["coupling"]) == {f"toy/lookup_{number}" for number in range(N_TASKS)}


def test_report_prints_tables_and_writes_a_page(run, monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, "diagnose", "report", run, "--details")
    assert code == 0, err
    for word in ("unpooled", "transfer", "null", "oracle", "access", "undecided"):
        assert word in out
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "unpooled" in page


def test_report_as_json_is_one_object_and_writes_nothing(run, monkeypatch, capsys, tmp_path):
    code, out, err = call(monkeypatch, capsys, "diagnose", "report", run, "--json")
    assert code == 0, err
    found = json.loads(out)
    text = json.dumps(found)
    assert "unpooled" in text
    assert "NaN" not in text


def test_explain_shows_a_lost_answer(run, monkeypatch, capsys):
    lost = next(
        record for record in read_run(run) if record.arm == "unpooled@15%" and record.measures["verdict"] == "access"
    )
    arguments = ("explain", run, f"{lost.task}/{lost.sample}", "--arm", "unpooled@15%")
    code, out, err = call(monkeypatch, capsys, "diagnose", *arguments)
    assert code == 0, err
    assert "stage I access" in " ".join(out.split())
    code, out, _ = call(monkeypatch, capsys, "diagnose", *arguments, "--json")
    assert code == 0
    assert json.loads(out)["finding"]["verdict"] == "access"


def test_resume_of_a_finished_run_adds_nothing(run, monkeypatch, capsys):
    before = (run / "records.jsonl").read_bytes()
    code, _, err = call(monkeypatch, capsys, "diagnose", "resume", run)
    assert code == 0, err
    assert f"kvpress diagnose report {run}" in " ".join(err.split())
    assert (run / "records.jsonl").read_bytes() == before


def test_mistakes_are_one_sentence(run, place, monkeypatch, capsys, tmp_path):
    plain = tmp_path / "plain.yaml"
    plain.write_text(f"model: {place / 'model'}\ntasks: [{{task: toy/lookup_0}}]\n")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((place / "study.yaml").read_text().replace("transfer: fit, ", ""))
    for arguments, sentence in (
        (("run", plain, "--out", tmp_path / "a"), "has no 'host'"),
        (("run", wrong, "--out", tmp_path / "b"), "differs from 'host' in 2 slots"),
        (("explain", run, "nobody"), "no sample 'nobody'"),
        (("report", tmp_path / "nowhere"), "holds no run"),
        (("explain", tmp_path / "nowhere", "1"), "holds no run"),
    ):
        code, _, err = call(monkeypatch, capsys, "diagnose", *arguments)
        assert code == 2
        assert sentence in err
        assert err.count("\n") == 1
