"""Flower's tabs in a real Chromium, which clicks, types and waits for text as a user does."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from playwright.sync_api import Dialog, Locator, Page, expect

from rlm_tasks import Client, Job
from rlm_tasks.flower.pages import TABS
from tests.browser.conftest import PREFIX
from tests.integration.flowers import USER, Flower, flower
from tests.support import wait_until

UPDATED = re.compile("^Updated ")
ACTING = ("jobs", "pressure", "breakers")
"""Tabs with buttons."""
READABLE = 4.5
"""The contrast of text that WCAG 2.2 requires at level AA."""
THEMES: dict[Literal["light", "dark"], range] = {"light": range(230, 256), "dark": range(40)}
"""Theme -> the allowed values of red, green and blue of a page's background."""


def open_tab(page: Page, tab: str) -> None:
    """Open a page, and wait until it is drawn."""
    page.goto(f"rlm/{tab}")
    expect(page.locator("#rlm-refresh")).to_have_text(UPDATED)


def row_of(page: Page, *texts: str) -> Locator:
    """Return the table row that has all these texts."""
    found = page.locator("#rlm-tables tbody tr")
    for text in texts:
        found = found.filter(has_text=text)
    return found


def table_of(page: Page, title: str) -> Locator:
    return page.get_by_role("region", name=title)


def card_of(page: Page, label: str) -> Locator:
    return page.locator("article", has_text=label).locator(".metric-value")


def short(job: Job) -> str:
    return job.id[:8]


def answer(page: Page, *, yes: bool) -> list[str]:
    """Accept or dismiss the next dialog; return a list that will receive its message."""
    asked: list[str] = []

    def answered(dialog: Dialog) -> None:
        asked.append(dialog.message)
        (dialog.accept if yes else dialog.dismiss)()

    page.once("dialog", answered)
    return asked


# --- navigation -------------------------------------------------------------------------------


def test_flowers_bar_has_our_tabs_and_each_opens_a_page(page: Page) -> None:
    page.goto("workers")
    for title in TABS.values():
        bar = page.get_by_role("navigation", name="Primary navigation")

        bar.get_by_role("link", name=title, exact=True).click()

        expect(page.get_by_role("heading", level=1)).to_have_text(title)
        expect(bar.get_by_role("link", name=title, exact=True)).to_have_attribute(
            "aria-current", "page"
        )
        expect(page.locator("#rlm-refresh")).to_have_text(UPDATED)
        expect(page.locator("#rlm-sentence")).not_to_be_empty()


def test_all_links_and_requests_stay_below_the_prefix(page: Page, platform: Client) -> None:
    job = platform.submit(operation="sum", items=[1, 2])
    job.wait(timeout=20)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))

    open_tab(page, "jobs")
    row_of(page, short(job)).get_by_role("link").click()
    expect(page).to_have_url(re.compile(f"{PREFIX}/rlm/job/{job.id}$"))
    expect(page.locator("#rlm-refresh")).to_have_text(UPDATED)

    links = page.locator("a[href^='/']").evaluate_all(
        "links => links.map((link) => link.getAttribute('href'))"
    )
    assert len(links) > len(TABS)
    assert [link for link in links if not link.startswith(PREFIX)] == []
    assert any(f"{PREFIX}/rlm/job/{job.id}?json=1" in url for url in asked)
    assert [url for url in asked if PREFIX not in url] == []


# --- jobs -------------------------------------------------------------------------------------


def test_the_jobs_page_shows_progress_without_a_reload(
    page: Page, hold: Callable[..., Job], tmp_path: Path
) -> None:
    open_tab(page, "jobs")
    page.evaluate("window.isTheSame = true")
    job = hold(4)

    row = row_of(page, short(job))
    expect(row).to_contain_text("running")
    progress = row.get_by_role("cell", name=re.compile("%$"))
    expect(progress).to_have_text("0%")
    cancel = row.get_by_role("button", name=f"Cancel job {short(job)}")
    cancel.focus()
    (tmp_path / "0").touch()
    expect(progress).to_have_text("25%")
    expect(cancel).to_be_focused()

    (tmp_path / "all").touch()
    expect(row).to_contain_text("succeeded")
    expect(progress).to_have_text("100%")
    expect(cancel).to_have_count(0)
    assert page.evaluate("window.isTheSame") is True


def test_a_jobs_page_shows_reason_failures_receipt_tree_and_events(
    page: Page, platform: Client, normal_again: None
) -> None:
    platform.pressure.force("high")
    wait_until(
        lambda: (
            platform.execute(operation="limited", items=[0], priority="critical", timeout=20).output
            == [80]
        )
    )
    job = platform.submit(
        operation="limited",
        items=range(40),
        priority="critical",
        chunk_size=10,
        continue_on_error=True,
        description="Half of them are odd",
    )
    job.wait(timeout=20)

    open_tab(page, "jobs")
    row_of(page, short(job)).get_by_role("link", name="limited").click()

    expect(page.locator("#rlm-heading")).to_have_text("Half of them are odd")
    expect(page.locator("#rlm-about")).to_have_text(f"limited · critical priority · {job.id}")
    expect(page.locator("#rlm-sentence")).to_contain_text(job.explain())
    expect(table_of(page, "Failures")).to_contain_text(re.compile(r"ValueError.*20.*1, 3, 5,"))
    expect(table_of(page, "Receipt")).to_contain_text(re.compile(r"reduce_entity_limits.*high.*20"))
    expect(table_of(page, "Tree").locator("tbody tr")).to_have_count(len(job.tree()))
    expect(table_of(page, "Tree")).to_contain_text(re.compile(r"root.*0 to 40"))
    expect(table_of(page, "Events")).to_contain_text(re.compile(r"closed.*succeeded"))


def test_a_job_is_cancelled_only_after_confirmation(
    page: Page, hold: Callable[..., Job], tmp_path: Path
) -> None:
    job = hold(3)
    open_tab(page, "jobs")
    row = row_of(page, short(job))
    expect(row).to_contain_text("running")
    sent: list[str] = []
    page.on(
        "request", lambda request: sent.append(request.url) if request.method == "POST" else None
    )

    asked = answer(page, yes=False)
    row.get_by_role("button").click()
    assert asked == [f"Cancel job {job.id} with all of its nodes?"]
    assert sent == []

    answer(page, yes=True)
    row.get_by_role("button").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_text("It is cancelled")).to_be_visible()
    (tmp_path / "all").touch()
    expect(row).to_contain_text("cancelled")
    assert job.status == "cancelled"
    assert len(sent) == 1


def test_a_click_retries_failed_items(page: Page, platform: Client) -> None:
    job = platform.submit(operation="fail_odd", items=[2, 3], continue_on_error=True)
    job.wait(timeout=20)
    open_tab(page, f"job/{job.id}")

    answer(page, yes=True)
    page.get_by_role("button", name="Retry failed items").click()

    toast = page.locator(".toast-body")
    expect(toast).to_have_text(re.compile("^Job [0-9a-f-]+ runs the failed items again$"))
    again = platform.job(str(toast.text_content()).split()[1])
    again.wait(timeout=20)
    assert (again.progress().total, again.progress().failed) == (1, 1)


def test_markup_in_a_description_is_shown_as_text(page: Page, platform: Client) -> None:
    description = "<script>window.isMine = 1</script><img src=x onerror='window.isMine = 2'>&amp;"
    job = platform.submit(operation="sum", items=[1, 2], description=description)
    job.wait(timeout=20)

    open_tab(page, "jobs")
    expect(row_of(page, short(job)).locator(".rlm-note")).to_have_text(description)
    row_of(page, short(job)).get_by_role("link").click()
    expect(page.locator("#rlm-heading")).to_have_text(description)

    assert page.locator("#rlm-page :is(script, img)").count() == 0
    assert page.evaluate("window.isMine") is None


# --- the platform -----------------------------------------------------------------------------


def test_a_button_closes_an_open_breaker(page: Page, platform: Client) -> None:
    platform.create_circuit_breaker("till", failure_threshold=1).open()
    open_tab(page, "breakers")
    row = row_of(page, "till")
    expect(row).to_contain_text("open")

    asked = answer(page, yes=True)
    row.get_by_role("button", name="Close breaker till").click()

    expect(row).to_contain_text("closed")
    expect(row.get_by_role("button")).to_have_count(0)
    assert asked == ["Close breaker till?"]
    assert platform.breakers.status()["till"]["state"] == "closed"


def test_the_limits_page_shows_how_much_of_a_limit_is_used(
    page: Page, platform: Client, tmp_path: Path
) -> None:
    open_tab(page, "limits")
    row = row_of(page, "metered", "requests").first
    expect(row).to_contain_text("0 of 20")

    job = platform.submit(operation="metered", items=range(200), params={"folder": str(tmp_path)})

    expect(row).to_contain_text(re.compile(r"[1-9]\d* of 20"))
    assert float(row.locator(".rlm-bar > span").evaluate("bar => bar.style.width").rstrip("%")) > 0
    job.cancel()
    job.wait(timeout=20)


def test_the_queues_page_counts_waiting_running_and_parked_nodes(
    page: Page, platform: Client, hold: Callable[..., Job], tmp_path: Path
) -> None:
    platform.breakers.get("reset-by-hand").open()
    parked = platform.submit(
        operation="stubborn", items=[1], params={"folder": str(tmp_path)}, priority="low"
    )
    wait_until(
        lambda: any(each.queue == "browser.low" and each.parked for each in platform.at_work())
    )
    running = [hold(1, priority="critical") for _ in range(2)]
    wait_until(lambda: all(each.status == "running" for each in running))
    for _ in range(3):
        hold(1, priority="high")

    open_tab(page, "queues")

    expect(row_of(page, "browser.high").locator("td")).to_contain_text(
        ["browser.high", "3", "", "0", "0", "celery@"]
    )
    expect(row_of(page, "browser.critical").locator("td").nth(4)).to_have_text("2")
    expect(row_of(page, "browser.low").locator("td").nth(3)).to_have_text("1")
    parked.cancel()


def test_the_pressure_page_draws_levels_and_starts_a_drill(
    page: Page, platform: Client, normal_again: None
) -> None:
    platform.pressure.release()
    open_tab(page, "pressure")
    chart = page.get_by_role("img", name="Level over time")
    expect(chart.locator("text")).to_contain_text(
        ["normal", "elevated", "high", "critical", "emergency"]
    )
    drawn = chart.locator("path").get_attribute("d") or ""
    expect(chart.locator("path")).not_to_have_attribute("d", drawn)

    asked = answer(page, yes=True)
    page.get_by_role("button", name="Drill: critical").click()

    expect(card_of(page, "Level")).to_have_text("critical")
    expect(page.locator("#rlm-sentence")).to_contain_text("it is forced")
    expect(chart.locator(".rlm-drill")).to_have_count(1)
    assert asked == ["Make all workers act on critical for 10 minutes?"]
    assert platform.status().forced == "critical"

    page.get_by_role("button", name="End the drill").click()
    expect(page.locator("#rlm-sentence")).not_to_contain_text("it is forced")
    expect(chart.locator(".rlm-drill")).to_have_count(0)
    assert platform.status().forced == ""


# --- accessibility ----------------------------------------------------------------------------

LOW_CONTRAST_TEXTS = """
(least) => {
    const parts = (colour) => (colour.match(/[\\d.]+/g) || []).map(Number);
    const over = ([r, g, b, a = 1], below) =>
        [r, g, b].map((each, i) => each * a + below[i] * (1 - a));
    const ground = (element) => {
        const own = element && parts(getComputedStyle(element).backgroundColor);
        return !element ? [255, 255, 255]
            : own[3] === 0 ? ground(element.parentElement)
            : over(own, ground(element.parentElement));
    };
    const light = (colour) => colour.map((each) => each / 255)
        .map((each) => each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4)
        .reduce((sum, each, i) => sum + each * [0.2126, 0.7152, 0.0722][i], 0);
    const contrast = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const hasText = (element) => [...element.childNodes].some(
        (node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
    const texts = [...document.querySelectorAll("#rlm-page *")].filter(
        (element) => element.checkVisibility() && hasText(element));
    return texts.map((element) => {
        const below = ground(element), style = getComputedStyle(element);
        const colour = element.namespaceURI.endsWith("svg") ? style.fill : style.color;
        const ratio = contrast(light(over(parts(colour), below)), light(below));
        return [element.textContent.slice(0, 40), ratio];
    }).filter(([, ratio]) => ratio < least);
}
"""
"""JavaScript: returns the visible texts, and their contrast, below a minimum of contrast."""


@pytest.fixture(scope="module")
def example_jobs(platform: Client) -> Job:
    """Create a job, or a state, of each kind; return the job with failures and a tree."""
    ended = [
        platform.submit(
            operation="limited", items=range(60), continue_on_error=True, chunk_size=10
        ),
        platform.submit(operation="fail_odd", items=[1]),
        platform.submit(
            operation="sum", items=[1], description="a short job with a long description " * 4
        ),
    ]
    for job in ended:
        job.wait(timeout=20)
    platform.create_circuit_breaker("post", failure_threshold=1).open()
    platform.create_circuit_breaker("bank", failure_threshold=1).half_open()
    return ended[0]


def test_text_is_readable_in_both_themes(
    open_page: Callable[..., Page], example_jobs: Job, hold: Callable[..., Job]
) -> None:
    page, running = open_page(reduced_motion="reduce"), hold(1)
    wait_until(lambda: running.status == "running")
    for tab in (*TABS, f"job/{example_jobs.id}"):
        open_tab(page, tab)
        for theme, ground in THEMES.items():
            page.emulate_media(color_scheme=theme)
            expect(page.locator("html")).to_have_attribute("data-bs-theme", theme)

            colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert all(int(each) in ground for each in re.findall(r"\d+", colour)), colour
            assert page.evaluate(LOW_CONTRAST_TEXTS, READABLE) == [], (tab, theme)


def test_a_narrow_screen_shows_all_pages_without_scrolling_sideways(
    open_page: Callable[..., Page], example_jobs: Job
) -> None:
    page = open_page(viewport={"width": 390, "height": 800})
    for tab in (*TABS, f"job/{example_jobs.id}"):
        open_tab(page, tab)
        assert page.evaluate("document.documentElement.scrollWidth") == 390, tab

    open_tab(page, "pressure")
    chart = page.get_by_role("img", name="Level over time")
    boxes = [each.bounding_box() for each in (chart, chart.locator("text").last)]
    assert [each for each in boxes if not each or each["x"] + each["width"] > 390] == [], (
        "the chart fits the screen"
    )
    assert (
        chart.locator("text").last.evaluate("text => text.getBoundingClientRect().height") > 10
    ), "the chart's text is as large as other text"


def test_every_button_has_a_unique_name(
    page: Page, example_jobs: Job, hold: Callable[..., Job]
) -> None:
    hold(1)
    hold(1)
    for tab in (*ACTING, f"job/{example_jobs.id}"):
        open_tab(page, tab)
        for button in page.get_by_role("button").all():
            expect(button).to_have_accessible_name(re.compile(r"\w"))
        names = [
            each.get_attribute("aria-label") or each.text_content()
            for each in page.locator("#rlm-page button").all()
        ]
        assert names, tab
        assert len(set(names)) == len(names), tab


# --- login and permissions --------------------------------------------------------------------


def test_without_a_login_every_page_is_refused(
    open_page: Callable[..., Page], flower_site: Flower
) -> None:
    stranger = open_page(http_credentials=None).context.request
    for path in (*(f"rlm/{tab}" for tab in TABS), "rlm/jobs?json=1", "rlm/job/nothing"):
        assert stranger.get(path).status == 401
    assert stranger.post("rlm/do/force", form={"level": "critical"}).status == 401
    assert stranger.get("rlm/jobs", headers={"Authorization": "Basic bm90Om1l"}).status == 401


@pytest.mark.parametrize(
    ("options", "status", "hint"),
    [
        ((), 401, "start Flower with --basic_auth"),
        ((f"--basic_auth={USER}", "--read_only"), 403, "This Flower is read-only."),
    ],
    ids=["no login", "read-only"],
)
def test_a_read_only_user_has_no_buttons_and_cannot_act(
    open_page: Callable[..., Page],
    platform: Client,
    environment: dict[str, str],
    example_jobs: Job,
    logs: Path,
    hold: Callable[..., Job],
    options: tuple[str, ...],
    status: int,
    hint: str,
) -> None:
    job = hold(1)
    wait_until(lambda: job.status == "running")
    with flower(environment, logs / "flower-read-only.log", *options) as own:
        page = open_page(own.url)
        for tab in (*ACTING, f"job/{job.id}"):
            open_tab(page, tab)
            expect(page.get_by_text(hint)).to_be_visible()
            expect(page.locator("#rlm-page button")).to_have_count(0)
        expect(page.get_by_text("running", exact=True).first).to_be_visible()

        refused: dict[str, Any] = {
            "cancel": {"job": job.id},
            "reset": {"breaker": "post"},
            "force": {"level": "critical"},
        }
        answers = [
            page.request.post(f"rlm/do/{name}", form=about).status
            for name, about in refused.items()
        ]

    assert answers == [status] * len(refused)
    assert job.status == "running"
    assert platform.breakers.status()["post"]["state"] == "open"
    assert platform.status().forced == "normal"
