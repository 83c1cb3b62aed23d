"""The command line: what goes to stdout, what to stderr, and with which exit code."""

import json
import subprocess
import sys

import pytest
import yaml
from cli_support import assert_one_sentence

from kvpress.cli import main

DOCUMENT = "The hen was called Duchess. " * 8


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "document.txt"
    path.write_text(DOCUMENT)
    return path


def test_help_imports_neither_torch_nor_transformers():
    code = "import sys; from kvpress.cli import main\ntry: main()\nexcept SystemExit: pass\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    assert "generate" in result.stdout
    assert not {"torch", "transformers"} & set(result.stdout.split())


def test_version(kvpress):
    code, out, _ = kvpress("--version")
    assert code == 0
    assert out.startswith("kvpress-engine ")


def test_contracts_list(kvpress):
    code, out, _ = kvpress("contracts", "list")
    assert code == 0
    assert "snapkv" in out
    assert max(map(len, out.splitlines())) <= 80
    _, out, _ = kvpress("contracts", "list", "--json")
    assert {"snapkv", "full"} <= {contract["name"] for contract in json.loads(out)}


def test_contracts_show_can_be_read_back(kvpress, tmp_path):
    code, shown, _ = kvpress("contracts", "show", "snapkv", "--budget", "512tokens")
    assert code == 0
    assert yaml.safe_load(shown)["budget"] == {"kind": "tokens", "value": 512}
    file = tmp_path / "mine.yaml"
    file.write_text(shown)
    _, again, _ = kvpress("contracts", "show", file)
    assert again == shown


@pytest.mark.parametrize(
    ("pair", "verdict", "slots"),
    [
        (("snapkv", "mii"), "diagnostic", ["ranking"]),
        (("snapkv", "kvzip"), "transfer", ["query_law", "access", "allocation", "protection"]),
        (("snapkv", "snapkv"), "equal", []),
    ],
)
def test_contracts_diff(kvpress, pair, verdict, slots):
    code, out, _ = kvpress("contracts", "diff", *pair)
    assert code == 0
    assert out.splitlines()[-1].startswith(verdict)
    assert [line.split()[0] for line in out.splitlines()[1:-1] if line[0] != " "] == slots
    assert max(map(len, out.splitlines())) <= 80
    _, out, _ = kvpress("contracts", "diff", *pair, "--json")
    assert json.loads(out)["verdict"] == verdict
    assert list(json.loads(out)["slots"]) == slots


def test_unknown_preset(kvpress):
    assert_one_sentence(kvpress("contracts", "show", "snapvk"), "'snapvk'", "did you mean 'snapkv'")


def test_generate(kvpress, model_folder, document):
    code, out, err = kvpress(
        "generate", "-m", model_folder, "-d", document, "-b", "0.5", "--max-new-tokens", 4, "--report"
    )
    assert code == 0
    assert "snapkv" in err
    assert "contract snapkv" in err  # the report
    assert "snapkv" not in out  # only the answer


def test_generate_json(kvpress, model_folder, document):
    arguments = ["-m", model_folder, "-d", document, "-b", "0.5", "--max-new-tokens", 4, "--dtype", "float32"]
    code, out, _ = kvpress("generate", *arguments, "--question", "Which hen?", "--compare", "--json")
    assert code == 0
    result = json.loads(out)
    full, compressed = result["runs"]
    assert (full["contract"], compressed["contract"]) == ("full cache", "snapkv")
    assert full["prompt_tokens"] == compressed["prompt_tokens"] > len(DOCUMENT)
    assert compressed["cache_bytes"] < 0.6 * full["cache_bytes"]
    assert compressed["report"]["contract_id"] == result["contract_id"]


def test_full_preset_answers_like_the_full_cache(kvpress, model_folder, document):
    arguments = ["-m", model_folder, "-d", document, "--max-new-tokens", 8, "--dtype", "float32"]
    _, out, _ = kvpress("generate", *arguments, "-c", "full", "--compare", "--json")
    ours, theirs = json.loads(out)["runs"]
    assert ours["text"] == theirs["text"]


def test_generate_reads_stdin(kvpress, model_folder):
    arguments = ["generate", "-m", model_folder, "--max-new-tokens", 2, "--json"]
    _, out, _ = kvpress(*arguments, "--no-chat", stdin=DOCUMENT)
    assert json.loads(out)["runs"][0]["prompt_tokens"] == len(DOCUMENT.strip()) + 1  # one BOS
    _, out, _ = kvpress(*arguments, "--no-chat", "-c", "full", "-d", "-", stdin="x")
    assert json.loads(out)["runs"][0]["prompt_tokens"] == 2


def test_oracle_takes_a_reference(kvpress, model_folder, document):
    arguments = ["generate", "-m", model_folder, "-d", document, "-c", "oracle_mass", "--max-new-tokens", 2, "--json"]
    assert_one_sentence(kvpress(*arguments), "reference")
    code, out, err = kvpress(*arguments, "--reference", "Duchess")
    assert code == 0, err
    assert json.loads(out)["contract"] == "oracle_mass"


def test_users_mistakes(kvpress, model_folder, document, tmp_path):
    run = ["generate", "-m", model_folder]
    assert_one_sentence(kvpress("generate", "-m", tmp_path / "none", "-d", document), "no such folder")
    assert_one_sentence(kvpress(*run, "-d", tmp_path / "none.txt"), "none.txt' cannot be read: No such file")
    assert_one_sentence(kvpress(*run, "-d", tmp_path), "cannot be read: Is a directory")
    assert_one_sentence(kvpress(*run, stdin=b"\xff\xfe"), "no UTF-8 text: byte 0")
    assert_one_sentence(kvpress(*run, stdin=""), "the prompt is empty")
    assert_one_sentence(kvpress(*run, "-d", document, "-c", "snapvk"), "did you mean 'snapkv'")
    assert_one_sentence(kvpress(*run, "-d", document, "-b", "lots"), "lots")
    assert_one_sentence(kvpress(*run, "-d", document, "--device", "abacus"), "unknown device 'abacus'")
    assert_one_sentence(kvpress(*run, stdin=DOCUMENT * 9), "the model's context is 512")


def test_out_of_memory_is_one_sentence(kvpress, model_folder, document, monkeypatch):
    def explode(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: 1 TB")

    monkeypatch.setattr("kvpress.loading.load", explode)
    assert_one_sentence(kvpress("generate", "-m", model_folder, "-d", document), "out of memory")


def test_programming_errors_keep_their_traceback(kvpress, model_folder, document, monkeypatch):
    def explode(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr("kvpress.loading.load", explode)
    monkeypatch.setattr(sys, "argv", ["kvpress", "generate", "-m", str(model_folder), "-d", str(document)])
    with pytest.raises(RuntimeError, match="a bug"):
        main()


def test_doctor(kvpress):
    code, out, _ = kvpress("doctor")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    _, out, _ = kvpress("doctor", "--json")
    checks = {check["name"]: check["ok"] for check in json.loads(out)["checks"]}
    assert checks["compressed generate"] is True
    assert checks["presets"] is True


def test_bench_decode(kvpress, model_folder):
    arguments = ["bench", "decode", "-m", model_folder, "--context", 300, "--steps", 2, "--repeats", 2]
    code, out, err = kvpress(*arguments, "--dtype", "float32", "--json")
    assert code == 0, err
    names = {"full_vs_transformers", "full_vs_floor", "quarter_vs_floor", "evidence_share_snapkv", "evidence_share_mii"}
    assert names | {"setting"} <= set(json.loads(out))
    code, out, _ = kvpress(*arguments, "--dtype", "float32")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert_one_sentence(kvpress("bench", "decode", "-m", model_folder, "--context", 4096), "the bench needs")


def test_backend_options(kvpress, model_folder, document, monkeypatch):
    arguments = ["generate", "-m", model_folder, "-d", document, "-b", "0.5", "--max-new-tokens", 3]
    code, _, err = kvpress(*arguments, "--store", "paged", "--page-size", 16, "--report")
    assert code == 0
    assert "backend torch" in err
    assert "paged store with pages of 16 tokens" in err
    code, _, err = kvpress(*arguments, "--graphs")
    assert code == 0
    assert "decode: 2 steps eager: only the Triton backend" in err
    assert_one_sentence(kvpress(*arguments, "--backend", "tritom"), "did you mean 'triton'")
    assert_one_sentence(
        kvpress(*arguments, "--backend", "torch", "--graphs"), "only the Triton kernels can be replayed"
    )
    monkeypatch.setattr("kvpress_kernels.launch.INTERPRETED", False)
    assert_one_sentence(kvpress(*arguments, "--backend", "triton"), "the kernels need a CUDA or ROCm device")


def test_doctor_says_why_kernels_do_not_run(kvpress, monkeypatch):
    for interpreted, words in ((True, "Triton's interpreter"), (False, "the kernels need a CUDA or ROCm device")):
        monkeypatch.setattr("kvpress_kernels.launch.INTERPRETED", interpreted)
        _, out, _ = kvpress("doctor", "--json")
        (line,) = [check for check in json.loads(out)["checks"] if check["name"] == "triton kernels"]
        assert words in line["detail"]
        assert line["ok"] is None


def test_bench_step(kvpress):
    arguments = ["bench", "step", "--shape", "tiny", "--batch", 1, "--context", 64, "--steps", 1, "--no-static"]
    code, out, _ = kvpress(*arguments, "--dtype", "float32", "--json")
    assert code == 0
    assert json.loads(out)["eager_vs_floor"] > 0
    assert_one_sentence(kvpress("bench", "step", "--shape", "tony"), "did you mean 'tiny'")
