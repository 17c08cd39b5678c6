"""The README is true and whole."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_link_of_the_readme_leads_somewhere_and_nothing_is_left_to_fill_in() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")

    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
    assert not re.findall(r"\b[A-Z]+_[A-Z_]+\b", text)


def test_no_page_is_left_to_fill_in() -> None:
    pages = [page for page in (ROOT / "docs").rglob("*.md") if "figures:" in page.read_text(encoding="utf-8")]

    assert pages == []
