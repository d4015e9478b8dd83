"""The pages are true: what they say is printed is printed, their links lead somewhere, their numbers come from a run."""

import re
from pathlib import Path

import pytest

from tests.docs.execute import CONSOLE, PAGES, PYTHON, ROOT, Session, differences, rendered, select

FENCE = re.compile(r"```.*?```|<!--.*?-->|\]\([^)]*\)|https?://\S+|arXiv:\S+", re.S)
NUMBER = re.compile(r"\d[\d,]*\d")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#([^)\s]+))?\)")


def numbers(text: str) -> set[str]:
    """Numbers of five or more digits, without separators."""
    found = {number.replace(",", "") for number in NUMBER.findall(text)}
    return {number for number in found if len(number) >= 5}


@pytest.fixture(scope="session")
def session(tmp_path_factory):
    """One cache for all processes that test at once."""
    folder = tmp_path_factory.getbasetemp().parent / "docs-cache"
    folder.mkdir(exist_ok=True)
    return Session(folder)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_shows_what_is_printed(path: Path, session: Session):
    page = path.read_text()
    now = rendered(page, session)
    assert "\n".join(differences(page, now)) == ""


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_numbers_in_prose_are_in_an_output(path: Path):
    outputs = "".join(
        match[0] for page in PAGES for pattern in (CONSOLE, PYTHON) for match in pattern.finditer(page.read_text())
    )
    assert numbers(FENCE.sub(" ", path.read_text())) - numbers(outputs) == set()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path):
    for target, anchor in LINK.findall(path.read_text()):
        if target.startswith("http"):
            continue
        file = (path.parent / target).resolve()
        assert file.is_relative_to(ROOT)
        assert file.exists(), f"{path.name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{path.name}: {target}#{anchor}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_block_is_executed(path: Path):
    """A block of another kind would be a claim that nothing keeps true; `sh` is set-up, `toml` is loaded by a block."""
    kinds = re.findall(r"^```(\w*)\n", path.read_text(), re.M)
    assert set(kinds) - {"", "console", "python", "text", "sh", "toml"} == set()
    assert kinds.count("console") == len(CONSOLE.findall(path.read_text()))


def test_every_command_that_is_only_listed_is_executed_elsewhere():
    pages = [page.read_text() for page in PAGES]
    executed = [command for page in pages for command in re.findall(r"^\$ (jaxllm .*)$", page, re.M)]
    executed = [re.sub(r" --(explain|plot) \S+", "", command) for command in executed]
    listed = [line for page in pages for block in re.findall(r"```sh\n(.*?)```", page, re.S) for line in block.splitlines()]
    assert [line for line in listed if line.startswith("jaxllm ") and line not in executed] == []


def test_toml_in_a_page_is_the_example_that_is_loaded():
    example = (ROOT / "docs" / "examples" / "four-h100.toml").read_text()
    blocks = [block for page in PAGES for block in re.findall(r"```toml\n(.*?)```", page.read_text(), re.S)]
    assert len(blocks) == 1 and example.endswith(blocks[0])


# ---------------------------------------------------------------- the executor itself


OUTPUT = """\
model     tiny

Memory of one device, in bytes
            closed form  XLA:CPU
  residuals       1,000    1,000 equal
  all-gather/data, 2 times
    payload          10       10 equal

lines     equal
peak      closed form 20,000 (20.0 kB); XLA:CPU 19,000 (19.0 kB); an
          estimate, off by +5.3 %, within the tolerance of 10 %
seconds   compile 1.0
"""


def test_select_keeps_lines_what_is_below_them_and_whole_paragraphs():
    title, heads, residuals, gather, payload = OUTPUT.splitlines()[2:7]
    assert select(OUTPUT, ["all-gather"]).splitlines() == ["...", title, heads, "...", gather, payload, "..."]
    assert select(OUTPUT, ["residuals 1,000"]).splitlines() == ["...", title, heads, residuals, "..."]
    assert select(OUTPUT, ["lines*"]).startswith("...\nlines     equal\npeak ")
    assert select(OUTPUT, ["peak"]).splitlines()[1:3] == OUTPUT.splitlines()[9:11]
    with pytest.raises(AssertionError, match="nothing"):
        select(OUTPUT, ["reduce-scatter"])


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("compile 1.0", "compile 7.5", True),
        ("XLA:CPU 19,000 (19.0 kB)", "XLA:CPU 19,900 (19.9 kB)", True),
        ("XLA:CPU 19,000 (19.0 kB)", "XLA:CPU 29,000 (29.0 kB)", False),
        ("closed form 20,000", "closed form 20,001", False),
        ("1,000 equal", "1,001 equal", False),
        ("10 equal", "10 differs", False),
    ],
)
def test_what_may_differ_and_what_may_not(old, new, same):
    assert old in OUTPUT
    assert (differences(OUTPUT, OUTPUT.replace(old, new)) == []) is same


def test_a_command_that_fails_must_show_its_exit_code(tmp_path):
    session = Session(tmp_path)
    page = "```console\n$ jaxllm models llama-9\n```\n"
    with pytest.raises(AssertionError, match="exit code 2"):
        rendered(page, session)
    told = rendered(page.replace("9\n", "9\n$ echo $?\n"), session)
    assert "unknown name 'llama-9'" in told and "\n2\n```" in told


def test_every_warning_is_on_its_page():
    from jaxllm.hlo.warn import kinds

    rows = re.findall(r"^\| `([a-z0-9-]+)` \|", (ROOT / "docs/inspect.md").read_text(), re.M)
    assert sorted(rows) == list(kinds())
