"""The page in a real browser: plots have their points, nothing leaves the file, nothing of a user runs."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from raylora.config.schema import SearchConfig
from raylora.report.page import write_report
from raylora.run.directory import RunDirectory
from tests.helpers import history_of
from tests.report.browser import Browser, browser, needs_chromium
from tests.report.runs import EVENTS, HOSTILE, SPACE, make_checked_run, make_run


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def run(make_config: Callable[..., SearchConfig], tmp_path: Path) -> RunDirectory:
    made = make_checked_run(tmp_path / "run", make_config(space=SPACE))
    write_report(made)
    return made


@needs_chromium
def test_the_page_draws_every_point_and_the_console_stays_empty(chromium: Browser, run: RunDirectory) -> None:
    chromium.open(run.page_file)
    assert chromium.console() == []
    marks = "figure.querySelectorAll('.mark-symbol.role-mark path, .mark-rect.role-mark path').length"
    figures = chromium.run(
        f"return Object.fromEntries([...document.querySelectorAll('figure')].map(figure => [figure.id, {marks}]))"
    )
    assert figures["curves"] == 5  # two finished trials at two rungs, and a stopped one at the first
    assert (figures["rate9"], figures["rate3"]) == (2, 3)
    assert (figures["rank9"], figures["rank3"]) == (4, 5)  # the same trials, and a median for each of two ranks
    assert figures["ways"] == 3 * 4  # three trials on the axes of r, lora_alpha, learning rate and loss
    assert (figures["kept"], figures["candidates"]) == (6, 2)
    assert figures["scores"] == 3 * 4  # three models, four scores
    expected = chromium.run(
        "return Object.fromEntries([...document.querySelectorAll('figure')].map(one => [one.id, +one.dataset.points]))"
    )
    assert figures == expected


@needs_chromium
def test_nothing_leaves_the_file(chromium: Browser, run: RunDirectory) -> None:
    chromium.open(run.page_file)
    assert chromium.requests() == []


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_down_only(chromium: Browser, run: RunDirectory, scheme: str) -> None:
    chromium.open(run.page_file, width=390, scheme=scheme)
    assert chromium.run("return document.documentElement.scrollWidth") == 390
    paper = chromium.run("return getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}[scheme]


@needs_chromium
def test_what_users_wrote_stays_text(chromium: Browser, run: RunDirectory) -> None:
    chromium.open(run.page_file)
    assert chromium.run("return document.images.length") == 0
    assert chromium.run("return document.scripts.length") == 3  # specifications, library, ours
    assert chromium.console() == []  # an alert, or a script that the policy stopped, would be there
    assert HOSTILE in chromium.run("return document.body.textContent")  # a prompt, a reason and an answer


def test_no_tag_of_a_user_is_in_the_file(run: RunDirectory) -> None:
    page, library = run.page_file.read_text().split("BSD 3-Clause")  # Vega's own code names tags
    assert "<img" not in page
    assert "<script>alert" not in page
    assert (page.count("</script>"), library.count("</script>")) == (1, 2)
    assert "{{ 7 * 7 }}" in page  # and no template in a text is rendered


@needs_chromium
def test_a_search_in_which_all_trials_failed_has_a_page(
    chromium: Browser, make_config: Callable[..., SearchConfig], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", make_config(space=SPACE), [*EVENTS[:2], *history_of(0, {}, "failed")])
    write_report(run)
    chromium.open(run.page_file)
    assert chromium.console() == []
    assert "No trial has reached the full budget of 9 steps yet (1 failed)." in chromium.run(
        "return document.body.innerText"
    )


@needs_chromium
def test_a_search_that_still_runs_has_a_page_that_says_so(
    chromium: Browser, make_config: Callable[..., SearchConfig], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", make_config(space=SPACE), EVENTS[:11])  # the second trial has just reported
    write_report(run)
    chromium.open(run.page_file)
    assert chromium.console() == []
    text = chromium.run("return document.body.innerText")
    assert "This search is not done: 1 of 3 trials have ended." in text
    assert "Of 2 trials, trial 0 leads" in text
    assert "The best adapter is not merged yet." in text
    assert "The held-out check has not run yet." in text
