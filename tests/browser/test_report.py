"""The report of a sweep in Chromium, at the size of a desk and of a phone."""

import pytest

from .conftest import DESKTOP, DOCS, PHONE, watched

REPORT = DOCS / "sweep.html"


@pytest.mark.skipif(not REPORT.exists(), reason="no report was written: foveate sweep ... --html docs/sweep.html")
@pytest.mark.parametrize(("size", "kind"), [(DESKTOP, "desktop"), (PHONE, "phone")], ids=["desktop", "phone"])
def test_the_report_fits_and_asks_nobody(chromium, size, kind):
    with watched(chromium, viewport=size) as page:
        page.goto(REPORT.as_uri())
        page.locator("table").first.wait_for()
        page.wait_for_timeout(500)
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        page.screenshot(path=DOCS / f"report-{kind}.png")
