"""The site has a page for every rule and every public name, without anybody listing them."""

from __future__ import annotations

import inspect
import pathlib
import re

import pytest
from common import REGISTERED, one_in

import adaptive_opt
from docs.pages import api, docstrings, rules

SECTIONS = [
    *("Where it comes from", "Line by line", "What it equals", "Arguments", "Memory and time"),
    *("Evidence", "How to log it", "Cite"),  # and a picture of its rates, which takes a training
]
ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize("name", one_in(3, REGISTERED))
def test_every_rule_has_a_page_that_says_it_all(name):
    page = rules.page(name)
    assert re.findall("^## (.+)$", page, re.MULTILINE) == SECTIONS
    rule = docstrings.formula(adaptive_opt.RECIPES[name].__doc__)
    assert rule
    assert f"```text\n{rule}\n```" in page
    for begin in rules.ADVICE:
        assert f"\n\n{begin} " in page, f"the docstring has no paragraph that begins {begin!r}"
    assert "```bibtex\n@" in page, "no entry of docs/references.bib is cited in the docstring"
    assert "see the module" not in page, "what that argument means stands nowhere on the page"
    namespace: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, f"the page of {name}", "exec"), namespace)
    assert namespace["optimizer"].init


def test_the_index_of_the_rules_links_every_page():
    links = re.findall(r"\[\w+\]\((\w+)\.md\)", rules.index())
    assert sorted(links) == sorted(REGISTERED)


def test_a_line_that_adam_does_not_have_is_marked_and_one_that_is_missing_too():
    (_, adams), *_ = rules.listings("adam").items()
    (_, lines), *_ = rules.listings("amsgrad").items()
    marked = [(mark, line.name) for mark, line in rules.compared(lines, [adams]) if mark]
    assert marked == [("+", "amsgrad_max")]
    back = [(mark, line.name) for mark, line in rules.compared(adams, [lines]) if mark]
    assert back == [("-", "amsgrad_max")]
    assert not any(mark for mark, _ in rules.compared(adams, [adams]))


def test_every_entry_of_the_bibliography_is_cited_by_a_rule():
    cited = {entry for name in REGISTERED for entry in rules.cited(name)}
    assert cited == set(rules.bibliography().values())
    keys = re.findall(r"^@\w+\{(\w+),$", (ROOT / "docs" / "references.bib").read_text(), re.M)
    assert len(keys) == len(set(keys)) == len(cited)


def parsed(entry: str) -> dict[str, str]:
    """The fields of a BibTeX entry, its braces counted, with nothing of the site."""
    head = re.match(r"@(article|inproceedings|misc)\{\w+,\n", entry)
    assert head, entry
    fields, at = {}, head.end()
    while entry[at:] != "}":
        begin = re.compile(r"  (\w+) = \{").match(entry, at)
        assert begin, entry[at:]
        depth, end = 1, begin.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(entry[end], 0)
            end += 1
        assert begin[1] not in fields
        fields[begin[1]] = entry[begin.end() : end - 1]
        assert entry[end : end + 2] == ",\n", entry[end:]
        at = end + 2
    return fields


@pytest.mark.parametrize("name", REGISTERED)
def test_the_bibtex_of_a_rule_parses_and_is_of_the_papers_that_its_docstring_names(name):
    """By number, first author and year. Papers that advice is from are named there, not cited."""
    entries = [parsed(entry) for entry in rules.cited(name)]
    assert entries
    for fields in entries:
        assert {"title", "author", "year"} < set(fields)
        assert all(re.fullmatch("[^,]+, [^,]+", one) for one in fields["author"].split(" and "))
        assert ("eprint" in fields) == ("archivePrefix" in fields)
    parts = inspect.getdoc(adaptive_opt.RECIPES[name]).split("\n\n")
    said = " ".join(" ".join(p.split()) for p in parts if not p.startswith(rules.ADVICE))
    by_number = {f["eprint"]: f for f in entries if f.get("archivePrefix") == "arXiv"}
    assert set(re.findall(r"arXiv:(\d+\.\d+)", said)) == set(by_number)
    for number, fields in by_number.items():
        names = r"([A-Z]\w+)(?: et al\.|(?:, [A-Z]\w+)*(?: & [A-Z]\w+)?)"
        (first, year), *_ = re.findall(rf"{names} (\d{{4}}),? \(?arXiv:{number}", said)
        assert (first, year) == (fields["author"].partition(",")[0], fields["year"])


def test_what_was_recorded_is_on_the_page_of_its_rule_in_its_convention():
    rows = rules.public_code("amsgrad")
    assert {convention for convention, *_ in rows} == {"torch", "optax", "keras", "paper"}
    assert ["optax", "`optax.amsgrad`"] in [row[:2] for row in rows]


def test_every_public_name_has_a_page_and_a_section_of_the_index():
    assert sorted(n for names in api.sections().values() for n in names) == sorted(
        adaptive_opt.__all__
    )
    pages = api.pages()
    assert set(adaptive_opt.__all__) < set(pages)
    for name, page in pages.items():
        if name != "index":
            assert re.search(r"\.\. auto(?:function|class|data):: adaptive_opt\.", page)
            assert f"<{name}>" in pages["index"]


def test_no_page_sends_its_reader_to_a_module_that_has_none():
    for name in adaptive_opt.__all__:
        text = inspect.getdoc(getattr(adaptive_opt, name)) or ""
        assert "see the module" not in api.spelled_out(text).lower(), name
    assert "  b1: the decay of an average" in api.spelled_out(inspect.getdoc(adaptive_opt.adamw))


def test_a_submodule_that_the_documents_import_from_has_pages_too():
    texts = [page.read_text() for page in (ROOT / "docs").glob("*.md")]
    used = {m for text in texts for m in re.findall(r"from adaptive_opt\.([\w.]+) import", text)}
    assert used == set(api.SUBMODULES)


def test_the_first_page_leads_to_every_document():
    text = (ROOT / "docs" / "index.md").read_text()
    trees = "".join(re.findall(r"```{toctree}\n(.*?)```", text, re.DOTALL))
    listed = set(re.findall(r"^(?:\w+ <)?([\w./]+)>?$", trees, re.MULTILINE))
    documents = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
    assert documents <= listed
    for page in listed - documents - {"rules/index", "api/index"}:
        assert (ROOT / "docs" / f"{page}.md").resolve().exists()


def test_the_citation_is_of_this_version():
    assert f"\nversion: {adaptive_opt.__version__}\n" in (ROOT / "CITATION.cff").read_text()
