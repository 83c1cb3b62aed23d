"""The documentation says what the code does: names, defaults, presets and refusals of docs/contracts.md, code blocks, paths.

A block that starts with ```python must compile; one that is no whole program starts with ```python fragment.
"""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvpress.contract import SLOTS, Contract, differences, preset_names
from kvpress.errors import ContractError
from kvpress.slots import Choice

ROOT = Path(__file__).resolve().parents[2]
CONTRACTS = (ROOT / "docs" / "contracts.md").read_text(encoding="utf-8")
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md"))]
#: how the second column of a slot's choices is called
CHOICE_COLUMN = {
    "budget": "formula",
    "granularity": "formula",
    "query_law": "weights",
    "access": "formula",
    "ranking": "score",
    "allocation": "tokens beyond protection",
    "retention": "rule",
    "protection": "rule",
    "representation": "rule",
    "schedule": "when",
}
BLOCK = re.compile(r"^```python[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(
        page, found.group(1), id=f"{page.name}:{page.read_text(encoding='utf-8')[: found.start()].count(chr(10)) + 1}"
    )
    for page in PAGES
    for found in BLOCK.finditer(page.read_text(encoding="utf-8"))
]
#: a path that exists only on one machine: a home or scratch folder, a mount, a drive letter
MACHINE_PATH = re.compile(r"(?<![\w.:/~$}-])(?:/(?:home|Users|root|tmp|work|mnt|data|opt|scratch)\b|[A-Z]:\\)")


def section(title: str) -> str:
    """The text under a heading of docs/contracts.md, up to the next heading of the same or a higher level."""
    found = re.search(rf"^(#+) {re.escape(title)}\n", CONTRACTS, re.MULTILINE)
    assert found, f"docs/contracts.md has no section '{title}'"
    end = re.search(rf"^#{{1,{len(found.group(1))}}} ", CONTRACTS[found.end() :], re.MULTILINE)
    return CONTRACTS[found.end() :][: end.start() if end else None]


def table(text: str, *header: str) -> list[list[str]]:
    """The rows of the tables with this header, as cells without back-ticks around them."""
    inside, found = False, []
    for line in text.splitlines():
        cells = [cell.strip().strip("`") for cell in line[1:-1].split(" | ")] if line.startswith("|") else []
        if cells == list(header):
            inside = True
        elif not cells:
            inside = False
        elif inside and not set(line) <= set("|-"):
            assert len(cells) == len(header), line
            found.append(cells)
    return found


def default_of(choice: type[Choice], name: str) -> str:
    """A field's default as the documentation writes it: text in quotes only if it has more than a word."""
    field = choice.model_fields[name]
    if field.is_required():
        return "required"
    value: Any = getattr(field.default, "kind", field.default)  # a choice inside a choice is written by its name
    return value if isinstance(value, str) and re.fullmatch(r"[\w+]+", value) else json.dumps(value)


@pytest.mark.parametrize("slot", SLOTS)
def test_every_choice_of_a_slot_is_described_with_its_source(slot):
    described = {row[0]: row[2] for row in table(section(slot), "choice", CHOICE_COLUMN[slot], "source", "ours")}
    assert set(described) == set(SLOTS[slot].registry)
    for kind, choice in SLOTS[slot].registry.items():
        papers = re.findall(r"\b\d{4}\.\d{5}\b", choice.source)
        assert all(paper in described[kind] for paper in papers), f"'{kind}' names {papers} as its source"


@pytest.mark.parametrize("slot", SLOTS)
def test_every_field_is_described_with_its_default(slot):
    described = [tuple(row[:3]) for row in table(section(slot), "choice", "field", "default", "meaning")]
    assert sorted(described) == sorted(
        (kind, name, default_of(choice, name))
        for kind, choice in SLOTS[slot].registry.items()
        for name in choice.model_fields
    )


def test_the_default_contract():
    text = CONTRACTS[CONTRACTS.index("The default contract") :].split("\n\n")[0]
    contract = Contract()
    for slot, choice in contract.choices.items():
        assert slot == "budget" or f"`{choice.kind}`" in text
    assert f"{contract.budget.value:.0%}".replace("%", " %") in text


def test_every_preset_is_listed_with_the_slots_in_which_it_differs():
    host = Contract.load("snapkv")
    header = ("preset", "slots that differ from snapkv", "source", "where it differs from the publication")
    listed = {row[0]: re.findall(r"\w+", row[1]) for row in table(section("Presets"), *header)}
    assert listed == {name: differences(host, Contract.load(name)) for name in preset_names()}


REFUSED = [row[0] for row in table(section("Refused combinations"), "combination", "reason")]


@pytest.mark.parametrize("combination", REFUSED)
def test_what_is_called_refused_is_refused(combination):
    with pytest.raises(ContractError):
        Contract.build(yaml.safe_load(combination))


def test_every_reason_for_a_refusal_is_listed():
    """Each sentence of contract/combinations.py is the answer to one of the listed combinations."""
    source = (ROOT / "kvpress" / "contract" / "combinations.py").read_text(encoding="utf-8")
    returned = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Return)]
    sentences = [v for v in returned if isinstance(v, ast.JoinedStr) or (isinstance(v, ast.Constant) and v.value)]
    said = set()
    for combination in REFUSED:
        with pytest.raises(ContractError) as error:
            Contract.build(yaml.safe_load(combination))
        if str(error.value).startswith("contract 'custom': "):  # the others are refused by one choice alone
            said.add(re.sub(r"'[^']*'|n=\d+", "_", str(error.value)))
    assert len(said) == len(sentences)


@pytest.mark.parametrize(("page", "code"), BLOCKS)
def test_python_blocks_compile(page, code):
    compile(code, str(page), "exec")


@pytest.mark.parametrize("code", [block.values[1] for block in BLOCKS if block.values[0].name == "contracts.md"])
def test_python_blocks_about_contracts_run(code, capsys):
    exec(compile(code, "docs/contracts.md", "exec"), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_machine_paths(page):
    assert not MACHINE_PATH.findall(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target
